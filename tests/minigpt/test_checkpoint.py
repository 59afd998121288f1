"""Checkpoints load exactly as they were written, whatever their layout, or are refused with the file and the tensor."""

import json
import pickle
import random
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from safetensors.torch import save_file

from minigpt import GPT, GPTConfig, UserError, checkpoint
from minigpt.checkpoint import INDEX, WEIGHTS
from minigpt.config import PUBLISHED

CONFIG = GPTConfig(vocab_size=50, n_positions=8, n_embd=12, n_layer=2, n_head=3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def refusal(directory):
    """The one line that says why the checkpoint does not load, less the directory that it begins with."""
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(directory)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(directory))
    return str(caught.value).removeprefix(f"{directory}").lstrip("/")


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
@pytest.mark.parametrize("computed", DTYPES, ids=str)
def test_weights_of_any_float_type_load_into_any_other(stored, computed, weights, tmp_path):
    weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    save_file(weights, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights, computed)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", ["with a head", "without a head", "with nothing but a head"])
@pytest.mark.parametrize("buffers", ["with mask buffers", "without"])
def test_names_with_or_without_prefix_head_and_buffers_are_the_same_model(prefix, head, buffers, weights, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in weights.items()}
    if buffers == "with mask buffers":
        tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)
    if head != "without a head":
        tensors["lm_head.weight"] = weights["wte.weight"].clone()
    if head == "with nothing but a head":
        del tensors[f"{prefix}wte.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights)


def test_shards_are_the_same_model_however_the_tensors_fell(weights, tmp_path):
    names = random.sample(list(weights), len(weights))
    parts = [{name: weights[name] for name in names[i::3]} for i in range(3)]
    parts[0]["lm_head.weight"] = weights["wte.weight"].clone()
    save_shards(tmp_path, *parts)
    assert_loads(tmp_path, weights)


def test_shards_written_by_transformers_load(reference, tmp_path):
    theirs = reference()
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_loads(tmp_path, dict(theirs.transformer.named_parameters()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_is_read_back_here_and_by_transformers(dtype, weights, tmp_path):
    from transformers import GPT2LMHeadModel

    checkpoint.save(GPT.from_pretrained(tmp_path), tmp_path / "copy", dtype)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    assert_loads(tmp_path / "copy", weights)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "copy", dtype=dtype).transformer.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights.items())


def test_a_fingerprint_does_not_depend_on_the_type_computed_in(weights, tmp_path):
    assert len({GPT.from_pretrained(tmp_path, dtype=dtype).fingerprint for dtype in DTYPES}) == 1


def test_a_fingerprint_does_not_depend_on_names_shards_and_heads(weights, tmp_path):
    before = GPT.from_pretrained(tmp_path).fingerprint
    renamed = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    renamed["lm_head.weight"] = weights["wte.weight"].clone()
    save_shards(tmp_path, renamed)
    assert GPT.from_pretrained(tmp_path).fingerprint == before


@pytest.mark.parametrize("name", [name for name, _ in GPT(CONFIG).named_parameters()])
def test_a_fingerprint_changes_with_any_tensor(name, weights, tmp_path):
    before = GPT.from_pretrained(tmp_path).fingerprint
    save_file(weights | {name: torch.randn_like(weights[name])}, tmp_path / WEIGHTS)
    assert GPT.from_pretrained(tmp_path).fingerprint != before


# What is refused, and what it is told.


@pytest.mark.parametrize("name", [name for name, _ in GPT(CONFIG).named_parameters()])
def test_a_missing_tensor_is_an_error_that_names_it(name, weights, tmp_path):
    del weights[name]
    save_file(weights, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: 1 of 28 tensors missing, the first {name}"


def test_a_tensor_missing_from_shards_is_an_error_that_names_it_and_the_index(weights, tmp_path):
    names = sorted(weights)
    save_shards(tmp_path, {name: weights[name] for name in names[:9]}, {name: weights[name] for name in names[11:]})
    assert refusal(tmp_path) == f"{INDEX}: 2 of 28 tensors missing, the first {names[9]}"


def test_an_unexpected_tensor_is_an_error_that_names_it(weights, tmp_path):
    save_file(weights | {"transformer.h.2.ln_1.bias": torch.zeros(12)}, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: unexpected tensor transformer.h.2.ln_1.bias"


@pytest.mark.parametrize("name", [name for name, _ in GPT(CONFIG).named_parameters()] + ["lm_head.weight"])
def test_a_tensor_of_another_shape_is_an_error_with_both_shapes(name, weights, tmp_path):
    shape = weights["wte.weight" if name == "lm_head.weight" else name].shape
    other = [*shape[:-1], shape[-1] + 1]
    save_file(weights | {name: torch.zeros(other)}, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: tensor {name} has shape {other}, config.json says {list(shape)}"


def test_a_matrix_stored_the_other_way_round_is_an_error(weights, tmp_path):
    name = "h.1.mlp.c_fc.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: tensor {name} has shape [48, 12], config.json says [12, 48]"


@pytest.mark.parametrize(
    "dtype, called",
    [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")],
    ids=str,
)
def test_a_tensor_of_another_type_is_an_error_that_names_it(dtype, called, weights, tmp_path):
    save_file(weights | {"ln_f.weight": weights["ln_f.weight"].to(dtype)}, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: tensor ln_f.weight is {called}, expected one of F32, F16, BF16"


@pytest.mark.parametrize("where", ["in the same file", "in another shard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_was_trained_apart_is_an_error(dtype, where, weights, tmp_path):
    head = {"lm_head.weight": torch.randn(50, 12).to(dtype)}
    if where == "in the same file":
        save_file(weights | head, tmp_path / WEIGHTS)
    else:
        save_shards(tmp_path, head, weights)
    told = "lm_head.weight differs from wte.weight; only tied heads are implemented"
    assert refusal(tmp_path).endswith(f".safetensors: {told}")


def test_a_tensor_under_two_names_is_an_error_that_says_both(weights, tmp_path):
    save_file(weights | {"transformer.wpe.weight": torch.zeros(8, 12)}, tmp_path / WEIGHTS)
    assert "is there twice" in refusal(tmp_path)
    assert "transformer.wpe.weight" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(share, weights, tmp_path):
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(share * len(content))])
    assert refusal(tmp_path).startswith((f"{WEIGHTS}: not a safetensors file: ", f"{WEIGHTS}: not a whole safetensors"))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>\n", " (a web page in place of "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:248dfc\nsize 548105171\n", " (a git LFS pointer in "),
        (pickle.dumps(["weights"]), " (a pickle, which could run code: "),
        (b"\0" * 1000, ": "),
        (b"", ": it has 0 bytes"),
    ],
    ids=["html", "lfs pointer", "pickle", "zeros", "empty"],
)
def test_a_file_that_is_something_else_is_an_error_that_says_what(content, what, weights, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{WEIGHTS}: not a ")
    assert what in refusal(tmp_path)


def test_what_torch_saved_is_refused_as_a_pickle(weights, tmp_path):
    torch.save(weights, tmp_path / WEIGHTS)
    assert "(a zip or a pickle of torch.save, which could run code: " in refusal(tmp_path)


@pytest.mark.parametrize(
    "lie",
    [
        lambda header: header["wte.weight"].update(data_offsets=[0, 1 << 60]),
        lambda header: header["wte.weight"].update(data_offsets=header["wpe.weight"]["data_offsets"]),
        lambda header: header["wte.weight"].update(data_offsets=[-8, 0]),
        lambda header: header["wte.weight"].update(shape=[1 << 40, 1 << 40]),
        lambda header: header["wte.weight"].update(shape=[-50, -12]),
        lambda header: header["wte.weight"].update(shape="large"),
        lambda header: header["wte.weight"].update(dtype="F16"),
        lambda header: header["wte.weight"].update(dtype="OBJECT"),
        lambda header: header.pop("wte.weight"),
        lambda header: header.clear(),
        lambda header: header.update({f"a{i}": 0 for i in range(1000)}),
    ],
    ids=range(11),
)
def test_a_header_that_lies_is_an_error_that_names_the_file(lie, weights, tmp_path):
    length, rest = struct.unpack("<Q", (tmp_path / WEIGHTS).read_bytes()[:8])[0], (tmp_path / WEIGHTS).read_bytes()[8:]
    header = json.loads(rest[:length])
    lie(header)
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + rest[length:])
    assert refusal(tmp_path).startswith(f"{WEIGHTS}: not a whole safetensors file: ")


@pytest.mark.parametrize("length", [1 << 25, 1 << 40, (1 << 64) - 1])
def test_a_header_of_any_length_that_is_claimed_is_not_read(length, weights, tmp_path):
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(1 << 42)  # a hole: four terabytes that take no room
    assert refusal(tmp_path).startswith(f"{WEIGHTS}: not a safetensors file: 4,398,046,511,104 bytes cannot hold a ")


def test_a_directory_in_place_of_the_file_is_an_error(weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    assert refusal(tmp_path) == f"{WEIGHTS}: not a regular file"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wpe.weight", "h.1.mlp.c_proj.bias"])
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(name, dtype, value, weights, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: tensor {name} has numbers that are not finite (NaN or infinity)"


def test_a_weight_that_does_not_fit_into_float16_is_an_error_that_says_so(weights, tmp_path):
    weights["wpe.weight"][:] = 60_000  # this does
    weights["ln_f.bias"][3] = 1e6
    save_file(weights, tmp_path / WEIGHTS)
    assert_loads(tmp_path, weights, torch.bfloat16)
    with pytest.raises(
        UserError, match=r"tensor ln_f.bias has numbers too large for torch.float16: use --dtype float32"
    ):
        GPT.from_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize(
    "setting", [{"n_layer": 10**9}, {"n_embd": 3 * 10**8}, {"vocab_size": 2**31 - 1}, {"n_inner": 2**31 - 1}], ids=str
)
def test_a_config_of_another_size_by_far_is_refused_before_a_model_is_made(setting, weights, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | setting))
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("made a model"))
    assert refusal(tmp_path).startswith(": config.json says ")
    assert f"but the weights are 28 tensors in {(tmp_path / WEIGHTS).stat().st_size:,} bytes" in refusal(tmp_path)


def test_the_weights_of_another_architecture_are_an_error_that_names_a_tensor(weights, tmp_path):
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(50, 50) for i in range(3)}
    save_file(tensors, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{WEIGHTS}: unexpected tensor model.layers.0.self_attn.q_proj.weight"


def test_a_directory_without_weights_is_an_error_that_says_which_files_were_sought(weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    assert refusal(tmp_path) == f": neither {WEIGHTS} nor {INDEX} is there"


def test_a_directory_without_config_is_an_error(weights, tmp_path):
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path).endswith("no checkpoint: there is no config.json in it")


@pytest.mark.parametrize(
    "shard", ["model-00002.safetensors", "../model.safetensors", "/etc/passwd", "..", "", 3, "a\0", "\ud800", "a" * 300]
)
def test_an_index_that_names_a_file_that_is_not_beside_it_is_an_error(shard, weights, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "config.json").rename(inside / "config.json")
    save_shards(inside, weights)
    (inside / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    assert refusal(inside) == f"{INDEX}: names the file {str(shard)!r}, which is not beside it"


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"weight_map": ["a"]}', "<html>", "[" * 100_000])
def test_an_index_that_is_something_else_is_an_error(content, weights, tmp_path):
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(content)
    assert refusal(tmp_path).startswith((f"{INDEX}: expected a JSON object", f"{INDEX}: not JSON: "))


def test_a_refused_checkpoint_takes_no_memory(weights, tmp_path):
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with torch.device("meta"):
        model = GPT(CONFIG)
    with pytest.raises(UserError):
        checkpoint.load_weights(model, tmp_path, "cpu", torch.float32)
    assert all(p.is_meta for p in model.parameters())


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


def test_a_directory_is_the_checkpoint_in_it(home):
    assert checkpoint.find(str(home)) == home
    assert checkpoint.find(home) == home


def test_the_demo_is_in_the_package_and_loads():
    assert checkpoint.find("demo") == checkpoint.DEMO
    assert GPT.from_pretrained("demo").config.vocab_size == 4096


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_sought_in_minigpt_home(name, home):
    directory = place(home / name, "config.json", WEIGHTS)
    assert checkpoint.find(name) == directory


def test_minigpt_home_is_in_the_users_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIGPT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.home() == tmp_path / ".cache/minigpt"


def test_an_unknown_name_is_an_error_that_says_the_known_ones(home):
    with pytest.raises(UserError) as caught:
        checkpoint.find("gpt3")
    assert str(caught.value) == f"--model gpt3: no such directory, and not one of demo, {', '.join(PUBLISHED)}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_that_is_not_here_is_an_error_with_the_commands_that_fetch_it(name, home):
    owner = "distilbert" if name == "distilgpt2" else "openai-community"
    with pytest.raises(UserError) as caught:
        checkpoint.find(name)
    assert str(caught.value) == (
        f"{name} is not on this machine. To fetch it: pip install huggingface_hub && hf download {owner}/{name} "
        f"config.json model.safetensors vocab.json merges.txt --local-dir {home / name}"
    )


def test_a_download_that_was_cut_short_does_not_count(home):
    place(home / "gpt2", "config.json", "vocab.json")
    with pytest.raises(UserError, match="gpt2 is not on this machine"):
        checkpoint.find("gpt2")


def test_minigpt_home_goes_before_the_hub(home, monkeypatch):
    directory = place(home / "gpt2", "config.json", WEIGHTS)
    put_hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    assert checkpoint.find("gpt2") == directory


def test_what_the_hubs_cache_has_is_not_downloaded(home, monkeypatch):
    cache = place(home / "cache", "config.json", WEIGHTS)
    asked = []
    put_hub(monkeypatch, lambda repository, local_files_only, **_: asked.append(local_files_only) or str(cache))
    assert checkpoint.find("gpt2-large") == cache
    assert asked == [True]


def test_a_hub_cache_without_weights_is_completed(home, monkeypatch):
    cache = place(home / "cache", "config.json", "vocab.json")

    def snapshot_download(repository, allow_patterns, local_files_only):
        if not local_files_only:
            place(cache, WEIGHTS)
        return str(cache)

    put_hub(monkeypatch, snapshot_download)
    assert checkpoint.on_disk("gpt2-xl") is None
    assert checkpoint.find("gpt2-xl") == cache
    assert checkpoint.on_disk("gpt2-xl") == cache


@pytest.mark.parametrize("reason", ["", "no network\nmore about it"])
def test_a_failed_download_is_an_error_of_one_line(reason, home, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError(reason)

    put_hub(monkeypatch, snapshot_download)
    with pytest.raises(UserError) as caught:
        checkpoint.find("gpt2")
    told = reason.partition("\n")[0] or "ConnectionError"
    assert str(caught.value) == f"gpt2: huggingface_hub could not download it: {told}"


def test_without_a_name_gpt2_xl_is_used_where_it_is_and_nothing_is_said(home):
    place(home / "gpt2-xl", "config.json", WEIGHTS)
    said = []
    assert checkpoint.default(said.append) == "gpt2-xl" and said == []


def test_without_gpt2_xl_the_demo_is_used_and_one_line_says_how_to_get_it(home, capsys):
    said = []
    assert checkpoint.default(said.append) == "demo" and capsys.readouterr() == ("", "")
    (line,) = said
    assert "\n" not in line and f"hf download openai-community/gpt2-xl config.json {WEIGHTS}" in line
