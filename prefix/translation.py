"""Translating with a learned prefix: texts in, texts out.

A text becomes a prompt as in training (sequences.py): its tokens see the source bank, <sep> and the answer see both.
Prompts go through the one `decode`, which chooses the algorithm and keeps it within the free memory.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from minigpt.beam import beam_search
from minigpt.files import UserError
from minigpt.generate import Prompt, Sampler, generate
from minigpt.memory import SHARE, free_memory, out_of_memory, row_bytes, rows_that_fit
from minigpt.scoring import likeliest_answer, max_new_tokens
from prefix import distributed
from prefix.data.rows import MAX_FIELD, clean
from prefix.sequences import separator

CLOSING = """["'”’»)\\]]"""
SENTENCE_END = re.compile(  # spaces behind a mark that ends a sentence, or behind what closes such a one: « Oui ! »
    rf"(?:(?<=[.!?…。！？])|(?<=[.!?…]{CLOSING})|(?<=[.!?…]\s{CLOSING}))\s+(?!{CLOSING})"
)
log_once = functools.cache(distributed.log)


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


@dataclass
class Translation:
    """text: one line. finished: False if it was cut at its limit. fault: why there is none, or None. pieces: into how
    many the source was divided, because it was too long for the context."""

    text: str = ""
    finished: bool = True
    fault: str | None = None
    pieces: int = 1


def translate(model, tokenizer, banks, texts, source, target, decoding=None, first=0, on_text=None):
    """List of texts -> list of Translation, in the same order; an empty text gives an empty one.

    source, target: bank names. decoding: a Decoding; None: greedy. first: the number of the first text; each text is
    sampled from a random stream of its number. on_text(text so far): called as it grows, if there is one text in one
    piece and no beam search. A text that is too long for the context is divided at sentence ends. Several processes
    share the texts, and each returns all results. Raises UserError for banks or numbers that the model does not have."""
    decoding = decoding or Decoding()
    decoding.check(model.config)
    sees_source, sees_both, sep = banks.mask([source]), banks.mask([source, target]), separator(tokenizer)
    slots, offset, room = banks.slots().to(model.dtype), banks.position_offset, model.config.n_positions
    answers = [[*tokenizer.encode(clean(choice)), tokenizer.eot] for choice in decoding.choices or []]

    def fits(text):
        n = len(tokenizer.encode(text)) if len(text) <= MAX_FIELD else math.inf
        return answers or n + 1 + min(decoding.max_new or math.inf, 2 * n + 16) <= room - offset

    pieces = [divide(clean(text), fits) for text in texts]  # as training read them: a newline would be a separator
    flat = [(first + i, j, piece) for i, parts in enumerate(pieces) for j, piece in enumerate(parts)]
    results, prompts = [Translation() for _ in flat], {}
    for number, (i, j, text) in enumerate(flat):
        if len(text) > MAX_FIELD:  # tiktoken panics on such texts, which is no exception
            results[number] = Translation(finished=False, fault=f"more than {MAX_FIELD:,} characters are no sentence")
        elif text:
            ids = tokenizer.encode(text)
            most = decoding.room_for_answer(len(ids), room - offset, answers)
            prompts[number] = Prompt([*ids, sep], most, [sees_source] * len(ids) + [sees_both], stream=(i, j))
    on_token = _whole_texts(on_text, tokenizer) if on_text and len(prompts) == 1 else None
    answer = lambda prompts: decode(model, prompts, [tokenizer.eot], slots, offset, decoding, answers, on_token)
    parts = iter(answered(results, prompts, answer, tokenizer))
    return [join([next(parts) for _ in one]) for one in pieces]


def divide(text, fits):
    """[text] if fits(text), else its sentences: a prefix is trained on single sentences, as a rule."""
    return [text] if fits(text) else SENTENCE_END.split(text)


def join(parts):
    """The Translations of a text's pieces -> the text's."""
    fault = next((part.fault for part in parts if part.fault), None)
    text = " ".join(part.text for part in parts if part.text)
    return Translation(text, all(part.finished for part in parts), fault, len(parts))


def _whole_texts(on_text, tokenizer):
    """An on_token for generate that calls on_text(the text so far) whenever it ends with a whole character."""
    ids = []

    def on_token(number, token):
        ids.append(token)
        text = clean(tokenizer.decode(ids))
        if not text.endswith("\ufffd"):
            on_text(text)

    return on_token


def answered(results, prompts, answer, tokenizer):
    """Fill in `results` the texts that answer(prompts) gives, {number: Prompt}; each process answers its shard. A
    prompt without room for a single new token is a fault."""
    for i in [i for i, prompt in prompts.items() if prompt.max_new < 1]:
        fault = f"{len(prompts.pop(i).ids)} tokens leave no room to answer in this model's context"
        results[i] = Translation(finished=False, fault=fault)
    generated = distributed.all_gather(answer(distributed.shard(list(prompts.values()))))
    for i, result in zip(prompts, generated):
        results[i] = Translation(clean(tokenizer.decode(result.ids)), result.finished)
    return results


# Decoding within the free memory


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
