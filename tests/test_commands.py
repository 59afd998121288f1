"""The three commands, as a newcomer and as a careless user meet them."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_rows, random_text, save_random_checkpoint, write_table

import evaluate
import train
import translate
from minigpt import GPT, Tokenizer, checkpoint
from minigpt.generate import Generated
from prefix import cli, distributed, translation
from prefix import run as runs
from prefix.banks import Banks
from prefix.evaluation import compare as evaluation
from prefix.evaluation import metrics
from prefix.run import DEMO_PREFIX
from prefix.trainer import Trainer
from prefix.translation import Translation
from prefix.translation import translate as translate_texts

ROOT = Path(__file__).parents[1]
CONTEXT = 200
TRAIN = ["--steps", "3", "--batch-size", "4", "--prefix-len", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints `base` and `other`, the tables en-fr.csv and en-fr-de.csv, and the trained prefixes of
    runs `run` and `run3`."""
    place = tmp_path_factory.mktemp("place")
    for name in ("base", "other"):
        save_random_checkpoint(place / name, CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_HOME", str(place / "home"))
        for out, columns in (("run", ["en", "fr"]), ("run3", ["en", "fr", "de"])):
            table = place / f"{'-'.join(columns)}.csv"
            rows = random_rows("train", 12, len(columns)) + random_rows("validation", 2, len(columns))
            write_table(table, [columns, *rows, *random_rows("test", 5, len(columns))])
            options = ["--model", place / "base", "--data", table, "--columns", *columns, "--out", place / out]
            patch.setattr(sys, "argv", ["train.py", *map(str, options), *TRAIN])
            train.main()
    return place


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, place):
    """Every command runs in an empty folder."""
    monkeypatch.setenv("MINIGPT_HOME", str(place / "home"))
    monkeypatch.chdir(tmp_path)


def assert_refused(result, *words):
    """One line on standard error that has these words, nothing on standard output, exit code 2."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert str(word) in err


# train.py


def test_training_leaves_a_run_directory_and_says_what_to_do_next(run, place):
    arguments = ["--model", place / "base", "--data", place / "en-fr.csv", *TRAIN]
    code, out, err = run(train, *arguments, "--out", "my first run")
    assert (code, out) == (0, "")
    assert set(os.listdir("my first run")) == {"prefix.safetensors", "last", "metrics.jsonl", "config.json"}
    last = err.splitlines()[-1]
    model = GPT.from_pretrained(place / "base")
    share = 2 * 2 * 2 * 3 * 32 / sum(p.numel() for p in model.parameters())
    assert f"Trained {2 * 2 * 2 * 3 * 32:,} parameters ({share:.2%} of the model) in " in last
    assert "my first run/prefix.safetensors" in last
    _, to_try = last.split("Try: python translate.py ")
    code, out, _ = run(translate, *shlex.split(to_try))
    assert (code, out.count("\n")) == (0, 1)


@pytest.mark.parametrize("columns", [["fr", "en"], ["en", "de"], ["en", "de", "fr"]], ids="-".join)
def test_a_french_word_is_to_be_tried_only_where_french_would_be_read(run, place, columns):
    arguments = ["--model", place / "base", "--data", place / "en-fr-de.csv", "--columns", *columns, *TRAIN]
    code, _, err = run(train, *arguments, "--out", "my run")
    assert code == 0 and err.endswith("Try: python evaluate.py --prefix 'my run'\n")


def test_the_config_of_a_run_is_the_command_with_its_defaults_filled_in(run, place):
    config = json.loads((place / "run" / "config.json").read_text())
    assert config["model"] == str(place / "base") and config["data"] == [str(place / "en-fr.csv")]
    assert (config["columns"], config["prefix_len"], config["max_tokens"]) == (["en", "fr"], 3, 384)
    settings = {"steps": 3, "batch_size": 4, "warmup": 0, "eval_every": 1, "seed": 0}
    assert settings.items() <= config["settings"].items()


def test_of_several_processes_the_first_alone_says_which_model_is_used(place, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "on_disk", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(place / "en-fr.csv")])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        assert runs.resolve(train.parse_arguments())["model"] == "demo"
        assert capsys.readouterr().err.count("Using the small demo checkpoint") == (rank == 0)


def test_without_out_every_run_gets_a_directory_of_its_own_even_in_the_same_second(run, place, monkeypatch):
    times = iter(["now", "now", "now", "later"])
    monkeypatch.setattr("prefix.run.time.strftime", lambda _: next(times))
    for _ in range(2):
        assert run(train, "--model", place / "base", "--data", place / "en-fr.csv", *TRAIN)[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["later", "now"]


def test_a_directory_that_is_not_empty_is_refused_and_stays_as_it_is(run, place):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    result = run(train, "--model", place / "base", "--data", place / "en-fr.csv", *TRAIN, "--out", "mine")
    assert_refused(result, "--out mine", "not empty", "--resume mine")
    assert [path.read_text() for path in Path("mine").iterdir()] == ["years of work"]


@pytest.mark.parametrize(
    "mistake, words",
    [
        (["--prefix-len", "0"], ["--prefix-len", "'0'", "1 or more"]),
        (["--prefix-len", "65537"], ["--prefix-len 65,537", "65,536 slots at most"]),
        (["--prefix-len", "9" * 13, "--init", "random"], ["--prefix-len", "65,536 slots at most"]),
        (["--steps", "x"], ["--steps", "'x'"]),
        (["--steps", "²"], ["--steps", "'²'"]),
        (["--lr", "-1"], ["--lr", "'-1'", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--seed", "9" * 30], ["--seed", "too large"]),
        (["--limit", "0"], ["--limit"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--data", "nothing.csv"], ["nothing.csv: no such file"]),
        (["--data", "."], [".: not a regular file"]),
        (["--columns", "en", "de"], ["no column 'de'", "'en', 'fr'"]),
        (["--columns", "en"], ["2 to 31 columns"]),
        (["--model", "gpt9"], ["--model gpt9", "gpt2-xl"]),
        (["--model", "."], ["config.json"]),
        (["--max-tokens", "3"], ["no row that can be used", "(over 3 tokens)"]),
        (["--resume", "nothing"], ["--resume", "--data"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_run_directory(run, place, mistake, words):
    result = run(train, "--model", place / "base", "--data", place / "en-fr.csv", *TRAIN, "--out", "new", *mistake)
    assert_refused(result, *words)
    assert not Path("new").exists()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(run, place, device):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is an accelerator")
    options = ["--model", place / "base", "--data", place / "en-fr.csv", "--out", "new", "--device", device]
    assert_refused(run(train, *options), f"--device {device}", "--device cpu")
    assert not Path("new").exists()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_without_training_pairs_there_is_one_line_and_no_run_directory(run, place, split):
    table = write_table("small.csv", [("en", "fr"), *random_rows(split, 2)])
    result = run(train, "--model", place / "base", "--data", table, "--out", "new")
    assert_refused(result, "no training pair", "more data")
    assert not Path("new").exists()


def test_pairs_longer_than_the_context_are_left_out_and_counted(run, place):
    long = [[f"{'word ' * 200}{i}", "mot"] for i in range(3)]
    table = write_table("long.csv", [("en", "fr"), *random_rows("train", 5), *long])
    code, _, err = run(train, "--model", place / "base", "--data", table, *TRAIN)
    assert code == 0 and f"3 rows skipped: too long (over {CONTEXT} tokens) (first at line 7)" in err


# train.py --resume


def interrupt_after(monkeypatch, step):
    """As Ctrl-C would, at the end of a step."""
    optimizer_step = Trainer.optimizer_step

    def interrupted(trainer):
        record = optimizer_step(trainer)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return record

    monkeypatch.setattr(Trainer, "optimizer_step", interrupted)


def test_a_run_that_was_interrupted_says_how_to_go_on_and_ends_as_if_it_had_not_been(run, place, monkeypatch):
    options = ["--model", place / "base", "--data", place / "en-fr.csv", *TRAIN, "--steps", 6, "--attention", "plain"]
    outs = ["whole", "an interrupted run"]
    run(train, *options, "--out", outs[0])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        code, out, err = run(train, *options, "--out", outs[1])
    assert (code, out) == (130, "")
    said, to_do = err.splitlines()[-1].split("; to go on: python train.py ")
    assert said == "stopped after step 3"
    code, _, err = run(train, *shlex.split(to_do))
    assert code == 0 and "Trained" in err
    model = GPT.from_pretrained(place / "base")
    one, other = (Banks.load(f"{out}/prefix.safetensors", model) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    configs = [json.loads(Path(out, "config.json").read_text()) for out in outs]
    assert configs[0] == configs[1]


def test_a_run_may_go_on_for_more_steps_but_not_otherwise_than_it_began(run, place):
    shutil.copytree(place / "run", "run")
    assert_refused(run(train, "--resume", "run", "--lr", "1"), "--lr cannot be new")
    code, _, err = run(train, "--resume", "run", "--steps", 5)
    assert code == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_micro_batches_are_those_that_a_run_began_with_unless_told_otherwise(run, place, monkeypatch):
    options, found = ["--model", place / "base", "--data", place / "en-fr.csv", *TRAIN, "--out", "run"], []
    work = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda trainer: (found.append(trainer.micro_batch_tokens), work(trainer))[1])
    for arguments in ([*options, "--micro-batch-tokens", 50], ["--resume", "run"]):
        assert run(train, *arguments)[0] == 0
    assert run(train, "--resume", "run", "--steps", 5, "--micro-batch-tokens", 70)[0] == 0
    assert run(train, "--resume", "run")[0] == 0
    assert found == [50, 50, 70, 50]


def test_a_run_that_is_past_the_steps_asked_for_is_refused_and_stays_as_it_is(run, place):
    shutil.copytree(place / "run", "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert_refused(run(train, "--resume", "run", "--steps", 2), "3 steps are done already", "--steps 2")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prefix_len": 4}, "another prefix_len (3, here 4)"),
        ({"reparam": True}, "another reparam (False, here True)"),
        ({"init": "random"}, "another init (text, here random)"),
        ({"columns": ["fr", "en"]}, "another columns (['en', 'fr'], here ['fr', 'en'])"),
    ],
    ids=str,
)
def test_a_run_whose_config_was_changed_does_not_go_on_and_says_in_what(run, place, change, words):
    shutil.copytree(place / "run", "run")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | change))
    assert_refused(run(train, "--resume", "run"), "this run has", words)


@pytest.mark.parametrize(
    "content, fault",
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "is not the config of a run: model is missing"),
    ],
)
def test_a_run_directory_without_a_sound_config_is_refused(run, content, fault):
    Path("run").mkdir()
    if content:
        Path("run/config.json").write_text(content)
    assert_refused(run(train, "--resume", "run"), "run/config.json", fault)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"data": "demo"},
        {"columns": [1, 2]},
        {"limit": -1},
        {"max_tokens": "384"},
        {"init": ["text"]},
        {"prefix_len": 65537},
        {"position_offset": None},
        {"reparam": "yes"},
        {"settings": {}},
        {"settings": {"steps": 3, "lr": 1, "pace": 1}},
        {"settings": {"steps": 10**30, "lr": 1}},
        {"settings": {"steps": 3, "lr": "1"}},
        {"settings": {"steps": 3, "lr": 1, "seed": -1}},
        {"settings": {"steps": 3, "lr": 1, "batch_size": 10**12}},
        {"settings": {"steps": 3, "lr": 1, "save_every": "soon"}},
        {"settings": {"steps": True, "lr": 1}},
        {"machine": []},
        {"machine": {"device": "tpu"}},
        {"machine": {"micro_batch_tokens": 0}},
    ],
    ids=str,
)
def test_a_setting_of_a_run_that_no_option_would_take_is_refused(run, place, change):
    shutil.copytree(place / "run", "run")
    config = json.loads(Path("run/config.json").read_text()) | change
    Path("run/config.json").write_text(json.dumps(config))
    assert_refused(run(train, "--resume", "run"), "run/config.json is not the config of a run: ")


# translate.py


@pytest.fixture
def expected(place):
    """A function: texts -> the lines that translate.py owes for them."""
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    banks = Banks.load(place / "run" / "prefix.safetensors", model)

    def expected(texts, source="fr", target="en", **options):
        results = translate_texts(model, tokenizer, banks, texts, source, target, max_new=6, **options)
        return "".join(result.text + "\n" for result in results)

    return expected


def on(place):
    return ["--prefix", place / "run", "--max-new-tokens", 6]


def test_each_argument_gets_a_line_of_standard_output_and_nothing_else_is_there(run, place, expected):
    texts = [random_text() for _ in range(5)] + ["", "two\nlines"]
    code, out, err = run(translate, *on(place), *texts)
    assert (code, out) == (0, expected(texts))
    assert "cut at their token limit (--max-new-tokens)" in err


@pytest.mark.parametrize(
    "stdin, texts",
    [
        (b"", []),
        (b"\n", [""]),
        (b"un\ndeux\n", ["un", "deux"]),
        (b"un\ndeux", ["un", "deux"]),
        (b"un\n\n \n\ndeux\n\n", ["un", "", "", "", "deux", ""]),
        (b"un\r\ndeux\r\n", ["un", "deux"]),
        (b"un\rdeux\n", ["un deux"]),
        (b"un \xff\xfe\ndeux\n", ["un \ufffd\ufffd", "deux"]),
        (b"un \x00 \xe2\x80\xa8 deux\ntrois\n", ["un \0 \u2028 deux", "trois"]),
        ("<|endoftext|>\n« Où ça ? »\n".encode(), ["<|endoftext|>", "« Où ça ? »"]),
    ],
    ids=repr,
)
def test_each_line_of_standard_input_gets_a_line_of_standard_output(run, place, expected, stdin, texts):
    code, out, _ = run(translate, *on(place), stdin=stdin)
    assert (code, out) == (0, expected(texts))
    assert out.count("\n") == len(texts)


def test_more_lines_than_are_read_at_a_time_keep_their_order(run, place, expected, monkeypatch):
    monkeypatch.setattr(translate, "LINES_AT_A_TIME", 3)
    texts = [random_text() for _ in range(14)]
    _, out, _ = run(translate, *on(place), "--batch-size", 2, stdin="\n".join(texts).encode())
    assert out == expected(texts)


def test_a_translation_with_line_breaks_in_it_is_printed_on_one_line(run, place, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: "a\nb\rc\u2028d\x85e\n")
    assert run(translate, *on(place), "x", "y")[1] == "a b c d e\na b c d e\n"


def test_the_end_of_text_token_in_a_sentence_is_ordinary_text(run, place, monkeypatch):
    asked, tokenizer = [], Tokenizer.from_pretrained(place / "base")
    answer = lambda model, prompts, *_: asked.extend(prompts) or [Generated()]
    monkeypatch.setattr(translation, "generate", answer)
    run(translate, *on(place), "a <|endoftext|> b")
    assert tokenizer.eot not in asked[0].ids
    assert tokenizer.decode(asked[0].ids) == "a <|endoftext|> b\n"


def test_a_sentence_that_is_too_long_is_told_by_its_line_and_the_others_are_translated(run, place, expected):
    long, endless = "mot " * CONTEXT, "x" * 1_000_000
    code, out, err = run(translate, *on(place), stdin=f"un\n{long}\n\ndeux\n{endless}".encode())
    assert (code, out) == (2, expected(["un", "", "", "deux", ""]))
    assert re.search(r"^line 2: \d+ tokens leave no room to answer", err, re.MULTILINE)
    assert re.search(r"^line 5: more than [\d,]+ characters", err, re.MULTILINE)
    assert "error: 2 of 5 sentences could not be translated" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "prefix, options, direction",
    [
        ("run", [], ("fr", "en")),
        ("run", ["--from", "fr"], ("fr", "en")),
        ("run", ["--from", "en"], ("en", "fr")),
        ("run", ["--to", "en"], ("fr", "en")),
        ("run", ["--to", "fr"], ("en", "fr")),
        ("run", ["--from", "en", "--to", "fr"], ("en", "fr")),
        ("run3", [], ("fr", "en")),
        ("run3", ["--from", "de"], ("de", "en")),
        ("run3", ["--from", "en"], ("en", "fr")),
        ("run3", ["--to", "de"], ("fr", "de")),
        ("run3", ["--to", "fr"], ("en", "fr")),
        ("run3", ["--from", "de", "--to", "fr"], ("de", "fr")),
    ],
    ids=str,
)
def test_the_direction_is_second_bank_to_first_unless_told_otherwise(place, monkeypatch, prefix, options, direction):
    monkeypatch.setattr(sys, "argv", ["translate.py", *options])
    banks = Banks.load(place / prefix / "prefix.safetensors", GPT.from_pretrained(place / "base"))
    assert cli.direction(translate.parse_arguments(), banks) == direction


def test_both_directions_are_translated(run, place, expected):
    texts = [random_text() for _ in range(3)]
    assert run(translate, *on(place), "--from", "en", *texts)[1] == expected(texts, "en", "fr")
    assert run(translate, *on(place), "--from", "fr", *texts)[1] == expected(texts, "fr", "en")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--from", "es"], ["no bank 'es'", "en, fr"]),
        (["--to", "es"], ["no bank 'es'", "en, fr"]),
        (["--from", "en", "--to", "en"], ["--from en --to en"]),
        (["--beam", "2", "--temperature", "1"], ["--beam", "--temperature"]),
        (["--beam", "0"], ["--beam", "1 or more"]),
        (["--top-p", "0"], ["--top-p"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--prefix", "nothing"], ["nothing: no prefix file there"]),
        (["--prefix", ROOT / "train.py"], ["train.py: not a safetensors file"]),
        (["--prefix", ROOT / "minigpt/demo/model.safetensors"], ["not a prefix file"]),
        (["--model", "nothing"], ["--model nothing: no such directory"]),
        (["-oui"], ["unrecognized arguments: -oui"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:30],
)
def test_a_mistake_in_translating_is_one_line_and_exit_code_2(run, place, options, words):
    assert_refused(run(translate, *on(place), *options, "--", "Bonjour"), *words)


def test_a_prefix_of_another_base_is_refused_naming_both(run, place):
    fingerprints = [GPT.from_pretrained(place / name).fingerprint for name in ("base", "other")]
    result = run(translate, *on(place), "--model", place / "other", "Bonjour")
    assert_refused(result, "run/prefix.safetensors", *fingerprints)


def test_a_base_that_has_been_moved_can_be_named(run, place):
    save_random_checkpoint(Path("here"))
    run(train, "--model", "here", "--data", place / "en-fr.csv", *TRAIN, "--out", "run")
    there = Path("here").resolve()
    Path("here").rename("there")
    assert_refused(run(translate, "--prefix", "run", "Bonjour"), there, "no longer there", "--model")
    assert run(translate, "--prefix", "run", "--model", "there", "Bonjour")[0] == 0


def test_samples_follow_from_the_seed_whatever_the_batch_size(run, place, monkeypatch):
    monkeypatch.setattr(translate, "LINES_AT_A_TIME", 2)
    texts = [random_text() for _ in range(7)]
    draw = lambda *options: run(translate, *on(place), "--temperature", 1.5, *options, *texts)[1]
    first = draw("--seed", 3, "--batch-size", 1)
    assert draw("--seed", 3, "--batch-size", 5) == draw("--seed", 3) == first
    assert draw("--seed", 4) != first


def test_the_likeliest_of_one_token_is_greedy(run, place, expected):
    texts = [random_text() for _ in range(3)]
    assert run(translate, *on(place), "--top-k", 1, *texts)[1] == expected(texts)


def test_beam_search_is_what_the_option_asks_for(run, place, expected):
    texts = [random_text() for _ in range(3)]
    assert run(translate, *on(place), "--beam", 3, *texts)[1] == expected(texts, beams=3)


def test_without_prefix_the_newest_run_is_used_else_the_demo_prefix(run, place, monkeypatch):
    monkeypatch.setattr(cli, "DEMO_PREFIX", place / "run3" / "prefix.safetensors")
    assert f"Using the prefix {place}/run3/prefix.safetensors" in run(translate, "--max-new-tokens", 2, "Bonjour")[2]
    for i, name in enumerate(["b", "c", "a"]):
        shutil.copytree(place / "run", Path("runs", name))
        os.utime(Path("runs", name, "prefix.safetensors"), (i, i))
    assert "Using the prefix runs/a/prefix.safetensors" in run(translate, "--max-new-tokens", 2, "Bonjour")[2]


def test_the_demo_translates_on_a_fresh_clone(run):
    code, out, err = run(translate, "--device", "cpu", "Bonjour", "Il pleut.")
    assert (code, out.count("\n")) == (0, 2) and all(out.splitlines())
    assert f"Using the prefix {DEMO_PREFIX}" in err


# evaluate.py


@pytest.fixture
def evaluated(run, place):
    """A function: options -> (standard output, what --json wrote)."""

    def evaluated(*options):
        arguments = ["--prefix", place / "run", "--limit", 5, "--shots", 1, "--draws", 2, "--json", "result.json"]
        code, out, _ = run(evaluate, *arguments, *options)
        assert code == 0
        return out, json.loads(Path("result.json").read_text(encoding="utf-8"))

    return evaluated


def test_an_evaluation_scores_the_outputs_that_it_keeps_in_both_directions(place, evaluated):
    out, result = evaluated("--examples", 1)
    test_rows = list(csv.reader(open(place / "en-fr.csv", encoding="utf-8")))[-5:]
    for report, (source, target) in zip(result["directions"], ((1, 0), (0, 1)), strict=True):
        assert report["sources"] == [row[source] for row in test_rows]
        assert report["references"] == [row[target] for row in test_rows]
        few = report["few_shot"]
        for outputs, score in [(report["outputs"], report["prefix"]), *zip(few["outputs"], few["draws"], strict=True)]:
            assert score["bleu"] == metrics.corpus_bleu(outputs, report["references"])
            assert score["chrf"] == metrics.chrf(outputs, report["references"])
            assert score["sentence_bleu"] == metrics.mean_sentence_bleu(outputs, report["references"])
            assert score["empty"] == outputs.count("")
        assert few["mean"]["chrf"] == pytest.approx(sum(s["chrf"] for s in few["draws"]) / 2)
        assert f"{report['prefix']['chrf']:.2f}" in out
        assert f"{few['mean']['chrf']:.2f} ± {few['spread']['chrf']:.1f}" in out
        assert report["outputs"][0] in out and few["outputs"][0][0] in out and report["references"][0] in out
    assert "fr -> en, 5 sentences" in out and "en -> fr, 5 sentences" in out
    assert metrics.signature("BLEU", test_rows[0]) in out and result["signatures"]["bleu"] in out


def test_an_evaluation_translates_as_translate_does(place, evaluated, run):
    _, result = evaluated()
    for report in result["directions"]:
        _, out, _ = run(translate, "--prefix", place / "run", "--from", report["source"], *report["sources"])
        assert out == "".join(text + "\n" for text in report["outputs"])


def test_an_evaluation_is_repeatable(evaluated):
    def without_seconds(value):
        if isinstance(value, dict):
            return {name: without_seconds(v) for name, v in value.items() if name != "seconds"}
        return [without_seconds(v) for v in value] if isinstance(value, list) else value

    assert without_seconds(evaluated()[1]) == without_seconds(evaluated()[1])


def test_each_draw_prompts_with_other_training_pairs(place, evaluated):
    out, result = evaluated("--shots", 3, "--show-prompt")
    training = {tuple(row) for row in list(csv.reader(open(place / "en-fr.csv", encoding="utf-8")))[1:13]}
    for report in result["directions"]:
        one, other = report["few_shot"]["prompts"]
        assert one != other and one in out
        lines = [line.split(": ", 1) for line in one.splitlines()]
        assert [name for name, _ in lines] == [report["source"], report["target"]] * 3
        pairs = {(a, b) if report["source"] == "en" else (b, a) for (_, a), (_, b) in zip(lines[::2], lines[1::2])}
        assert len(pairs) == 3 and pairs <= training


def test_zero_shots_are_asked_once_and_without_examples(evaluated):
    _, result = evaluated("--shots", 0)
    assert [report["few_shot"]["prompts"] for report in result["directions"]] == [[""], [""]]


def test_without_draws_only_the_prefix_is_evaluated(evaluated):
    out, result = evaluated("--draws", 0, "--examples", 2)
    assert [report["few_shot"] for report in result["directions"]] == [None, None]
    assert "1-shot  " not in out and "prefix minus" not in out


def test_the_order_in_which_columns_are_named_makes_no_training_pair_a_test_pair(evaluated):
    one, other = (evaluated("--draws", 0, "--columns", *columns)[1] for columns in (["fr", "en"], ["en", "fr"]))
    assert [report["sources"] for report in one["directions"]] == [report["sources"] for report in other["directions"]]


def test_three_banks_are_evaluated_in_six_directions(run, place):
    code, out, _ = run(evaluate, "--prefix", place / "run3", "--limit", 1, "--draws", 0, "--examples", 0)
    assert code == 0 and out.count(" -> ") == 6


def test_other_data_another_split_and_beams_are_what_the_options_ask_for(place, evaluated):
    rows = [(fr, en) for en, fr in random_rows("validation", 3)]
    table = write_table("mine.csv", [("fr", "en"), *rows])
    _, result = evaluated("--data", table, "--split", "validation", "--beam", 2, "--draws", 0)
    assert result["directions"][0]["sources"] == [row[0] for row in rows]
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    banks = Banks.load(place / "run" / "prefix.safetensors", model)
    outputs = translate_texts(model, tokenizer, banks, [row[0] for row in rows], "fr", "en", beams=2)
    assert result["directions"][0]["outputs"] == [output.text for output in outputs]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--shots", 12, "--limit", 1], ["12 shots of", f"context of {CONTEXT}"]),
        (["--shots", 13], ["13 shots, but 12 training pairs", "--draws 0"]),
        (["--json", "nowhere/result.json"], ["--json nowhere/result.json"]),
        (["--json", "."], ["--json ."]),
        (["--split", "dev"], ["--split", "'dev'"]),
        (["--data", "nothing.csv"], ["nothing.csv: no such file"]),
        (["--columns", "en", "de"], ["no bank 'de'"]),
        (["--limit", 0], ["--limit"]),
        (["--model", "nothing"], ["--model nothing"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:30],
)
def test_a_mistake_in_evaluating_is_one_line_and_exit_code_2(run, place, options, words):
    assert_refused(run(evaluate, "--prefix", place / "run", *options), *words)


def test_a_result_on_standard_output_follows_the_table_also_in_a_file(place):
    options = ["--prefix", place / "run", "--limit", 1, "--draws", 0, "--examples", 0, "--json", "/dev/stdout"]
    with open("result.txt", "wb") as file:
        subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, options)], stdout=file, check=True, timeout=300)
        file.write(b"and more")
    table, brace, rest = Path("result.txt").read_text(encoding="utf-8").partition("\n{")
    assert table.startswith("fr -> en, 1 sentence") and rest.endswith("and more")
    assert len(json.loads(brace + rest.removesuffix("and more"))["directions"]) == 2


def test_a_result_may_go_into_a_pipe(run, place):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    options = ["--split", "validation", "--limit", 1, "--draws", 0, "--json", f"/dev/fd/{writer}"]
    code, _, err = run(evaluate, "--prefix", place / "run", *options)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    assert code == 0 and len(json.loads(text)["directions"]) == 2, err


def test_a_split_without_pairs_is_refused(run, place):
    table = write_table("mine.csv", [("en", "fr"), *random_rows("train", 3)])
    result = run(evaluate, "--prefix", place / "run", "--data", table)
    assert_refused(result, "none of the 3 usable pairs", "test split")


@pytest.mark.parametrize("right", [1, 0.5, 0])
@pytest.mark.parametrize("n", [100, 99])
def test_the_table_says_whether_the_prefix_differs_from_the_median_draw(n, right):
    references = [random_text(9) + " and so on" for _ in range(n)]
    some = lambda share: [text if i < share * n else text.upper() for i, text in enumerate(references)]
    scored = lambda texts: evaluation.timed(references, lambda: [Translation(text) for text in texts])
    drawn = [(*scored(some(share)), "") for share in (0.9, 0.1, 0.5)]
    report = evaluation.report(("fr", "en"), references, references, *scored(some(right)), drawn)
    found = metrics.paired_bootstrap(some(right), some(0.5), references)
    assert report["few_shot"]["difference"] == {"draw": 2, **found}
    said = evaluation.table(report, 3)[-1]
    verdict = "not significant (p = 1.000)" if right == 0.5 else "significant at p = 0.002"
    assert said.endswith("), too few sentences to tell" if n < 100 else f"), {verdict}")
    assert f"prefix minus the median draw: {found['delta']:+.2f} BLEU (95 % of 1,000 resamples: " in said


# All of them


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nOf")],
    ids=repr,
)
def test_a_full_disk_and_too_little_memory_are_one_line(run, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(train, "main", fail)
    assert_refused(run(train), str(error).split("\n")[0] or "out of memory")


def test_too_little_main_memory_is_one_line(run, place, monkeypatch):
    monkeypatch.setattr("prefix.run.Banks.random", lambda *_: torch.empty(1 << 50))
    options = ["--model", place / "base", "--data", place / "en-fr.csv", "--init", "random"]
    assert_refused(run(train, *options, "--out", "new"), "allocate")
    assert not Path("new").exists()


def test_a_bug_is_not_taken_for_a_users_mistake(run, monkeypatch):
    def fail():
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "main", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(train)


@pytest.fixture
def shell(place):
    """A function: a line of shell -> its result. The scripts run in processes of their own."""

    def shell(line):
        script = f"{sys.executable} {ROOT}/translate.py --prefix {place}/run"
        words = f"set -o pipefail; {line}".replace("translate.py", script)
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # as a locale may have it
        return subprocess.run(["bash", "-c", words], capture_output=True, env=environment, timeout=300)

    return shell


def test_in_a_pipe_translations_are_utf_8_whatever_the_locale(shell, expected):
    done = shell(f"printf 'été\\n\\n{'mot ' * CONTEXT}\\ndeux' | translate.py --max-new-tokens 6")
    assert (done.returncode, done.stdout.decode()) == (2, expected(["été", "", "", "deux"]))
    assert b"line 3: " in done.stderr and b"Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error_message(shell):
    done = shell("yes | head -2000 | translate.py --batch-size 1 --max-new-tokens 1 2> errors | head -1; cat errors")
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""


def test_columns_that_are_left_out_unasked_are_named(run, place):
    line = ["--model", place / "base", "--data", place / "en-fr-de.csv", *TRAIN]
    assert "Columns not used: de (--columns" in run(train, *line)[2]
    assert "not used" not in run(train, *line, "--columns", "en", "fr")[2]
