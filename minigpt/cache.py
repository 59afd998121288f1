"""The key/value cache of decoding, and what runs the model on it: prefill many tokens, then one token at a time.

    row 0   [ p3 ######## + ]       #  keys and values that are there
    row 1   [ p5 ### +      ]       +  one token for every row at once (decode), or one for each of its beams
    row 2   [ p6 ##### +    ]       a new prompt fills its row at once (prefill)

Each row holds one sequence, with positions 0, 1, 2 ... of its own, so its neighbours do not change it. Learned slots are
not in the cache: a step reads them once for all rows (attend_cached).

What the next step needs lies on the device and advances there: the newest tokens, where they go and what they see. So a
GPU runs a step as one CUDA graph, with one attention kernel a layer, and waits for nothing. A cache on a GPU stays for
the model's next decoding, and its graph with it.
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from minigpt.attention import PackedBatch, slot_layers, to_device
from minigpt.backends import KERNELS_FROM, attend
from minigpt.memory import out_of_memory

ROWS = 16  # whose attention a CPU computes at once
AT_ONCE = 1 << 10, 1 << 14  # tokens of a prefill on a CPU, on a GPU: more at once are no faster, and take memory
KEPT = WeakKeyDictionary()  # of each model on a GPU: its last cache
FAILED = set()  # what this GPU has not done as it should: "kernel", "graph"


class Cache:
    """Room for `rows` sequences of `capacity` entries, each of which a step continues by one token for each beam.

    kv (n_layer, 2, rows, n_head, capacity, head_dim): keys and values, allocated once; key and value are views of it.
    slots: those that sequences may see, or None.
    length: a list on the host, how many entries of each row are filled. On the device, of the next step: ids (rows,
    beams), the tokens that it feeds in; visible (rows, beams, capacity), the entries that each beam sees; and state
    (4, rows), of each row: entry, where its next keys and values go; position; bank_mask; running, 1 or, where the row
    is free, 0."""

    def __init__(self, model, rows, capacity, slots=None, beams=1):
        c, device = model.config, model.device
        self.kv = torch.zeros(c.n_layer, 2, rows, c.n_head, capacity, c.head_dim, device=device, dtype=model.dtype)
        self.key, self.value = self.kv.unbind(1)
        self.ids = torch.zeros(rows, beams, device=device, dtype=torch.int64)
        self.visible = torch.zeros(rows, beams, capacity, device=device, dtype=torch.bool)
        self.state = torch.zeros(4, rows, device=device, dtype=torch.int64)
        self.entry, self.position, self.bank_mask, self.running = self.state.unbind()
        self.advance = to_device(torch.tensor([[beams], [1]]), device)  # of entry and position, in a step
        self.length = [0] * rows  # on the host: nobody waits for the device to know it
        self.rows, self.capacity = rows, capacity
        slots = slots and slots.to(model.dtype)
        if uses_graphs(device) and slots:  # a graph reads the same memory in every decoding
            slots = replace(slots, key=slots.key.clone(), value=slots.value.clone(), bank=slots.bank.clone())
        self.slots, self.layers = slots, slot_layers(slots, c.n_layer)
        self.tried, self.kernel, self.graph = False, None, None  # how a GPU runs a step: see first_step

    def write(self, layer, row, entry, kv):
        """kv (N, 2, n_head, head_dim), keys and values of N tokens -> where row (N,) and entry (N,) say."""
        self.kv[layer][:, row, :, entry] = kv

    def clear(self, rows):
        """Zero these rows (float16 only). Entries past a sequence's end get weight 0, but 0 * nan of an overflow is nan."""
        if self.key.dtype == torch.float16:
            self.kv[:, :, rows] = 0

    def evict(self, row, last):
        """The sequence in `row` has ended: that of `last`, the last row that is running, takes its place."""
        if row != last:
            self.clear(slice(row, row + 1))
            n = self.length[row] = self.length[last]
            self.kv[:, :, row, :, :n] = self.kv[:, :, last, :, :n]
            self.ids[row], self.visible[row], self.state[:, row] = self.ids[last], self.visible[last], self.state[:, last]
        self.state[:, last] = 0

    def take_slots(self, slots):
        """Read these slots from now on: True where they have the shapes of those that the cache was made for."""
        shapes = lambda layers: [None if layer is None else layer.key.shape for layer in layers]
        fits = shapes(slot_layers(slots, len(self.key))) == shapes(self.layers)
        if fits and slots is not None:
            for mine, new in ((self.slots.key, slots.key), (self.slots.value, slots.value), (self.slots.bank, slots.bank)):
                mine.copy_(new)
        return fits


def uses_graphs(device):
    return device.type == "cuda"


@contextmanager
def borrow_cache(model, rows, capacity, slots=None, beams=1):
    """A Cache for one decoding. On a GPU it is the model's last one if that fits, so that its graph is recorded once; a
    lone row is as long as the context, so that it fits every line that is typed. After an error it is not kept."""
    slots = slots if slots is not None and len(slots.bank) else None  # banks of no slots are no banks
    cache, kind = KEPT.pop(model, None), (rows, beams, model.device, model.dtype, model.attention)
    if cache and (cache.kind != kind or cache.capacity < capacity or not cache.take_slots(slots)):
        cache = None  # its memory is free before more is taken
    if cache is None:
        if rows == 1 and uses_graphs(model.device):
            capacity = max(capacity, model.config.n_positions)
        cache = Cache(model, rows, capacity, slots, beams)
        cache.kind = kind
    yield cache
    if uses_graphs(model.device):
        KEPT[model] = cache


def kept_bytes(model):
    """Bytes of keys and values that the model's next decoding may use again, or that are free before it takes others."""
    return KEPT[model].kv.nbytes if model in KEPT else 0


def greedy(logits):
    """logits (..., vocab_size) -> the likeliest ids (...)."""
    return logits.max(dim=-1).indices  # on a CPU three times as fast as argmax


def prefill(model, cache, first, prompts, bank_masks=None, position_offset=0):
    """Run whole prompts (lists of ids) into the free rows from `first` on; each row's next token is the likeliest.
    bank_masks: a list of masks for each prompt -> the logits after the last token of each (B, vocab_size)."""
    n = max(1, AT_ONCE[uses_graphs(model.device)] // max(map(len, prompts)))
    if n < len(prompts):
        parts = [slice(i, i + n) for i in range(0, len(prompts), n)]
        masks = [bank_masks and bank_masks[part] for part in parts]
        runs = [(first + part.start, prompts[part], mask, position_offset) for part, mask in zip(parts, masks)]
        return torch.cat([prefill(model, cache, *run) for run in runs])
    lengths, rows, device = [len(ids) for ids in prompts], slice(first, first + len(prompts)), model.device
    cache.clear(rows)
    masks = None if bank_masks is None else torch.tensor([mask for masks in bank_masks for mask in masks])
    packed = PackedBatch(lengths, masks, device)
    ids = to_device(torch.tensor([i for ids in prompts for i in ids]), device)  # (N,)
    row = to_device(torch.arange(rows.start, rows.stop).repeat_interleave(torch.tensor(lengths)), device)  # (N,)

    def attn_fn(i, qkv):
        cache.write(i, row, packed.position, qkv.unflatten(-1, (3, model.config.n_head, -1))[:, 1:])
        return attend(qkv, model.config.n_head, packed, cache.layers[i], model.attention)

    hidden = model.blocks(model.embed(ids, packed.position + position_offset), attn_fn)  # (N, n_embd)
    logits = model.logits(hidden[to_device(torch.tensor(lengths).cumsum(0) - 1, device)])
    cache.length[rows] = lengths
    newest_mask = [0] * len(prompts) if bank_masks is None else [masks[-1] for masks in bank_masks]
    positions = [n + position_offset for n in lengths]
    cache.state[:, rows] = to_device(torch.tensor([lengths, positions, newest_mask, [1] * len(prompts)]), device)
    cache.visible[rows] = torch.arange(cache.capacity, device=device) < cache.entry[rows, None, None]
    cache.ids[rows] = greedy(logits)[:, None]
    return logits


def decode_one_token(model, cache, B):
    """Feed cache.ids of the first B rows in: they become the rows' newest entries. Without beams the likeliest tokens
    take their place in cache.ids -> logits (B, beams, vocab_size), which on a GPU the next call overwrites."""
    beams = cache.ids.size(1)
    lengths = cache.length[:B] = [n + beams for n in cache.length[:B]]
    if not uses_graphs(model.device):
        return decode_step(model, cache, lengths)
    with torch.cuda.device(model.device):
        return gpu_step(model, cache, lengths)[:B]


def decode_step(model, cache, lengths):
    """What decode_one_token does on the device, all in tensors. lengths: entries of each row that are looked at; the
    kernel knows them."""
    B, beams, device = len(lengths), cache.ids.size(1), cache.ids.device
    entry = cache.entry[:B, None] + torch.arange(beams, device=device)  # (B, beams)
    cache.visible[:B].scatter_(2, entry[:, :, None], True)  # a beam sees its own new entry
    position = cache.position[:B, None].expand(-1, beams)
    x = model.embed(cache.ids[:B].flatten(), position.flatten())  # (B * beams, n_embd)
    if cache.kernel:
        from minigpt.decode_kernel import decode_blocks  # here, because only CUDA builds of torch bring triton

        hidden = decode_blocks(model, cache, x)
    else:
        hidden = model.blocks(x, plain_attention(model, cache, entry, lengths))
    logits = model.logits(hidden).unflatten(0, (B, beams))
    cache.state[:2, :B] += cache.running[:B] * cache.advance
    if beams == 1:
        cache.ids[:B] = greedy(logits)
    return logits


def plain_attention(model, cache, entry, lengths):
    """attn_fn of a step by attend_cached. entry (B, beams): where the new keys and values go. On a CPU a few rows at a
    time, each as far as the longest of them: it takes as long as reading keys and values does."""
    B, beams = entry.shape
    n, parts = B if uses_graphs(entry.device) else ROWS, []
    for i in range(0, B, n):
        rows, T = slice(i, min(i + n, B)), max(lengths[i : i + n])
        visible = cache.visible[rows, None, :, :T]  # (n, 1, beams, T)
        if cache.slots is not None:
            slots = cache.slots.visible_slots(cache.bank_mask[rows, None, None]).expand(-1, -1, beams, -1)
            visible = torch.cat([slots, visible], dim=-1)  # (n, 1, beams, S + T)
        parts.append((rows, cache.kv[:, :, rows, :, :T], bias_of(visible, model.dtype)))
    row, entry = torch.arange(B, device=entry.device).repeat_interleave(beams), entry.flatten()

    def attn_fn(i, qkv):
        qkv = qkv.unflatten(-1, (3, model.config.n_head, -1))  # (B * beams, 3, n_head, head_dim)
        cache.write(i, row, entry, qkv[:, 1:])
        q = qkv[:, 0].unflatten(0, (B, beams)).transpose(1, 2)  # (B, n_head, beams, head_dim)
        out = [attend_cached(q[rows], *kv[i], bias, cache.layers[i]) for rows, kv, bias in parts]
        return torch.cat(out).transpose(1, 2).flatten(2).flatten(0, 1)  # (B * beams, n_embd)

    return attn_fn


def bias_of(visible, dtype):
    """What is added to scores, in float32 or better: 0 where a query sees a key, the least number where it does not."""
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def gpu_step(model, cache, lengths):
    """decode_step as one launch. Without a graph, or a kernel, it is as on a CPU."""
    if not cache.tried:
        return first_step(model, cache, len(lengths))
    if cache.graph:
        graph, logits = cache.graph
        graph.replay()
        return logits
    return decode_step(model, cache, lengths)


def first_step(model, cache, B):
    """A cache's first step on a GPU -> its logits. It runs plainly, by the kernel, and from a graph, which always takes
    all rows: free ones stay as they are. What raises, or differs from the plain step, is said once and then left."""
    before, cache.tried = (cache.state.clone(), cache.ids.clone()), True

    def run():
        cache.state.copy_(before[0])
        cache.ids.copy_(before[1])
        return gpu_step(model, cache, [cache.capacity] * cache.rows)[:B].clone()

    logits = expected = run()
    for name, prepare in (("kernel", has_kernel), ("graph", record_graph)):
        if name in FAILED:
            continue
        try:
            setattr(cache, name, prepare(model, cache))
            logits = run()
            fault = "" if agree(logits, expected, model.dtype) else "its numbers are not those of a plain step"
        except Exception as error:  # of a compiler, a driver: whatever it is, there is another way
            if out_of_memory(error) or out_of_memory(error.__context__):  # a capture ends with an error of its own
                raise
            fault = (str(error) or repr(error)).splitlines()[0]
        if fault:
            FAILED.add(name)
            print(f"Decoding goes on without its {name} on this GPU: {fault}", file=sys.stderr)
            setattr(cache, name, None)
            logits = run()
    return logits


def has_kernel(model, cache):
    return model.attention != "plain" and torch.cuda.get_device_capability(model.device) >= KERNELS_FROM


def record_graph(model, cache):
    """A CUDA graph of a step of all rows, and the logits that each replay writes. Nothing runs meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph):  # after a capture that failed, torch stays on its stream
        logits = decode_step(model, cache, [cache.capacity] * cache.rows)
    return graph, logits


def agree(logits, expected, dtype):
    """Do two paths' logits (B, beams, vocab_size) differ by no more than rounding in `dtype`? (NaN: no.)"""
    logits, expected = logits.float(), expected.float()
    spread = expected - expected.mean(dim=-1, keepdim=True)  # the logits of a base may all be far from 0
    return bool((logits - expected).norm() <= (0.01 if dtype == torch.float32 else 0.1) * spread.norm())


def attend_cached(q, key, value, bias, slots=None):
    """Q queries for each of B cache rows, over the row's keys and over slots that all rows share: read once for the whole
    batch, not copied into each row. One softmax, with the slots' scores in front of the others.

    q (B, n_head, Q, head_dim); key, value (B, n_head, T, head_dim); slots: those of this layer, or None; bias (B, 1, Q, S +
    T): see bias_of; a layer without slots takes its last T -> (B, n_head, Q, head_dim)."""
    scores, S = q @ key.mT, 0  # (B, n_head, Q, T)
    if slots:
        slot_scores = unfold_heads(fold_heads(q) @ slots.key.mT, q)  # (B, n_head, Q, S)
        scores, S = torch.cat([slot_scores, scores], dim=-1), slots.key.size(1)
    weights = torch.add(bias[..., -scores.size(-1) :], scores, alpha=1 / math.sqrt(q.size(-1))).softmax(dim=-1).to(q.dtype)
    of_slots, of_text = weights.split([S, weights.size(-1) - S], dim=-1)
    out = of_text @ value  # (B, n_head, Q, head_dim)
    return out.add_(unfold_heads(fold_heads(of_slots) @ slots.value, q)) if slots else out


def fold_heads(x):
    """(B, n_head, Q, ...) -> (n_head, B * Q, ...): all queries of a batch see the same slots."""
    return x.transpose(0, 1).flatten(1, 2)


def unfold_heads(x, q):
    """The inverse: (n_head, B * Q, ...) -> (B, n_head, Q, ...)."""
    return x.unflatten(1, (q.size(0), q.size(2))).transpose(0, 1)
