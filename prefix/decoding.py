"""How to decode, and the one place that does: it chooses the algorithm and keeps it within the free memory."""

from dataclasses import dataclass

from minigpt.beam import beam_search
from minigpt.cache import kept_bytes
from minigpt.files import UserError
from minigpt.generate import Sampler, generate
from minigpt.memory import SHARE, attempt, free_memory, row_bytes, rows_that_fit
from minigpt.scoring import likeliest_answer, max_new_tokens
from prefix.distributed import log_once


@dataclass
class Decoding:
    """How to decode."""

    max_new: int | None = None  # tokens of an answer at most; None: twice the source plus 16; never past the context
    sampler: Sampler | None = None  # None: the likeliest token
    beams: int = 1  # 1: no beam search
    length_penalty: float = 1.0
    batch_size: int = 32  # sentences at a time; where memory runs out it is halved
    choices: list | None = None  # the texts that an answer may be; the likeliest is taken
    first: int = 0  # the number of the first text; each is sampled from a random stream of its number

    def check(self, config):
        """Raises UserError for more than a model of this config can use."""
        for option, value in (("--beam", self.beams), ("--top-k", self.sampler.top_k if self.sampler else 0)):
            if value > config.vocab_size:
                raise UserError(f"{option} {value:,} is more than the {config.vocab_size:,} tokens of this model's vocabulary")

    def room_for_answer(self, n, room, answers):
        """New tokens that a source of n tokens may have where `room` positions are left for both and <sep>; 0 if that
        is too few for a fair answer."""
        left, usual = room - n - 1, self.max_new or 2 * n + 16
        if answers:
            return max_new_tokens(answers, left)
        return min(usual, left) if left >= min(usual, n) else 0


def decode(model, prompts, stop, prefix, decoding, answers=()):
    """Prompts -> a list of Generated, in the same order: the likeliest of `answers` (lists of ids), or by beams, or
    token by token. stop: ids that end an answer. prefix: (Slots or None, position of the first token). Where memory runs
    out, rows are halved until they fit."""

    def work(rows):
        if answers:
            return likeliest_answer(model, prompts, answers, *prefix, batch_size=rows)
        if decoding.beams > 1:
            ranking = {"beams": decoding.beams, "length_penalty": decoding.length_penalty}
            return beam_search(model, prompts, stop, *prefix, batch_size=rows, **ranking)
        if decoding.sampler:
            decoding.sampler.streams.clear()  # also where an attempt has drawn from them
        return generate(model, prompts, stop, *prefix, batch_size=rows, sampler=decoding.sampler)

    if not prompts:
        return []
    rows = min(decoding.batch_size, len(prompts) * max(1, len(answers)))
    if not answers:
        rows = rows_in_memory(model, prompts, rows, decoding.beams)
    fitting = rows
    while (results := attempt(work, fitting)) is None:
        if fitting == 1:
            raise UserError("out of memory, even with one sentence at a time: lower --beam or --max-new-tokens")
        fitting //= 2
    if fitting < rows:
        decoding.batch_size = fitting  # later texts begin there
        log_once(f"Out of memory with {rows} sentences at a time: now {fitting}")
    return results


def rows_in_memory(model, prompts, rows, beams):
    """`rows` of the cache, or as many as memory has room for. A row is as long as the longest prompt needs."""
    longest = max(len(prompt.ids) + prompt.max_new * beams for prompt in prompts)
    fitting = rows_that_fit(model, longest, rows, beams, kept_bytes(model))
    if not fitting:
        need = f"one sentence takes {row_bytes(model, longest, beams) / 1e9:,.1f} GB with --beam {beams}"
        free = f"there is memory for {SHARE * free_memory(model.device) / 1e9:,.1f}"
        raise UserError(f"{need}, and {free}: lower --beam or --max-new-tokens")
    if fitting < rows:
        log_once(f"Memory has room for {fitting} sentences at a time, not {rows}")
    return fitting
