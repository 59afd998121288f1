"""benchmarks/gpu.py, the run for a machine with a GPU, as far as a CPU goes with the demo."""

import json
import sys
from functools import partial
from itertools import islice

import pytest
import torch
from benchmarks import gpu

# Of the others, `commands` starts five programs, and `others` needs transformers.
HERE = ["machine", "kernels", "training", "texts", "ceilings", "speed", "decode", "memory"]


@pytest.fixture
def parts(monkeypatch, capsys):
    """A function: names of parts, of few tokens -> their lines of JSON, and the table."""
    monkeypatch.setattr(gpu, "islice", lambda rows, n: islice(rows, 2))
    monkeypatch.setattr(gpu, "Decoding", partial(gpu.Decoding, 5))

    def parts(*names, device="cpu"):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", device, "--shape", "demo", "--parts", *names])
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
    assert "full: tokens/s" in found["speed"] and "3 rows: ms a step" in found["decode"]
    assert all(f"\n{name} " in table for name in HERE) and "expected" in table


def test_the_parts_that_compare_with_the_cpu_take_a_gpus_ways(monkeypatch, parts):
    """On a pretended GPU, without kernels: graphs are recorded, replayed and compared, and waits counted."""
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    from pretend_cuda import pretended_gpu

    for name in ("set_sync_debug_mode", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    with pretended_gpu(monkeypatch, (7, 5)):
        (training, texts), _ = parts("training", "texts", device="cuda")
    assert "error" not in training | texts, (training, texts)
    assert training["a resumed run has the same bits"] is True and training["loss, float32, off the CPU's by"] < 1e-5
    assert texts["same texts as the CPU, float32"] == texts["same texts, 4 beams"] == 1 and texts["waits"] > 0
    replays = [value for what, value in texts.items() if "replays" in what]
    assert len(replays) == 2 and max(replays) < 1e-3 and texts["what decoding does without"] == "nothing"


def test_a_part_that_fails_says_so_and_the_next_one_runs(parts, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "training", lambda: 1 / 0)
    (broken, whole), table = parts("training", "machine")
    assert broken["error"].startswith("ZeroDivisionError") and "ZeroDivisionError" in table
    assert "device" in whole
