"""Files and texts from strangers: read or refused in one line, never run, and harmless on a terminal."""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model, why_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, Tokenizer, UserError, checkpoint
from minigpt.files import escape_control
from minigpt.tokenizer import BYTE, END_OF_TEXT
from prefix import Banks, peft
from prefix.distributed import log, printable
from prefix.init import random_banks

ROOT = Path(__file__).parents[1]
CONFIG = GPTConfig(vocab_size=261, n_positions=16, n_embd=4, n_layer=1, n_head=2)
MODEL = random_model(CONFIG)
IDS = torch.arange(6)[None]


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

    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = [*BYTE, *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = [{"id": 261, "content": "<x>", "special": True, "rstrip": False}]
    content = {"added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}
    content |= {"model": {"vocab": vocab, "merges": merges}}
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


def read_adapter(folder):
    peft.import_bank(folder, "en", MODEL).logits(MODEL, IDS, open=["en"])


READERS = {  # of the folder that the file is in
    **dict.fromkeys(["config.json", "model.safetensors", "shards/model.safetensors.index.json"], read_model),
    **dict.fromkeys(["vocab.json", "merges.txt", "json/tokenizer.json", "json/tokenizer_config.json"], read_tokenizer),
    **dict.fromkeys(["adapter/adapter_config.json", "adapter/adapter_model.safetensors"], read_adapter),
    "prefix.safetensors": lambda folder: Banks.load(folder / "prefix.safetensors", MODEL).logits(MODEL, IDS),
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
    path = tmp_path / file
    if not path.exists():
        model_files(tmp_path)
        READERS[file](path.parent)
    sound = path.read_bytes()
    path.write_bytes(data.draw(changes(sound, path.suffix[1:])))
    try:
        READERS[file](path.parent)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1100
    finally:
        path.write_bytes(sound)


def test_nothing_in_the_project_reads_a_pickle_or_runs_what_it_reads():
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
    hostile = "\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"
    for is_terminal, expected in ((True, r"\x1b[2J\x9b31m\x07\x7f\r\u202eoui\u2066"), (False, hostile)):
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer)
        print(printable(hostile))
        log(hostile)
        assert capsys.readouterr() == (f"{expected}\n", f"{expected}\n")
    harmless = "a\n\tb é 日本語 שלום 👩‍👩‍👧"
    assert escape_control(harmless, keep="\n\t") == harmless


# Prefix files.

SLOTS = torch.ones(1, 2, 3, 2)  # as en.key should be
BAD_SLOTS = [
    *(("fr.value", SLOTS * bad, "tensor fr.value has numbers that are not finite") for bad in (math.nan, math.inf)),
    *(("en.key", torch.ones(shape), str(shape)) for shape in ([1, 2, 4, 2], [2, 2, 3, 2], [1, 2, 3, 1], [12])),
    *(("en.key", SLOTS.to(d), "expected one of F32, F16, BF16") for d in (torch.float64, torch.bool, torch.float8_e5m2)),
    ("de.key", SLOTS, "unexpected tensor de.key"),
    ("fr.key", None, "no tensor fr.key"),
]
LIES = {
    "banks": ['["en", "en"]', "[" * 100_000],
    "prefix_len": [str(10**6), "-1"],
    "position_offset": [str(10**30), "16"],
    "training": ['{"data": "/etc/passwd"}', '{"data": [3]}', '{"limit": "all"}', "[]"],
    "base": ["[]"],
    "format": ["\x1b[2J"],
}


def test_a_prefix_file_with_foreign_slots_metadata_or_names_of_banks_is_an_error(tmp_path):
    path = tmp_path / "p.safetensors"
    random_banks(CONFIG, ["en", "fr"], 3).save(path, MODEL)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()

    def why(tensors, metadata):
        save_file(tensors, path, metadata)
        return why_refused(Banks.load, path, MODEL)

    for name, slots, told in BAD_SLOTS:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        assert told in why(rest | ({} if slots is None else {name: slots}), metadata)
    for name, value in ((name, value) for name, values in LIES.items() for value in values):
        assert why(tensors, metadata | {name: value})
    for name in ("en\x1b[2J", "", "x" * 100_000, 3):  # that no terminal or table can show
        renamed = {key.replace("en.", f"{name}."): tensor for key, tensor in tensors.items()}
        assert why(renamed, metadata | {"banks": json.dumps([name, "fr"])})
    save_file(tensors, path, metadata)
    assert Banks.load(path, MODEL).names == ["en", "fr"]
