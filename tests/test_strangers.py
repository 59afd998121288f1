"""Files and texts from strangers: read or refused in one line, never run, and harmless on a terminal."""

import ast
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
from minigpt.errors import visible
from prefix.command import DEMO_PREFIX, notice, shown

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
    assert sum(outcomes.values()) == 100 and len(outcomes) > 1 or target == "text"


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
    print(shown(HOSTILE, stream), file=stream)
    monkeypatch.setattr(sys, "stderr", stream)
    notice(HOSTILE)
    stream.close()
    assert read() == f"{SPELLED}\r\n{SPELLED}\r\n"


def test_control_characters_are_untouched_in_a_pipe(capsys):
    print(shown(HOSTILE))
    notice(HOSTILE)
    assert capsys.readouterr() == (f"{HOSTILE}\n", f"{HOSTILE}\n")


def test_an_answer_of_translate_cannot_command_a_terminal(terminal):
    stream, read = terminal
    command = ["translate.py", "--prefix", DEMO_PREFIX, "--device", "cpu", "Bonjour", "--choices", "\x1b[2J\u202eoui"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, *command], stdout=stream, stderr=stream, cwd=ROOT, env=environment)
    stream.close()
    assert read().endswith("\\x1b[2J\\u202eoui\r\n")
    result = subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT, env=environment)
    assert result.stdout.decode() == "\x1b[2J\u202eoui\n"


def test_newlines_tabs_and_other_writing_systems_are_not_spelled_out():
    assert visible("a\n\tb é 日本語 שלום 👩‍👩‍👧", keep="\n\t") == "a\n\tb é 日本語 שלום 👩‍👩‍👧"
