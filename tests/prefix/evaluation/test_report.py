"""One evaluation in every form: the terminal, JSON, a table of outputs, a page."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix.evaluation import report
from prefix.evaluation.compare import Result, System

ATTACK = "<script>document.title='taken'</script><img src=x onerror=alert(1)> & \"q\" 'q'"
SETTINGS = {"prefix": [f"{Path.home()}/runs/x"], "model": "gpt2", "base": "0a1b", "date": "2026-01-02 03:04"}
SETTINGS |= {"data": ["en-fr.csv"], "split": "test", "beam": 1, "shots": 1, "draws": 2, "examples": 2}
SETTINGS |= {"weights": None, "seed": 0}
ATTENTION = [("bank <en>", [["layer", "h0", "h1"], ["0", "20.0", "0.0"], ["1", "10.0", "5.0"]])]


def system(name, word, score, n=3, cut=0, **fields):
    counts = {"empty": 0, "truncated": 1, "sources cut": cut, "seconds": 0.25}
    return System(name, [f"{word} {i}" for i in range(n)], {"BLEU": score}, counts, **fields)


def result(n=3, cut=0, **fields):
    """fr -> en on n sentences, the prefix beside two draws of one shot."""
    draws = [system("1-shot", "shot", 12.5, n), system("1-shot", "other", 7.5, n, cut)]
    found = {"sources": [f"le chat {i}" for i in range(n)], "references": [[f"the cat {i}"] for i in range(n)]}
    found |= {"source": "fr", "target": "en", "signatures": {"BLEU": "nrefs:1|tok:13a"}, "draws": draws}
    found |= {"form": "lines", "form_log_p": {"names": -9, "lines": -7.5}}
    found["prefix"] = system("prefix", "prefixed", 30.0, n)
    found["difference"] = {"BLEU": {"delta": 20.0, "interval": (12.5, 27.25), "p": 0.002}}
    return Result(**found | fields)


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


def test_the_terminal_the_page_and_the_json_file_have_the_same_table_and_sentences():
    text, page = report.to_text(SETTINGS, [result()]), Page(report.to_html(SETTINGS, [result()])).text
    (direction,) = json.loads(report.to_json(SETTINGS, [result()]))["directions"]
    rows = [["", "prefix", "1-shot", "ratio"], ["BLEU", "30.00", "10.00 ± 2.5", "-"], ["empty", "0", "0", ""]]
    rows += [["truncated", "1", "1", ""], ["seconds", "0.25", "0.25", ""]]
    assert direction["table"] == rows and direction["prefix"]["scores"] == {"BLEU": 30}
    words = [cell for row in rows for cell in row] + ["prefixed 1", "shot 1", "the cat 1", "nrefs:1|tok:13a"]
    words += ["+20.00 BLEU (+12.50 to +27.25); no verdict on fewer than 100 sentences"]
    words += ["1-shot prompts are bare lines (mean log p of other training targets: names -9.0, lines -7.5)"]
    for shown in (text, page):
        assert all(word in shown for word in words) and "other 1" not in shown  # the draw that is not the median
    assert "2026-01-02 03:04" in page and "gpt2 (weights 0a1b)" in page


@pytest.mark.parametrize("n, p, ratio, words", [
    (99, 0.002, "-", "; no verdict on fewer than 100 sentences"),
    (100, 0.002, "3.0x", ", significant (p = 0.002)"),
    (100, 0.0519, "3.0x", ", not significant (p = 0.052)"),
])  # fmt: skip
def test_from_a_hundred_sentences_on_there_is_a_ratio_and_a_verdict_at_five_per_cent(n, p, ratio, words):
    lines = report.score_lines(result(n, cut=3))
    assert lines[1][-1] == ratio and ["sources cut", "0", "2", ""] in lines  # in one of two draws
    found = {"BLEU": {"delta": 20.0, "interval": (12.5, 27.25), "p": p}}
    assert report.difference(result(n, difference=found)) == "+20.00 BLEU (+12.50 to +27.25)" + words


def test_labels_have_a_confusion_matrix_and_the_share_of_the_commonest(monkeypatch):
    classes = ["fear", "joy", "rage"]  # the last one is no choice
    some = result(4, references=[["joy"], ["fear"], ["rage"], ["rage"]], choices=classes[:2], classes=classes)
    some.prefix.confusion = [[1, 0, 0], [0, 1, 0], [2, 0, 0]]
    text, page = report.to_text(SETTINGS, [some]), Page(report.to_html(SETTINGS, [some])).text
    for shown in (text, page):
        assert "always answering 'rage' would have accuracy 50.00" in shown
    matrix = text.split("prefix: labels (rows) and answers (columns)\n")[1].splitlines()[:4]
    assert [line.split() for line in matrix] == [
        ["fear", "joy", "rage"], ["fear", "1", "0", "0"], ["joy", "0", "1", "0"], ["rage", "2", "0", "0"],
    ]  # fmt: skip
    monkeypatch.setattr(report, "CLASSES_SHOWN", 2)  # a larger matrix is left to the page and JSON
    assert "rage  " not in report.to_text(SETTINGS, [some]) and ">rage</th>" in report.to_html(SETTINGS, [some])


def test_an_answer_that_is_always_the_same_is_right_where_any_reference_says_it():
    some = result(references=[["joy", "fun"], ["fun", "joy"], ["rage"]], classes=["fun", "joy", "rage"], choices=["joy"])
    assert "always answering 'joy' would have accuracy 66.67" in report.remarks(some)


def test_few_different_references_are_said_to_look_like_labels():
    assert not any("labels?" in said for said in report.remarks(result(references=[["a"]] * 3)))
    some = result(12, references=[["a"]] * 12)
    assert "12 references, 1 different: labels? --metrics en=accuracy scores them as such" in report.remarks(some)


def test_three_references_of_a_sentence_are_shown():
    (shown,) = report.side_by_side(result(references=[["a", "b", "c", "d"]] * 3), 1)
    assert shown == [("fr", "le chat 0"), *(("reference", x) for x in "abc"), ("1-shot", "shot 0"), ("prefix", "prefixed 0")]


def test_a_table_of_outputs_has_one_line_a_sentence_and_six_cells_a_line():
    some = result(sources=["a\tb c", "d", "e"], references=[["x", "y z"], ["w"], ["v"]])
    lines = report.to_tsv(SETTINGS, [some, result(draws=[])]).splitlines()
    assert [line.split("\t") for line in lines[:2]] == [
        ["source", "reference", "prefix", "k-shot", "from", "to"],
        ["a b c", "x ||| y z", "prefixed 0", "shot 0", "fr", "en"],
    ]
    assert len(lines) == 7 and lines[4].split("\t")[2:4] == ["prefixed 0", ""]


def test_the_name_of_the_home_folder_is_nowhere():
    for shown in (report.to_text(SETTINGS, [result()]), report.to_html(SETTINGS, [result()])):
        assert "~/runs/x" in shown and str(Path.home()) not in shown
    home = str(Path.home())
    assert report.spelled([f"{home}/a", f"{home}x/b", f"/data{home}/c", 3]) == f"~/a {home}x/b /data{home}/c 3"
    assert "weights</dt>" not in report.to_html(SETTINGS, [result()]) and "<dt>seed</dt><dd>0" in shown


def test_text_from_models_and_files_is_text_and_the_page_loads_nothing():
    hostile = result(sources=[ATTACK] * 3, references=[[ATTACK, "a"]] * 3, source=ATTACK, signatures={ATTACK: ATTACK})
    hostile.attention = [(ATTACK, [["", ATTACK], [ATTACK, "1.0"]])]
    hostile.prefix.outputs[:2] = [ATTACK, ""]
    hostile.choices, hostile.classes, hostile.prefix.confusion = [ATTACK], [ATTACK], [[3]]
    settings = SETTINGS | {"model": ATTACK, "prefix": [ATTACK], ATTACK: ATTACK}
    html = report.to_html(settings, [hostile])
    page = Page(html)
    assert page.text.count(ATTACK) > 8 and "url(" not in html and "@import" not in html
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "img", "link", "iframe", "object"}
    attributes = {name for _, found in page.elements for name in found}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "style"}
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.elements


def test_attention_is_a_table_of_shaded_cells_with_a_legend():
    html = report.to_html(SETTINGS, [result(attention=ATTENTION)])
    cells = re.findall(r'<td style="background: rgb\(59 130 196 / (.*?)\)">(.*?)</td>', html)
    assert cells == [("0.65", "20.0"), ("0.00", "0.0"), ("0.33", "10.0"), ("0.16", "5.0")]
    assert "the darkest cells are 20 %" in html and "bank &lt;en&gt;" in html


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("ink, paper", [(0, 255), (255, 18)])
def test_the_darkest_cell_has_the_contrast_that_wcag_asks_for_by_day_and_by_night(ink, paper):
    cell = [report.SHADE * x + (1 - report.SHADE) * paper for x in (59, 130, 196)]
    low, high = sorted([luminance([ink] * 3), luminance(cell)])
    assert (high + 0.05) / (low + 0.05) > 4.5


def without(html, tag):
    """The text of a piece of a page with these elements left out."""
    return unescape(re.sub(r"<[^>]*>", "", re.sub(f"<{tag}>.*?</{tag}>", "", html, flags=re.DOTALL)))


TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", ",", "l'eau", "<b>", "&", "été.", "--", "日本"])).map(" ".join)


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_without_its_struck_words_it_is_the_output_and_without_its_underlined_ones_the_reference(output, reference):
    html = report.marked(output, [reference])
    assert (without(html, "del"), without(html, "ins")) == (output, reference)


@pytest.mark.parametrize("output, references, html", [
    ("the cat sat.", ["the cat sat."], "the cat sat."),
    ("the dog sat.", ["the cat sat."], "the <del>cat</del><ins>dog</ins> sat."),
    ("the cat sat down.", ["the cat sat."], "the cat sat<ins> down</ins>."),
    ("j'irai", ["j'irais"], "j&#x27;<del>irais</del><ins>irai</ins>"),
    ("", ["the cat"], "<del>the cat</del>"),
    ("the cat sat", ["a dog ran", "the cat sat"], "the cat sat"),  # the nearest of several
])  # fmt: skip
def test_differences_are_marked_word_by_word(output, references, html):
    assert report.marked(output, references) == html
