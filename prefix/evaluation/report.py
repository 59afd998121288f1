"""What an evaluation came to: the terminal's text, JSON, a table of outputs, an HTML page.

Every form shows the same compare.Evaluation, and its tables and sentences are put into words here once. The page is one
HTML file that loads nothing: no script, no font, no picture from elsewhere, and a policy that forbids them. All text is
escaped. An output is compared with its reference word by word (difflib): words that the reference does not have are
underlined, words that the output lacks are struck through.
"""

import json
import re
from dataclasses import asdict
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from prefix.evaluation import metrics
from prefix.evaluation.attention_maps import most_of, panels

REFERENCES_SHOWN = 3  # of a sentence that has more
LABELS_SHOWN = 12  # a larger confusion matrix is left to JSON and the page
SHADES = 10
WORD = re.compile(r"\s*(?:\w+['’]?|[^\w\s]+)")  # or a run of punctuation, each with the space before it
BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")

CELL, SHADE = "59 130 196", 0.65  # colour and opacity of the darkest cell: light enough to read its number
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --soft: #5c5c5c; --rule: #d8d8d8; --more: #dcefdc;
  --less: #f6dfdd }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e8e8; --soft: #a9a9a9; --rule: #3a3d42;
  --more: #1f4427; --less: #552a28 } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
h3, caption { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .25rem; text-align: left }
p { margin: .25rem 0 .75rem; max-width: 48rem }
.soft, dt { color: var(--soft) }
.wide { overflow-x: auto; margin: 0 0 .75rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child { text-align: left }
thead th { font-weight: 400; color: var(--soft) }
.shaded td { padding: .1rem .3rem; border: 1px solid var(--paper) }
.shaded thead th { padding: .3rem; writing-mode: vertical-rl; white-space: nowrap }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr); gap: .15rem 1rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
.example { padding: .6rem 0; border-bottom: 1px solid var(--rule) }
ins { background: var(--more); text-decoration: underline; text-underline-offset: .2em }
del { background: var(--less); text-decoration: line-through }
""" + "".join(f".s{i} {{ background: rgb({CELL} / {SHADE * i / (SHADES - 1):.3f}) }}\n" for i in range(SHADES))


# The same in every form


def title(result):
    n = len(result.sources)
    return f"{result.source} -> {result.target}, {n} sentence{'s' * (n != 1)}"


def score_table(result):
    """One direction's numbers, as rows of cells: the head, then a row for each score and count. The last column is the
    prefix's score over the mean of the draws."""
    few, rows = result.few_shot, []
    for name, value in result.prefix.numbers().items():
        mean, scored, digits = few.mean[name] if few else 0, name in result.metrics, 0 if isinstance(value, int) else 2
        if name == "sources cut" and value == mean == 0:
            continue
        row = [result.metrics.get(name, name), f"{value:.{digits}f}"]
        if few:
            row.append(f"{mean:.{digits}f}" + (f" ± {few.spread[name]:.1f}" if scored else ""))
            row.append(f"{value / mean:.1f}x" if scored and mean >= 0.1 else "")
        rows.append(row)
    return [["", "prefix", *([f"{few.shots}-shot", "ratio"] if few else [])], *rows]


def remarks(result):
    """What else there is to say of one direction, in words."""
    said, few = [], result.few_shot
    if result.commonest:
        said.append(f"always answering {result.commonest[0]!r} would have accuracy {result.commonest[1]:.2f}")
    if few:
        said.append(f"prefix minus the median draw (95 % of {metrics.RESAMPLES:,} resamples): {difference(result)}")
        forms = {"names": "lines that begin with the columns' names", "lines": "bare lines"}
        tried = ", ".join(f"{form} {value:.1f}" for form, value in few.form_log_p.items()) or "no training pair to try"
        said.append(f"{few.shots}-shot prompts are {forms[few.form]} (mean log p of other training targets: {tried})")
    return said


def difference(result):
    """What metrics.paired_bootstrap found, for each metric, and the verdict or why there is none."""
    parts, judged = [], len(result.sources) >= metrics.ENOUGH
    for name, found in result.few_shot.difference.items():
        low, high = found["interval"]
        verdict = f", {metrics.verdict(found['p'])}" if judged else ""
        parts.append(f"{found['delta']:+.2f} {result.metrics[name]} ({low:+.2f} to {high:+.2f}){verdict}")
    return "; ".join(parts + [f"no verdict on fewer than {metrics.ENOUGH} sentences"] * (not judged))


def confusions(result):
    """[(system, rows of cells)]: of each system, how often each label was answered with each."""
    few = result.few_shot
    systems = [("prefix", result.prefix)] + ([(f"{few.shots}-shot", few.draws[few.median])] if few else [])
    head = ["", *(result.labels or [])]
    table = lambda system: [head, *([label, *map(str, row)] for label, row in zip(result.labels, system.confusion))]
    return [(name, table(system)) for name, system in systems if system.confusion]


def example(result, i):
    """Sentence number i: [(what it is, text)], outputs last."""
    references = _list(result.references[i])
    lines = [(result.source, result.sources[i])]
    lines += [("reference", text) for text in references[:REFERENCES_SHOWN]]
    if len(references) > REFERENCES_SHOWN:
        lines.append(("", f"(and {len(references) - REFERENCES_SHOWN} more references)"))
    if few := result.few_shot:
        lines.append((f"{few.shots}-shot", few.draws[few.median].outputs[i]))
    return [*lines, ("prefix", result.prefix.outputs[i])]


def _list(references):
    return [references] if isinstance(references, str) else references


# Text, JSON, TSV


def to_text(evaluation):
    lines, settings = [], evaluation.settings
    for result in evaluation.directions:
        lines += [title(result), *aligned(score_table(result)), *(f"  {said}" for said in remarks(result)), ""]
        for name, rows in confusions(result):
            small = len(rows) - 1 <= LABELS_SHOWN
            lines += [f"  {name}: labels (rows) and answers (columns)", *(aligned(rows) if small else []), ""]
        if settings["show_prompt"] and result.few_shot:
            lines.append(result.few_shot.draws[0].prompt)
        for i in range(min(settings["examples"], len(result.sources))):
            lines += [*(f"  {name:>10}  {text}" for name, text in example(result, i)), ""]
    names = "prefix", "data", "split", "decoding", "shots", "draws"
    lines.append(", ".join(f"{name} {_spelled(settings[name])}" for name in names))
    lines.append("   ".join(f"{label} {signature}" for label, signature in evaluation.directions[0].signatures.items()))
    return "\n".join(lines)


def aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return [f"  {'  '.join(row)}".rstrip() for row in cells]


def to_json(evaluation):
    found = {"settings": evaluation.settings, "directions": list(map(asdict, evaluation.directions))}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def to_tsv(evaluation):
    """Source, reference, prefix and the median k-shot draw of every sentence, one a line, then the direction's ends.
    Tabs and line breaks within a text are spaces; several references are joined by " ||| "."""
    rows = [["source", "reference", "prefix", "k-shot", "from", "to"]]
    for result in evaluation.directions:
        few, references = result.few_shot, (" ||| ".join(_list(refs)) for refs in result.references)
        shots = few.draws[few.median].outputs if few else [""] * len(result.sources)
        ends = [[result.source, result.target]] * len(result.sources)
        rows += [[*row, *end] for *row, end in zip(result.sources, references, result.prefix.outputs, shots, ends)]
    return "".join("\t".join(BREAKS.sub(" ", cell) for cell in row) + "\n" for row in rows)


# The page


def to_html(evaluation):
    settings, results = evaluation.settings, evaluation.directions
    few = results[0].few_shot
    ends = ", ".join(f"{result.source} → {result.target}" for result in results)
    heading = escape(f"Prefix{f' against {few.shots}-shot prompting' if few else ''}: {ends}")
    base = f"One frozen model ({_spelled(settings['model'])}, weights {settings['base']}), the same sentences"
    told = escape(f"{base}, {settings['date']}. Prefix: {_spelled(settings['prefix'])}")
    parts = [f'<h1>{heading}</h1><p class="soft">{told}</p><h2>Scores</h2>']
    for result in results:
        parts += [html_table(title(result).replace("->", "→"), score_table(result))]
        parts += [f"<p>{escape(said)}</p>" for said in remarks(result)]
        parts += [html_table(f"{name}: labels (rows) and answers", rows) for name, rows in confusions(result)]
    if settings["examples"]:
        marks = "<ins>underlined</ins> words are not in it, <del>struck</del> ones are missing."
        parts += [f"<h2>Examples</h2><p>The first sentences of each direction. Against the reference: {marks}</p>"]
        parts += [html_examples(result, settings["examples"]) for result in results]
    if evaluation.attention:
        parts.append(html_attention(evaluation.attention))
    signatures = {label: text for result in results for label, text in result.signatures.items()}
    parts += ["<h2>Settings</h2>", html_list(settings), "<h2>Signatures</h2>", html_list(signatures)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title><style>{STYLE}</style></head><body><main>",
    ]
    return "\n".join([*head, *parts, "</main></body></html>\n"])


def html_table(caption, rows, kind="", shades=None):
    """rows of cells, the first one the head. shades: rows of classes, for the cells beside the first column."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0][1:])
    body = ""
    for i, (name, *cells) in enumerate(rows[1:]):
        classes = [f' class="{shade}"' for shade in shades[i]] if shades else [""] * len(cells)
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, cells))
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        f'<div class="wide {kind}" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def html_examples(result, n):
    parts = [f"<h3>{escape(result.source)} → {escape(result.target)}</h3>"]
    for i in range(min(n, len(result.sources))):
        lines, outputs = example(result, i), 2 if result.few_shot else 1
        texts = [escape(text) for _, text in lines[:-outputs]]
        texts += [marked(text, _list(result.references[i])) for _, text in lines[-outputs:]]
        items = "".join(f'<dt>{escape(name)}</dt><dd dir="auto">{text}</dd>' for (name, _), text in zip(lines, texts))
        parts.append(f'<dl class="example">{items}</dl>')
    return "\n".join(parts)


def marked(output, references):
    """An output as HTML, its differences from the reference that is nearest to it marked."""
    if not output:
        return '<span class="soft">(empty)</span>'
    found = WORD.findall(output)
    wanted, matcher = max((_compared(text, found) for text in references), key=lambda pair: pair[1].ratio())
    html = ""
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            html = _followed(html, found[c:d])
        else:
            html = _followed(_followed(html, wanted[a:b], "del"), found[c:d], "ins")
    return html


def _followed(html, words, tag=None):
    """`html`, then these words in this tag. A space comes between if the words have one, or if a <del> needs one."""
    text = "".join(words)
    if not text:
        return html
    apart = html and (text[0].isspace() or (html.endswith("</del>") and text[0].isalnum()))
    text = escape(text.lstrip())
    return html + " " * bool(apart) + (f"<{tag}>{text}</{tag}>" if tag else text)


def _compared(reference, found):
    """The words of a reference, and what difflib says of them and of the words `found`."""
    wanted = WORD.findall(reference)
    bare = [[word.strip() for word in words] for words in (wanted, found)]
    return wanted, SequenceMatcher(None, *bare, autojunk=False)


def html_attention(attention):
    """The shares of attention_maps as tables of shaded cells."""
    drawn = panels(attention)
    most, shades = most_of(drawn), range(SHADES)
    legend = "".join(f'<td class="s{i}">{100 * most * i / (SHADES - 1):.0f}</td>' for i in shades)
    parts = [
        "<h2>Attention to the slots</h2><p>Of the first sentence that has a translation, in %, over the tokens at which"
        " a bank is open: by head, the mean of these tokens; by token, the mean of the heads. The rest is on text.</p>"
        f'<div class="wide shaded"><table><caption>Shades, in %</caption><tbody><tr>{legend}</tr></tbody></table></div>'
    ]
    for panel in drawn:
        values = panel.values.tolist()
        rows = [
            ["", *panel.columns],
            *([name, *(f"{100 * x:.0f}" for x in row)] for name, row in zip(panel.rows, values)),
        ]
        levels = [[f"s{round((SHADES - 1) * x / most)}" for x in row] for row in values]
        parts.append(html_table(panel.title, rows, "shaded", levels))
    return "\n".join(parts)


def html_list(values):
    """{name: value} as a list of both, without what is None or False."""
    given = [(name, value) for name, value in values.items() if value is not None and value is not False]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_spelled(value))}</dd>" for name, value in given)
    return f"<dl>{items}</dl>"


def _spelled(value):
    """A value as text, without the name of the home folder."""
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace(str(Path.home()), "~")
