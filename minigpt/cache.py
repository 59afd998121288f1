"""The key/value cache of decoding, and what runs the model on it: prefill many tokens, then one token at a time.

    row 0   [ p3 ######## + ]       #  keys and values that are there
    row 1   [ p5 ### +      ]       +  one token for every row at once (decode)
    row 2   [ p6 ##### +    ]       a new prompt fills its row at once (prefill)

Each row holds one sequence, with positions 0, 1, 2 ... of its own, so its neighbours do not change it. Learned slots are
not in the cache: a step reads them once for all rows (attention.attend_cached). On a GPU a step is one CUDA
graph, recorded at its first use: without it the GPU would wait for the host to launch some twenty kernels per layer.
"""

import torch

from minigpt.attention import PackedBatch, attend, attend_cached, slot_layers, to_device

ROUND = 128  # on a GPU a step reads a multiple of so many entries: one graph serves them all


class Cache:
    """Keys and values of every token so far: key, value (n_layer, rows, n_head, capacity, head_dim), allocated once.
    length: a list on the host, how many entries of each row are filled."""

    def __init__(self, model, rows, capacity):
        c = model.config
        shape = (c.n_layer, rows, c.n_head, capacity, c.head_dim)
        self.key = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.value = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.length = [0] * rows  # on the host: nobody waits for the device to know it
        self.rows, self.capacity = rows, capacity
        self.graphs = {}  # CUDA graphs of steps on these very keys and values

    def write(self, layer, row, cache_position, k, v):
        """k, v (N, n_head, head_dim) of N tokens -> where row (N,) and cache_position (N,) say."""
        self.key[layer][row, :, cache_position] = k
        self.value[layer][row, :, cache_position] = v

    def clear(self, rows):
        """Zero these rows (float16 only). Entries past a sequence's end get weight 0, but 0 * nan of an overflow is nan."""
        if self.key.dtype == torch.float16:
            self.key[:, rows], self.value[:, rows] = 0, 0

    def move(self, source, target):
        """Copy the sequence in row `source` to row `target`."""
        n = self.length[source]
        self.key[:, target, :, :n] = self.key[:, source, :, :n]
        self.value[:, target, :, :n] = self.value[:, source, :, :n]
        self.length[target] = n

    def kv_len(self, rows, new):
        """How many entries a step reads that adds `new` tokens to each of the first rows."""
        longest = max(self.length[:rows]) + new
        return min(-(-longest // ROUND) * ROUND, self.capacity) if uses_graphs(self.key.device) else longest


def uses_graphs(device):
    return device.type == "cuda"


def prefill(model, cache, rows, prompts, bank_masks=None, slots=None, position_offset=0):
    """Run whole prompts (lists of ids) into free rows. bank_masks: a list of masks for each prompt -> the logits after
    the last token of each (B, vocab_size)."""
    lengths = [len(ids) for ids in prompts]
    cache.clear(rows)
    masks = None if bank_masks is None else torch.tensor([mask for masks in bank_masks for mask in masks])
    packed = PackedBatch(lengths, masks, model.device)
    ids = torch.tensor([i for ids in prompts for i in ids], device=model.device)  # (N,)
    row = torch.tensor(rows).repeat_interleave(torch.tensor(lengths)).to(model.device)  # (N,)

    layers = slot_layers(slots, model.config.n_layer)

    def attn_fn(i, qkv):
        _, k, v = qkv.unflatten(-1, (3, model.config.n_head, -1)).unbind(1)  # (N, n_head, head_dim)
        cache.write(i, row, packed.position, k, v)
        return attend(qkv, model.config.n_head, packed, layers[i], model.attention)

    hidden = model.blocks(model.embed(ids, packed.position + position_offset), attn_fn)  # (N, n_embd)
    for r, n in zip(rows, lengths):
        cache.length[r] = n
    last = torch.tensor(lengths).cumsum(0) - 1
    return model.logits(hidden[last.to(model.device)])


def decode_one_token(model, cache, ids, bank_mask=None, slots=None, position_offset=0):
    """The next token, ids (B,), of each of the first B rows; bank_mask (B,) -> logits (B, vocab_size), which on a GPU
    the next call overwrites."""
    length = to_device(torch.tensor(cache.length[: len(ids)]), model.device)[:, None]  # (B, 1)
    past = torch.arange(cache.kv_len(len(ids), 1), device=model.device) <= length  # (B, T)
    logits = forward_cached(model, cache, ids[:, None], length + position_offset, past[:, None], bank_mask, slots)
    return logits[:, 0]


def forward_cached(model, cache, ids, position, past, bank_mask=None, slots=None):
    """Append Q tokens to each of the first B rows: one, or one for each beam. They become the row's newest entries.

    ids, position (B, Q); past (B, Q, T): the entries that each token sees, itself included; bank_mask (B,)
    -> logits (B, Q, vocab_size)."""
    B, Q = ids.shape
    start = to_device(torch.tensor(cache.length[:B]), ids.device)[:, None]
    cache_position = start + torch.arange(Q, device=ids.device)  # (B, Q)
    if slots is not None:
        visible = slots.visible_slots(bank_mask)[:, None].expand(-1, Q, -1)
        past = torch.cat([visible, past], dim=-1)  # (B, Q, S + T)
    run = replay_graph if uses_graphs(model.device) else decode_step
    logits = run(model, cache, slots, ids, position, cache_position, past)
    cache.length[:B] = [n + Q for n in cache.length[:B]]
    return logits


def decode_step(model, cache, slots, ids, position, cache_position, visible):
    """What forward_cached does on the device, all in tensors: ids, position, cache_position (B, Q); visible (B, Q, S + T)."""
    B, Q = ids.shape
    T = visible.size(-1) - (0 if slots is None else slots.bank.numel())
    bias = torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, -torch.inf)
    row, layers = torch.arange(B, device=ids.device).repeat_interleave(Q), slot_layers(slots, model.config.n_layer)

    def attn_fn(i, qkv):
        q, k, v = qkv.unflatten(-1, (3, model.config.n_head, -1)).unbind(1)  # (B * Q, n_head, head_dim)
        cache.write(i, row, cache_position.flatten(), k, v)
        key, value = cache.key[i, :B, :, :T], cache.value[i, :B, :, :T]
        q = q.unflatten(0, (B, Q)).transpose(1, 2)  # (B, n_head, Q, head_dim)
        return attend_cached(q, key, value, bias, layers[i], model.attention).flatten(0, 1)

    hidden = model.blocks(model.embed(ids.flatten(), position.flatten()), attn_fn)  # (B * Q, n_embd)
    return model.logits(hidden).unflatten(0, (B, Q))


def replay_graph(model, cache, slots, *inputs):
    """decode_step as one launch. A CUDA graph is recorded for each set of last dimensions and replayed from then on, with
    the same slots and always over all rows. Free rows compute rubbish, which the next prefill overwrites."""
    B = len(inputs[0])
    widths = tuple(x.size(-1) for x in inputs)
    if widths not in cache.graphs:
        static = [x.new_ones(cache.rows, *x.shape[1:]) for x in inputs]
        cache.graphs[widths] = [torch.cuda.CUDAGraph(), static, None]
    graph, static, logits = cache.graphs[widths]
    for buffer, x in zip(static, inputs):
        buffer[:B] = x
    with torch.cuda.device(model.device):
        if logits is None:
            decode_step(model, cache, slots, *static)  # outside the graph, for what is set up only once
            with torch.cuda.graph(graph):
                logits = decode_step(model, cache, slots, *static)
            cache.graphs[widths][2] = logits
        graph.replay()
    return logits[:B]
