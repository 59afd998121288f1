"""Files and texts from strangers: read or refused in one line, never run, and harmless on a terminal."""

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, Tokenizer, UserError, checkpoint
from minigpt.files import escape_control
from minigpt.tokenizer import END_OF_TEXT, byte_characters
from prefix import Banks, peft
from prefix.distributed import log, printable
from prefix.init import random_banks
from prefix.run import DEMO_PREFIX

ROOT = Path(__file__).parents[1]
CONFIG = GPTConfig(vocab_size=261, n_positions=16, n_embd=4, n_layer=1, n_head=2)
MODEL = random_model(CONFIG)
IDS = torch.arange(6)[None]
HOSTILE = "\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"
SPELLED = r"\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"


# Any change of any file: read right, or one UserError of one line.


def model_files(folder):
    """Sound files in `folder`: a model and a tokenizer in both forms, a prefix, an adapter."""
    checkpoint.save(MODEL, folder)
    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = [*byte_characters().values(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "json").mkdir()
    added = [{"id": 261, "content": "<x>", "special": False, "rstrip": True}]
    content = {"added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}
    content |= {"model": {"vocab": vocab, "merges": merges}}
    (folder / "json/tokenizer.json").write_text(json.dumps(content))
    (folder / "json/tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (folder / "shards").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / "shards" / file.replace("model.", "model-1.")).write_bytes((folder / file).read_bytes())
    weight_map = dict.fromkeys(dict(MODEL.named_parameters()), "model-1.safetensors")
    (folder / "shards" / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    random_banks(CONFIG, ["en", "fr"], 3).save(folder / "prefix.safetensors", MODEL)
    peft.export_bank(random_banks(CONFIG, ["en"], 3), "en", folder / "adapter")


def read_model(folder):
    GPT.from_pretrained(folder)(IDS)


def read_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode(f"hello\0é{END_OF_TEXT}")
    assert tokenizer.eot not in ids and tokenizer.decode(ids).strip() == f"hello\0é{END_OF_TEXT}"


def read_prefix(folder):
    Banks.load(folder / "prefix.safetensors", MODEL).logits(MODEL, IDS)


def read_adapter(folder):
    peft.import_bank(folder / "adapter", "en", MODEL).logits(MODEL, IDS, open=["en"])


READERS = {
    "config.json": read_model,
    "model.safetensors": read_model,
    "vocab.json": read_tokenizer,
    "merges.txt": read_tokenizer,
    "json/tokenizer.json": lambda folder: read_tokenizer(folder / "json"),
    "json/tokenizer_config.json": lambda folder: read_tokenizer(folder / "json"),
    "shards/model.safetensors.index.json": lambda folder: read_model(folder / "shards"),
    "prefix.safetensors": read_prefix,
    "adapter/adapter_config.json": read_adapter,
    "adapter/adapter_model.safetensors": read_adapter,
}
NASTY = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b" ",
    b'"',
    b"{",
    b"]",
    b"\\ud800",
    b"../",
    b"-1",
    b"1e999",
]
NASTY += [
    b"NaN",
    b"null",
    b"true",
    b"9" * 5000,
    b"[" * 5000,
    b'""',
    b"PK\3\4",
    b"<!DOCTYPE html>",
    "\u2028\u202eé".encode(),
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    10**400,
    0.5,
    -1e308,
    float("nan"),
    "",
    "0",
    "F32",
    "\0",
    "\ud800",
    "../x",
]
VALUES += ["\x1b[2J\u202e", "x" * 9999, [], {}, [[]], {"a": 1}]


def changed_value(draw, value):
    """A JSON value with one node changed. A text that is JSON itself, as in safetensors' metadata, is looked into."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.dumps(changed_value(draw, json.loads(value)))
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(VALUES))
    value, key = value.copy(), draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    if draw(st.integers(0, 4)) == 0:
        del value[key]
    else:
        value[key] = changed_value(draw, value[key])
    return value


@st.composite
def changes(draw, content, kind):
    """The bytes of a file of that kind, changed in one place."""
    if kind == "json" and draw(st.booleans()):
        return json.dumps(changed_value(draw, json.loads(content))).encode()
    if kind == "safetensors" and draw(st.booleans()):
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(changed_value(draw, json.loads(content[8:end]))).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]
    start = draw(st.integers(0, len(content)))
    end = draw(st.sampled_from([start, start + 1, start + 8, len(content)]))
    return content[:start] + draw(st.sampled_from(NASTY) | st.binary(max_size=8)) + content[end:]


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("file", READERS)
def test_whatever_is_changed_in_a_file_it_is_read_or_refused_in_one_line(file, data, tmp_path):
    if not (tmp_path / "config.json").exists():
        model_files(tmp_path)
        READERS[file](tmp_path)
    path = tmp_path / file
    sound = path.read_bytes()
    path.write_bytes(data.draw(changes(sound, path.suffix[1:])))
    try:
        READERS[file](tmp_path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1100
    finally:
        path.write_bytes(sound)


def test_nothing_in_the_project_reads_a_pickle_or_runs_what_it_reads():
    """Between the processes of one run torch.distributed sends objects as pickles; none of them is a file."""
    seen = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("minigpt/**/*.py"), *ROOT.glob("prefix/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                seen |= {name.split(".")[0] for name in names}
            elif isinstance(node, ast.Call) and "weights_only=True" not in ast.unparse(node):  # which runs nothing
                seen.add(ast.unparse(node.func))
    assert "open_tensors" in seen and "json" in seen  # it looks at the right files
    assert not seen & {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy"}
    assert not seen & {"torch.load", "eval", "exec", "compile", "np.load", "numpy.load", "__import__"}


# Terminals.


@pytest.fixture
def terminal():
    """(A stream to write to, a function that gives all that was written to it): a real terminal."""
    ours, theirs = pty.openpty()

    def read():
        found = b""
        while True:
            try:
                found += os.read(ours, 1 << 12)
            except OSError:  # the other end is closed
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
    assert escape_control("a\n\tb é 日本語 שלום 👩‍👩‍👧", keep="\n\t") == "a\n\tb é 日本語 שלום 👩‍👩‍👧"


# Prefix files.


@pytest.fixture
def refusal(tmp_path):
    """A function: a change of a sound prefix file's (tensors, metadata) -> the one line that says why it is refused."""
    path = tmp_path / "p.safetensors"
    random_banks(CONFIG, ["en", "fr"], 3).save(path, MODEL)
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
    assert f"{list(shape)}" in reason and "[1, 2, " in reason


def test_a_bank_with_fewer_values_than_keys_is_an_error(refusal):
    assert "keys of shape [1, 2, 2, 2], values of [1, 2, 3, 2]" in refusal(lambda tensors, _: tensors.update({"en.key": torch.zeros(1, 2, 2, 2)}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.float8_e5m2])
def test_slots_of_another_type_are_an_error(refusal, dtype):
    reason = refusal(lambda tensors, _: tensors.update({"en.key": tensors["en.key"].to(dtype)}))
    assert "tensor en.key is " in reason and reason.endswith("expected one of F32, F16, BF16")


def test_a_missing_and_an_unexpected_tensor_are_errors_that_name_it(refusal):
    assert refusal(lambda tensors, _: tensors.update({"de.key": torch.zeros(1)})) .endswith("unexpected tensor de.key")
    assert refusal(lambda tensors, _: tensors.pop("de.key") is tensors.pop("fr.key")) .endswith("no tensor fr.key")


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
