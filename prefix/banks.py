"""Banks of slots: the only thing that training moves (Li & Liang 2021, section 4; their MLP is in reparam.py).

A bank is one key and one value for each of its slots, in every layer and head of a frozen GPT-2:

    bank "fr":   key (n_layer, n_head, prefix_len, head_dim)    value (the same)

Banks are numbered in order; bit b of a token's mask opens bank b to it. Their masters are float32, cast to the
model's dtype where they are used (in attention). A bank can be drawn at random, read off a text (the keys and values
that the model itself computes for some tokens), placed where no text looks, learned, saved and loaded.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minigpt.attention import PackedBatch, Slots, attend
from minigpt.checkpoint import check_finite, fingerprint, sample
from minigpt.config import GPTConfig
from minigpt.errors import UserError, visible
from minigpt.files import FLOATS, open_tensors, replacing
from minigpt.generate import Cache, prefill

FORMAT = "minigpt-prefix/1"
MAX_BANKS = 31
MAX_NAME = 100  # characters
MAX_SLOTS = 1 << 16  # of a bank: far more than any context has positions
RANDOM_STD = 0.5
QUIET_MARGIN = 6.0  # e to the power of it: what text gets of the attention for each part that all slots get together


class Banks(nn.Module):
    """Named banks of slots for one base model.

    position_offset: the position that text takes first, 0 for learned banks and the number of tokens for a bank
    that was read off a text. training: a dict about how they came to be, kept in the file."""

    def __init__(self, banks, position_offset=0, training=None):
        """banks: {name: (key, value)}, each (n_layer, n_head, prefix_len, head_dim)."""
        super().__init__()
        if len(banks) > MAX_BANKS:
            raise UserError(f"{len(banks)} banks are more than the {MAX_BANKS} that a token's mask holds")
        for name, (key, _) in banks.items():
            if not 0 < len(name) <= MAX_NAME or visible(name) != name:
                raise UserError(f"a bank's name has 1 to {MAX_NAME} characters, no control character: not {name!r:.99}")
            if key.size(2) > MAX_SLOTS:
                raise UserError(f"{key.size(2):,} slots in bank {name} are more than {MAX_SLOTS:,}")
        self.names = list(banks)
        self.key = nn.ParameterList(nn.Parameter(key.float()) for key, _ in banks.values())
        self.value = nn.ParameterList(nn.Parameter(value.float()) for _, value in banks.values())
        number = torch.arange(len(banks), dtype=torch.int32).repeat_interleave(torch.tensor(self.prefix_len))
        self.register_buffer("number", number.to(self.key[0].device), persistent=False)  # (S,), of each slot's bank
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
            banks[name] = [x[:, :, tiled] for x in compute_kv(model, tokens)]
        return cls(banks).to(model.device)

    @classmethod
    def zero_effect(cls, model, ids, packed, names, prefix_len, seed=0, position_offset=0):
        """Slots that leave the model as it is, nearly: values of zero, and keys that next to no query of its own looks
        at, with noise that tells the slots apart. ids (N,), packed as `layout` says: the sentences that the queries are
        read off, from position_offset on. A wider margin is quieter but learns more slowly: at 10, gradients sink below
        AdamW's epsilon."""
        margin = QUIET_MARGIN + math.log(max(1, len(names) * prefix_len))
        keys = quiet_keys(model, ids, packed, margin, position_offset).cpu()
        generator = torch.Generator().manual_seed(seed)
        shape = (*keys.shape[:2], prefix_len, keys.size(-1))
        draw = lambda: keys[:, :, None] + RANDOM_STD * torch.randn(shape, generator=generator)
        return cls({name: (draw(), torch.zeros(shape)) for name in names}).to(model.device)

    @classmethod
    def from_prompt(cls, model, name, ids):
        """One bank that stands for `ids` exactly: text after it gives the logits that it gives after the tokens."""
        return cls({name: compute_kv(model, ids)}, position_offset=len(ids))

    @property
    def prefix_len(self):
        """Slots of each bank, in order."""
        return [key.size(2) for key in self.key]

    def pairs(self):
        """(key, value) of each bank, as attention sees them now."""
        return list(zip(self.key, self.value))

    def mask(self, names):
        """The bits of these banks together. Raises UserError for a name that is not here."""
        for name in names:
            if name not in self.names:
                raise UserError(f"no bank {name!r} in this prefix: it has {', '.join(self.names)}")
        return sum(1 << self.names.index(name) for name in set(names))

    def slots(self):
        """All banks one after another, as attention takes them; it casts them to the model's dtype."""
        key, value = (torch.cat(side, dim=2) for side in zip(*self.pairs()))
        return Slots(key, value, self.number)

    def logits(self, model, ids, open=()):
        """ids (B, T), with the banks named in `open` open from the first token on -> logits (B, T, vocab_size)."""
        B, T = ids.shape
        bank_mask = torch.full((B * T,), self.mask(open), device=ids.device)
        packed = PackedBatch([T] * B, bank_mask, ids.device)
        hidden = model.hidden(ids.flatten(), packed, self.slots(), self.position_offset)
        return model.logits(hidden).view(B, T, -1)

    def save(self, path, model):
        """Write the prefix file (DESIGN section 3), whole or not at all."""
        tensors = {}
        for name, (key, value) in zip(self.names, self.pairs()):
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
        """Read a prefix file, or a run's, made for `model`. Raises UserError naming both bases where they differ."""
        path = file_of(path)
        theirs, ours = read_metadata(path)["base"], base_of(model)
        if theirs != ours:
            raise UserError(f"{path} was trained on {describe(theirs)}; this model is {describe(ours)}")
        return cls.read(path).to(model.device)

    @classmethod
    def read(cls, path):
        """Read a prefix file as it is, whatever its base, onto the CPU."""
        metadata, banks = read_metadata(path), {}
        try:
            config = GPTConfig.from_dict(metadata["base"]["config"])
        except UserError as error:
            raise UserError(f"{path}: its base: {error}") from error
        if metadata["position_offset"] >= config.n_positions:
            raise UserError(f"{path}: text would start past the {config.n_positions} positions of its base")
        slots = [config.n_layer, config.n_head, metadata["prefix_len"], config.head_dim]
        with open_tensors(path) as file:
            wanted = {f"{bank}.{side}" for bank in metadata["banks"] for side in ("key", "value")}
            if wanted != set(file.keys()):
                odd = min(wanted ^ set(file.keys()))
                raise UserError(f"{path}: {'unexpected tensor' if odd not in wanted else 'no tensor'} {odd}")
            for bank in metadata["banks"]:
                banks[bank] = [_slots(path, file, f"{bank}.{side}", slots) for side in ("key", "value")]
                if banks[bank][0].shape != banks[bank][1].shape:
                    raise UserError(f"{path}: bank {bank} has other keys than values: the shapes differ")
        try:
            return cls(banks, metadata["position_offset"], metadata["training"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def joined(cls, parts):
        """The banks of several prefix files of one base, as one. parts: [(path, Banks)]. Raises UserError where they
        disagree on position_offset, or where two have a bank of the same name."""
        first, one = parts[0]
        banks, owner = {}, {}
        for path, part in parts:
            if part.position_offset != one.position_offset:
                offsets = f"{part.position_offset} in {path}, {one.position_offset} in {first}"
                raise UserError(f"prefixes go together only where text starts at the same position: {offsets}")
            for name, key, value in zip(part.names, part.key, part.value):
                if name in banks:
                    raise UserError(f"bank {name!r} is there twice, in {owner[name]} and in {path}: leave one out")
                banks[name], owner[name] = (key.data, value.data), path
        return cls(banks, one.position_offset, one.training_record)


def file_of(path):
    """The prefix file that `path` means: itself, or that of a run directory."""
    path = Path(path)
    found = path / "prefix.safetensors" if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"{path}: no prefix file there (train.py writes runs/<name>/prefix.safetensors)")
    return found


def read_metadata(path):
    """The header of a prefix file, checked: base, banks, prefix_len, position_offset, training."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a prefix file: format is {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        header = {name: json.loads(metadata[name]) for name in ("base", "banks", "training")}
        header |= {name: int(metadata[name]) for name in ("prefix_len", "position_offset")}
        valid = (
            isinstance(header["base"]["config"], dict)
            and isinstance(header["base"]["fingerprint"], str)
            and _is_record(header["training"])
            and isinstance(header["banks"], list)
            and all(isinstance(bank, str) for bank in header["banks"])
            and 0 < len(set(header["banks"])) == len(header["banks"])
            and 0 <= header["prefix_len"] <= MAX_SLOTS
            and 0 <= header["position_offset"]
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged header: {error!r}") from error
    if not valid:
        raise UserError(f"{path}: damaged header: a field is not of its type")
    return header


def _is_record(training):
    """Whether a record of training is one whose parts the commands can use: the model, files, columns and limit."""
    if not isinstance(training, dict):
        return False
    limit, texts = training.get("limit"), [training.get("data", []), training.get("columns", [])]
    return (
        isinstance(training.get("model"), (str, type(None)))
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in texts)
        and (limit is None or type(limit) is int and limit > 0)
    )


def _slots(path, file, name, most):
    """One tensor of a prefix file, float32. most: its shape, but for the number of slots, which may be less."""
    info = file.get_slice(name)
    shape, dtype = info.get_shape(), info.get_dtype()
    if len(shape) != 4 or shape[2] > most[2] or [*shape[:2], shape[3]] != [*most[:2], most[3]]:
        raise UserError(f"{path}: tensor {name} has shape {shape}, expected {most}")
    if dtype not in FLOATS:
        raise UserError(f"{path}: tensor {name} is {dtype}, expected one of {', '.join(FLOATS)}")
    tensor = file.get_tensor(name)
    check_finite(path, name, tensor)
    return tensor


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
def compute_kv(model, ids):
    """The keys and values that the frozen model computes for `ids` -> two of (n_layer, n_head, T, head_dim). Raises
    UserError for more of them than the context has positions."""
    if len(ids) > model.config.n_positions:
        raise UserError(f"{len(ids)} tokens are more than this model's context of {model.config.n_positions}")
    cache = Cache(model, seats=1, capacity=len(ids))
    prefill(model, cache, [0], [ids])
    return cache.key[:, 0].float(), cache.value[:, 0].float()


@torch.no_grad()
def quiet_keys(model, ids, packed, margin, position_offset=0):
    """For every layer and head, a key that its queries score at least `margin` below all of their text together
    (the log of the sum of exp(score)), as far as one key can -> (n_layer, n_head, head_dim), float32."""
    keys, n_head = [], model.config.n_head
    future = torch.ones(packed.longest, packed.longest, dtype=torch.bool, device=ids.device).triu(1)

    def attn_fn(i, qkv):
        q, k, _ = qkv.float().unflatten(-1, (3, n_head, -1)).permute(1, 2, 0, 3)  # (n_head, N, head_dim)
        q, text = q / math.sqrt(q.size(-1)), []
        for one_q, one_k in zip(q.split(packed.lengths, 1), k.split(packed.lengths, 1)):  # all scores are too many
            T = one_q.size(1)
            scores = (one_q @ one_k.transpose(-2, -1)).masked_fill(future[:T, :T], -torch.inf)  # (n_head, T, T)
            text.append(scores.logsumexp(dim=-1))
        keys.append(smallest_below(q, torch.cat(text, 1) - margin))
        return attend(qkv, n_head, packed, backend=model.attention)

    model.blocks(model.embed(ids, packed.position + position_offset), attn_fn)
    return torch.stack(keys)


def smallest_below(q, ceiling, steps=20):
    """q (n_head, N, head_dim), ceiling (n_head, N) -> the k (n_head, head_dim) that has the least
    sum of max(0, q . k - ceiling)² + |k|². Newton's method, which is least squares over the queries that k still
    misses, again and again until they stay the same (Chapelle 2007, section 2.3)."""
    missed = torch.ones_like(ceiling)
    eye = torch.eye(q.size(-1), device=q.device)
    for _ in range(steps):
        a = (q * missed[..., None]).transpose(-2, -1)  # (n_head, head_dim, N)
        k = torch.linalg.solve(a @ q + eye, a @ ceiling[..., None])  # (n_head, head_dim, 1)
        missed = ((q @ k)[..., 0] > ceiling).float()
    return k[..., 0]
