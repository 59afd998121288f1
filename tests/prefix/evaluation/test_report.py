"""The pages and pictures that show what came out: evaluate.py --report, and a run's loss.png."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import save_random_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import train
from minigpt import GPT, Tokenizer
from prefix.banks import Banks
from prefix.data.splits import split_of
from prefix.evaluation import attention_maps, report
from prefix.init import random_banks

NAMES = ["chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable", "chrome"]
PLAYWRIGHT = Path.home() / ".cache/ms-playwright"
FETCHED = [path for name in ("chrome", "headless_shell") for path in PLAYWRIGHT.glob(f"*/chrome-linux*/{name}")]
CHROMIUM = next(filter(None, map(shutil.which, [*NAMES, *FETCHED])), None)
ATTACK = "<script>document.title='taken'</script><img src=x onerror=alert(1)> & \"q\" 'q'"
VOID = {"meta"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small random checkpoint `base`, a table en-fr.csv with one ugly test sentence, and a prefix."""
    place = tmp_path_factory.mktemp("place")
    model = save_random_checkpoint(place / "base")
    rows, splits = [["en", "fr"], [ATTACK, f"oui {ATTACK}"]], []
    for i in range(60):
        rows.append([f"sentence {i}, it is", f"phrase {i} c'est"])
        splits.append(split_of(rows[-1][0]))
    assert split_of(ATTACK) == "train" and {"train", "test"} <= set(splits)
    with open(place / "en-fr.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    record = {"model": str(place / "base"), "data": [str(place / "en-fr.csv")], "columns": ["en", "fr"]}
    record |= {"init": "random", "settings": {"lr": 0.03, "steps": 7, "seed": 5}}
    banks = random_banks(model.config, ["en", "fr"], prefix_len=3)
    banks.training_record = record
    banks.save(place / "prefix.safetensors", model)
    return place


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, place):
    monkeypatch.setenv("MINIGPT_HOME", str(place / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pages():
    """What `reported` has made so far."""
    return {}


@pytest.fixture
def reported(run, place, pages):
    """A function: options of evaluate.py -> (the page, what --json wrote). The ugly sentence is among them."""

    def reported(*options):
        if options not in pages:
            pages[options] = evaluated(*options)
        return pages[options]

    def evaluated(*options):
        arguments = ["--prefix", place / "prefix.safetensors", "--split", "train", "--shots", 1, "--draws", 2]
        arguments += ["--device", "cpu", "--limit", 12, "--examples", 12]
        arguments += ["--json", "result.json", "--report", "report.html"]
        code, _, err = run(evaluate, *arguments, *options)
        assert code == 0, err
        return Path("report.html").read_text(encoding="utf-8"), json.loads(Path("result.json").read_text("utf-8"))

    return reported


class Page(HTMLParser):
    """The elements of a page, in order, and its text; asserts that every element is closed where it must be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text, self.headers = [], [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_says_what_the_json_file_says(reported):
    html, result = reported()
    text = re.sub(r"\s+", " ", Page(html).text)
    for direction in result["directions"]:
        assert f"{direction['source']} → {direction['target']}, 12 sentences" in text
        mean, spread = direction["few_shot"]["mean"], direction["few_shot"]["spread"]
        for metric in ("bleu", "chrf", "sentence_bleu"):
            assert f"{direction['prefix'][metric]:.2f}" in text
            assert f"{mean[metric]:.2f} ± {spread[metric]:.1f}" in text
        assert f"prefix minus the median draw: {direction['few_shot']['difference']['delta']:+.2f} BLEU" in text
        assert "too few sentences to tell" in text
        for source, reference in zip(direction["sources"], direction["references"]):
            assert re.sub(r"\s+", " ", source) in text and re.sub(r"\s+", " ", reference) in text
    assert result["signatures"]["bleu"] in text and result["signatures"]["chrf"] in text
    assert all(str(value) in text for name, value in result["settings"].items() if name in ("seed", "limit", "model"))


def test_the_settings_are_what_was_chosen_and_what_the_prefix_was_made_with(reported, place):
    html, result = reported("--examples", 0)
    items = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html.split("<h2>Settings</h2>")[1])
    settings = {name: unescape(value) for name, value in items}
    assert not {"None", "False", ""} & set(settings.values()) and result["settings"]["weights"] is None
    assert settings["trained"] == "init random, prefix_len 3, lr 0.03, steps 7, seed 5, data en-fr.csv"
    assert settings["base"] == GPT.from_pretrained(place / "base").fingerprint
    assert (settings["torch"], settings["seed"], settings["columns"]) == (torch.__version__, "0", "en; fr")


def test_of_a_prefix_file_that_says_nothing_of_its_training_the_settings_say_its_length(place, tmp_path):
    banks = Banks.read(place / "prefix.safetensors")
    for record in ({}, {"settings": "?", "data": []}):
        banks.training_record = record
        banks.save(tmp_path / "bare.safetensors", GPT.from_pretrained(place / "base"))
        assert evaluate.training_of(tmp_path / "bare.safetensors") == "prefix_len 3"


def test_an_output_stands_in_the_page_word_for_word_beside_its_reference(reported):
    html, result = reported("--limit", 3)
    shown = re.findall(r"<dt>prefix</dt><dd dir=\"auto\">(.*?)</dd>", html)
    outputs = [output for direction in result["directions"] for output in direction["outputs"]]
    assert len(outputs) == 6 and [words(without(html, "del")) for html in shown] == list(map(words, outputs))


def test_user_text_is_shown_as_text(reported):
    page = Page(reported()[0])
    assert ATTACK in page.text and not page.all("script") and not page.all("img")


def test_the_page_asks_for_nothing_from_elsewhere(reported):
    html, _ = reported()
    page = Page(html)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {name for name in attributes if name in {"src", "href", "srcset", "style"} or name.startswith("on")}
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert styles and "url(" not in styles and "@import" not in styles


def test_tables_have_headers_and_pictures_have_names(reported):
    page = Page(reported("--limit", 3)[0])
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption")) == 2
    scopes = [header.get("scope") for header in page.all("th")]
    assert set(scopes) == {"col", "row"} and scopes.count("row") == 4
    drawings = page.all("svg")
    assert len(drawings) == 4 and all(svg["role"] == "img" and "attention" in svg["aria-label"] for svg in drawings)


def test_the_picture_is_of_the_first_sentence_that_has_a_translation(reported, place):
    html, result = reported("--examples", 0)
    first = result["directions"][0]
    text, output = next(pair for pair in zip(first["sources"], first["outputs"]) if pair[1])
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    banks = Banks.load(place / "prefix.safetensors", model)
    attention = attention_maps.look_at(model, tokenizer, banks, text, "fr", "en", output)
    assert escape("\n".join(attention_maps.mass_lines(attention))) in html
    panels = attention_maps.panels(attention)
    assert all(attention_maps.svg_panel(panel, attention_maps.most_of(panels))[0] in html for panel in panels)


def test_without_k_shot_and_without_examples_the_page_is_shorter(reported):
    text = Page(reported("--draws", 0, "--examples", 0)[0]).text
    assert "shot prompting" not in text and "prefix minus" not in text and "Examples" not in text


def test_of_choices_the_page_shows_the_accuracy_and_no_score_of_translations(reported):
    html, result = reported("--from", "fr", "--to", "en", "--choices", "yes", "no")
    page, (direction,) = Page(html), result["directions"]
    columns = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert columns == ["exact %", "empty", "cut", "seconds"] and direction["choices"] == ["yes", "no"]
    assert f"prefix minus the median draw: {direction['few_shot']['difference']['delta']:+.2f} exact %" in page.text
    assert "BLEU" not in page.text and "chrF" not in page.text


@pytest.mark.parametrize("path", ["nowhere/report.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(run, place, path):
    code, out, err = run(evaluate, "--prefix", place / "prefix.safetensors", "--report", path)
    assert (code, out, err.count("\n")) == (2, "", 1) and f"--report {path}" in err


# Differences


def without(html, tag):
    """The text of a piece of a page with these elements left out."""
    return unescape(re.sub(r"<[^>]*>", "", re.sub(f"<{tag}>.*?</{tag}>", "", html, flags=re.DOTALL)))


def words(text):
    return report.WORD.findall(re.sub(r"\s+", "", text))


TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", ",", "l'eau", "<b>", "&", "été.", "--", "日本"])).map(" ".join)


@given(TEXTS.filter(bool), TEXTS)
def test_without_its_struck_words_it_is_the_output_and_without_its_underlined_ones_the_reference(output, reference):
    html = report.marked(output, [reference])
    assert words(without(html, "del")) == words(output) and words(without(html, "ins")) == words(reference)


@pytest.mark.parametrize(
    "output, reference, html",
    [
        ("the cat sat.", "the cat sat.", "the cat sat."),
        ("the dog sat.", "the cat sat.", "the <del>cat</del> <ins>dog</ins> sat."),
        ("cat sat.", "the cat sat.", "<del>the</del> cat sat."),
        ("the cat sat down.", "the cat sat.", "the cat sat <ins>down</ins>."),
        ("j'irai", "j'irais", "j&#x27;<del>irais</del> <ins>irai</ins>"),
        ("it's not", "it isn't", "<del>it isn&#x27;t</del> <ins>it&#x27;s not</ins>"),
        ("a < b", "a & b", "a <del>&amp;</del> <ins>&lt;</ins> b"),
        ("", "the cat", '<span class="soft">(empty)</span>'),
    ],
)
def test_differences_are_marked_word_by_word(output, reference, html):
    assert report.marked(output, [reference]) == html


def test_of_several_references_the_nearest_is_held_against_the_output():
    assert report.marked("the cat sat", ["a dog ran", "the cat sat"]) == "the cat sat"


# What a reader sees


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for_by_day_and_by_night():
    for colours in re.findall(r":root \{(.*?)\}", report.STYLE, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", colours))
        for ink, ground in (("ink", "paper"), ("soft", "paper"), ("ink", "more"), ("ink", "less")):
            assert contrast(colours[ink], colours[ground]) > 4.5
    ink, paper, cell, night_ink, night_paper = re.findall(r"#\w{6}", attention_maps.STYLE)
    for text, ground in ((ink, paper), (night_ink, night_paper)):
        mixed = [0.65 * int(cell[i : i + 2], 16) + 0.35 * int(ground[i : i + 2], 16) for i in (1, 3, 5)]
        assert contrast(text, "#" + "".join(f"{round(c):02x}" for c in mixed)) > 4.5


PROBE = """<!DOCTYPE html><title>probe</title>FRAMES<script>
onload = () => { document.body.dataset.seen = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement, cell = page.querySelector(".mass .cell")
  return { overflow: root.scrollWidth - root.clientWidth, height: root.scrollHeight, text: page.body.innerText,
    requests: frame.contentWindow.performance.getEntriesByType("resource").length, title: page.title,
    font: parseFloat(getComputedStyle(page.body).fontSize), struck: getComputedStyle(page.querySelector("del"))
    .textDecorationLine, cell: cell.getBoundingClientRect().width } })) }
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_page_at_both_widths_and_asks_for_nothing_else(reported, tmp_path):
    html, result = reported("--limit", 3)
    frames = [f'<iframe srcdoc="{escape(html)}" width="{width}" height="700"></iframe>' for width in (1280, 400)]
    Path("probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    line = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{Path('probe.html').resolve()}"]
    done = subprocess.run(line, capture_output=True, timeout=300)
    seen = json.loads(unescape(re.search(r'data-seen="(.*?)"', done.stdout.decode())[1]))
    for page in seen:
        assert page["overflow"] <= 0 and page["requests"] == 0 and page["font"] >= 16
        assert page["title"] == "Prefix against 1-shot prompting: fr → en, en → fr"
        assert result["directions"][0]["references"][0] in page["text"] and "Attention to the slots" in page["text"]
        assert page["struck"] == "line-through" and page["cell"] > 20
    wide, narrow = seen
    assert narrow["height"] > wide["height"] > 700


# The loss curve

LINES = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 2, "val_loss": 2.5}, {"step": 3, "loss": 2.0}]


@pytest.fixture
def finished(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


@pytest.mark.parametrize("lines", [LINES, LINES[:1], LINES[2:3], []], ids=len)
def test_the_loss_is_drawn_whatever_was_logged(lines, tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.draw_loss(tmp_path)
    assert capsys.readouterr().err == "" and imread(tmp_path / "loss.png").std() > 0.05


def test_the_curve_is_of_the_logged_numbers():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    report._draw_curves(axes, LINES)
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {"training": [[1, 3], [3, 2]], "mean of 20 steps": [[1, 3], [3, 2.5]], "validation": [[2, 2.5]]}


def test_without_matplotlib_there_is_no_picture_and_no_word_of_it(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.draw_loss(finished)
    assert capsys.readouterr().err == "" and [file.name for file in finished.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_costs_the_picture_one_line_and_nothing_else(finished, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    report.draw_loss(finished)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "loss.png" in err and "No space left" in err
    assert [file.name for file in finished.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_ends_and_one_that_is_stopped_leave_the_picture(run, place, monkeypatch, stopped):
    pytest.importorskip("matplotlib")
    if stopped:
        step = train.Trainer.optimizer_step

        def interrupted(trainer):
            record = step(trainer)
            trainer.stop.append(2)
            trainer.stopped = True
            return record

        monkeypatch.setattr(train.Trainer, "optimizer_step", interrupted)
    options = ["--model", place / "base", "--data", place / "en-fr.csv", "--device", "cpu", "--prefix-len", 2]
    code, out, err = run(train, *options, "--steps", 3, "--batch-size", 4, "--out", "new")
    assert (code, out) == ((130, "") if stopped else (0, "")), err
    assert Path("new/loss.png").read_bytes().startswith(b"\x89PNG") and "loss.png" not in err
