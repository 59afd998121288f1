"""Checkpoints load exactly as they were written, whatever their layout, or are refused with the file and the tensor."""

import functools
import json
import math
import pickle
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, refusal, why_refused
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, checkpoint
from minigpt.checkpoint import INDEX, WEIGHTS
from minigpt.config import PUBLISHED

CONFIG = GPTConfig(vocab_size=50, n_positions=8, n_embd=12, n_layer=2, n_head=3)
NAMES = [name for name, _ in GPT(CONFIG).named_parameters()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD, WTE = "lm_head.weight", "wte.weight"
read = GPT.from_pretrained


@pytest.fixture
def weights(tmp_path):
    """The random tensors, by name, of a small checkpoint in tmp_path."""
    model = random_model(CONFIG, std=1.0)
    checkpoint.save(model, tmp_path)
    return dict(model.named_parameters())


def assert_loads(directory, weights, dtype=torch.float32):
    loaded = dict(read(directory, dtype=dtype).named_parameters())
    assert set(loaded) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def save_shards(directory, *shards):
    """Instead of the one file several, and the index that names them."""
    (directory / WEIGHTS).unlink(missing_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# What loads.


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_weights_of_any_float_type_load_into_any_other(stored, weights, tmp_path):
    weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    save_file(weights, tmp_path / WEIGHTS)
    for computed in DTYPES:
        assert_loads(tmp_path, weights, computed)


@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.", "module.transformer."])
@pytest.mark.parametrize("head", ["with a head", "without a head", "with nothing but a head"])
def test_names_with_or_without_prefix_head_and_buffers_are_the_same_model(prefix, head, weights, tmp_path, caplog):
    tensors = {prefix + name.replace("h.1.", "h.1._orig_mod."): tensor for name, tensor in weights.items()}
    tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # the mask's buffers
    tensors[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)
    if head != "without a head":
        tensors[HEAD] = weights[WTE].clone()
    if head == "with nothing but a head":
        del tensors[prefix + WTE]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "made by": "somebody"})
    assert_loads(tmp_path, weights)
    assert not caplog.records


def test_shards_written_by_transformers_load(reference, tmp_path):
    theirs = reference()
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_loads(tmp_path, dict(theirs.transformer.named_parameters()))


@pytest.mark.parametrize(
    "heads",
    [["score.weight"], ["v_head.summary.weight", "v_head.summary.bias"], ["\x1b[2J", *"abcdef"]],
)
def test_heads_of_other_tasks_are_passed_over_and_said_once(heads, weights, tmp_path, caplog):
    save_file(weights | {name: torch.zeros(3, dtype=torch.int64) for name in heads}, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights)
    (record,) = caplog.records
    said = ", ".join(sorted(heads)[:5]).replace("\x1b", "\\x1b") + ", ..." * (len(heads) > 5)
    assert record.getMessage() == f"{tmp_path}: passed over, no part of the language model: {said}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_is_read_back_here_and_by_transformers(dtype, weights, tmp_path):
    from transformers import GPT2LMHeadModel

    checkpoint.save(read(tmp_path), tmp_path / "copy", dtype)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    assert_loads(tmp_path / "copy", weights)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "copy", dtype=dtype).transformer.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights.items())


def test_no_more_than_one_tensor_is_in_memory_beside_the_model(weights, tmp_path, monkeypatch):
    alive, open_tensors = [], checkpoint.open_tensors

    class Watched:
        def __init__(self, path):
            self.file = open_tensors(path)
            self.keys, self.get_slice = self.file.keys, self.file.get_slice

        def get_tensor(self, name):
            assert sum(tensor() is not None for tensor in alive) <= 1  # the one before, which this one replaces
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            return tensor

    monkeypatch.setattr(checkpoint, "open_tensors", Watched)
    assert_loads(tmp_path, weights, torch.bfloat16)
    assert len(alive) == len(NAMES)


# Fingerprints.


def test_a_fingerprint_does_not_depend_on_types_names_shards_and_heads(weights, tmp_path):
    (before,) = {read(tmp_path, dtype=dtype).fingerprint for dtype in DTYPES}
    renamed = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    save_shards(tmp_path, renamed | {HEAD: weights[WTE].clone()})
    assert read(tmp_path).fingerprint == before


def test_a_fingerprint_changes_with_any_tensor(weights, tmp_path):
    prints = {read(tmp_path).fingerprint}
    for name in NAMES:
        save_file(weights | {name: torch.randn_like(weights[name])}, tmp_path / WEIGHTS)
        prints.add(read(tmp_path).fingerprint)
    assert len(prints) == 1 + len(NAMES)


# What is refused, and what it is told.

FINITE, LARGE = "numbers that are not finite (NaN or infinity)", "numbers too large for torch.float16: use --dtype float"
SHAPED = "h.1.attn.c_attn.weight"


@pytest.mark.parametrize("change, why", [
    ({"ln_f.bias": None}, "1 of 28 tensors missing, the first ln_f.bias"),
    (dict.fromkeys(NAMES) | {"model.layers.0.q_proj.weight": torch.zeros(50, 50)}, "28 of 28 tensors missing, the first h.0.a"),
    ({WTE: torch.zeros(50, 13)}, f"{WEIGHTS}: tensor {WTE} has shape [50, 13], config.json says [50, 12]"),
    ({HEAD: torch.zeros(51, 12)}, f"{WEIGHTS}: tensor {HEAD} has shape [51, 12], config.json says [50, 12]"),
    ({SHAPED: torch.zeros(36)}, f"{WEIGHTS}: tensor {SHAPED} has shape [36], config.json says [12, 36]"),
    ({HEAD: torch.randn(50, 12)}, f"{WEIGHTS}: {HEAD} differs from {WTE}; only tied heads are implemented"),
    ({"transformer.h.2.ln_1.bias": torch.zeros(12)}, f"{WEIGHTS}: unexpected tensor transformer.h.2.ln_1.bias"),
    ({"ln_f.bias": torch.zeros(12).double()}, f"{WEIGHTS}: tensor ln_f.bias is F64"),
    ({"ln_f.bias": torch.zeros(12).to(torch.float8_e4m3fn)}, f"{WEIGHTS}: tensor ln_f.bias is F8_E4M3"),
    *(({"ln_f.bias": torch.full((12,), math.nan, dtype=d)}, f"{WEIGHTS}: tensor ln_f.bias has {FINITE}") for d in DTYPES),
    ({"wpe.weight": torch.tensor([0.0] * 95 + [-math.inf]).view(8, 12)}, f"{WEIGHTS}: tensor wpe.weight has {FINITE}"),
    ({"wpe.weight": torch.full((8, 12), 6e4), "ln_f.bias": torch.full((12,), 1e6)}, f"{WEIGHTS}: tensor ln_f.bias has {LARGE}"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(change, why, weights, tmp_path):
    tensors = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    save_file(tensors, tmp_path / WEIGHTS)
    load = functools.partial(read, dtype=torch.float16 if LARGE in why else torch.float32)
    assert why_refused(load, tmp_path).startswith(why)
    if LARGE in why:
        assert_loads(tmp_path, tensors, torch.bfloat16)


@pytest.mark.parametrize(
    "content, what",
    [
        *((share, "") for share in (0.0, 0.999)),
        (b"<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>\n", " (a web page in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:248dfc\nsize 548105171\n", " (a git LFS pointer in"),
        (pickle.dumps(["weights"]), " (a pickle, which could run code: "),
        ("torch.save", "(a zip or a pickle of torch.save, which could run code: "),
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_file_that_is_cut_or_something_else_is_an_error_that_says_what(content, what, weights, tmp_path):
    """content: the bytes, or the share that is left of a sound file, or that it is torch's."""
    sound = (tmp_path / WEIGHTS).read_bytes()
    if content == "torch.save":
        torch.save(weights, tmp_path / WEIGHTS)
    else:
        cut = isinstance(content, float)
        (tmp_path / WEIGHTS).write_bytes(sound[: int(content * len(sound))] if cut else content)
    assert why_refused(read, tmp_path).startswith(f"{WEIGHTS}: not a safetensors file: ") and what in why_refused(
        read, tmp_path
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_alone_are_an_error_with_a_command_that_converts_them(shards, weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    tensors = [(name, p.data) for name, p in [*weights.items(), (HEAD, weights[WTE])]]  # two names of the same memory
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(dict(tensors[i::shards]), tmp_path / name)
    told, _, command = why_refused(read, tmp_path).partition(" To convert it: ")
    assert told.endswith("is a pickle, which could run code: it is not read.")
    subprocess.run(["bash", "-c", command.replace("python -c", f"{sys.executable} -c")], check=True)
    assert_loads(tmp_path, weights)


@pytest.mark.parametrize(
    "file, why",
    [
        ("config.json", "no checkpoint: there is no config.json in it"),
        (WEIGHTS, f"neither {WEIGHTS} nor {INDEX} is there"),
    ],
)
def test_a_directory_without_config_or_weights_is_an_error(file, why, weights, tmp_path):
    (tmp_path / file).unlink()
    assert why_refused(read, tmp_path) == why


FOREIGN = ["model-00002.safetensors", "../model.safetensors", "", 3, "a\0", "\ud800"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": ["a"]}', "<html>", *(json.dumps({"weight_map": {WTE: s}}) for s in FOREIGN)],
)
def test_an_index_that_is_something_else_or_names_no_file_beside_it_is_an_error(content, weights, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "config.json").rename(inside / "config.json")
    (inside / INDEX).write_text(content)
    assert why_refused(read, inside).startswith(f"{INDEX}: ")


# Where a checkpoint is looked for.


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty $MINIGPT_HOME on a machine without huggingface_hub."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path


def place(directory, *files):
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        (directory / file).touch()
    return directory


def put_hub(monkeypatch, snapshot_download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))


@pytest.mark.parametrize("name", ["gpt2-xl", "openai-community/gpt2", "distilbert/distilgpt2"])
def test_a_published_name_is_sought_in_minigpt_home_before_the_hub(name, home, monkeypatch):
    put_hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    directory = place(home / name.split("/")[-1], "config.json", WEIGHTS)
    assert checkpoint.find(name) == directory


def test_an_unknown_name_is_an_error_that_says_the_known_ones(home):
    told = f"--model gpt3: no such directory, and not one of demo, {', '.join(PUBLISHED)}"
    assert refusal(checkpoint.find, "gpt3") == told


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2"])
def test_a_published_name_that_is_not_here_is_an_error_with_the_commands_that_fetch_it(name, home):
    place(home / name, "config.json", "vocab.json")  # a download that was cut short
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    assert refusal(checkpoint.find, name) == (
        f"{name} is not on this machine. To fetch it: pip install huggingface_hub && hf download {owner}/{name} "
        f"config.json model.safetensors vocab.json merges.txt --local-dir {home / name}"
    )


def test_a_hub_cache_without_weights_is_completed(home, monkeypatch):
    cache = place(home / "cache", "config.json", "vocab.json")

    def snapshot_download(repository, allow_patterns, local_files_only):
        if not local_files_only:
            place(cache, WEIGHTS)
        return str(cache)

    put_hub(monkeypatch, snapshot_download)
    assert checkpoint.on_disk("gpt2-xl") is None
    assert checkpoint.find("gpt2-xl") == checkpoint.on_disk("gpt2-xl") == cache


@pytest.mark.parametrize("reason, told", [("", "ConnectionError"), ("no network\nmore about it", "no network")])
def test_a_failed_download_is_an_error_of_one_line(reason, told, home, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError(reason)

    put_hub(monkeypatch, snapshot_download)
    assert refusal(checkpoint.find, "gpt2") == f"gpt2: huggingface_hub could not download it: {told}"


def test_without_a_name_gpt2_xl_is_used_or_else_the_demo_and_one_line_says_how_to_get_it(home):
    said = []
    assert checkpoint.default(said.append) == "demo"
    (line,) = said
    assert "\n" not in line and f"hf download openai-community/gpt2-xl config.json {WEIGHTS}" in line
    place(home / "gpt2-xl", "config.json", WEIGHTS)
    assert checkpoint.default(said.append) == "gpt2-xl" and said == [line]
