"""What a run and an evaluation came to, to look at: loss.png beside metrics.jsonl, and evaluate.py's --report page.

The page is one HTML file that loads nothing: no script, no font, no picture from elsewhere, and a policy that forbids
them. All text is escaped. An output is held against its reference word by word (difflib): words that the reference does
not have are underlined, words that it has and the output lacks are struck through.
"""

import json
import re
from difflib import SequenceMatcher
from html import escape

from minigpt.files import replacing
from prefix.distributed import log
from prefix.evaluation import attention_maps
from prefix.evaluation import compare as evaluation

SMOOTHED = 20  # steps whose mean is the loss curve's thick line
WORD = re.compile(r"\s*(?:\w+['’]?|[^\w\s]+)")  # or a run of punctuation, each with the space before it

COUNTS = ("empty", "cut")

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
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child { text-align: left }
thead th { font-weight: 400; color: var(--soft) }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr); gap: .15rem 1rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
.example { padding: .6rem 0; border-bottom: 1px solid var(--rule) }
ins { background: var(--more); text-decoration: underline; text-underline-offset: .2em }
del { background: var(--less); text-decoration: line-through }
pre { font-size: .8rem; line-height: 1.4; overflow-x: auto }
figure { margin: 0 }
"""


# The page


def write_page(path, *content):
    """page(*content) as the file `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(page(*content), encoding="utf-8", errors="replace")


def page(reports, shots, n_examples, settings, signatures, attention=None):
    """The whole page as a string. reports: of evaluation.compare; settings, signatures: {name: value};
    attention: an attention_maps.Attention of the first direction, or None."""
    directions = ", ".join(f"{report['source']} → {report['target']}" for report in reports)
    against = f" against {shots}-shot prompting" if reports[0]["few_shot"] else ""
    title = escape(f"Prefix{against}: {directions}")
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="soft">One frozen model, the same sentences. Prefix: {escape(_spelled(settings["prefix"]))}</p>',
        "<h2>Scores</h2>",
        *(scores(report, shots) for report in reports),
    ]
    if n_examples:
        parts += [
            "<h2>Examples</h2><p>The first sentences of each direction. Against the reference: <ins>underlined</ins>"
            " words are not in it, <del>struck</del> ones are missing.</p>",
            *(examples(report, shots, n_examples) for report in reports),
        ]
    if attention:
        parts.append(attention_section(attention))
    parts += ["<h2>Settings</h2>", listed(settings)]
    if "bleu" in evaluation.scores_of(reports[0]):
        parts += ["<h2>Signatures</h2>", listed(signatures)]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>",
    ]
    return "\n".join([*head, *parts, "</main></body></html>\n"])


def scores(report, shots):
    """One direction's table and what it says."""
    n, few = report["sentences"], report["few_shot"]
    title = escape(f"{report['source']} → {report['target']}, {n} sentence{'s' * (n != 1)}")
    columns = [*evaluation.scores_of(report), *COUNTS, "seconds"]
    head = "".join(f'<th scope="col">{escape(evaluation.SCORES.get(name, name))}</th>' for name in columns)
    rows = [_row("prefix", columns, report["prefix"])]
    if few:
        rows.append(_row(f"{shots}-shot", columns, few["mean"], few["spread"]))
    said = f"<p>{escape(evaluation.difference(report))}</p>" if few else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{said}"
    )


def _row(name, columns, score, spread=None):
    def cell(column):
        if column in COUNTS:
            return f"{score[column]:.0f}"
        return f"{score[column]:.2f} ± {spread[column]:.1f}" if spread else f"{score[column]:.2f}"

    cells = "".join(f"<td>{cell(column)}</td>" for column in columns)
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def examples(report, shots, n):
    parts = [f"<h3>{escape(report['source'])} → {escape(report['target'])}</h3>"]
    for i in range(min(n, report["sentences"])):
        references = report["references"][i]
        references = [references] if isinstance(references, str) else references
        lines = [(report["source"], escape(report["sources"][i]))]
        lines += [("reference", escape(text)) for text in references]
        if report["few_shot"]:
            lines.append((f"{shots}-shot", marked(report["few_shot"]["outputs"][0][i], references)))
        lines.append(("prefix", marked(report["outputs"][i], references)))
        items = "".join(f'<dt>{escape(name)}</dt><dd dir="auto">{text}</dd>' for name, text in lines)
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


def attention_section(attention):
    """The pictures of prefix.evaluation.attention_maps, and the same as text."""
    panels = attention_maps.panels(attention)
    most = attention_maps.most_of(panels)
    parts = [
        "<h2>Attention to the slots</h2>",
        "<p>Of the first sentence that has a translation, over the tokens at which a bank is open: by head, the mean of"
        " these tokens; by token, the mean of the heads. What is on no bank is on the text.</p>",
        attention_maps.STYLE,
    ]
    for panel in panels:
        title, (drawing, _, _) = escape(panel.title), attention_maps.svg_panel(panel, most)
        parts.append(f'<figure class="wide" tabindex="0" aria-label="{title}">{drawing}</figure>')
    text = escape("\n".join(attention_maps.mass_lines(attention)))
    return "\n".join([*parts, f'<details><summary>As text</summary><pre tabindex="0">{text}</pre></details>'])


def listed(values):
    """{name: value} as a list of both, without what is None or False."""
    given = [(name, value) for name, value in values.items() if value is not None and value is not False]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_spelled(value))}</dd>" for name, value in given)
    return f"<dl>{items}</dl>"


def _spelled(value):
    return "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# The loss curve


def draw_loss(run):
    """Write loss.png beside the metrics.jsonl of a run directory, where matplotlib is installed. Raises nothing: no run
    shall fail for a picture."""
    try:
        from matplotlib.figure import (
            Figure,  # an optional extra, and slow to import: not before the end of a run
        )
    except ImportError:
        return
    try:
        with open(run / "metrics.jsonl", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        figure = Figure(figsize=(7, 4), layout="constrained")
        _draw_curves(figure.subplots(), lines)
        with replacing(run / "loss.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except Exception as error:
        log(f"{run / 'loss.png'}: not drawn: {error}")


def _draw_curves(axes, lines):
    trained = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validated = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    last = [losses[max(0, i - SMOOTHED) : i] for i in range(1, len(losses) + 1)]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
    axes.plot(steps, [sum(near) / len(near) for near in last], color="tab:blue", label=f"mean of {SMOOTHED} steps")
    if validated:
        axes.plot(*zip(*validated), "o", color="tab:orange", label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.legend()
