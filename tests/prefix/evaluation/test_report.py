"""One evaluation in every form that it is shown in, and a run's loss.png."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefix.evaluation import attention_maps, report
from prefix.evaluation.attention_maps import Attention
from prefix.evaluation.compare import Evaluation, FewShot, Result, System

NAMES = ["chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome"]
PLAYWRIGHT = Path.home() / ".cache/ms-playwright"
FETCHED = [path for name in ("chrome", "headless_shell") for path in PLAYWRIGHT.glob(f"*/chrome-linux*/{name}")]
CHROMIUM = next(filter(None, map(shutil.which, [*NAMES, *FETCHED])), None)
ATTACK = "<script>document.title='taken'</script><img src=x onerror=alert(1)> & \"q\" 'q'"
SETTINGS = {
    "prefix": [f"{Path.home()}/runs/x"],
    "model": "gpt2",
    "base": "0a1b",
    "date": "2026-01-02 03:04",
    "data": ["en-fr.csv"],
}
SETTINGS |= {"split": "test", "decoding": "greedy", "shots": 1, "draws": 2, "examples": 2, "show_prompt": False}
SETTINGS |= {"weights": None, "seed": 7}


def result(n=3, **fields):
    """fr -> en on n sentences, the prefix beside two draws of one shot."""
    system = lambda word, bleu: System(
        [f"{word} {i}" for i in range(n)], {"bleu": bleu}, 0, 1, 0, 0.25, "fr: x\nen: y\n"
    )
    difference = {"bleu": {"delta": 20.0, "interval": (12.5, 27.25), "p": 0.002}}
    mean, spread = (
        {"bleu": 10.0, "empty": 0, "truncated": 1, "sources cut": 0, "seconds": 0.5},
        {"bleu": 2.5, "seconds": 0.1},
    )
    draws, tried = [system("shot", 12.5), system("other", 7.5)], {"names": -9.0, "lines": -7.5}
    few = FewShot(1, "lines", tried, draws, 0, mean, spread, difference)
    found = {"source": "fr", "target": "en", "metrics": {"bleu": "BLEU"}, "signatures": {"BLEU": "nrefs:1|tok:13a"}}
    found |= {"sources": [f"le chat {i}" for i in range(n)], "references": [f"the cat {i}" for i in range(n)]}
    return Result(**found | {"prefix": system("prefixed", 30.0), "few_shot": few} | fields)


def labelled():
    """A classifier of three labels, one of them unheard of."""
    system = lambda outputs: System(outputs, {"accuracy": 50.0}, 0, 0, 0, 0.1, None, [[1, 0, 0], [0, 1, 0], [2, 0, 0]])
    return Result(
        *(
            "text",
            "label",
            ["a", "b", "c", "d"],
            ["joy", "fear", "rage", "rage"],
            ["fear", "joy"],
            {"accuracy": "accuracy"},
        ),
        *(
            {"accuracy": "nrefs:1"},
            system(["fear", "joy", "joy", "joy"]),
            None,
            ["fear", "joy", "rage"],
            ("rage", 50.0),
        ),
    )


@pytest.fixture
def attention():
    """Two layers of two heads, three tokens, two banks; the second opens late."""
    mass = torch.rand(2, 2, 3, 3).softmax(dim=-1)
    return Attention(
        ["un", "<b>", "\\n"], ["en", "fr"], torch.tensor([[True, False], [True, True], [True, True]]), mass
    )


class Page(HTMLParser):
    """The elements of a page, in order, and its text; asserts that every element is closed where it must be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] * (tag != "meta")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# The same in every form


def test_the_terminal_the_page_and_the_json_file_say_the_same():
    evaluation = Evaluation(SETTINGS, [result()])
    text, page = report.to_text(evaluation), Page(report.to_html(evaluation))
    (direction,) = json.loads(report.to_json(evaluation))["directions"]
    assert direction["prefix"]["scores"]["bleu"] == 30 and direction["few_shot"]["difference"]["bleu"]["delta"] == 20
    head, bleu = (line.split() for line in text.splitlines()[1:3])
    assert (head, bleu) == (["prefix", "1-shot", "ratio"], ["BLEU", "30.00", "10.00", "±", "2.5", "3.0x"])
    for shown in (text, page.text):
        for words in ("30.00", "10.00 ± 2.5", "3.0x", "0.25", "prefixed 1", "shot 1", "the cat 1", "nrefs:1|tok:13a"):
            assert words in shown
        assert "other 1" not in shown  # the draw that is not the median
        assert "+20.00 BLEU (+12.50 to +27.25); no verdict on fewer than 100 sentences" in shown
        assert "1-shot prompts are bare lines (mean log p of other training targets: names -9.0, lines -7.5)" in shown
    assert (
        "fr → en, 3 sentences" in page.text and "2026-01-02 03:04" in page.text and "(gpt2, weights 0a1b)" in page.text
    )


def test_cut_sources_are_counted_where_there_are_any():
    some = result()
    assert "sources cut" not in [row[0] for row in report.score_table(some)]
    some.few_shot.mean["sources cut"] = 1.5  # in some draws
    assert ["sources cut", "0", "2", ""] in report.score_table(some)


def test_from_a_hundred_sentences_on_there_is_a_verdict():
    said = [report.difference(result(n)) for n in (99, 100)]
    assert said[0].endswith("no verdict on fewer than 100 sentences")
    assert said[1] == "+20.00 BLEU (+12.50 to +27.25), significant at p = 0.002"


def test_of_labels_the_confusion_matrix_and_the_commonest_label_are_shown():
    evaluation = Evaluation(SETTINGS, [labelled()])
    text, page = report.to_text(evaluation), Page(report.to_html(evaluation))
    rows = [line.split() for line in text.splitlines()]
    assert ["rage", "2", "0", "0"] in rows and ["fear", "joy", "rage"] in rows
    for shown in (text, page.text):
        assert "always answering 'rage' would have accuracy 50.00" in shown and "BLEU" not in shown
    assert len(page.all("table")) == 2 and {header.get("scope") for header in page.all("th")} == {"row", "col"}


def test_without_k_shot_and_without_examples_less_is_said():
    evaluation = Evaluation(SETTINGS | {"examples": 0}, [result(few_shot=None)])
    for shown in (report.to_text(evaluation), Page(report.to_html(evaluation)).text):
        assert "1-shot" not in shown and "median" not in shown and "Examples" not in shown and "le chat" not in shown


def test_of_many_references_a_few_are_shown():
    references = [[f"the {word} cat {i}" for word in ("old", "young", "black", "lost", "sly")] for i in range(3)]
    text = report.to_text(Evaluation(SETTINGS, [result(references=references)]))
    assert "the black cat 0" in text and "the lost cat 0" not in text and "(and 2 more references)" in text


def test_a_line_of_the_table_of_outputs_is_a_sentence_whatever_it_holds():
    odd = result(sources=["a\tb", "c\r\nd", "e\u2028f"], references=["x", ["y", "z"], "w"])
    rows = [line.split("\t") for line in report.to_tsv(Evaluation(SETTINGS, [odd, result(few_shot=None)])).split("\n")]
    assert rows[0] == ["source", "reference", "prefix", "k-shot", "from", "to"] and rows.pop() == [""]
    assert [row[:4] for row in rows[1:4]] == [
        ["a b", "x", "prefixed 0", "shot 0"],
        ["c d", "y ||| z", "prefixed 1", "shot 1"],
        ["e f", "w", "prefixed 2", "shot 2"],
    ]
    assert rows[4] == ["le chat 0", "the cat 0", "prefixed 0", "", "fr", "en"] and len(rows) == 7


# The page


def test_user_text_is_shown_as_text_and_paths_without_the_home_folder(attention):
    named = result(source=ATTACK, sources=[ATTACK] * 3, references=[ATTACK] * 3)
    page = Page(report.to_html(Evaluation(SETTINGS, [named], attention)))
    assert ATTACK in page.text and not page.all("script") and not page.all("img") and "<b>" in page.text
    assert "~/runs/x" in page.text and str(Path.home()) not in page.text


def test_the_page_asks_for_nothing_from_elsewhere(attention):
    html = report.to_html(Evaluation(SETTINGS, [result()], attention))
    page = Page(html)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {name for name in attributes if name in {"src", "href", "srcset", "style"} or name.startswith("on")}
    assert "url(" not in html and "@import" not in html


def test_attention_is_a_table_of_shaded_cells_with_a_legend(attention):
    html = report.to_html(Evaluation(SETTINGS, [result()], attention))
    tables = html.split('class="wide shaded"')[1:]
    panels = attention_maps.panels(attention)
    most = attention_maps.most_of(panels)
    legend, *drawn = [re.findall(r'<td class="s(\d)">(\d+)</td>', table) for table in tables]
    assert [int(shade) for shade, _ in legend] == [*range(10)] and int(legend[-1][1]) == round(100 * most)
    for cells, panel in zip(drawn, panels, strict=True):
        values = panel.values.flatten().tolist()
        assert cells == [(str(round(9 * value / most)), f"{100 * value:.0f}") for value in values]
    assert [re.findall('scope="row">(.*?)<', table) for table in tables[1:]] == [["layer 0", "layer 1"]] * 4
    assert re.findall('scope="col">(.*?)<', tables[2]) == ["un", "&lt;b&gt;", "\\n"]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for_by_day_and_by_night():
    cell = [int(x) for x in report.CELL.split()]
    for colours in re.findall(r":root \{(.*?)\}", report.STYLE, re.DOTALL):
        found = re.findall(r"--(\w+): #(\w{6})", colours)
        colours = {name: [int(value[i : i + 2], 16) for i in (0, 2, 4)] for name, value in found}
        colours["cell"] = [report.SHADE * x + (1 - report.SHADE) * y for x, y in zip(cell, colours["paper"])]
        for ink, ground in (("ink", "paper"), ("soft", "paper"), ("ink", "more"), ("ink", "less"), ("ink", "cell")):
            assert contrast(colours[ink], colours[ground]) > 4.5


PROBE = """<!DOCTYPE html><title>probe</title>FRAMES<script>
onload = () => { document.body.dataset.seen = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, table = page.querySelector("table")
  return { overflow: root.scrollWidth - root.clientWidth, height: root.scrollHeight, text: page.body.innerText,
    requests: frame.contentWindow.performance.getEntriesByType("resource").length, table: table.clientWidth,
    struck: getComputedStyle(page.querySelector("del")).textDecorationLine } })) }
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_page_at_both_widths_with_all_columns_of_the_scores(attention, tmp_path):
    html = report.to_html(Evaluation(SETTINGS, [result()], attention))
    frames = [f'<iframe srcdoc="{escape(html)}" width="{width}" height="700"></iframe>' for width in (1280, 360)]
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("FRAMES", "".join(frames)), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    line = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{probe}"]
    done = subprocess.run(line, capture_output=True, timeout=300)
    wide, narrow = json.loads(unescape(re.search(r'data-seen="(.*?)"', done.stdout.decode())[1]))
    for page in (wide, narrow):
        assert page["overflow"] <= 0 and page["requests"] == 0 and page["struck"] == "line-through"
        assert "the cat 1" in page["text"] and "Attention to the slots" in page["text"]
    assert narrow["table"] < 360 - 32 and narrow["height"] > wide["height"] > 700


# Differences


def without(html, tag):
    """The words of a piece of a page with these elements left out."""
    text = unescape(re.sub(r"<[^>]*>", "", re.sub(f"<{tag}>.*?</{tag}>", "", html, flags=re.DOTALL)))
    return report.WORD.findall(re.sub(r"\s+", "", text))


TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", ",", "l'eau", "<b>", "&", "été.", "--", "日本"])).map(" ".join)


@given(TEXTS.filter(bool), TEXTS)
def test_without_its_struck_words_it_is_the_output_and_without_its_underlined_ones_the_reference(output, reference):
    html = report.marked(output, [reference])
    assert without(html, "del") == without(escape(output), "del") and without(html, "ins") == without(
        escape(reference), "ins"
    )


@pytest.mark.parametrize(
    "output, reference, html",
    [
        ("the cat sat.", "the cat sat.", "the cat sat."),
        ("the dog sat.", "the cat sat.", "the <del>cat</del> <ins>dog</ins> sat."),
        ("cat sat.", "the cat sat.", "<del>the</del> cat sat."),
        ("the cat sat down.", "the cat sat.", "the cat sat <ins>down</ins>."),
        ("j'irai", "j'irais", "j&#x27;<del>irais</del> <ins>irai</ins>"),
        ("a < b", "a & b", "a <del>&amp;</del> <ins>&lt;</ins> b"),
        ("", "the cat", '<span class="soft">(empty)</span>'),
    ],
)
def test_differences_are_marked_word_by_word(output, reference, html):
    assert report.marked(output, [reference]) == html


def test_of_several_references_the_nearest_is_compared_with_the_output():
    assert report.marked("the cat sat", ["a dog ran", "the cat sat"]) == "the cat sat"
