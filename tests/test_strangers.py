"""Files and texts from strangers: read or refused in one line, never run, and harmless on a terminal."""

import ast
import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minigpt import UserError
from minigpt.errors import visible
from prefix import Banks
from prefix.distributed import log, printable
from prefix.init import random_banks
from prefix.run import DEMO_PREFIX

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"
SPELLED = r"\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_whatever_is_changed_in_a_file_it_is_read_or_refused_in_one_line(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    outcomes, failure = fuzz.fuzz(target, 100, seed)
    assert failure is None
    assert sum(outcomes.values()) == 100 and (len(outcomes) > 1 or target == "text")


def test_the_fuzzer_finds_what_it_is_for(tmp_path, monkeypatch):
    def careless(folder):
        (folder / "a.json").write_text('{"n": 3}')
        return ["a.json"], lambda: fuzz.json.loads((folder / "a.json").read_bytes())["n"] // 3

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fuzz.TARGETS, "careless", careless)
    outcomes, failure = fuzz.fuzz("careless", 100, 0)
    assert {words.split(":")[1].strip() for words in outcomes if "FAILED" in words} >= {"KeyError", "JSONDecodeError"}
    found = failure.split()[6]
    assert failure.startswith(f"python tests/fuzz.py careless --seed 0 --first {found} --inputs 1 ")
    again, _ = fuzz.fuzz("careless", 1, 0, int(found))
    assert failure.endswith(*again)
    assert Path(f"fuzz-careless-0-{found}-a.json").exists()


def test_nothing_in_the_project_reads_a_pickle_or_runs_what_it_reads():
    """Between the processes of one run torch.distributed sends objects as pickles; none of them is a file."""
    seen = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("minigpt/*.py"), *ROOT.glob("prefix/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                seen |= {name.split(".")[0] for name in names}
            elif isinstance(node, ast.Call):
                seen.add(ast.unparse(node.func))
    assert "open_tensors" in seen and "json" in seen  # it looks at the right files
    assert not seen & {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy"}
    assert not seen & {"torch.load", "eval", "exec", "compile", "np.load", "numpy.load", "__import__"}


@pytest.fixture
def terminal():
    """(A stream to write to, a function that gives all that was written to it): a real terminal."""
    ours, theirs = pty.openpty()

    def read():
        found = b""
        while True:
            try:
                found += os.read(ours, 1 << 12)
            except OSError:  # nobody has the other end open any more
                return found.decode()

    with open(theirs, "w", encoding="utf-8") as stream:
        yield stream, read
    os.close(ours)


def test_control_characters_are_spelled_out_on_a_terminal(terminal, monkeypatch):
    stream, read = terminal
    print(printable(HOSTILE, stream), file=stream)
    monkeypatch.setattr(sys, "stderr", stream)
    log(HOSTILE)
    stream.close()
    assert read() == f"{SPELLED}\r\n{SPELLED}\r\n"


def test_control_characters_are_untouched_in_a_pipe(capsys):
    print(printable(HOSTILE))
    log(HOSTILE)
    assert capsys.readouterr() == (f"{HOSTILE}\n", f"{HOSTILE}\n")


def test_an_answer_of_translate_cannot_command_a_terminal(terminal):
    stream, read = terminal
    command = ["translate.py", "--prefix", DEMO_PREFIX, "--device", "cpu", "Bonjour", "--choices", "\x1b[2J\u202eoui"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, *command], stdout=stream, stderr=stream, cwd=ROOT, env=environment, check=True)
    stream.close()
    assert read().endswith("\\x1b[2J\\u202eoui\r\n")
    result = subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, env=environment, check=True)
    assert result.stdout.decode() == "\x1b[2J\u202eoui\n"


def test_newlines_tabs_and_other_writing_systems_are_not_spelled_out():
    assert visible("a\n\tb é 日本語 שלום 👩‍👩‍👧", keep="\n\t") == "a\n\tb é 日本語 שלום 👩‍👩‍👧"


# Prefix files


MODEL = fuzz.tiny()


@pytest.fixture
def refusal(tmp_path):
    """A function: a change of a sound prefix file's (tensors, metadata) -> the one line that says why it is refused."""
    path = tmp_path / "p.safetensors"
    random_banks(fuzz.CONFIG, ["en", "fr"], 3).save(path, MODEL)
    Banks.load(path, MODEL)

    def refusal(change):
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        change(tensors, metadata)
        save_file(tensors, path, metadata)
        with pytest.raises(UserError) as caught:
            Banks.load(path, MODEL)
        assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 1100
        return str(caught.value).removeprefix(f"{path}: ")

    return refusal


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_is_an_error_that_names_its_tensor(refusal, value):
    reason = refusal(lambda tensors, _: tensors["fr.value"].view(-1)[-1].fill_(value))
    assert reason == "tensor fr.value has numbers that are not finite (NaN or infinity)"


@pytest.mark.parametrize(
    "shape", [(1, 2, 4, 2), (2, 2, 3, 2), (1, 1, 3, 2), (1, 2, 3, 1), (1, 2, 6), (12,), (1, 2, 3, 2, 1)]
)
def test_slots_of_another_shape_are_an_error_with_both_shapes(refusal, shape):
    reason = refusal(lambda tensors, _: tensors.update({"en.key": torch.zeros(shape)}))
    assert reason == f"tensor en.key has shape {list(shape)}, expected [1, 2, 3, 2]"


def test_a_bank_with_fewer_values_than_keys_is_an_error(refusal):
    assert "the shapes differ" in refusal(lambda tensors, _: tensors.update({"en.key": torch.zeros(1, 2, 2, 2)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.float8_e5m2])
def test_slots_of_another_type_are_an_error(refusal, dtype):
    reason = refusal(lambda tensors, _: tensors.update({"en.key": tensors["en.key"].to(dtype)}))
    assert reason.startswith("tensor en.key is ") and reason.endswith("expected one of F32, F16, BF16")


def test_a_missing_and_an_unexpected_tensor_are_errors_that_name_it(refusal):
    assert refusal(lambda tensors, _: tensors.update({"de.key": torch.zeros(1)})) == "unexpected tensor de.key"
    assert refusal(lambda tensors, _: tensors.pop("de.key") is tensors.pop("fr.key")) == "no tensor fr.key"


@pytest.mark.parametrize(
    "name, value",
    [
        ("banks", '["en\\u001b[2J", "fr"]'),
        ("banks", '["en\\n", "fr"]'),
        ("banks", '["", "fr"]'),
        ("banks", json.dumps(["x" * 10_000_000, "fr"])),
        ("banks", '["en", "en"]'),
        ("banks", '["en", 3]'),
        ("banks", "[" * 100_000),
        ("prefix_len", str(10**6)),
        ("prefix_len", "-1"),
        ("position_offset", str(10**30)),
        ("position_offset", "16"),
        ("training", '{"data": "/etc/passwd"}'),
        ("training", '{"data": [3]}'),
        ("training", '{"columns": "en"}'),
        ("training", '{"limit": "all"}'),
        ("training", '{"model": ["demo"]}'),
        ("training", "[]"),
        ("base", "[]"),
        ("format", "\x1b[2J"),
    ],
)
def test_metadata_that_lies_is_an_error(refusal, name, value):
    def change(tensors, metadata):
        if name == "banks" and value.startswith('["') and "," in value:
            bank = str(json.loads(value)[0])
            tensors |= {f"{bank}.key": tensors.pop("en.key"), f"{bank}.value": tensors.pop("en.value")}
        metadata[name] = value

    assert refusal(change)


# The state of a run


@pytest.mark.parametrize("name", ["adam.0.step", "adam.3.exp_avg_sq"])
def test_a_state_that_adamw_cannot_have_been_in_is_an_error(tmp_path, name):
    (path, _), resume = fuzz.state(tmp_path)
    resume()
    with safe_open(tmp_path / path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    tensors[name] -= 1e6
    save_file(tensors, tmp_path / path, metadata)
    with pytest.raises(UserError, match="state.safetensors: cannot resume from it: AdamW's count of steps or mean of"):
        resume()
