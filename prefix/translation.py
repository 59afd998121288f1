"""Translating with a learned prefix: texts in, texts out."""

import math
import re
from dataclasses import dataclass

from minigpt.beam import beam_search
from minigpt.generate import Prompt, generate
from minigpt.scoring import likeliest_answer, max_new_tokens
from prefix import distributed
from prefix.data.rows import MAX_FIELD, clean
from prefix.sequences import separator

CLOSING = """["'”’»)\\]]"""
SENTENCE_END = re.compile(  # spaces behind a mark that ends a sentence, or behind what closes such a one: « Oui ! »
    rf"(?:(?<=[.!?…。！？])|(?<=[.!?…]{CLOSING})|(?<=[.!?…]\s{CLOSING}))\s+(?!{CLOSING})"
)


@dataclass
class Translation:
    """text: one line. finished: False where it was cut at its limit. fault: why there is none, or None. pieces: into
    how many the source was divided, because it was too long for the context."""

    text: str = ""
    finished: bool = True
    fault: str | None = None
    pieces: int = 1


def translate(
    model,
    tokenizer,
    banks,
    texts,
    source,
    target,
    max_new=None,
    batch_size=32,
    sampler=None,
    beams=1,
    length_penalty=1.0,
    first=0,
    choices=None,
    on_text=None,
):
    """List of texts -> list of Translation, in the same order; an empty text gives an empty one.

    source, target: bank names. max_new: tokens of each answer, by default twice the source plus 16; never past the
    context. A text that is too long for the context is divided at sentence ends. first: the number of the first text,
    for sampling: each draws from a stream of its own. choices: the texts that an answer may be, of which the likeliest
    is taken. on_text(text so far): called as it grows, if there is one text in one piece and no beam search. Several
    processes share the texts out between them, and each returns all results."""
    sees_source, sees_both, sep = banks.mask([source]), banks.mask([source, target]), separator(tokenizer)
    room = model.config.n_positions - banks.position_offset
    slots, offset = banks.slots().to(model.dtype), banks.position_offset
    answers = [[*tokenizer.encode(clean(choice)), tokenizer.eot] for choice in choices or []]

    def fits(text):
        n = len(tokenizer.encode(text)) if len(text) <= MAX_FIELD else math.inf
        return choices or n + 1 + min(max_new or math.inf, 2 * n + 16) <= room

    def tokens_for_answer(n):
        """How many a source of n tokens may take; 0 where there is no room for a fair answer."""
        left, usual = room - n - 1, max_new or 2 * n + 16
        if choices:
            return max_new_tokens(answers, left)
        return min(usual, left) if left >= min(usual, n) else 0

    pieces = [divide(clean(text), fits) for text in texts]  # as training read them: a newline would be a separator
    flat = [(first + i, j, piece) for i, parts in enumerate(pieces) for j, piece in enumerate(parts)]
    results, prompts = [Translation() for _ in flat], {}
    for number, (i, j, text) in enumerate(flat):
        if len(text) > MAX_FIELD:  # tiktoken gives up on such texts, and not as an exception
            results[number] = Translation(finished=False, fault=f"more than {MAX_FIELD:,} characters are no sentence")
        elif text:
            ids = tokenizer.encode(text)
            bank_mask = [sees_source] * len(ids) + [sees_both]
            prompts[number] = Prompt([*ids, sep], tokens_for_answer(len(ids)), bank_mask, stream=(i, j))
    on_token = _whole_texts(on_text, tokenizer) if on_text and len(prompts) == 1 else None

    def answer(prompts):
        if choices:
            return likeliest_answer(model, prompts, answers, slots, offset, batch_size)
        if beams > 1:
            return beam_search(model, prompts, [tokenizer.eot], slots, offset, beams, batch_size, length_penalty)
        return generate(model, prompts, [tokenizer.eot], slots, offset, batch_size, sampler, on_token)

    parts = iter(answered(results, prompts, answer, tokenizer))
    return [join([next(parts) for _ in one]) for one in pieces]


def divide(text, fits):
    """[text] if fits(text), else its sentences: what a prefix is trained on is single sentences, as a rule."""
    return [text] if fits(text) else SENTENCE_END.split(text)


def join(parts):
    """The Translations of a text's pieces -> that of the text."""
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
    """Fill in `results` what answer() makes of the prompts, {number: Prompt}; each process answers its share. A prompt
    without room for a single new token is a fault."""
    for i in [i for i, prompt in prompts.items() if prompt.max_new < 1]:
        fault = f"{len(prompts.pop(i).ids)} tokens leave no room to answer in this model's context"
        results[i] = Translation(finished=False, fault=fault)
    generated = distributed.all_gather(answer(distributed.shard(list(prompts.values()))))
    for i, result in zip(prompts, generated):
        results[i] = Translation(clean(tokenizer.decode(result.ids)), result.finished)
    return results
