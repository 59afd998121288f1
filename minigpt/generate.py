"""Decoding: greedy or sampled, many prompts at once, with slots or without.

Continuous batching: prompts wait in a queue and run in the rows of one cache. When a sequence ends, the last row's
moves into its row, so the running ones stay the first ones and a step reads no others; waiting prompts are admitted
to the free rows. A sequence does not depend on its neighbours, up to the last bits of rounding.

    waiting  p7 p8 p9 ...       running  p3 p5 p6       free rows  - -
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from minigpt.cache import borrow_cache, decode_one_token, greedy, prefill, uses_graphs
from minigpt.files import UserError


@dataclass
class Prompt:
    """ids: token ids, at least one. max_new: tokens to generate at most. bank_mask: a mask for each id (new tokens
    keep the last); None: no banks. stream: names the random stream that sampling draws from, an int or a tuple of
    ints; None: the prompt's number."""

    ids: list
    max_new: int
    bank_mask: list | None = None
    stream: int | tuple | None = None


@dataclass
class Generated:
    """ids: the new tokens, without the one that stopped it. finished: False if it was cut at max_new."""

    ids: list = field(default_factory=list)
    finished: bool = False


class Sampler:
    """Chooses next tokens: the likeliest (temperature 0), or one drawn from softmax(logits / temperature), cut to the
    top_k likeliest, then to the smallest set that holds top_p of the probability that is left. Each sequence draws from
    a random stream of its own, so its neighbours do not change it."""

    def __init__(self, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        tiny = torch.finfo(torch.float32).tiny  # a smaller number is 0 on some devices
        self.temperature = temperature if temperature >= tiny else 0.0
        self.top_k, self.top_p, self.seed = top_k, max(top_p, tiny), seed
        self.streams = {}

    def __call__(self, logits, streams):
        """logits (B, vocab_size), the names of the B sequences' streams -> token ids (B,)."""
        if self.temperature == 0:
            return greedy(logits)
        logits = logits.float()
        p = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_k or self.top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                ranked[:, self.top_k :] = 0
                ranked /= ranked.sum(dim=-1, keepdim=True)
            ranked[ranked.cumsum(dim=-1) - ranked >= self.top_p] = 0  # one stays while those before it hold less
            p = torch.zeros_like(p).scatter_(1, order, ranked)
        # An exponential race (like Gumbel-max): of waiting times with rates p the first to end is a draw from p. The last
        # bits of p, in which a batch differs from a sequence alone, change it far less often than a cumulative sum.
        wait = torch.empty_like(p)
        for row, stream in zip(wait, streams):
            if stream not in self.streams:
                self.streams[stream] = torch.Generator(p.device).manual_seed(hash((self.seed, stream)) % 2**63)
            row.exponential_(generator=self.streams[stream])
        return (p / wait.clamp(min=1e-30)).argmax(dim=-1)


@torch.no_grad()
def generate(model, prompts, stop, slots=None, position_offset=0, batch_size=32, sampler=None):
    """Prompts -> a list of Generated, in the same order.

    stop: ids that end a sequence. batch_size: rows of the cache. Raises UserError for an empty prompt, or one that does
    not fit the context."""
    sampler, stop = sampler or Sampler(), set(stop)
    has_ended = lambda n: results[n].finished or len(results[n].ids) == prompts[n].max_new
    results, unread = [Generated() for _ in prompts], deque()  # of steps: the prompts' numbers, and a function: their tokens
    late = uses_graphs(model.device)  # a step runs on a GPU while the host reads the tokens of the one before
    for cache, running, first, logits in continuous_batch(model, prompts, slots, position_offset, batch_size):
        numbers, ids = running[first:], cache.ids[first : len(running), 0]
        if sampler.temperature:
            ids.copy_(sampler(logits[:, 0], [n if prompts[n].stream is None else prompts[n].stream for n in numbers]))
        unread.append((numbers, to_host(ids)))
        while len(unread) > late:
            numbers, tokens = unread.popleft()
            for n, token in zip(numbers, tokens().tolist()):
                if not has_ended(n):  # a step late: what an ended sequence got more is dropped
                    results[n].finished = token in stop
                    results[n].ids += [token] * (token not in stop)
            evict(cache, running, has_ended)
    return results


def continuous_batch(model, prompts, slots, position_offset, batch_size, beams=1):
    """Run prompts through the rows of one cache -> after each pass (cache, running, first, logits). running: the
    prompts' numbers by row. logits (B, beams, vocab_size): what follows in the rows from `first` on. cache.ids has the
    likeliest tokens: the caller may put others there, and evicts the sequences that have ended."""
    limit = model.config.n_positions - position_offset
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt.ids) <= limit - prompt.max_new:
            length = f"{len(prompt.ids)} tokens and {prompt.max_new} new ones"
            raise UserError(f"prompt {number}: {length}: this model's context has room for 1 to {limit}")
    # Longest first: at the end, when rows stay free, little work is left.
    waiting = deque(sorted((n for n, p in enumerate(prompts) if p.max_new > 0), key=lambda n: -len(prompts[n].ids)))
    rows, running = min(max(1, batch_size), len(waiting)), []
    capacity = max((len(p.ids) + p.max_new * beams for p in prompts), default=0)
    with borrow_cache(model, rows, capacity, slots, beams) as cache:
        while waiting or running:
            first = len(running)
            if waiting and first <= rows * 3 // 4:  # a few at a time: a prefill reads all weights, too
                running += [waiting.popleft() for _ in range(min(len(waiting), rows - first))]
                new = [prompts[n] for n in running[first:]]
                masks = None if cache.slots is None else [prompt.bank_mask for prompt in new]
                logits = prefill(model, cache, first, [prompt.ids for prompt in new], masks, position_offset)
                logits = logits[:, None].expand(-1, beams, -1)
            else:
                first, logits = 0, decode_one_token(model, cache, len(running))
            yield cache, running, first, logits


def evict(cache, running, has_ended):
    """For each sequence that has ended, by its prompt's number, the last row's takes its row."""
    for row in reversed(range(len(running))):
        if has_ended(running[row]):
            cache.evict(row, len(running) - 1)
            running[row] = running[-1]
            running.pop()


def to_host(x):
    """Begin to copy x to the host -> a function that returns it there, once it has come. On a GPU it is as x is now, and
    the wait is not for what runs after it."""
    if not x.is_cuda:
        return lambda: x
    with torch.cuda.device(x.device):
        there, done = x.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
        done.record()

    def read():
        done.synchronize()
        return there

    return read
