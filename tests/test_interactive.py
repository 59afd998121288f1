"""translate.py as a person meets it: at a terminal, behind a pipe, with texts of any length."""

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import translate
from minigpt import GPT, Tokenizer
from prefix import Banks
from prefix.distributed import printable
from prefix.run import DEMO_PREFIX
from prefix.translation import divide
from prefix.translation import translate as translate_texts

ROOT = Path(__file__).parents[1]
PREFIX = ["--prefix", DEMO_PREFIX, "--device", "cpu"]
LONG = "Je suis ici. Il pleut. " * 40  # more tokens than the demo's context has


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = GPT.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    return model, tokenizer, Banks.load(DEMO_PREFIX, model)


@pytest.fixture
def terminal():
    """A function: arguments, lines to type -> what a terminal shows."""
    bank_mask = []

    def run(*arguments, typed=""):
        ours, theirs = pty.openpty()
        bank_mask.append(ours)
        line = [sys.executable, ROOT / "translate.py", *arguments]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1 << 12)
            except OSError:  # the other end is closed
                process.wait()
                return shown.decode()

    yield run
    for ours in bank_mask:
        os.close(ours)


def test_a_terminal_shows_a_translation_as_it_grows(run, monkeypatch, demo):
    written, write = [], printable
    monkeypatch.setattr(translate, "printable", lambda text: written.append(text) or write(text))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = run(translate, *PREFIX, "Il pleut depuis ce matin.")
    assert (code, out) == (0, translate_texts(*demo, ["Il pleut depuis ce matin."], "fr", "en")[0].text + "\n")
    assert len(written) > 3 and "".join(written) + "\n" == out


def test_text_grows_by_whole_characters(demo):
    texts = []
    result = translate_texts(*demo, ["The café is over there."], "en", "fr", on_text=texts.append)[0]
    assert texts[-1] == result.text and len(texts) > 3
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:]))
    assert not any("\ufffd" in text for text in texts)


def test_lines_typed_at_a_terminal_are_answered_one_by_one(terminal, demo):
    shown = terminal(*PREFIX, typed="Il pleut.\nMerci.\n\x04")
    assert "Reading fr sentences, one per line; Ctrl-D ends." in shown
    for answer in translate_texts(*demo, ["Il pleut.", "Merci."], "fr", "en"):
        assert answer.text in shown


def test_escape_sequences_cannot_steer_the_terminal_but_pass_through_a_pipe(monkeypatch, capsys):
    for terminal, expected in ((True, "a\\x1b[31mb\n"), (False, "a\x1b[31mb\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        translate.Output().line("a\x1b[31mb")
        assert capsys.readouterr().out == expected


def test_a_slow_pipe_is_answered_line_by_line():
    """The answer to the first line comes before the second line is written."""
    line = [sys.executable, ROOT / "translate.py", *PREFIX]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        giving_up = threading.Timer(120, process.kill)
        giving_up.daemon = True
        giving_up.start()
        for text in ("Il pleut.", "Merci."):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.stdout.read() == ""
        giving_up.cancel()


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_lines_are_what_stands_between_newlines_whatever_blocks_they_come_in(monkeypatch, tmp_path, ending):
    lines = ["", "été", "x" * 200_000, "", "fin"]
    (tmp_path / "lines").write_bytes(b"\r\n".join(line.encode() for line in lines) + ending)
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr(sys, "stdin", file)
        chunks = list(translate.lines_as_they_come(3))
    assert [line for chunk in chunks for line in chunk] == lines
    assert all(chunks[:-1])


def test_a_bar_counts_the_lines_that_a_file_has_left(tmp_path):
    for ending in ("", "\n"):
        (tmp_path / "lines").write_text("a\nb\nc" + ending)
        with open(tmp_path / "lines") as file:
            os.lseek(file.fileno(), 2, os.SEEK_SET)
            assert translate.lines_ahead(file.fileno()) == 2
    reader, writer = os.pipe()
    assert translate.lines_ahead(reader) is None
    os.close(reader), os.close(writer)


# Texts that are too long


def test_a_text_that_does_not_fit_is_cut_at_the_ends_of_its_sentences():
    text = "Un deux. « Trois ! » Quatre ? Cinq... six. (Sept.) 8.5 Huit"
    sentences = ["Un deux.", "« Trois ! »", "Quatre ?", "Cinq...", "six.", "(Sept.)", "8.5 Huit"]
    assert divide(text, lambda piece: False) == sentences
    assert divide(text, lambda piece: True) == [text]


def test_a_long_text_gets_what_its_sentences_get_alone(run, demo):
    code, out, err = run(translate, *PREFIX, LONG, "Merci.")
    alone = translate_texts(*demo, ["Je suis ici.", "Il pleut.", "Merci."], "fr", "en")
    expected = " ".join([alone[0].text, alone[1].text] * 40)
    assert (code, out) == (0, f"{expected}\n{alone[2].text}\n")
    assert "1 of 2 texts were too long" in err


def test_a_sentence_that_cannot_be_cut_is_a_fault_and_the_others_are_translated(run):
    code, out, err = run(translate, *PREFIX, stdin=f"Merci.\n{'mot ' * 300}\nIl pleut.".encode())
    assert code == 2 and out.count("\n") == 3 and out.splitlines()[1] == ""
    assert "line 2: " in err and "leave no room to answer" in err


def test_the_length_penalty_is_that_of_the_beams(run, demo):
    text = "Il faut que je te dise quelque chose de très important."
    _, out, _ = run(translate, *PREFIX, "--beam", 4, "--length-penalty", -9, text)
    short, usual = (translate_texts(*demo, [text], "fr", "en", beams=4, length_penalty=x)[0].text for x in (-9.0, 1.0))
    assert out == short + "\n" and short != usual
    code, out, err = run(translate, *PREFIX, "--length-penalty", 2, text)
    assert (code, out) == (2, "") and "--length-penalty goes with --beam" in err


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--weights", "int8"]])
def test_other_forms_of_the_weights_translate(run, options):
    code, out, _ = run(translate, *PREFIX, *options, "Il pleut.")
    assert code == 0 and "rain" in out


def test_eight_bits_are_for_the_cpu(run):
    code, out, err = run(translate, "--weights", "int8", "--dtype", "float16", "Il pleut.")
    assert (code, out) == (2, "") and "--weights int8 is for bfloat16 on a CPU" in err
