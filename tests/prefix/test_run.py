"""What a run is made of: the command as resolved, directions and banks to train, and which run is the newest."""

import json
import os
from pathlib import Path

import pytest

import train
from minigpt import UserError
from prefix import run as runs
from prefix.init import random_banks


@pytest.fixture
def config_of(monkeypatch):
    """A function: options of train.py -> the config of such a run."""

    def config_of(*options):
        monkeypatch.setattr("sys.argv", ["train.py", "--model", "demo", *map(str, options)])
        return runs.resolve(train.parse_arguments())

    return config_of


def test_defaults_and_what_is_given_instead(config_of, tmp_path):
    """A learning rate serves all starts, and is smaller through the network."""
    settings = config_of()["settings"]
    assert (settings["lr"], settings["warmup"], settings["eval_every"]) == (runs.LR, 15, 50)
    settings = config_of("--reparam", "--eval-every", 0, "--warmup", 0)["settings"]
    assert (settings["lr"], settings["warmup"], settings["eval_every"]) == (runs.REPARAM_LR, 0, 0)
    config = config_of("--lr", 0.1, 0.3, "--prefix-len", 7, "--position-offset", "prefix")
    assert config["settings"]["lr"] == [0.1, 0.3] and config["position_offset"] == 7


def test_columns_that_are_not_used_and_words_that_name_banks_are_told_unless_they_were_named(config_of, write, capsys):
    def told(file, *options):
        config_of("--data", file, *options)
        return capsys.readouterr().err

    wide = write("wide.csv", "id,en,fr\n1,one,un\n2,two,deux\n")
    assert "Columns not used: id (--columns" in told(wide) and not told(wide, "--columns", "en", "fr")
    words, objects = write("words.csv", "chat,cat\nchien,dog\n"), write("words.jsonl", '{"chat": "chien", "cat": "dog"}\n')
    assert "Line 1 is read as the names of the columns: chat, cat (if it is a row" in told(words)
    assert not told(words, "--columns", "chat", "cat") and not told(objects)


# --pairs, --train-banks


def test_pairs_name_the_directions_and_without_columns_the_banks(config_of, write):
    table = write("t.csv", "review,label,article,summary\na fine film,good,a long text,short\n")
    config = config_of("--data", table, "--pairs", "review:label", "article:summary")
    assert config["columns"] == ["review", "label", "article", "summary"]
    assert config["pairs"] == ["review:label", "article:summary"]
    assert runs.directions(config) == [(0, 1), (2, 3)]
    assert runs.directions(config_of()) is None


@pytest.mark.parametrize("fields, message", [
    ({"pairs": ["en:xx"]}, "--pairs en:xx: not one of en:fr, en:de, fr:en, "),
    ({"pairs": ["en:fr"]}, "--pairs has no pair with de"),
    ({"train_banks": ["xx"]}, "--train-banks xx: not one of en, fr, de"),
    ({"train_banks": ["de"]}, "--train-banks leaves en untrained: give a prefix that has this bank, --from-prefix"),
], ids=str)  # fmt: skip
def test_a_pair_or_bank_that_cannot_be_trained_is_one_line(fields, message):
    config = {"columns": ["en", "fr", "de"], "pairs": None, "train_banks": None, "from_prefix": None}
    with pytest.raises(UserError, match=message):
        runs.directions(config | fields)


# --resume


def test_a_config_that_is_missing_or_has_a_missing_or_foreign_field_is_one_line_that_names_it(config_of, write, tmp_path):
    with pytest.raises(UserError, match=r"no run to go on with: no .*nosuch/config.json"):
        runs.read_config(tmp_path / "nosuch" / "config.json")
    config, told = config_of(), "config.json: not the config of a run of this version: "
    without = {name: value for name, value in config.items() if name != "columns"}
    for content, fault in ((config | {"alien": 1}, "alien is unknown"), (without, "columns is missing")):
        with pytest.raises(UserError, match=told + fault):
            runs.read_config(write("config.json", json.dumps(content)))


def test_runs_of_the_same_second_have_directories_of_their_own(workplace, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    for name in ("now", "now-2", "now-3"):
        with runs.directory(None) as out:
            assert out == Path("runs") / name


def test_a_directory_where_another_run_began_meanwhile_is_left_alone(write, tmp_path):
    write("thesis.txt", "years of work")
    with pytest.raises(UserError, match="not empty"), runs.directory(tmp_path):
        pytest.fail("it was used")


# The newest run


@pytest.fixture
def folder(tmp_path, monkeypatch, model, config_of):
    """A function: name, banks, loss -> the prefix file of a run in runs/, each newer than the one before."""
    monkeypatch.chdir(tmp_path)
    config, made = config_of(), []

    def folder(name, banks, val_loss=1.0):
        out, banks = runs.RUNS / name, random_banks(model.config, banks, 2)
        out.mkdir(parents=True)
        banks.training_record = {"val_loss": val_loss}
        banks.save(out / "prefix.safetensors", model)
        runs.write_config(out, config | {"columns": banks.names})
        made.append(name)
        for path in out.iterdir():
            os.utime(path, (len(made), len(made)))
        return out / "prefix.safetensors"

    return folder


def test_the_newest_run_is_the_newest_whose_banks_fit(folder):
    assert runs.newest_run() is None
    old, newer = folder("old", ["en", "fr"]), folder("newer", ["review", "label"])
    folder("half a pair", ["en"])
    assert runs.newest_run() == runs.newest_run(["label"]) == newer
    assert runs.newest_run(["en"]) == runs.newest_run(["fr", "en"]) == old
    assert runs.newest_run(["en", "label"]) is None


def test_the_module_lists_the_runs_and_passes_over_those_that_it_cannot_read(folder, capsys):
    folder("a", ["en", "fr"], 1.25)
    folder("b", ["review", "label"], None).unlink()  # it has only begun
    damaged = folder("damaged", ["en", "fr"])
    damaged.write_bytes(damaged.read_bytes()[:100])
    folder("earlier", ["en", "fr"])
    Path("runs/earlier/config.json").write_text("{}")
    lines = sorted([*line][:5] for line in runs.list_runs())
    assert lines == [
        ["runs/a", "demo", "en,fr", "300 steps", "loss 1.2500"],
        ["runs/b", "demo", "review,label", "300 steps", "loss -"],
        ["runs/damaged", "demo", "en,fr", "300 steps", "loss -"],
    ]
    Path("runs/earlier/prefix.safetensors").unlink()
    assert runs.newest_run() == Path("runs/a/prefix.safetensors")
    said = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said.count("Passing over runs/damaged/prefix.safetensors") == 2
    assert said.count("Passing over runs/earlier/config.json") == 1
