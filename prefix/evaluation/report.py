"""An evaluation as text for a terminal, as JSON, as a table of outputs, as an HTML page.

Tables and remarks are made once, and each form only lays them out. A table is (title, lines of cells): its first line
is the head, its first column the names. The page is one file that loads nothing, and its policy forbids loading.
"""

import json
import re
from collections import Counter
from dataclasses import asdict
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from prefix.evaluation.few_shot import FORMS
from prefix.evaluation.metrics import RESAMPLES

ENOUGH = 100  # sentences for a verdict
LABELS = 5  # sentences to one reference, from which on they seem to be labels
REFERENCES_SHOWN = 3  # of a sentence
CLASSES_SHOWN = 12  # a larger confusion matrix is for JSON and the page
PIECES = re.compile(r"\w+['’]?|\s+|[^\w\s]+")  # words, spaces, runs of punctuation
SHADE = 0.65  # opacity of the darkest cell: light enough to read its number, by day and by night
PAGE = Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>$title</title><style>
:root { color-scheme: light dark }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0 }
caption { text-align: left; font-weight: 600 }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; font-weight: 400 }
th:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0 1rem }
dd { margin: 0; overflow-wrap: anywhere }
ins { background: #4a44 }
del { background: #d444 }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")


def tables(result):
    """[(title, lines)] of one direction: the scores and counts, then each system's confusion matrix if there is one."""
    n = len(result.sources)
    found = [(f"{result.source} -> {result.target}, {n} sentence{'s' * (n != 1)}", score_lines(result))]
    for system in result.systems:
        if system.confusion:
            counts = [[label, *map(str, answers)] for label, answers in zip(result.classes, system.confusion)]
            found.append((f"{system.name}: labels (rows) and answers (columns)", [["", *result.classes], *counts]))
    return found


def score_lines(result):
    """Each score and count: its name, the prefix, the mean of the draws, the ratio of scores where these are many."""
    lines = [["", *(system.name for system in result.systems), *["ratio"] * bool(result.draws)]]
    for name, value in (result.prefix.scores | result.prefix.counts).items():
        values = [(draw.scores | draw.counts)[name] for draw in result.draws]
        number = lambda x: f"{x:.{0 if isinstance(value, int) else 2}f}"
        line = [name, number(value)]
        if values:
            mean = np.mean(values)
            line += [number(mean), ""]
            if name in result.signatures:
                line[2] += f" ± {np.std(values):.1f}" * (len(values) > 1)
                line[3] = "" if mean < 0.1 else f"{value / mean:.1f}x" if len(result.sources) >= ENOUGH else "-"
        if not name.startswith("sources") or any([value, *values]):
            lines.append(line)
    return lines


def remarks(result):
    """The rest that there is to say of one direction, in sentences."""
    said, n, count = [], len(result.references), Counter(text for refs in result.references for text in dict.fromkeys(refs))
    if result.classes:
        label, most = count.most_common(1)[0]
        said.append(f"each answer is the likeliest choice of {len(result.choices)}")
        said.append(f"always answering {label!r} would have accuracy {100 * most / n:.2f}")
    elif n >= LABELS * len(count):
        score = f"--metrics {result.target}=accuracy scores them as such"
        said.append(f"{n} references, {len(count)} different: labels? {score}")
    if result.draws:
        said.append(f"prefix minus the median draw (95 % of {RESAMPLES:,} resamples): {difference(result)}")
        tried = ", ".join(f"{form} {value:.1f}" for form, value in result.form_log_p.items()) or "no pair fits"
        prompts = f"{result.systems[1].name} prompts are {FORMS[result.form]}"
        said.append(f"{prompts} (mean log p of other training targets: {tried})")
    return said


def difference(result):
    """The paired bootstrap of each metric, and the verdict or why there is none."""
    parts, enough = [], len(result.sources) >= ENOUGH
    for name, found in result.difference.items():
        low, high = found["interval"]
        said = f"{found['delta']:+.2f} {name} ({low:+.2f} to {high:+.2f})"
        verdict = "significant" if found["p"] < 0.05 else "not significant"
        parts.append(f"{said}, {verdict} (p = {found['p']:.3f})" if enough else said)
    if not enough:
        parts.append(f"no verdict on fewer than {ENOUGH} sentences")
    return "; ".join(parts)


def signatures(results):
    """Each metric with its signature; where directions differ in it, each."""
    return dict.fromkeys(f"{label} {text}" for result in results for label, text in result.signatures.items())


def side_by_side(result, n):
    """Of each of the first n sentences [(name, text)]: the source, the references, the outputs of the systems."""
    for i, (source, references) in enumerate(zip(result.sources[:n], result.references)):
        outputs = [(system.name, system.outputs[i]) for system in reversed(result.systems)]
        yield [(result.source, source), *(("reference", text) for text in references[:REFERENCES_SHOWN]), *outputs]


def spelled(value):
    """A setting as text, without the name of the home folder."""
    texts, home = map(str, value if isinstance(value, list) else [value]), f"{Path.home()}/"
    return " ".join(f"~/{text.removeprefix(home)}" if text.startswith(home) else text for text in texts)


def aligned(lines):
    """A table's lines as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    cells = [[first.ljust(widths[0]), *map(str.rjust, others, widths[1:])] for first, *others in lines]
    return [f"  {'  '.join(line)}".rstrip() for line in cells]


def to_text(settings, results):
    shown = []
    for result in results:
        for heading, lines in tables(result):
            shown += [heading, *(aligned(lines) if len(lines) <= CLASSES_SHOWN + 1 else [])]
        shown += [*(f"  {said}" for said in remarks(result)), ""]
        for sentence in side_by_side(result, settings["examples"]):
            shown += [*(f"  {name:>10}  {text}" for name, text in sentence), ""]
    names = "prefix", "data", "split", "beam", "shots", "draws"
    shown.append(", ".join(f"{name} {spelled(settings[name])}" for name in names))
    return "\n".join([*shown, "   ".join(signatures(results))])


def to_json(settings, results):
    directions = [asdict(result) | {"table": score_lines(result)} for result in results]
    return json.dumps({"settings": settings, "directions": directions}, indent=1, ensure_ascii=False) + "\n"


def to_tsv(settings, results):
    """Source, reference, prefix and the median k-shot draw of every sentence, one a line, then the direction's ends.
    Tabs within a text are spaces; several references are joined by " ||| "."""
    lines = [["source", "reference", "prefix", "k-shot", "from", "to"]]
    for result in results:
        prefix, shots, *_ = [system.outputs for system in result.systems] + [[""] * len(result.sources)]
        for source, references, *outputs in zip(result.sources, result.references, prefix, shots):
            lines.append([source, " ||| ".join(references), *outputs, result.source, result.target])
    return "".join("\t".join(cell.replace("\t", " ") for cell in line) + "\n" for line in lines)


def to_html(settings, results):
    told = f"One frozen model, {spelled(settings['model'])} (weights {settings['base']}), the same sentences"
    parts = [f"<p>{escape(told)}. {settings['date']}</p>"]
    for result in results:
        parts += [html_table(heading, lines) for heading, lines in tables(result)]
        parts += [f"<p>{escape(said)}</p>" for said in remarks(result)]
    marks = "<ins>underlined</ins> words are not in the reference, <del>struck</del> ones are missing"
    parts.append(f"<h2>Examples</h2><p>The first sentences of each direction: {marks}.</p>")
    for result in results:
        for sentence, references in zip(side_by_side(result, settings["examples"]), result.references):
            n = len(sentence) - len(result.systems)  # the outputs come last
            texts = [(name, escape(text)) for name, text in sentence[:n]]
            parts.append(html_list(texts + [(name, marked(text, references)) for name, text in sentence[n:]]))
    if attention := results[0].attention:
        most = max(float(cell) for _, lines in attention for _, *cells in lines[1:] for cell in cells)
        parts.append(f"<h2>Attention of the first sentence</h2><p>In %; the darkest cells are {most:.0f} %.</p>")
        parts += [html_table(heading, lines, most) for heading, lines in attention]
    given = {name: value for name, value in settings.items() if value is not None and value is not False}
    parts.append(f"<h2>Settings</h2>{html_list((name, escape(spelled(value))) for name, value in given.items())}")
    parts.append(f"<h2>Signatures</h2><p>{'<br>'.join(map(escape, signatures(results)))}</p>")
    ends = ", ".join(f"{result.source} → {result.target}" for result in results)
    heading = f"Prefix{' against k-shot prompting' * bool(results[0].draws)}: {ends}"
    return PAGE.substitute(title=escape(heading), body="\n".join(parts))


def html_table(heading, lines, most=0):
    """most: the number in the darkest cells; 0: no shades."""
    shade = lambda cell: f' style="background: rgb(59 130 196 / {SHADE * float(cell) / most:.2f})"' if most else ""
    tags = lambda cells: "".join(f"<td{shade(cell)}>{escape(cell)}</td>" for cell in cells)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join(f"<tr><th>{escape(name)}</th>{tags(cells)}</tr>" for name, *cells in lines[1:])
    return f"<table><caption>{escape(heading)}</caption><tr>{head}</tr>{body}</table>"


def html_list(items):
    """items: (name, HTML)."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{html}</dd>' for name, html in items)}</dl>"


def marked(output, references):
    """An output as HTML, its differences from the nearest reference marked."""
    compared = [SequenceMatcher(None, *map(PIECES.findall, (ref, output)), autojunk=False) for ref in references]
    nearest, html = max(compared, key=SequenceMatcher.ratio), ""
    for kind, a, b, c, d in nearest.get_opcodes():
        missing, written = escape("".join(nearest.a[a:b])), escape("".join(nearest.b[c:d]))
        changed = f"<del>{missing}</del>" * (b > a) + f"<ins>{written}</ins>" * (d > c)
        html += written if kind == "equal" else changed
    return html
