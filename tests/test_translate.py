"""translate.py as a person meets it: arguments, lines of a file or a pipe, a terminal, and mistakes."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import CONTEXT, assert_refused, random_text

import translate
from minigpt import GPT, Tokenizer
from prefix import cli
from prefix.banks import Banks
from prefix.run import DEMO_PREFIX
from prefix.translation import Decoding
from prefix.translation import translate as translate_texts

ROOT = Path(__file__).parents[1]
PREFIX = ["--prefix", DEMO_PREFIX, "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def expected(place):
    """A function: texts -> the lines that translate.py owes for them."""
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    parts = model, tokenizer, Banks.load(place / "run", model)
    written = lambda texts, **options: translate_texts(*parts, texts, ("fr", "en"), Decoding(max_new=6, **options))
    return lambda texts, **options: "".join(result.text + "\n" for result in written(texts, **options))


@pytest.fixture
def small(run, place):
    """A function: further arguments of translate.py with the small base -> (exit code, standard output, error)."""
    return lambda *options, **stdin: run(translate, "--prefix", place / "run", "--max-new-tokens", 6, *options, **stdin)


def test_the_demo_translates_on_a_fresh_clone(run):
    code, out, err = run(translate, "--device", "cpu", "Bonjour", "Il pleut.")
    assert (code, out) == (0, "Good afternoon.\nIt's raining.\n")
    assert f"Using the prefix {DEMO_PREFIX}" in err


def test_each_argument_gets_a_line_of_standard_output_and_nothing_else_is_there(small, expected):
    texts = [random_text() for _ in range(5)] + ["", "two\nlines", "- un tiret"]
    code, out, err = small(*texts)
    assert (code, out) == (0, expected(texts))
    assert "cut at their token limit (--max-new-tokens)" in err
    code, out, err = small("un", "\udce9")
    assert (code, out) == (2, expected(["un", ""])) and "line 2: not UTF-8" in err


# Standard input


@pytest.mark.parametrize("stdin, texts", [
    (b"", []),
    (b"un\n\n \n\ndeux\n\n", ["un", "", "", "", "deux", ""]),
    (b"un\r\ndeux\r\n", ["un", "deux"]),
    (b"un\rdeux\n", ["un deux"]),
    ("\ufeffun\ndeux\n".encode(), ["un", "deux"]),
    ("un \u2028 deux\ntrois\n".encode(), ["un \u2028 deux", "trois"]),
    ("<|endoftext|>\n« Où ça ? »\n".encode(), ["<|endoftext|>", "« Où ça ? »"]),
], ids=repr)  # fmt: skip
def test_each_line_of_standard_input_gets_a_line_of_standard_output(small, expected, stdin, texts):
    code, out, _ = small(stdin=stdin)
    assert (code, out) == (0, expected(texts))
    assert out.count("\n") == len(texts)


UNREADABLE = {  # by lines: what comes in, what it is read as, and what is told
    "Latin-1": ("un\nété\ndeux".encode("latin-1"), ["un", "", "deux"], ["line 2: not UTF-8: byte 0xe9 at its place 1"]),
    "NUL": (b"un\x00\ndeux\n\xff\n", ["", "deux", ""], ["line 1: it holds a NUL byte", "line 3: not UTF-8"]),
    "too long": (
        f"un\n{'mot ' * CONTEXT}\n\ndeux\n{'x' * 1_000_000}".encode(),
        ["un", "", "", "deux", ""],
        [r"line 2: \d+ tokens leave no room to answer", r"line 5: more than [\d,]+ characters"],
    ),
    "UTF-16": ("un\ndeux\n".encode("utf-16"), ["", ""], ["line 1: it holds a NUL byte", "line 2: it holds a NUL byte"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_line_without_a_translation_is_told_by_its_number_and_the_others_are_translated(small, expected, name):
    stdin, texts, told = UNREADABLE[name]
    code, out, err = small(stdin=stdin)
    assert (code, out) == (2, expected(texts))
    found = [line for line in err.splitlines() if line.startswith("line ")]
    assert len(found) == len(told) and all(map(re.match, told, found))
    assert err.splitlines()[-1].startswith(f"error: {len(told)} of {len(texts)} sentences could not be translated")
    assert err.count("seems to be UTF-16") == err.count("with iconv") == (name == "UTF-16")


def test_a_long_text_gets_what_its_sentences_get_alone(run, demo):
    code, out, err = run(translate, *PREFIX, "Je suis ici. Il pleut. " * 40, "Merci.")
    alone = translate_texts(*demo, ["Je suis ici.", "Il pleut.", "Merci."], ("fr", "en"))
    assert (code, out) == (0, " ".join([alone[0].text, alone[1].text] * 40) + f"\n{alone[2].text}\n")
    assert "1 of 2 texts were too long" in err


def test_lines_are_what_stands_between_newlines_whatever_blocks_they_come_in(monkeypatch, tmp_path):
    texts = ["", "été", "x" * 1_200_000, "", "fin"]
    (tmp_path / "lines").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(text.encode() for text in texts))
    monkeypatch.setattr(translate, "LINES_AT_A_TIME", 1)
    with open(tmp_path / "lines") as file:
        monkeypatch.setattr(sys, "stdin", file)
        chunks = list(translate.lines_as_they_come(1))
    assert [translate.decode_line(line) for chunk in chunks for line in chunk] == [(text, None) for text in texts]
    assert all(len(chunk) == 1 for chunk in chunks)


def test_a_slow_pipe_is_answered_line_by_line_in_utf_8_whatever_the_locale():
    """Each answer comes before the next line is written."""
    line = [sys.executable, ROOT / "translate.py", *PREFIX, "--from", "en", "--to", "fr"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(line, **pipes, env=environment) as process:
        giving_up = threading.Timer(120, process.kill)
        giving_up.start()
        for text, answer in (b"The summer is hot.", "L'été est chaud."), (b"", ""), (b"\xe9", ""), (b"Thanks.", "Merci."):
            process.stdin.write(text + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().decode() == f"{answer}\n"
        out, err = process.communicate()
        giving_up.cancel()
    assert (process.returncode, out) == (2, b"") and b"line 3: " in err and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(place):
    ours = f"{sys.executable} {ROOT}/translate.py --prefix {place}/run --batch-size 1 --max-new-tokens 2"
    line = ["bash", "-c", f"set -o pipefail; yes | head -2000 | {ours} | head -1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert done.stderr == "Translating fr to en, line by line from standard input\n"


def test_a_closed_standard_input_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["translate.py"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="2"):
        translate.parse_arguments()
    assert "no text, and standard input is closed" in capsys.readouterr().err


def test_a_translation_is_one_line_that_cannot_steer_a_terminal_but_passes_through_a_pipe(small, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "a\nb\rc\u2028d\x85\x1b[31me\n")
    assert small("x", "y")[1] == "a b c d \x1b[31me\n" * 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert small("x")[1] == "a b c d \\x1b[31me\n"


# Options


def test_the_direction_is_second_bank_to_first_unless_told_otherwise(place, monkeypatch):
    banks = [Banks.load(place / prefix / "prefix.safetensors") for prefix in ("run", "run3")]  # en fr, en fr de
    for options, *expected in (
        ("", "fr en", "fr en"),
        ("--from en", "en fr", "en fr"),
        ("--to en", "fr en", "fr en"),
        ("--to fr", "en fr", "en fr"),
        ("--from de", None, "de en"),
        ("--from de --to fr", None, "de fr"),
    ):
        monkeypatch.setattr(sys, "argv", ["translate.py", *options.split()])
        for these, direction in zip(banks, expected):
            assert not direction or " ".join(cli.direction(translate.parse_arguments(), these)) == direction


def test_samples_follow_from_the_seed_whatever_the_batch_size_and_the_chunks(small, monkeypatch):
    texts = [random_text() for _ in range(7)]
    draw = lambda *options, **stdin: small("--temperature", 1.5, *options, **stdin)[1]
    first = draw("--seed", 3, *texts)
    monkeypatch.setattr(translate, "LINES_AT_A_TIME", 2)
    assert draw("--seed", 3, "--batch-size", 1, stdin="\n".join(texts).encode()) == first
    assert draw("--seed", 3, "--batch-size", 5, *texts) == first
    assert draw("--seed", 4, *texts) != first and small("--top-k", 50, *texts)[1] != small(*texts)[1]


def test_decoding_is_what_the_options_ask_for(run, small, demo, expected):
    texts = [random_text() for _ in range(3)]
    assert small("--top-k", 1, *texts)[1] == expected(texts)
    assert small("--beam", 3, *texts)[1] == expected(texts, beams=3)
    text = "Il faut que je te dise quelque chose de très important."
    _, out, _ = run(translate, *PREFIX, "--beam", 4, "--length-penalty", -9, text)
    penalised = lambda x: translate_texts(*demo, [text], ("fr", "en"), Decoding(beams=4, length_penalty=x))[0].text
    assert out == penalised(-9.0) + "\n" and penalised(-9.0) != penalised(1.0)


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--weights", "int8"]])
def test_other_forms_of_the_weights_translate(run, options):
    assert "rain" in run(translate, *PREFIX, *options, "Il pleut.")[1]


@pytest.mark.parametrize("options, words", [
    (["--from", "es"], ["no bank 'es'", "en, fr"]),
    (["--choices", "a", " "], ["--choices: an answer is empty"]),
    (["--choices", "a", "--beam", "2"], ["--choices does not go with --beam"]),
    (["--choices", "a", "--top-k", "2"], ["--top-k", "not with"]),
    (["--from", "en", "--to", "en"], ["--from en --to en"]),
    (["--beam", "2", "--temperature", "1"], ["--beam", "--temperature"]),
    (["--beam", "2", "--temperature", "0", "--top-k", "5"], ["--top-k", "not with --beam"]),
    (["--length-penalty", "2"], ["--length-penalty goes with --beam"]),
    (["--beam", "5000"], ["--beam 5,000", "tokens of this model's vocabulary"]),
    (["--top-k", "99999"], ["--top-k 99,999", "tokens of this model's vocabulary"]),
    (["--batch-size", "65537"], ["--batch-size", "1 to 65,536"]),
    (["--weights", "int8", "--dtype", "float16"], ["--weights int8 is for a CPU, in float32"]),
    (["--prefix", "nothing"], ["nothing: no prefix file there"]),
    (["--prefix", ROOT / "minigpt/demo/model.safetensors"], ["not a prefix file"]),
    (["--model", "nothing"], ["--model nothing: no such directory"]),
    (["-oui"], ["unrecognized arguments: -oui"]),
], ids=lambda value: " ".join(map(str, value))[:30])  # fmt: skip
def test_a_mistake_in_translating_is_one_line_and_exit_code_2(small, options, words):
    assert_refused(small(*options, "--", "Bonjour"), *words)


# Which prefix, on which base


def test_without_prefix_the_newest_run_with_these_banks_is_used_else_the_demo_prefix(run, place, monkeypatch):
    """A base that has been moved can be named."""
    monkeypatch.setattr(cli, "DEMO_PREFIX", place / "run3" / "prefix.safetensors")
    used = lambda *options: run(translate, "--max-new-tokens", 2, *options, "Bonjour")
    assert f"Using the prefix {place}/run3/prefix.safetensors" in used()[2]
    banks = Banks.load(place / "run" / "prefix.safetensors")
    banks.training_record = {"model": "/moved/base"}
    Path("runs/a").mkdir(parents=True)
    banks.save("runs/a/prefix.safetensors", GPT.from_pretrained(place / "base"))
    assert f"Using the prefix {place}/run3/prefix.safetensors" in used("--to", "de")[2]
    code, out, err = used()
    assert (code, out) == (2, "") and "/moved/base" in err and "--model" in err
    code, _, err = used("--model", place / "base")
    assert code == 0 and "Using the prefix runs/a/prefix.safetensors\nTranslating fr to en\n" in err
