"""Checkpoint directories as the hub serves them: where to look for one, weights in, weights out.

Weights are read from the memory-mapped file one tensor at a time and copied straight into the model's own
memory, on its device and in its dtype; there is never a second copy of the model.
"""

import hashlib
import itertools
import json
import os
import shlex
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from minigpt.config import PUBLISHED
from minigpt.errors import UserError
from minigpt.files import FLOATS, open_tensors, read_object, replacing

DEMO = Path(__file__).parent / "demo"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["config.json", WEIGHTS, INDEX, "model-*.safetensors", "vocab.json", "merges.txt"]
HEAD = "lm_head.weight"


def find(name):
    """The directory of the checkpoint `name`: a directory, "demo", or a published name, which is sought in
    $MINIGPT_HOME, then through huggingface_hub (its cache, else its download). Raises UserError with what to do."""
    if name == "demo":
        return DEMO
    if os.path.isdir(name):
        return Path(name)
    if name not in PUBLISHED:
        raise UserError(f"--model {name}: no such directory, and not one of demo, {', '.join(PUBLISHED)}")
    directory = on_disk(name) or _from_hub(name, download=True)
    if directory is None:
        raise UserError(f"{name} is not on this machine. To fetch it: {_command(name)}")
    return directory


def default(tell):
    """The model to use when none is named: gpt2-xl where it already lies on disk, else the demo; `tell` gets a line
    that says so."""
    if on_disk("gpt2-xl"):
        return "gpt2-xl"
    fetch = f"gpt2-xl is not on this machine; to fetch it: {_command('gpt2-xl')}"
    tell(f"Using the small demo checkpoint. {fetch}")
    return "demo"


def on_disk(name):
    """The directory of a published checkpoint if it can be had without the network, else None."""
    directory = home() / name
    if _has_weights(directory):
        return directory
    directory = _from_hub(name, download=False)
    return directory if directory and _has_weights(directory) else None


def _has_weights(directory):
    """Not so where a download was cut short, or where only the tokenizer was ever asked for."""
    return (directory / "config.json").exists() and any((directory / file).exists() for file in (WEIGHTS, INDEX))


def home():
    return Path(os.environ.get("MINIGPT_HOME", "~/.cache/minigpt")).expanduser()


def repository(name):
    """What the hub calls a published checkpoint."""
    return f"distilbert/{name}" if name == "distilgpt2" else f"openai-community/{name}"


def _command(name):
    """The shell command that puts a published checkpoint where `find` looks first."""
    files = f"config.json {WEIGHTS} vocab.json merges.txt"
    target = shlex.quote(str(home() / name))
    return f"pip install huggingface_hub && hf download {repository(name)} {files} --local-dir {target}"


def _from_hub(name, download):
    try:
        import huggingface_hub
    except ImportError:
        return None
    try:
        path = huggingface_hub.snapshot_download(repository(name), allow_patterns=FILES, local_files_only=not download)
    except Exception as error:  # the library's own errors and those of the network below it are many
        if download:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{name}: huggingface_hub could not download it: {reason}") from error
        return None
    return Path(path)


def check_size(config, directory):
    """Refuse a config.json that promises far more than the weights hold, before time or memory is spent on it."""
    with _opened(directory) as files:
        tensors, size = sum(len(file.keys()) for file in files.values()), sum(path.stat().st_size for path in files)
    if config.n_layer > tensors or config.n_params > size:  # a number takes two bytes or more
        raise UserError(
            f"{directory}: config.json says {config.n_layer:,} layers and {config.n_params:,} parameters, "
            f"but the weights are {tensors:,} tensors in {size:,} bytes"
        )


@torch.no_grad()
def load_weights(model, directory, device, dtype):
    """Fill `model` (its parameters may be on the meta device) from `directory`. Every tensor is checked: missing,
    unexpected, of another shape or type, not finite are UserErrors that name it. Sets model.fingerprint."""
    with _opened(directory) as files:
        sources = _match(files, dict(model.named_parameters()))
        for module in model.modules():  # not by to_empty, for which torch imports a second's worth of sympy
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device)))
        parameters, samples, ends = dict(model.named_parameters()), {}, []
        for name, (path, stored) in sources.items():
            tensor = files[path].get_tensor(stored)
            samples[name] = sample(tensor)
            parameters[name].copy_(tensor)
            ends.append(torch.stack([parameters[name].min(), parameters[name].max()]))  # NaN where there is one
        wrong = (~torch.stack(ends).isfinite()).any(dim=1).tolist()  # the one wait for the device
        for path, stored in itertools.compress(sources.values(), wrong):
            check_finite(path, stored, files[path].get_tensor(stored))
            raise UserError(f"{path}: tensor {stored} has numbers too large for {dtype}: use --dtype float32")
    model.fingerprint = fingerprint(samples)


def check_finite(path, name, tensor):
    if not tensor.isfinite().all():
        raise UserError(f"{path}: tensor {name} has numbers that are not finite (NaN or infinity)")


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


@contextmanager
def _opened(directory):
    """{path: open safetensors file} of all weights in a directory."""
    with ExitStack() as stack:
        yield {path: stack.enter_context(open_tensors(path)) for path in _weight_files(Path(directory))}


def _weight_files(directory):
    """The safetensors files of a checkpoint: one, or the shards that the index names."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
    weight_map = read_object(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / INDEX}: expected a JSON object with a weight_map of tensor: file")
    shards = sorted(set(map(str, weight_map.values())))
    if not shards:
        raise UserError(f"{directory / INDEX}: its weight_map names no file")
    for shard in shards:
        if Path(shard).name != shard or not os.path.isfile(directory / shard):
            raise UserError(f"{directory / INDEX}: names the file {shard!r}, which is not beside it")
    return [directory / shard for shard in shards]


def _match(files, wanted):
    """{name in the model: (path, name in that file)}, one tensor for every parameter. Reads no more than the headers
    and, where there is one, the head."""
    sources = {}
    for path, file in files.items():
        for stored in file.keys():
            name = stored.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # buffers of the causal mask, which some checkpoints carry
            _check_tensor(path, stored, file.get_slice(stored), wanted.get("wte.weight" if name == HEAD else name))
            if name in sources:
                raise UserError(f"{path}: tensor {stored} is there twice, also as {sources[name][1]}")
            sources[name] = path, stored
    _tie(sources, files)
    missing = sorted(set(wanted) - set(sources))
    if missing:
        where = next(iter(files)) if len(files) == 1 else next(iter(files)).with_name(INDEX)
        raise UserError(f"{where}: {len(missing)} of {len(wanted)} tensors missing, the first {missing[0]}")
    return sources


def _check_tensor(path, stored, info, parameter):
    if parameter is None:
        raise UserError(f"{path}: unexpected tensor {stored}")
    if info.get_dtype() not in FLOATS:
        raise UserError(f"{path}: tensor {stored} is {info.get_dtype()}, expected one of {', '.join(FLOATS)}")
    shape, expected = list(info.get_shape()), list(parameter.shape)
    if shape != expected:
        raise UserError(f"{path}: tensor {stored} has shape {shape}, config.json says {expected}")


def _tie(sources, files):
    """The head must be the token embedding: a checkpoint that trained them apart is another model."""
    if HEAD not in sources:
        return
    path, stored = sources.pop(HEAD)
    other_path, other = sources.setdefault("wte.weight", (path, stored))  # some keep only one of the two names
    head, wte = files[path].get_tensor(stored), files[other_path].get_tensor(other)
    if not torch.equal(head.float(), wte.float()):
        check_finite(path, stored, head)
        raise UserError(f"{path}: {stored} differs from {other}; only tied heads are implemented")


def save(model, directory, dtype=torch.float32):
    """Write config.json and model.safetensors, named as the hub names them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    with replacing(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(directory / "config.json") as temporary:
        end = {
            "bos_token_id": model.config.vocab_size - 1,
            "eos_token_id": model.config.vocab_size - 1,
        }  # GPT-2's custom
        temporary.write_text(json.dumps(model.config.to_dict() | end, indent=2) + "\n", encoding="utf-8")
