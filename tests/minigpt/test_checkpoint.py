"""Checkpoints load exactly as they were written, whatever their layout, or are refused with the file and the tensor."""

import io
import json
import math
import pickle
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


@pytest.fixture
def weights(tmp_path):
    """The random tensors, by name, of a small checkpoint in tmp_path."""
    model = random_model(CONFIG, std=1.0)
    checkpoint.save(model, tmp_path)
    return dict(model.named_parameters())


def assert_loads(directory, weights, dtype=torch.float32):
    loaded = dict(GPT.from_pretrained(directory, dtype=dtype).named_parameters())
    assert set(loaded) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


# What loads.


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_what_is_saved_in_any_float_type_is_read_in_any_other_and_by_transformers(stored, weights, tmp_path):
    from transformers import GPT2LMHeadModel

    checkpoint.save(GPT.from_pretrained(tmp_path), tmp_path / "copy", stored)
    weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    for computed in DTYPES:
        assert_loads(tmp_path / "copy", weights, computed)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "copy", dtype=stored).transformer.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights.items())


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


def test_shards_written_by_transformers_are_the_same_model(reference, tmp_path):
    theirs = reference()
    checkpoint.save(GPT.from_pretrained(tmp_path), tmp_path / "copy")
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_loads(tmp_path, dict(theirs.transformer.named_parameters()))
    assert GPT.from_pretrained(tmp_path).fingerprint == GPT.from_pretrained(tmp_path / "copy").fingerprint


def test_heads_of_other_tasks_are_passed_over_and_said_once(weights, tmp_path, caplog):
    heads = ["\x1b[2J", "score.weight", "v_head.summary.bias"]
    save_file(weights | {name: torch.zeros(3, dtype=torch.int64) for name in heads}, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights)
    (record,) = caplog.records
    assert record.getMessage().endswith(r"no part of the language model: \x1b[2J, score.weight, v_head.summary.bias")


def test_no_more_than_one_tensor_is_in_memory_beside_the_model(weights, tmp_path, monkeypatch):
    seen, sample = [], checkpoint.sample

    def watched(tensor):
        assert not any(earlier() is not None for earlier in seen)
        seen.append(weakref.ref(tensor))
        return sample(tensor)

    monkeypatch.setattr(checkpoint, "sample", watched)
    assert_loads(tmp_path, weights, torch.bfloat16)
    assert len(seen) == len(NAMES)


def test_a_fingerprint_is_of_every_number_whatever_its_type(weights, tmp_path):
    fingerprint = lambda dtype=torch.float32: GPT.from_pretrained(tmp_path, dtype=dtype).fingerprint
    (before,) = set(map(fingerprint, DTYPES))
    others = set()
    for name in NAMES:
        save_file(weights | {name: torch.randn_like(weights[name])}, tmp_path / WEIGHTS)
        others.add(fingerprint())
    assert len(others - {before}) == len(NAMES)


# What is refused, and what it is told.


FINITE, LARGE = "numbers that are not finite (NaN or infinity)", "numbers too large for torch.float16: use --dtype float"
SHAPED = "h.1.attn.c_attn.weight"


@pytest.mark.parametrize("change, why", [
    ({"ln_f.bias": None}, "1 of 28 tensors missing, the first ln_f.bias"),
    (dict.fromkeys(NAMES) | {"model.layers.0.q_proj.weight": torch.zeros(50, 50)}, "28 of 28 tensors missing, the first"),
    ({WTE: torch.zeros(50, 13)}, f"{WEIGHTS}: tensor {WTE} has shape [50, 13], config.json says [50, 12]"),
    ({HEAD: torch.zeros(51, 12)}, f"{WEIGHTS}: tensor {HEAD} has shape [51, 12], config.json says [50, 12]"),
    ({SHAPED: torch.zeros(36)}, f"{WEIGHTS}: tensor {SHAPED} has shape [36], config.json says [12, 36]"),
    ({HEAD: torch.randn(50, 12)}, f"{WEIGHTS}: {HEAD} differs from {WTE}; only tied heads are implemented"),
    ({"transformer.h.2.ln_1.bias": torch.zeros(12)}, f"{WEIGHTS}: unexpected tensor transformer.h.2.ln_1.bias"),
    ({"ln_f.bias": torch.zeros(12).double()}, f"{WEIGHTS}: tensor ln_f.bias is F64"),
    ({"ln_f.bias": torch.zeros(12).to(torch.float8_e4m3fn)}, f"{WEIGHTS}: tensor ln_f.bias is F8_E4M3"),
    *(({"ln_f.bias": torch.full((12,), math.nan, dtype=d)}, f"{WEIGHTS}: tensor ln_f.bias has {FINITE}") for d in DTYPES),
    ({"wpe.weight": torch.tensor([0.0] * 95 + [-math.inf]).view(8, 12)}, f"{WEIGHTS}: tensor wpe.weight has {FINITE}"),
    ({"wpe.weight": torch.full((8, 12), 9.0), "ln_f.bias": torch.full((12,), 1e6)}, f"{WEIGHTS}: tensor ln_f.bias has {LARGE}"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(change, why, weights, tmp_path):
    tensors = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
    save_file(tensors, tmp_path / WEIGHTS)
    dtype = torch.float16 if LARGE in why else torch.float32
    assert why_refused(GPT.from_pretrained, tmp_path, "cpu", dtype).startswith(why)
    if LARGE in why:
        assert_loads(tmp_path, tensors, torch.bfloat16)


def pickled(x):
    torch.save(x, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("content, what", [
    (b"", ""),
    (slice(-9), ""),  # a sound file, cut
    (b"<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>\n", " (a web page in place of the file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:248dfc\nsize 548105171\n", " (a git LFS pointer in"),
    (pickle.dumps(["weights"]), " (a pickle, which could run code: "),
    (pickled({"wte.weight": torch.zeros(3)}), " (a zip or a pickle of torch.save, which could run code: "),
], ids=lambda x: str(x)[:30])  # fmt: skip
def test_a_file_that_is_cut_or_something_else_is_an_error_that_says_what(content, what, weights, tmp_path):
    sound = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(sound[content] if isinstance(content, slice) else content)
    why = why_refused(GPT.from_pretrained, tmp_path)
    assert why.startswith(f"{WEIGHTS}: not a safetensors file: ") and what in why


def test_pickled_weights_alone_are_an_error_with_a_command_that_converts_them(weights, tmp_path, monkeypatch):
    (tmp_path / WEIGHTS).unlink()
    tensors = [(name, p.data) for name, p in [*weights.items(), (HEAD, weights[WTE])]]  # two names of the same memory
    for i in range(2):
        torch.save(dict(tensors[i::2]), tmp_path / f"pytorch_model-{i + 1:05}-of-00002.bin")
    told, _, command = why_refused(GPT.from_pretrained, tmp_path).partition(" To convert it: ")
    assert told.endswith("is a pickle, which could run code: it is not read.")
    folder, _, python = command.partition(" && python -c ")
    monkeypatch.chdir(folder.removeprefix("cd "))
    exec(python.strip('"'), {})
    assert_loads(tmp_path, weights)


def test_a_directory_without_config_weights_or_a_sound_index_of_them_is_an_error(weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    assert why_refused(GPT.from_pretrained, tmp_path) == f"neither {WEIGHTS} nor {INDEX} is there"
    foreign = [{"weight_map": {WTE: file}} for file in ("model-2.safetensors", "../model.safetensors", "", 3, "a\0")]
    for content in ("", "[]", "{}", '{"weight_map": ["a"]}', "<html>", *map(json.dumps, foreign)):
        (tmp_path / INDEX).write_text(content)
        assert why_refused(GPT.from_pretrained, tmp_path).startswith(f"{INDEX}: "), content
    (tmp_path / "config.json").unlink()
    assert why_refused(GPT.from_pretrained, tmp_path) == "no checkpoint: there is no config.json in it"


# Where a checkpoint is looked for.


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty $MINIGPT_HOME on a machine without huggingface_hub."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path


def place(directory, *files):
    directory.mkdir(exist_ok=True)
    for file in files:
        (directory / file).touch()
    return directory


@pytest.fixture
def hub(monkeypatch):
    """A function: what huggingface_hub.snapshot_download is from now on."""
    return lambda function: monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=function))


@pytest.mark.parametrize("name", ["gpt2-xl", "openai-community/gpt2", "distilbert/distilgpt2"])
def test_a_published_name_is_sought_in_minigpt_home_before_the_hub(name, home, hub):
    hub(None)
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


@pytest.mark.parametrize("here", ["config.json", WEIGHTS])
def test_a_hub_cache_that_is_cut_short_is_completed(here, home, hub):
    cache = place(home / "cache", here)

    def snapshot_download(repository, allow_patterns, local_files_only):
        if not local_files_only:
            place(cache, "config.json", WEIGHTS)
        return str(cache)

    hub(snapshot_download)
    assert checkpoint.on_disk("gpt2-xl") is None
    assert checkpoint.find("gpt2-xl") == checkpoint.on_disk("gpt2-xl") == cache


@pytest.mark.parametrize("reason, told", [("", "ConnectionError"), ("no network\nmore about it", "no network")])
def test_a_failed_download_is_an_error_of_one_line(reason, told, home, hub):
    def snapshot_download(*_, **__):
        raise ConnectionError(reason)

    hub(snapshot_download)
    assert refusal(checkpoint.find, "gpt2") == f"gpt2: huggingface_hub could not download it: {told}"


def test_without_a_name_gpt2_xl_is_used_or_else_the_demo_and_one_short_line_says_so(home):
    said = []
    assert checkpoint.default(said.append) == "demo"
    (line,) = said
    assert "\n" not in line and len(line) < 120 and "demo" in line and "--model gpt2-xl" in line
    place(home / "gpt2-xl", "config.json", WEIGHTS)
    assert checkpoint.default(said.append) == "gpt2-xl" and said == [line]
