"""Checkpoints load exactly as they were written, whatever their layout, or are refused with the file and the tensor."""

import json
import pickle
import random
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, refusal
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, UserError, checkpoint
from minigpt.checkpoint import INDEX, WEIGHTS
from minigpt.config import ACTIVATIONS, ALIASES, PUBLISHED

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


def why_refused(directory):
    """Why the checkpoint does not load, less the directory."""
    return refusal(GPT.from_pretrained, directory).removeprefix(f"{directory}").lstrip("/: ")


def save_shards(directory, *shards):
    """Instead of the one file several, and the index that names them."""
    (directory / WEIGHTS).unlink(missing_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alias", [None, *ALIASES])
def test_logits_of_any_config_equal_transformers(activation, alias, reference, tmp_path):
    sizes = dict(n_head=3, n_embd=24, n_layer=2, n_inner=random.choice([None, 7]), layer_norm_epsilon=1e-3)
    theirs = reference(**sizes, activation_function=activation)
    edit_config(tmp_path, lambda config: alias and config.update({alias: config.pop(ALIASES[alias])}))
    ids = torch.randint(100, (2, 16))
    assert torch.allclose(GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits, atol=1e-4)


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

    checkpoint.save(GPT.from_pretrained(tmp_path), tmp_path / "copy", dtype)
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
    (before,) = {GPT.from_pretrained(tmp_path, dtype=dtype).fingerprint for dtype in DTYPES}
    renamed = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    save_shards(tmp_path, renamed | {HEAD: weights[WTE].clone()})
    assert GPT.from_pretrained(tmp_path).fingerprint == before


def test_a_fingerprint_changes_with_any_tensor(weights, tmp_path):
    prints = {GPT.from_pretrained(tmp_path).fingerprint}
    for name in NAMES:
        save_file(weights | {name: torch.randn_like(weights[name])}, tmp_path / WEIGHTS)
        prints.add(GPT.from_pretrained(tmp_path).fingerprint)
    assert len(prints) == 1 + len(NAMES)


# What is refused, and what it is told.


def test_a_missing_tensor_is_an_error_that_names_it(weights, tmp_path):
    del weights[name := random.choice(NAMES)]
    save_file(weights, tmp_path / WEIGHTS)
    assert why_refused(tmp_path) == f"1 of 28 tensors missing, the first {name}"


@pytest.mark.parametrize("name", [WTE, HEAD, "h.1.attn.c_attn.weight"])
def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(name, weights, tmp_path):
    shape = weights[WTE if name == HEAD else name].shape
    other = [*shape[:-1], shape[-1] + 1]
    save_file(weights | {name: torch.zeros(other)}, tmp_path / WEIGHTS)
    assert why_refused(tmp_path) == f"{WEIGHTS}: tensor {name} has shape {other}, config.json says {list(shape)}"


@pytest.mark.parametrize(
    "name, tensor, why",
    [
        *(("ln_f.bias", torch.zeros(12).to(d), "tensor ln_f.bias is ") for d in (torch.float64, torch.float8_e4m3fn)),
        ("transformer.h.2.ln_1.bias", torch.zeros(12), "unexpected tensor transformer.h.2.ln_1.bias"),
        (HEAD, torch.randn(50, 12), "lm_head.weight differs from wte.weight; only tied heads are implemented"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_a_tensor_of_another_model_is_an_error_that_names_it(name, tensor, why, weights, tmp_path):
    save_file(weights | {name: tensor}, tmp_path / WEIGHTS)
    assert why_refused(tmp_path).startswith(f"{WEIGHTS}: {why}")


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
    assert why_refused(tmp_path).startswith(f"{WEIGHTS}: not a safetensors file: ") and what in why_refused(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(dtype, value, weights, tmp_path):
    weights, name = {name: tensor.to(dtype) for name, tensor in weights.items()}, random.choice(NAMES)
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / WEIGHTS)
    assert why_refused(tmp_path) == f"{WEIGHTS}: tensor {name} has numbers that are not finite (NaN or infinity)"


def test_a_weight_that_does_not_fit_into_float16_is_an_error_that_says_so(weights, tmp_path):
    weights["wpe.weight"][:] = 60_000  # this does
    weights["ln_f.bias"][3] = 1e6
    save_file(weights, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights, torch.bfloat16)
    with pytest.raises(UserError, match=r"tensor ln_f.bias has numbers too large for torch.float16: use --dtype float"):
        GPT.from_pretrained(tmp_path, dtype=torch.float16)


def test_the_weights_of_another_architecture_are_an_error(weights, tmp_path):
    save_file({f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(50, 50) for i in range(3)}, tmp_path / WEIGHTS)
    assert why_refused(tmp_path) == "28 of 28 tensors missing, the first h.0.attn.c_attn.bias"


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_alone_are_an_error_with_a_command_that_converts_them(shards, weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    tensors = [(name, p.data) for name, p in [*weights.items(), (HEAD, weights[WTE])]]  # two names of the same memory
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(dict(tensors[i::shards]), tmp_path / name)
    told, _, command = why_refused(tmp_path).partition(" To convert it: ")
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
    assert why_refused(tmp_path) == why


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
    assert why_refused(inside).startswith(f"{INDEX}: ")


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
