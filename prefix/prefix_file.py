"""The prefix file: one safetensors file with the slots of each bank and, as metadata, what they belong to.

    <bank>.key, <bank>.value      (n_layer, n_head, prefix_len, head_dim), float32
    format                        "minigpt-prefix/1"
    base                          {"config": ..., "fingerprint": ...} of the model that the slots were made for
    banks                         their names, in order
    prefix_len, position_offset   slots of the longest bank; the position that text takes first
    training                      how they came to be: model, data, columns, init, settings, ...

The file may come from anybody: `read` is the one door. Whatever is wrong inside is one UserError that names the file.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from minigpt.checkpoint import check_finite, fingerprint, sample
from minigpt.config import GPTConfig
from minigpt.files import FLOATS, UserError, open_tensors, reading, replacing

FORMAT = "minigpt-prefix/1"


def find(path):
    """The prefix file that `path` means: itself, or that of a run directory. Raises UserError where there is none."""
    path = Path(path)
    found = path / "prefix.safetensors" if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{path}: no prefix file there (train.py writes runs/<name>/prefix.safetensors)")
    return found


def base_of(model):
    """What a prefix file says of its base: the config and the fingerprint of the weights."""
    if not hasattr(model, "fingerprint"):  # built in memory rather than loaded
        model.fingerprint = fingerprint({name: sample(p) for name, p in model.named_parameters()})
    return {"config": model.config.to_dict(), "fingerprint": model.fingerprint}


def describe(base):
    """A base in words, for messages."""
    config = base["config"]
    sizes = f"{config.get('n_layer')} layers of {config.get('n_embd')}, vocabulary {config.get('vocab_size')}"
    return f"a model of {sizes}, weights {base['fingerprint']}"


def write(path, banks, base, position_offset, training):
    """banks: {name: (key, value)}, each (n_layer, n_head, prefix_len, head_dim). Written whole or not at all."""
    tensors = {}
    for name, (key, value) in banks.items():
        tensors[f"{name}.key"] = key.detach().cpu().contiguous()
        tensors[f"{name}.value"] = value.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "base": json.dumps(base),
        "banks": json.dumps([*banks]),
        "prefix_len": str(max(key.size(2) for key, _ in banks.values())),
        "position_offset": str(position_offset),
        "training": json.dumps(training),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_header(path):
    """The metadata of a prefix file as a dict: base, banks, prefix_len, position_offset, training."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    with reading(path, "a prefix file"):
        check(metadata.get("format") == FORMAT, f"format is {metadata.get('format')!r}, expected {FORMAT!r}")
        header = {name: json.loads(metadata[name]) for name in ("base", "banks", "training")}
        header |= {name: int(metadata[name]) for name in ("prefix_len", "position_offset")}
        config, training = GPTConfig.from_dict(header["base"]["config"]), header["training"]
        files, columns = training.get("data") or [], training.get("columns") or []
        texts = [header["base"]["fingerprint"], *header["banks"], *files, *columns, training.get("model") or ""]
        check(isinstance(files, list) and isinstance(columns, list), "data or columns are no list")
        check(all(isinstance(text, str) for text in texts), "a name is no text")
        check(isinstance(training.get("limit") or 1, int), "limit is no number")
        check(0 < len(set(header["banks"])) == len(header["banks"]), "banks need different names")
        check(0 <= header["position_offset"] < config.n_positions, f"text would start at {header['position_offset']}")
    return header


def read(path):
    """A prefix file -> ({name: (key, value)}, header). Raises UserError where anything in it does not fit."""
    header, banks = read_header(path), {}
    config = GPTConfig.from_dict(header["base"]["config"])
    with open_tensors(path) as file, reading(path, "a prefix file"):
        expected = {f"{bank}.{side}" for bank in header["banks"] for side in ("key", "value")}
        if odd := expected ^ set(file.keys()):
            raise ValueError(f"{'no' if min(odd) in expected else 'unexpected'} tensor {min(odd)}")
        for bank in header["banks"]:
            key, value = (read_side(path, file, f"{bank}.{side}", config) for side in ("key", "value"))
            check(key.shape == value.shape, f"bank {bank} has keys of shape {[*key.shape]}, values of {[*value.shape]}")
            banks[bank] = key, value
        longest = max(key.size(2) for key, _ in banks.values())
        check(longest == header["prefix_len"], f"prefix_len is {header['prefix_len']}, but a bank has {longest} slots")
    return banks, header


def read_side(path, file, name, config):
    """One tensor (n_layer, n_head, prefix_len, head_dim)."""
    info = file.get_slice(name)
    shape = list(info.get_shape())
    expected = [config.n_layer, config.n_head, *shape[2:3], config.head_dim]
    check(shape == expected, f"tensor {name} has shape {shape}, expected {expected}")
    check(info.get_dtype() in FLOATS, f"tensor {name} is {info.get_dtype()}, expected one of {', '.join(FLOATS)}")
    tensor = file.get_tensor(name)
    check_finite(path, name, tensor)
    return tensor


def check(holds, fault):
    if not holds:
        raise ValueError(fault)
