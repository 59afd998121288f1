"""Attention over packed sentences and over slots: the one entry, and the two ways to compute it.

A batch is one long row of N tokens, one sentence after another, with no padding between them. Two numbers
say what a token may look at: where its sentence starts, and a bit mask of the banks that are open at it.

    row       t0 t1 t2 t3 | t4 t5 | t6 t7 t8        three sentences, N = 9
    start      0  0  0  0 |  4  4 |  6  6  6
    open       1  1  3  3 |  2  2 |  1  3  3        bit 0: bank 0 is open here; bit 1: bank 1

Token i attends to the tokens start[i] .. i, and beside them to every slot whose bank's bit is set in open[i]:

    scores = [q . slot keys , q . text keys] / sqrt(head_dim)       one softmax over both
    output = softmax(scores) @ [slot values , text values]

A slot has a key and a value and nothing else, so it needs no query, no token and no position.
`plain` writes exactly this down. `fused` computes the same without keeping the scores: on a CPU through torch's own
fused attention, on a GPU through the kernels of kernels.py.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

KERNELS_FROM = (8, 0)  # compute capability: below it, Triton 3.9 compiles matrix products without tensor cores


def upload(x, device):
    """x on `device`; on its way to a GPU it waits for nothing that runs there, as it would in pageable memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Layout:
    """How N packed tokens fall into B sentences, and which banks are open at each.

    lengths: tokens of each sentence, in order, as a list of ints >= 1.
    opened: (N,) bit masks, or None where no bank is open anywhere.
    """

    def __init__(self, lengths, opened=None, device="cpu"):
        self.lengths, self.device = list(lengths), torch.device(device)
        self.n_tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.ragged = min(self.lengths) != self.longest
        self.has_open = opened is not None
        opened = torch.zeros(self.n_tokens) if opened is None else opened
        self.opened = upload(opened.to(torch.int32), self.device)
        n = torch.tensor(self.lengths, dtype=torch.int32)
        end = n.cumsum(0, dtype=torch.int32).repeat_interleave(n)  # (N,): the token after each token's sentence
        start = end - n.repeat_interleave(n)  # (N,): the first token of each token's sentence
        self.start, self.end = upload(start, self.device), upload(end, self.device)
        self.position = upload(torch.arange(self.n_tokens) - start, self.device)  # (N,) int64

    @cached_property
    def cell(self):
        """Where each token stands when sentences are laid out as rows of a (B, T) grid: (N,) flat indices."""
        sentence = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return sentence.to(self.device) * self.longest + self.position

    @cached_property
    def grid(self):
        """The inverse of `cell`: (B*T,) the token in each cell; token 0 in the empty cells at the ends of rows."""
        grid = torch.zeros(len(self.lengths) * self.longest, dtype=torch.int64, device=self.device)
        grid[self.cell] = torch.arange(self.n_tokens, device=self.device)
        return grid

    def to_grid(self, x):
        """(N, ...) -> (B, T, ...). Empty cells repeat token 0: they stand after the text, where nothing looks."""
        x = x.index_select(0, self.grid) if self.ragged else x
        return x.view(len(self.lengths), self.longest, *x.shape[1:])

    def to_row(self, x):
        """(B, T, ...) -> (N, ...), dropping the empty cells."""
        x = x.reshape(-1, *x.shape[2:])
        return x.index_select(0, self.cell) if self.ragged else x


@dataclass
class Slots:
    """The slots of all banks, one after another. key, value: (n_layer, n_head, S, head_dim) or, of one layer, (n_head,
    S, head_dim); bank: (S,) int32, the number of the bank that each slot belongs to (the bit that opens it).
    closed_layer: the number of a layer that sees none of them, or None."""

    key: torch.Tensor
    value: torch.Tensor
    bank: torch.Tensor
    closed_layer: int | None = None

    def to(self, dtype):
        return Slots(self.key.to(dtype), self.value.to(dtype), self.bank, self.closed_layer)

    def layer(self, i):
        return None if i == self.closed_layer else Slots(self.key[i], self.value[i], self.bank)

    def open_to(self, opened):
        """opened (...), bank masks -> (..., S): True for the slots of open banks."""
        return (opened[..., None] >> self.bank) & 1 == 1


def attend(qkv, n_head, layout, slots=None, how="auto"):
    """qkv (N, 3 * n_embd), the projection's output -> (N, n_embd). slots: those of this layer, or None, of any dtype.

    how: "plain" (the formula, the reference), "fused" (in one pass, without scores in memory), or "auto": fused."""
    if slots is not None and (slots.bank.numel() == 0 or not layout.has_open):
        slots = None
    if how == "plain":
        return plain(qkv, n_head, layout, slots)
    if qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) >= KERNELS_FROM:
        from minigpt import (
            kernels,  # here, because triton comes with CUDA builds of torch only
        )

        with torch.cuda.device(qkv.device):  # Triton launches on the current one
            return kernels.fused(qkv, n_head, layout, slots)
    return fused(qkv, n_head, layout, slots)


def plain(qkv, n_head, layout, slots):
    """The formula above, step by step; the softmax in float32 or better."""
    q, k, v = _heads(qkv, n_head, layout)  # each (B, n_head, T, head_dim)
    n_slots = 0
    if slots is not None:
        slots, n_slots = slots.to(q.dtype), slots.bank.numel()
    scores = q @ k.transpose(-2, -1)  # (B, n_head, T, T)
    if n_slots:
        scores = torch.cat([q @ slots.key.transpose(-2, -1), scores], dim=-1)  # (B, n_head, T, S + T)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~_visible(layout, slots), -torch.inf)
    weights = scores.softmax(dim=-1).to(v.dtype)
    out = weights[..., n_slots:] @ v  # (B, n_head, T, head_dim)
    if n_slots:
        out = out + weights[..., :n_slots] @ slots.value
    return layout.to_row(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def fused(qkv, n_head, layout, slots):
    """The same by torch's scaled_dot_product_attention, slots in front of each sentence's keys."""
    q, k, v = _heads(qkv, n_head, layout)
    if slots is None:  # with as many keys as queries, is_causal means what it says
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        slots = slots.to(q.dtype)
        k = torch.cat([slots.key.expand(len(k), -1, -1, -1), k], dim=2)  # (B, n_head, S + T, head_dim)
        v = torch.cat([slots.value.expand(len(v), -1, -1, -1), v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(layout, slots))
    return layout.to_row(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def _heads(qkv, n_head, layout):
    """(N, 3 * n_embd) -> q, k, v, each (B, n_head, T, head_dim)."""
    grid = layout.to_grid(qkv).unflatten(-1, (3, n_head, -1))  # (B, T, 3, n_head, head_dim)
    return grid.permute(2, 0, 3, 1, 4).unbind(0)


def _visible(layout, slots):
    """True where a query may look: (B, 1, T, S + T) with slots, (T, T) without."""
    causal = torch.ones(layout.longest, layout.longest, dtype=torch.bool, device=layout.device).tril()
    if slots is None:
        return causal
    slot = slots.open_to(layout.to_grid(layout.opened))[:, None]  # (B, 1, T, S)
    return torch.cat([slot, causal.expand(len(slot), 1, -1, -1)], dim=-1)


def attend_cached(q, key, value, bias, slots=None, how="auto"):
    """Q queries for each of B sentences, over its cached keys and over slots that all sentences share.

    q (B, n_head, Q, head_dim); key, value (B, n_head, T, head_dim); slots: those of this layer, or None;
    bias (B, Q, S + T): 0 for the slots, then the cached keys, that count for a query, -inf for others; how: "plain" (as
    on a GPU) or another word -> (B, Q, n_head * head_dim). The slots are read once for the whole batch, not copied into each sentence."""
    if slots is None:
        bias = bias[..., bias.size(-1) - key.size(2) :]
    else:
        slots = slots.to(q.dtype)
    out = (fused_cached if q.device.type == "cpu" and how != "plain" else plain_cached)(q, key, value, bias, slots)
    return out.transpose(1, 2).flatten(2)  # (B, Q, n_embd)


def plain_cached(q, key, value, bias, slots):
    """The formula, with the slots' scores beside the others."""
    n_slots = bias.size(-1) - key.size(2)
    scores = q @ key.transpose(-2, -1)  # (B, n_head, Q, T)
    if n_slots:
        slot_scores = _together(q) @ slots.key.transpose(-2, -1)  # (n_head, B * Q, S)
        scores = torch.cat([_apart(slot_scores, q), scores], dim=-1)  # (B, n_head, Q, S + T)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.size(-1))
    weights = (scores + bias[:, None]).softmax(dim=-1).to(q.dtype)
    out = weights[..., n_slots:] @ value  # (B, n_head, Q, head_dim)
    if n_slots:
        out = out + _apart(_together(weights[..., :n_slots]) @ slots.value, q)
    return out


def fused_cached(q, key, value, bias, slots):
    """Two softmaxes, each by torch's own fused attention for CPUs, merged by their log-sum-exps:

    share of the slots = e^slots / (e^slots + e^text) = sigmoid(slots - text)"""
    n_slots = bias.size(-1) - key.size(2)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, key, value, attn_mask=bias[:, None, :, n_slots:])  # (B, n_head, Q, head_dim), (B, n_head, Q)
    if n_slots:
        slot_bias = bias[..., :n_slots]  # (B, Q, S)
        slot_out, slot_lse = flash(
            _together(q)[None], slots.key[None], slots.value[None], attn_mask=slot_bias.reshape(1, 1, -1, n_slots)
        )
        closed = slot_bias.amax(dim=-1)[:, None, :, None] == -torch.inf  # where its log-sum-exp means nothing
        share = (_apart(slot_lse[0, ..., None], q) - lse[..., None]).masked_fill(closed, -torch.inf).sigmoid()
        out = torch.lerp(out, _apart(slot_out[0], q), share.to(out.dtype))
    return out


def _together(x):
    """(B, n_head, Q, ...) -> (n_head, B * Q, ...): to slots, all queries of a batch are alike."""
    return x.transpose(0, 1).flatten(1, 2)


def _apart(x, q):
    """The inverse: (n_head, B * Q, ...) -> (B, n_head, Q, ...)."""
    return x.unflatten(1, (q.size(0), q.size(2))).transpose(0, 1)
