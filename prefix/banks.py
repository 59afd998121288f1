"""Banks of slots: the only thing that training moves (Li & Liang 2021, section 4, without their MLP).

A bank is one key and one value for each of its slots, in every layer and head of a frozen GPT-2:

    bank "fr":   key (n_layer, n_head, prefix_len, head_dim)    value (the same)

Banks are numbered in order; bit b of a token's mask opens bank b to it. Their masters are float32, cast to the
model's dtype where they are used (in attention). A bank can be drawn at random, read off a text (the keys and values
that the model itself computes for some tokens), learned, saved and loaded.
"""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minigpt.attention import Layout, Slots
from minigpt.checkpoint import fingerprint, sample
from minigpt.errors import UserError
from minigpt.files import replacing
from minigpt.generate import Cache, prefill

FORMAT = "minigpt-prefix/1"
MAX_BANKS = 31
RANDOM_STD = 0.5


class Banks(nn.Module):
    """Named banks of slots for one base model.

    position_offset: the position that text takes first, 0 for learned banks and the number of tokens for a bank
    that was read off a text. training: a dict about how they came to be, kept in the file."""

    def __init__(self, banks, position_offset=0, training=None):
        """banks: {name: (key, value)}, each (n_layer, n_head, prefix_len, head_dim)."""
        super().__init__()
        if len(banks) > MAX_BANKS:
            raise UserError(f"{len(banks)} banks are more than the {MAX_BANKS} that a token's mask holds")
        self.names = list(banks)
        self.key = nn.ParameterList(nn.Parameter(key.float()) for key, _ in banks.values())
        self.value = nn.ParameterList(nn.Parameter(value.float()) for _, value in banks.values())
        self.position_offset = position_offset
        self.training_record = training or {}

    @classmethod
    def random(cls, config, names, prefix_len, seed=0):
        """Normal keys and values with standard deviation RANDOM_STD."""
        generator = torch.Generator().manual_seed(seed)
        shape = (config.n_layer, config.n_head, prefix_len, config.head_dim)
        draw = lambda: RANDOM_STD * torch.randn(shape, generator=generator)
        return cls({name: (draw(), draw()) for name in names})

    @classmethod
    def from_text(cls, model, ids, prefix_len):
        """Keys and values of real tokens, tiled or cut to prefix_len, as a start for training.
        ids: {name: list of token ids}, at least one each."""
        banks = {}
        for name, tokens in ids.items():
            tokens = tokens[: model.config.n_positions]
            tiled = [i % len(tokens) for i in range(prefix_len)]
            banks[name] = [x[:, :, tiled] for x in read_text(model, tokens)]
        return cls(banks).to(model.device)

    @classmethod
    def reading(cls, model, name, ids):
        """One bank that stands for `ids` exactly: text after it gives the logits that it gives after the tokens."""
        return cls({name: read_text(model, ids)}, position_offset=len(ids))

    @property
    def prefix_len(self):
        """Slots of each bank, in order."""
        return [key.size(2) for key in self.key]

    def mask(self, names):
        """The bits of these banks together. Raises UserError for a name that is not here."""
        for name in names:
            if name not in self.names:
                raise UserError(f"no bank {name!r} in this prefix: it has {', '.join(self.names)}")
        return sum(1 << self.names.index(name) for name in set(names))

    def slots(self):
        """All banks one after another, as attention takes them; it casts them to the model's dtype."""
        key, value = torch.cat(list(self.key), dim=2), torch.cat(list(self.value), dim=2)
        numbers = torch.arange(len(self.names), dtype=torch.int32)
        bank = numbers.repeat_interleave(torch.tensor(self.prefix_len)).to(key.device)  # (S,)
        return Slots(key, value, bank)

    def logits(self, model, ids, open=()):
        """ids (B, T), with the banks named in `open` open from the first token on -> logits (B, T, vocab_size)."""
        B, T = ids.shape
        opened = torch.full((B * T,), self.mask(open), device=ids.device)
        layout = Layout([T] * B, opened, ids.device)
        hidden = model.hidden(ids.flatten(), layout, self.slots(), self.position_offset)
        return model.logits(hidden).view(B, T, -1)

    def save(self, path, model):
        """Write the prefix file (DESIGN section 3), whole or not at all."""
        tensors = {}
        for name, key, value in zip(self.names, self.key, self.value):
            tensors[f"{name}.key"] = key.detach().cpu().contiguous()
            tensors[f"{name}.value"] = value.detach().cpu().contiguous()
        metadata = {
            "format": FORMAT,
            "base": json.dumps(base_of(model)),
            "banks": json.dumps(self.names),
            "prefix_len": str(max(self.prefix_len)),
            "position_offset": str(self.position_offset),
            "training": json.dumps(self.training_record),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path, model):
        """Read a prefix file made for `model`. Raises UserError naming both bases where they differ."""
        metadata = read_metadata(path)
        theirs, ours = metadata["base"], base_of(model)
        if theirs != ours:
            raise UserError(f"{path} was trained on {describe(theirs)}; this model is {describe(ours)}")
        config, banks = model.config, {}
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for bank in metadata["banks"]:
                pair = []
                for tensor in (f"{bank}.key", f"{bank}.value"):
                    if tensor not in names:
                        raise UserError(f"{path}: tensor {tensor} is missing")
                    shape = file.get_slice(tensor).get_shape()
                    expected = [config.n_layer, config.n_head, shape[2] if len(shape) == 4 else "any", config.head_dim]
                    if shape != expected:
                        raise UserError(f"{path}: tensor {tensor} has shape {shape}, expected {expected}")
                    pair.append(file.get_tensor(tensor))
                banks[bank] = pair
        return cls(banks, metadata["position_offset"], metadata["training"]).to(model.device)


def read_metadata(path):
    """The header of a prefix file, checked: base, banks, prefix_len, position_offset, training."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable prefix file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a prefix file: format is {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        header = {name: json.loads(metadata[name]) for name in ("base", "banks", "training")}
        header |= {name: int(metadata[name]) for name in ("prefix_len", "position_offset")}
        valid = (
            isinstance(header["base"]["config"], dict)
            and isinstance(header["base"]["fingerprint"], str)
            and isinstance(header["training"], dict)
            and isinstance(header["banks"], list)
            and all(isinstance(bank, str) for bank in header["banks"])
            and 0 < len(set(header["banks"])) == len(header["banks"])
            and header["prefix_len"] >= 0 <= header["position_offset"]
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged header: {error!r}") from error
    if not valid:
        raise UserError(f"{path}: damaged header: a field is not of its type")
    return header


def base_of(model):
    """What a prefix file says of its base: the config and the fingerprint of the weights."""
    if not hasattr(model, "fingerprint"):  # built in memory rather than loaded
        model.fingerprint = fingerprint({name: sample(p) for name, p in model.named_parameters()})
    return {"config": model.config.to_dict(), "fingerprint": model.fingerprint}


def describe(base):
    config = base["config"]
    sizes = f"{config.get('n_layer')} layers of {config.get('n_embd')}, vocabulary {config.get('vocab_size')}"
    return f"a model of {sizes}, weights {base['fingerprint']}"


@torch.no_grad()
def read_text(model, ids):
    """The keys and values that the frozen model computes for `ids` -> two of (n_layer, n_head, T, head_dim). Raises
    UserError for more of them than the context has positions."""
    if len(ids) > model.config.n_positions:
        raise UserError(f"{len(ids)} tokens are more than this model's context of {model.config.n_positions}")
    cache = Cache(model, seats=1, capacity=len(ids))
    prefill(model, cache, [0], [ids])
    return cache.key[:, 0].float(), cache.value[:, 0].float()
