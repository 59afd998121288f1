"""Banks of slots: the only thing that training moves (Li & Liang 2021, section 4).

A bank is one key and one value for each of its slots, in every layer and head of a frozen GPT-2:

    bank "fr":   key (n_layer, n_head, prefix_len, head_dim)    value (the same)

That is what the keys and values of `prefix_len` tokens would be, had they been read before the text: a slot is what
papers call a virtual token, a bank a prefix. But nothing ties a slot to a token: it is free to hold any two vectors.

Banks are numbered in order. Bit b of a token's mask opens bank b to it, so each token sees its own choice of banks:

    token       Il  pleut  .  <sep>  It  is  raining  .        banks: 0 "en", 1 "fr"
    bank_mask   10  10     10 11     11  11  11       11       (binary)

Slots are float32; attention casts them to the model's dtype. Where they start is in init.py, how training moves them in
reparam.py, their file in prefix_file.py.
"""

import torch
from torch import nn

from minigpt.attention import PackedBatch, Slots
from minigpt.cache import Cache, prefill
from minigpt.files import UserError, escape_control
from prefix import prefix_file

MAX_BANKS = 31  # bits of a token's mask
MAX_NAME = 100  # characters


class Banks(nn.Module):
    """Named banks of slots for one base model.

    position_offset: the position that text takes first. 0 for learned banks; the number of tokens for a bank that was
    computed from a prompt. training_record: a dict that says how they came to be, kept in the prefix file."""

    def __init__(self, banks, position_offset=0, training=None):
        """banks: {name: (key, value)}, each (n_layer, n_head, prefix_len, head_dim). Raises UserError for too many
        banks, or a name that cannot be shown."""
        super().__init__()
        if len(banks) > MAX_BANKS:
            raise UserError(f"{len(banks)} banks are more than the {MAX_BANKS} that a token's mask holds")
        for name in banks:
            if not 0 < len(name) <= MAX_NAME or escape_control(name) != name:
                raise UserError(f"a bank's name has 1 to {MAX_NAME} characters, no control character: not {name!r:.99}")
        self.names = list(banks)
        self.key = nn.ParameterList(nn.Parameter(key.float()) for key, _ in banks.values())
        self.value = nn.ParameterList(nn.Parameter(value.float()) for _, value in banks.values())
        bank = torch.arange(len(banks), dtype=torch.int32).repeat_interleave(torch.tensor(self.prefix_len))
        self.register_buffer("bank_of_slot", bank.to(self.key[0].device), persistent=False)  # (S,)
        self.position_offset = position_offset
        self.training_record = training or {}

    @classmethod
    def from_prompt(cls, model, name, ids):
        """One bank that stands for the tokens `ids` exactly: text that sees it has the logits that it has after them."""
        return cls({name: compute_kv(model, ids)}, position_offset=len(ids))

    @property
    def prefix_len(self):
        """Slots of each bank, in order."""
        return [key.size(2) for key in self.key]

    def key_values(self):
        """(key, value) of each bank, as attention sees them now."""
        return list(zip(self.key, self.value))

    def mask(self, names):
        """The bits of these banks together. Raises UserError for a name that is not here."""
        for name in names:
            if name not in self.names:
                raise UserError(f"no bank {name!r} in this prefix: it has {', '.join(self.names)}")
        return sum(1 << self.names.index(name) for name in set(names))

    def moved(self):
        """What metrics.jsonl records of how far slots have moved: TrainableBanks says it."""
        return {}

    def slots(self):
        """All banks one after another, as attention takes them: key, value (n_layer, n_head, S, head_dim)."""
        key, value = (torch.cat(side, dim=2) for side in zip(*self.key_values()))
        return Slots(key, value, self.bank_of_slot)

    def logits(self, model, ids, open=()):
        """ids (B, T), with the banks named in `open` open from the first token on -> logits (B, T, vocab_size)."""
        B, T = ids.shape
        bank_mask = torch.full((B * T,), self.mask(open), device=ids.device)
        packed = PackedBatch([T] * B, bank_mask, ids.device)
        slots = self.slots() if open else None  # no bank is open: the base, bit for bit
        hidden = model.hidden(ids.flatten(), packed, slots, self.position_offset)  # (B * T, n_embd)
        return model.logits(hidden.view(B, T, -1))

    def save(self, path, model):
        """Write a prefix file, whole or not at all."""
        banks = dict(zip(self.names, self.key_values()))
        prefix_file.write(path, banks, prefix_file.base_of(model), self.position_offset, self.training_record)

    @classmethod
    def load(cls, path, model=None):
        """Read a prefix file, or a run's. model: the base that it must have been made for, or UserError names both; None:
        whatever its base, onto the CPU."""
        banks, header = prefix_file.read(path := prefix_file.find(path))
        if model and header["base"] != (ours := prefix_file.base_of(model)):
            theirs, ours = prefix_file.describe(header["base"]), prefix_file.describe(ours)
            raise UserError(f"{path} was trained on {theirs}; this model is {ours}")
        try:
            loaded = cls(banks, header["position_offset"], header["training"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return loaded.to(model.device) if model else loaded


@torch.no_grad()
def compute_kv(model, ids):
    """The keys and values that the frozen model computes for the tokens `ids` -> two (n_layer, n_head, T, head_dim).
    Raises UserError for more tokens than the context has positions."""
    if len(ids) > model.config.n_positions:
        raise UserError(f"{len(ids)} tokens are more than this model's context of {model.config.n_positions}")
    cache = Cache(model, 1, len(ids))
    prefill(model, cache, 0, [ids])
    return cache.key[:, 0].float(), cache.value[:, 0].float()
