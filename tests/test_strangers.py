"""Files and texts from strangers: read or refused in one line, never run, and harmless on a terminal."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import MERGES, VOCAB, random_model, why_refused, write_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, Tokenizer, UserError, checkpoint
from minigpt.files import escape_control
from minigpt.tokenizer import END_OF_TEXT
from prefix import Banks, peft
from prefix.distributed import log, printable
from prefix.init import random_banks

ROOT = Path(__file__).parents[1]
CONFIG = GPTConfig(vocab_size=261, n_positions=16, n_embd=4, n_layer=1, n_head=2)
MODEL = random_model(CONFIG)
IDS = torch.arange(6)[None]
HOSTILE = "\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"
SPELLED = r"\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"


# Any change of any file: read right, or one UserError of one line.


def model_files(folder):
    """Sound files in `folder`: a model and a tokenizer in both forms, a prefix, an adapter."""
    (folder / "json").mkdir()
    (folder / "shards").mkdir()
    checkpoint.save(MODEL, folder)
    checkpoint.save(MODEL, folder / "shards")
    (folder / "shards/model.safetensors").rename(folder / "shards/model-1.safetensors")
    weight_map = dict.fromkeys(dict(MODEL.named_parameters()), "model-1.safetensors")
    (folder / "shards" / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write_vocabulary(folder)
    added = [{"id": 261, "content": "<x>", "special": True, "rstrip": False}]
    content = {"added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}
    content |= {"model": {"vocab": VOCAB, "merges": MERGES}}
    (folder / "json/tokenizer.json").write_text(json.dumps(content))
    (folder / "json/tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
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
NASTY = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n", b" ", b'"', b"{", b"]", b"\\ud800", b"../", b"-1"]
NASTY += [b"1e999", b"NaN", b"null", b"true", b"9" * 5000, b"[" * 5000, b'""', b"PK\3\4", b"<!DOCTYPE html>"]
NASTY += ["\u2028\u202eé".encode()]
VALUES = [None, True, False, 0, -1, 1, 2, 2**31, 10**400, 0.5, -1e308, float("nan"), [], {}, [[]], {"a": 1}]
VALUES += ["", "0", "F32", "\0", "\ud800", "../x", "\x1b[2J\u202e", "x" * 9999]


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


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
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


def test_control_characters_are_spelled_out_on_a_terminal_and_untouched_in_a_pipe(capsys, monkeypatch):
    for is_terminal, expected in ((True, SPELLED), (False, HOSTILE)):
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer)
        print(printable(HOSTILE))
        log(HOSTILE)
        assert capsys.readouterr() == (f"{expected}\n", f"{expected}\n")


def test_newlines_tabs_and_other_writing_systems_are_not_spelled_out():
    assert escape_control("a\n\tb é 日本語 שלום 👩‍👩‍👧", keep="\n\t") == "a\n\tb é 日本語 שלום 👩‍👩‍👧"


# Prefix files.


SLOTS = torch.ones(1, 2, 3, 2)  # as en.key should be


def called(name):
    return {"en.key": None, "en.value": None, f"{name}.key": SLOTS, f"{name}.value": SLOTS.clone()}


@pytest.mark.parametrize("tensors, metadata, why", [
    *(({"fr.value": SLOTS * bad}, {}, "tensor fr.value has numbers that are not finite") for bad in (math.nan, math.inf)),
    *(({"en.key": torch.ones(shape)}, {}, str([*shape])) for shape in [(1, 2, 4, 2), (2, 2, 3, 2), (1, 2, 3, 1), (12,), (1,) * 5]),
    *(({"en.key": SLOTS.to(getattr(torch, name))}, {}, "expected one of F32, F16, BF16") for name in ("float64", "bool", "float8_e5m2")),
    ({"de.key": SLOTS}, {}, "unexpected tensor de.key"),
    ({"fr.key": None}, {}, "no tensor fr.key"),
    *((called(name), {"banks": json.dumps([name, "fr"])}, "") for name in ("en\x1b[2J", "", "x" * 100_000, 3)),
    *(({}, {"banks": value}, "") for value in ('["en", "en"]', "[" * 100_000)),
    *(({}, {"prefix_len": value}, "") for value in (str(10**6), "-1")),
    *(({}, {"position_offset": value}, "") for value in (str(10**30), "16")),
    *(({}, {"training": value}, "") for value in ('{"data": "/etc/passwd"}', '{"data": [3]}', '{"limit": "all"}', "[]")),
    *(({}, {name: value}, "") for name, value in (("base", "[]"), ("format", "\x1b[2J"))),
], ids=lambda value: str([*value])[:40].replace("\n", ""))  # fmt: skip
def test_a_prefix_file_that_lies_is_an_error_that_names_what_is_wrong(tensors, metadata, why, tmp_path):
    path = tmp_path / "p.safetensors"
    random_banks(CONFIG, ["en", "fr"], 3).save(path, MODEL)
    Banks.load(path, MODEL)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()} | tensors
        metadata = file.metadata() | metadata
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    assert why in why_refused(Banks.load, path, MODEL)
