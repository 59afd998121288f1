"""benchmarks/gpu.py, the run for a machine with a GPU, as far as a CPU goes with the demo."""

import json
import sys

import pytest
from benchmarks import gpu

# Of the others, `commands` starts five programs, and `others` needs transformers.
HERE = ["machine", "kernels", "training", "texts", "ceilings", "speed", "decode", "memory"]


@pytest.fixture
def parts(monkeypatch, capsys):
    """A function: names of parts -> their lines of JSON, and the table."""

    def parts(*names):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shape", "demo", "--parts", *names])
        gpu.main()
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines[: len(names)]], "\n".join(lines[len(names) :])

    return parts


def test_a_part_prints_its_line_and_the_table_comes_last(parts):
    lines, table = parts(*HERE)
    found = {line["part"]: line for line in lines}
    assert list(found) == HERE and not [line for line in lines if "error" in line]
    assert found["training"]["loss, float32, off the CPU's by"] == 0
    assert found["training"]["a resumed run has the same bits"] is True
    assert found["texts"]["same texts as the CPU, float32"] == found["texts"]["same texts, 4 beams"] == 1
    assert found["speed"]["full: tokens/s"] > 0 and found["decode"]["3 rows: ms a step"] > 0
    assert all(f"\n{name} " in table for name in HERE) and "expected" in table


def test_a_part_that_fails_says_so_and_the_next_one_runs(parts, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "training", lambda: 1 / 0)
    (broken, whole), table = parts("training", "machine")
    assert broken["error"].startswith("ZeroDivisionError") and "ZeroDivisionError" in table
    assert "device" in whole
