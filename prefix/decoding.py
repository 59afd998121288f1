"""How to decode, and the one place that does: it chooses the algorithm and keeps it within the free memory."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from minigpt.beam import beam_search
from minigpt.files import UserError
from minigpt.generate import Sampler, generate
from minigpt.memory import SHARE, free_memory, out_of_memory, row_bytes, rows_that_fit
from minigpt.scoring import likeliest_answer, max_new_tokens
from prefix.distributed import log

log_once = functools.cache(log)


@dataclass
class Decoding:
    """How to decode. max_new: tokens of an answer at most; None: twice the source plus 16; never past the context.
    sampler: None takes the likeliest token. beams: 1 is no beam search. batch_size: sentences at a time; where memory
    runs out it is halved. choices: the texts that an answer may be; the likeliest is taken. on_finished(): called for
    each sentence that is done."""

    max_new: int | None = None
    sampler: Sampler | None = None
    beams: int = 1
    length_penalty: float = 1.0
    batch_size: int = 32
    choices: list | None = None
    on_finished: Callable | None = None

    def check(self, config):
        """Raises UserError for more than a model of this config can use."""
        top_k = self.sampler.top_k if self.sampler else 0
        for name, value, most, what in (
            ("--beam", self.beams, config.vocab_size, "tokens of this model's vocabulary"),
            ("--top-k", top_k, config.vocab_size, "tokens of this model's vocabulary"),
            ("--max-new-tokens", self.max_new or 0, config.n_positions, "positions of this model's context"),
        ):
            if value > most:
                raise UserError(f"{name} {value:,} is more than the {most:,} {what}")

    def room_for_answer(self, n, room, answers):
        """New tokens that a source of n tokens may have where `room` positions are left for both and <sep>; 0 if that
        is too few for a fair answer."""
        left, usual = room - n - 1, self.max_new or 2 * n + 16
        if answers:
            return max_new_tokens(answers, left)
        return min(usual, left) if left >= min(usual, n) else 0


def decode(model, prompts, stop, slots, position_offset, decoding, answers=(), on_token=None):
    """Prompts -> a list of Generated, in the same order: the likeliest of `answers` (lists of ids), or by beams, or
    token by token. stop: ids that end an answer. Where memory runs out, rows are halved until they fit."""

    def run(prompts, rows):
        common = {"batch_size": rows, "on_finished": decoding.on_finished}
        if answers:
            return likeliest_answer(model, prompts, answers, slots, position_offset, **common)
        if decoding.beams > 1:
            common |= {"beams": decoding.beams, "length_penalty": decoding.length_penalty}
            return beam_search(model, prompts, stop, slots, position_offset, **common)
        if decoding.sampler:
            decoding.sampler.streams.clear()  # also where an attempt has drawn from them
        common |= {"sampler": decoding.sampler, "on_token": on_token}
        return generate(model, prompts, stop, slots, position_offset, **common)

    results = [None] * len(prompts)
    together = [(range(len(prompts)), min(decoding.batch_size, len(prompts) * len(answers)))]
    for numbers, rows in together if answers and prompts else groups(model, prompts, decoding):
        generated = halving(run, [prompts[i] for i in numbers], rows, decoding)
        for i, result in zip(numbers, generated):
            results[i] = result
    return results


def groups(model, prompts, decoding):
    """Yield (numbers of prompts, rows of the cache), to be decoded one after another.

    A row is as long as the longest prompt needs. If memory has room for that, all prompts run together; else those
    that need about the same, so that a short one does not take the row of a long one."""
    need = [len(prompt.ids) + prompt.max_new * decoding.beams for prompt in prompts]
    left = sorted(range(len(prompts)), key=lambda i: -need[i])
    while left:
        longest, numbers, wanted = need[left[0]], left, min(decoding.batch_size, len(left))
        if (rows := rows_that_fit(model, longest, wanted, decoding.beams)) < wanted:
            numbers = [i for i in left if 2 * need[i] > longest]
        if not rows:
            taken, free = row_bytes(model, longest, decoding.beams) / 1e9, SHARE * free_memory(model.device) / 1e9
            one = f"one sentence takes {taken:,.1f} GB with --beam {decoding.beams}"
            raise UserError(f"{one}, and there is memory for {free:,.1f}: lower --beam or --max-new-tokens")
        if rows < min(wanted, len(numbers)):
            log_once(f"Memory has room for {rows} sentences at a time, not {wanted}")
        yield sorted(numbers), min(rows, len(numbers))
        left = left[len(numbers) :]


def halving(run, prompts, rows, decoding):
    """run(prompts, rows), again with half the rows for as long as memory runs out."""
    fitting = rows
    while True:
        try:
            results = run(prompts, fitting)
            break
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if fitting == 1:  # here, outside, what the error held on to is free again
            raise UserError("out of memory, even with one sentence at a time: lower --beam or --max-new-tokens")
        fitting //= 2
    if fitting < rows:
        decoding.batch_size = fitting
        log_once(f"Out of memory with {rows} sentences at a time: now {fitting}")
    return results
