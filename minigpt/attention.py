"""Attention over packed sequences and over slots: what is computed. backends.py chooses how.

A batch is one long row of N tokens, one sequence after another, without padding (as with cu_seqlens elsewhere). Two
numbers say what a token sees: where its sequence starts, and a bit field of the banks that are open at it.

    token       t0 t1 t2 t3 | t4 t5 | t6 t7 t8        three sequences, N = 9
    start        0  0  0  0 |  4  4 |  6  6  6
    bank_mask    1  1  3  3 |  2  2 |  1  3  3        bit 0: bank 0 is open here; bit 1: bank 1

Token i attends to the tokens start[i] .. i, and to every slot whose bank's bit is set in bank_mask[i]:

    scores = [q . slot keys , q . text keys] / sqrt(head_dim)       one softmax over both
    output = softmax(scores) @ [slot values , text values]

A slot makes no query: nobody would read its output. It has no token and takes no position: its key is learned as it is.
`reference_attention` writes exactly this down. `sdpa_attention` and kernels.py compute the same, and keep no scores.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F


def to_device(x, device):
    """x on `device`. A pinned, asynchronous copy: it does not wait for what runs on the GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class PackedBatch:
    """How N packed tokens fall into B sequences, and which banks are open at each.

    lengths: tokens of each sequence, a list of ints >= 1. bank_mask: (N,), or None where no bank is open anywhere."""

    def __init__(self, lengths, bank_mask=None, device="cpu"):
        self.lengths, self.device = list(lengths), torch.device(device)
        self.n_tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.ragged = min(self.lengths) != self.longest
        self.has_banks = bank_mask is not None
        bank_mask = torch.zeros(self.n_tokens) if bank_mask is None else bank_mask
        self.bank_mask = to_device(bank_mask.to(torch.int32), self.device)
        n = torch.tensor(self.lengths, dtype=torch.int32)
        end = n.cumsum(0, dtype=torch.int32).repeat_interleave(n)  # (N,): one past the last token of each token's sequence
        start = end - n.repeat_interleave(n)  # (N,): the first token of each token's sequence
        self.start, self.end = to_device(start, self.device), to_device(end, self.device)
        self.position = to_device(torch.arange(self.n_tokens) - start, self.device)  # (N,) int64

    @cached_property
    def flat_index(self):
        """(N,): where each token stands in the padded batch (B, T), flattened."""
        row = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return to_device(row, self.device) * self.longest + self.position

    def pad(self, x):
        """(N, ...) -> (B, T, ...), with zeros after the text, where no text token looks."""
        B, T = len(self.lengths), self.longest
        if self.ragged:
            tokens, x = x, x.new_zeros(B * T, *x.shape[1:])
            x[self.flat_index] = tokens
        return x.view(B, T, *x.shape[1:])

    def unpad(self, x):
        """(B, T, ...) -> (N, ...), without the padding."""
        x = x.reshape(-1, *x.shape[2:])
        return x.index_select(0, self.flat_index) if self.ragged else x


@dataclass
class Slots:
    """The slots of all banks, one after another. key, value: (n_layer, n_head, S, head_dim) or, of one layer, (n_head,
    S, head_dim); bank: (S,) int32, the number of the bank that each slot belongs to (the bit that opens it)."""

    key: torch.Tensor
    value: torch.Tensor
    bank: torch.Tensor

    @classmethod
    def none(cls, qkv, n_head, head_dim):
        """No slots, for one layer."""
        nothing = qkv.new_empty(n_head, 0, head_dim)
        return cls(nothing, nothing, qkv.new_empty(0, dtype=torch.int32))

    def to(self, dtype):
        return self if self.key.dtype == dtype else replace(self, key=self.key.to(dtype), value=self.value.to(dtype))

    def layers(self):
        """The Slots of each layer, as a list. unbind, not key[i] in a loop: its backward stacks the layers' gradients
        once; each key[i] would make a tensor of the full size and add it."""
        return [Slots(key, value, self.bank) for key, value in zip(self.key.unbind(), self.value.unbind())]

    def visible_slots(self, bank_mask):
        """bank_mask (...) -> (..., S): True for the slots of open banks."""
        return (bank_mask[..., None] >> self.bank) & 1 == 1


def slot_layers(slots, n_layer):
    """One layer's Slots for each layer; None for each where there are no slots."""
    return [None] * n_layer if slots is None else slots.layers()


def reference_attention(qkv, n_head, packed, slots):
    """The formula above, step by step; the softmax in float32 or better."""
    q, k, v = split_heads(qkv, n_head, packed)  # each (B, n_head, T, head_dim)
    slots, S = slots.to(q.dtype), len(slots.bank)
    scores = torch.cat([q @ slots.key.transpose(-2, -1), q @ k.transpose(-2, -1)], dim=-1)  # (B, n_head, T, S + T)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.size(-1))
    weights = scores.masked_fill(~visible(packed, slots), -torch.inf).softmax(dim=-1).to(v.dtype)
    out = weights[..., :S] @ slots.value + weights[..., S:] @ v  # (B, n_head, T, head_dim)
    return packed.unpad(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def sdpa_attention(qkv, n_head, packed, slots):
    """The same by scaled_dot_product_attention, with the slots copied in front of each sequence's keys.

    Its is_causal aligns the diagonal to the top left: with slots in front there are more keys than queries, and the first
    token would see one slot and not itself. So there the mask is written out."""
    q, k, v = split_heads(qkv, n_head, packed)
    if len(slots.bank) == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        slots = slots.to(q.dtype)
        k = torch.cat([slots.key.expand(len(k), -1, -1, -1), k], dim=2)  # (B, n_head, S + T, head_dim)
        v = torch.cat([slots.value.expand(len(v), -1, -1, -1), v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(packed, slots))
    return packed.unpad(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def split_heads(qkv, n_head, packed):
    """Pad, and split into heads: (N, 3 * n_embd) -> q, k, v, each (B, n_head, T, head_dim)."""
    padded = packed.pad(qkv).unflatten(-1, (3, n_head, -1))  # (B, T, 3, n_head, head_dim)
    return padded.permute(2, 0, 3, 1, 4).unbind(0)


def visible(packed, slots):
    """(B, 1, T, S + T): True where a query sees a slot, or a token."""
    causal = torch.ones(packed.longest, packed.longest, dtype=torch.bool, device=packed.device).tril()
    slot = slots.visible_slots(packed.pad(packed.bank_mask))[:, None]  # (B, 1, T, S)
    return torch.cat([slot, causal.expand(len(slot), 1, -1, -1)], dim=-1)
