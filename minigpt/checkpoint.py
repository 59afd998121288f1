"""Checkpoint directories as the hub serves them: where to look for one, weights in, weights out.

Weights are read from the memory-mapped file one tensor at a time and copied straight into the model's own
memory, on its device and in its dtype; there is never a second copy of the model.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigpt.config import PUBLISHED
from minigpt.errors import UserError
from minigpt.files import replacing

DEMO = Path(__file__).parent / "demo"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", "vocab.json", "merges.txt"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find(name):
    """The directory of the checkpoint `name`: a directory, "demo", or a published name, which is sought in
    $MINIGPT_HOME, then through huggingface_hub (its cache, else its download). Raises UserError with what to do."""
    if name == "demo":
        return DEMO
    if Path(name).is_dir():
        return Path(name)
    if name not in PUBLISHED:
        raise UserError(f"--model {name}: no such directory, and not one of demo, {', '.join(PUBLISHED)}")
    directory = on_disk(name) or _from_hub(name, download=True)
    if directory is None:
        raise UserError(
            f"{name} is not on this machine. To fetch it: pip install huggingface_hub && "
            f"hf download {_repository(name)} config.json {WEIGHTS} vocab.json merges.txt --local-dir {home() / name}"
        )
    return directory


def default():
    """The model to use when none is named: gpt2-xl where it already lies on disk, else the demo, saying so."""
    if on_disk("gpt2-xl"):
        return "gpt2-xl"
    print(
        "Using the small demo checkpoint (gpt2-xl is not on this machine; "
        f"hf download {_repository('gpt2-xl')} --local-dir {home() / 'gpt2-xl'} gets it).",
        file=sys.stderr,
    )
    return "demo"


def on_disk(name):
    """The directory of a published checkpoint if it can be had without the network, else None."""
    directory = home() / name
    return directory if (directory / "config.json").exists() else _from_hub(name, download=False)


def home():
    return Path(os.environ.get("MINIGPT_HOME", "~/.cache/minigpt")).expanduser()


def _repository(name):
    return f"distilbert/{name}" if name == "distilgpt2" else f"openai-community/{name}"


def _from_hub(name, download):
    try:
        import huggingface_hub
    except ImportError:
        return None
    try:
        path = huggingface_hub.snapshot_download(_repository(name), allow_patterns=FILES, local_files_only=not download)
    except Exception as error:  # the library's own errors and those of the network below it are many
        if download:
            raise UserError(f"{name}: huggingface_hub could not download it: {str(error).splitlines()[0]}") from error
        return None
    return Path(path)


def load_weights(model, directory, device, dtype):
    """Fill `model` (its parameters may be on the meta device) from `directory`. Every tensor is checked: missing,
    unexpected, of another shape or type are UserErrors that name it. Sets model.fingerprint."""
    wanted = dict(model.named_parameters())
    files = {path: _check_header(path, wanted) for path in _weight_files(Path(directory))}
    missing = set(wanted) - {name for names in files.values() for name in names.values()}
    if missing:
        raise UserError(f"{directory}: {len(missing)} tensors are missing from the weights, such as {min(missing)}")
    model.to_empty(device=device).to(dtype)  # of empty tensors: the last step before memory is taken
    wanted, samples = dict(model.named_parameters()), {}
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for stored, name in names.items():
                tensor = file.get_tensor(stored)
                samples[name] = sample(tensor)
                with torch.no_grad():
                    wanted[name].copy_(tensor)
    model.fingerprint = fingerprint(samples)


def sample(tensor):
    """64 values spread over a tensor, as float32 bytes."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes()


def fingerprint(samples):
    """A short name for these very weights, from samples of every tensor: {name: bytes} -> 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]


def _weight_files(directory):
    """The safetensors files of a checkpoint: one, or the shards that the index names."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
    try:
        shards = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / INDEX}: expected a JSON object with a weight_map of tensor: file") from error
    for shard in shards:
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise UserError(f"{directory / INDEX}: names the file {shard!r}, which is not beside it")
    return [directory / shard for shard in shards]


def _check_header(path, wanted):
    """{name in the file: name in the model} of the tensors to read. Looks at the header alone."""
    names, head = {}, None
    try:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():
                name = stored.removeprefix("transformer.")
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # buffers of the causal mask, which some checkpoints carry
                info = file.get_slice(stored)
                if name == "lm_head.weight":
                    head, name = stored, "wte.weight"
                else:
                    names[stored] = name
                if name not in wanted:
                    raise UserError(f"{path}: unexpected tensor {stored}")
                if info.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: tensor {stored} is {info.get_dtype()}, expected one of {', '.join(DTYPES)}")
                if tuple(info.get_shape()) != tuple(wanted[name].shape):
                    expected = list(wanted[name].shape)
                    raise UserError(f"{path}: tensor {stored} has shape {info.get_shape()}, config.json says {expected}")
            _check_tied(path, file, head, names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error
    return names


def _check_tied(path, file, head, names):
    """The head must be the token embedding: a checkpoint that trained them apart is another model."""
    wte = next((stored for stored, name in names.items() if name == "wte.weight"), None)
    if head and wte is None:
        names[head] = "wte.weight"  # a file that kept only one of the two tied names
    elif head and not torch.equal(file.get_tensor(head), file.get_tensor(wte)):
        raise UserError(f"{path}: {head} differs from {wte}; only tied heads are implemented")


def save(model, directory, dtype=torch.float32):
    """Write config.json and model.safetensors, named as the hub names them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
