"""A run's loss.png: drawn where matplotlib is installed, and never a reason for a run to fail."""

import json
import sys
from pathlib import Path

import pytest
from conftest import TRAIN, stop_after

import train
from prefix.evaluation import pictures

LINES = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 2, "val_loss": 2.5}, {"step": 3, "loss": 2.0}]


def write_lines(run, lines=LINES):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("lines", [LINES, LINES[2:3], []], ids=len)
def test_the_loss_is_drawn_whatever_was_logged(lines, tmp_path, capsys):
    imread = pytest.importorskip("matplotlib.image").imread
    write_lines(tmp_path, lines)
    pictures.draw_loss(tmp_path)
    assert capsys.readouterr().err == "" and imread(tmp_path / "loss.png").std() > 0.05


def test_the_curve_is_of_the_logged_numbers():
    pytest.importorskip("matplotlib")
    figure = pictures.loss_figure(LINES)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert curves == {"training": [[1, 3], [3, 2]], "mean of 20 steps": [[1, 3], [3, 2.5]], "validation": [[2, 2.5]]}


@pytest.mark.parametrize("installed", [False, True])
def test_a_loss_that_cannot_be_drawn_is_one_line_and_nothing_without_matplotlib(tmp_path, monkeypatch, capsys, installed):
    figure = pytest.importorskip("matplotlib.figure")

    def full(*_, **__):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_lines(tmp_path)
    pictures.draw_loss(tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == installed and ("loss.png: not drawn: " in err and "No space left" in err) == installed
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_leaves_the_picture_also_if_it_is_stopped(run, place, workplace, monkeypatch):
    pytest.importorskip("matplotlib")
    start = train.Trainer.run
    monkeypatch.setattr(train.Trainer, "run", lambda trainer: stop_after(trainer, 1) or start(trainer))
    code, out, err = run(train, "--model", place / "base", "--data", place / "en-fr.csv", *TRAIN, "--out", "new")
    assert (code, out) == (130, ""), err
    assert Path("new/loss.png").read_bytes().startswith(b"\x89PNG") and "loss.png" not in err
