"""Decoding with a key/value cache: greedy, sampling; batched, ragged, with slots or without.

    prompts waiting:  p7 p8 p9 ...                  seats = rows of the cache
    seat 0  [ p3 ######## + ]                       #  keys and values that are there
    seat 1  [ p5 ### +      ]   prefill: many tokens of a new prompt at once
    seat 2  [ p6 ##### +    ]   decode:  one token (+) for every seat at once

A sentence takes positions 0, 1, 2 ... of its own whatever its neighbours' lengths, so it gets the tokens that it
gets alone. When one ends, the last seat's sentence moves into its seat, so the seats in use stay the first ones and
a step reads no others; waiting prompts then take the free seats.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from minigpt.attention import PackedBatch, attend, attend_cached, to_device
from minigpt.errors import UserError

ROUND = 128  # entries of the cache: recorded steps look at multiples of this


@dataclass
class Prompt:
    """ids: token ids, at least one. max_new: tokens to generate at most. opened: a bank mask for each id (new tokens
    keep the last); None: no banks. stream: names the random stream that sampling draws from, an int or a tuple of
    them; None: the prompt's number."""

    ids: list
    max_new: int
    bank_mask: list | None = None
    stream: int | tuple | None = None


@dataclass
class Generated:
    """ids: the new tokens, without the one that stopped it. finished: False if it was cut at max_new."""

    ids: list = field(default_factory=list)
    finished: bool = False


class Cache:
    """Keys and values of every token so far. key, value: (n_layer, seats, n_head, capacity, head_dim), allocated
    once; length: a list, how many of each seat's entries are filled."""

    def __init__(self, model, seats, capacity):
        c = model.config
        shape = (c.n_layer, seats, c.n_head, capacity, c.head_dim)
        self.key = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.value = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.length = [0] * seats  # kept on the host: nothing waits for the device to know it
        self.seats, self.capacity = seats, capacity
        self.recorded = {}  # CUDA graphs of steps on these very keys and values

    def put(self, layer, seat, entry, k, v):
        """k, v (N, n_head, head_dim) of N tokens -> where seat (N,) and entry (N,) say."""
        self.key[layer][seat, :, entry] = k
        self.value[layer][seat, :, entry] = v

    def clear(self, seats):
        """What lies behind a sentence's end has no weight, but if a float16 that overflowed lies there, 0 * nan is nan."""
        if self.key.dtype == torch.float16:
            self.key[:, seats], self.value[:, seats] = 0, 0

    def move(self, source, target):
        """The sentence in seat `source` goes to seat `target`."""
        n = self.length[source]
        self.key[:, target, :, :n] = self.key[:, source, :, :n]
        self.value[:, target, :, :n] = self.value[:, source, :, :n]
        self.length[target] = n


def prefill(model, cache, seats, prompts, bank_mask=None, slots=None, position_offset=0):
    """Run whole prompts (lists of ids) into free seats; opened: a list of masks for each -> the logits after the last
    token of each (B, vocab_size)."""
    lengths = [len(ids) for ids in prompts]
    cache.clear(seats)
    masks = None if bank_mask is None else torch.tensor([bit for masks in bank_mask for bit in masks])
    packed = PackedBatch(lengths, masks, model.device)
    ids = torch.tensor([i for ids in prompts for i in ids], device=model.device)  # (N,)
    seat = torch.tensor(seats).repeat_interleave(torch.tensor(lengths)).to(model.device)  # (N,)

    def attn_fn(i, qkv):
        _, k, v = qkv.unflatten(-1, (3, model.config.n_head, -1)).unbind(1)  # (N, n_head, head_dim)
        cache.put(i, seat, packed.position, k, v)
        return attend(qkv, model.config.n_head, packed, slots and slots.layer(i), model.attention)

    hidden = model.blocks(model.embed(ids, packed.position + position_offset), attn_fn)  # (N, n_embd)
    for taken, n in zip(seats, lengths):
        cache.length[taken] = n
    last = torch.tensor(lengths).cumsum(0) - 1
    return model.logits(hidden[last.to(model.device)])


def decode(model, cache, ids, bank_mask=None, slots=None, position_offset=0):
    """One more token, ids (B,), for each of the first B seats; opened (B,) masks -> logits (B, vocab_size), which on a
    GPU the next call overwrites."""
    length = to_device(torch.tensor(cache.length[: len(ids)]), model.device)[:, None]  # (B, 1)
    past = torch.arange(reach(cache, len(ids), 1), device=model.device) <= length  # (B, T)
    logits = extend(model, cache, ids[:, None], length + position_offset, past[:, None], bank_mask, slots)
    return logits[:, 0]


def reach(cache, seats, Q):
    """How many entries of the cache a step has to look at that adds Q to each of the first seats. A GPU rounds up: it
    records a step once for each number."""
    longest = max(cache.length[:seats]) + Q
    return min(-(-longest // ROUND) * ROUND, cache.capacity) if records_steps(cache.key.device) else longest


def records_steps(device):
    """A GPU is faster than the host can tell it what to do: there a step is one launch of a CUDA graph."""
    return device.type == "cuda"


def extend(model, cache, ids, position, past, bank_mask=None, slots=None):
    """Q more tokens, each the next one of another beginning, for each of the first B seats; they become the newest Q
    entries of the cache.

    ids, position (B, Q); past (B, Q, T): the entries that belong to each one's beginning, its own among them;
    opened (B,) masks -> logits (B, Q, vocab_size)."""
    B, Q = ids.shape
    entry = to_device(torch.tensor(cache.length[:B]), ids.device)[:, None] + torch.arange(Q, device=ids.device)
    if slots is not None:
        past = torch.cat([slots.visible_slots(bank_mask)[:, None].expand(-1, Q, -1), past], dim=-1)  # (B, Q, S + T)
    logits = (replay if records_steps(model.device) else step)(model, cache, slots, ids, position, entry, past)
    cache.length[:B] = [n + Q for n in cache.length[:B]]
    return logits


def step(model, cache, slots, ids, position, entry, visible):
    """What extend does on the device, all of it in tensors: ids, position, entry (B, Q); visible (B, Q, S + T)."""
    B, Q = ids.shape
    n_entries = visible.size(-1) - (0 if slots is None else slots.bank.numel())
    bias = torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, -torch.inf)
    seat = torch.arange(B, device=ids.device).repeat_interleave(Q)

    def attn_fn(i, qkv):
        q, k, v = qkv.unflatten(-1, (3, model.config.n_head, -1)).unbind(1)  # (B * Q, n_head, head_dim)
        cache.put(i, seat, entry.flatten(), k, v)
        key, value = cache.key[i, :B, :, :n_entries], cache.value[i, :B, :, :n_entries]
        q = q.unflatten(0, (B, Q)).transpose(1, 2)  # (B, n_head, Q, head_dim)
        return attend_cached(q, key, value, bias, slots and slots.layer(i), model.attention).flatten(0, 1)

    hidden = model.blocks(model.embed(ids.flatten(), position.flatten()), attn_fn)  # (B * Q, n_embd)
    return model.logits(hidden).unflatten(0, (B, Q))


def replay(model, cache, slots, *inputs):
    """step() as one launch: recorded as a CUDA graph the first time that inputs have these widths, and replayed from
    then on, with the same slots. A graph runs all seats; what it writes for free ones is overwritten before any sentence
    reads it."""
    B, seats = len(inputs[0]), cache.seats
    widths = tuple(x.size(-1) for x in inputs)
    if widths not in cache.recorded:
        fixed = [x.new_ones(seats, *x.shape[1:]) for x in inputs]
        cache.recorded[widths] = [torch.cuda.CUDAGraph(), fixed, None]
    graph, fixed, logits = cache.recorded[widths]
    for buffer, x in zip(fixed, inputs):
        buffer[:B] = x
    with torch.cuda.device(model.device):
        if logits is None:
            step(model, cache, slots, *fixed)  # outside the graph, for what is set up only once
            with torch.cuda.graph(graph):
                logits = step(model, cache, slots, *fixed)
            cache.recorded[widths][2] = logits
        graph.replay()
    return logits[:B]


class Sampler:
    """Chooses next tokens: the likeliest (temperature 0), or one drawn from softmax(logits / temperature) cut to the
    top_k likeliest and then to the smallest set that holds a share top_p of what is left. Each sentence draws from a stream of its own,
    so that its neighbours do not change it."""

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed
        self.streams = {}

    def __call__(self, logits, streams):
        """logits (B, vocab_size), the names of the B sentences' streams -> token ids (B,)."""
        if self.temperature == 0:
            return logits.max(dim=-1).indices  # on a CPU three times as fast as argmax
        logits = logits.float()
        p = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_k or self.top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                ranked[:, self.top_k :] = 0
                ranked /= ranked.sum(dim=-1, keepdim=True)
            ranked[ranked.cumsum(dim=-1) - ranked >= self.top_p] = 0  # one stays while those before it hold less
            p = torch.zeros_like(p).scatter_(1, order, ranked)
        # Each token waits for a time that is exponential with rate p: it is the first to come with probability p. The last
        # bits of p, in which a batch differs from a sentence alone, change that far less often than a place in a sum.
        wait = torch.empty_like(p)
        for row, stream in zip(wait, streams):
            if stream not in self.streams:
                self.streams[stream] = torch.Generator(p.device).manual_seed(hash((self.seed, stream)) % 2**63)
            row.exponential_(generator=self.streams[stream])
        return (p / wait.clamp(min=1e-30)).argmax(dim=-1)


@torch.no_grad()
def generate(
    model, prompts, stop, slots=None, position_offset=0, batch_size=32, sampler=None, on_token=None, on_finished=None
):
    """Prompts -> a list of Generated, in the same order.

    stop: ids that end a sentence. batch_size: seats. on_token(number, id): called for each new token; on_finished(): for
    each sentence that ends."""
    sampler, stop = sampler or Sampler(), set(stop)
    check_prompts(model, prompts, position_offset)
    results, waiting = [Generated() for _ in prompts], longest_first(prompts)
    seats = min(max(1, batch_size), len(waiting))
    cache = Cache(model, seats, max((len(p.ids) + p.max_new for p in prompts), default=0))
    seated, last = [], []  # the number of each seat's sentence, and its newest token

    def take(logits, numbers):
        """Choose the next token of these sentences; None where one ends."""
        streams = [n if prompts[n].stream is None else prompts[n].stream for n in numbers]
        tokens = sampler(logits, streams).tolist()
        return [_accept(results[n], prompts[n], token, stop, n, on_token) for n, token in zip(numbers, tokens)]

    while waiting or seated:
        if time_to_seat(waiting, seated, seats):
            new, logits = sit_down(model, cache, waiting, prompts, len(seated), slots, position_offset)
            seated, last = seated + new, last + take(logits, new)
        else:
            ids = to_device(torch.tensor(last), model.device)
            bank_mask = open_now([prompts[n] for n in seated], slots)
            last = take(decode(model, cache, ids, bank_mask, slots, position_offset), seated)
        for seat in reversed(range(len(seated))):
            if last[seat] is None:
                leave(cache, seat, seated, last)
                if on_finished:
                    on_finished()
    return results


def longest_first(prompts):
    """The numbers of the prompts that want tokens, as a deque: the longest sentences come first, so that at the end,
    when seats stay free, the work left is short."""
    wanting = [i for i, prompt in enumerate(prompts) if prompt.max_new > 0]
    return deque(sorted(wanting, key=lambda i: -len(prompts[i].ids)))


def time_to_seat(waiting, seated, seats):
    """New sentences sit down a few at a time: a prefill reads all weights, too."""
    return waiting and len(seated) <= seats * 3 // 4


def sit_down(model, cache, waiting, prompts, first, slots, position_offset):
    """Waiting prompts take the seats from `first` on -> (their numbers, the logits after each (B, vocab_size))."""
    new = [waiting.popleft() for _ in range(min(len(waiting), cache.seats - first))]
    seats, ids = list(range(first, first + len(new))), [prompts[n].ids for n in new]
    bank_mask = None if slots is None else [prompts[n].bank_mask for n in new]
    return new, prefill(model, cache, seats, ids, bank_mask, slots, position_offset)


def leave(cache, seat, *lists):
    """A sentence ends: the last seat's sentence takes its seat, in the cache and in lists of what belongs to seats."""
    end = len(lists[0]) - 1
    if seat != end:
        cache.move(end, seat)
    for things in lists:
        things[seat] = things[end]
        things.pop()


def open_now(prompts, slots):
    """The masks of the banks that these sentences' new tokens see: (B,), or None without slots."""
    return None if slots is None else to_device(torch.tensor([p.bank_mask[-1] for p in prompts]), slots.bank.device)


def check_prompts(model, prompts, position_offset):
    """Every prompt has a token and fits, with what is to follow, into the context."""
    limit = model.config.n_positions - position_offset
    for number, prompt in enumerate(prompts):
        if not prompt.ids:
            raise UserError(f"prompt {number + 1} is empty")
        if len(prompt.ids) + prompt.max_new > limit:
            raise UserError(
                f"prompt {number + 1}: {len(prompt.ids)} tokens and {prompt.max_new} new ones "
                f"are more than the {limit} that this model's context has room for"
            )


def _accept(result, prompt, token, stop, number, on_token):
    """Add a token to a sentence; return it, or None if the sentence ends here."""
    if token in stop:
        result.finished = True
        return None
    result.ids.append(token)
    if on_token:
        on_token(number, token)
    return token if len(result.ids) < prompt.max_new else None
