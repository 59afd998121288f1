"""Translating with a learned prefix: texts in, texts out.

A text becomes a prompt as in training (sequences.py): its tokens see the source bank, <sep> and the answer see both.
"""

import math
import re
from dataclasses import dataclass

from minigpt.generate import Prompt
from prefix import distributed
from prefix.data.rows import MAX_FIELD, clean
from prefix.decoding import Decoding, decode
from prefix.sequences import separator

CLOSING = """["'”’»)\\]]"""
SENTENCE_END = re.compile(  # spaces behind a mark that ends a sentence, or behind what closes such a one: « Oui ! »
    rf"(?:(?<=[.!?…。！？])|(?<=[.!?…]{CLOSING})|(?<=[.!?…]\s{CLOSING}))\s+(?!{CLOSING})"
)


@dataclass
class Translation:
    text: str = ""  # one line
    finished: bool = True  # False: cut at its limit
    fault: str | None = None  # why there is none
    pieces: int = 1  # into how many the source was divided, because it was too long for the context


def translate(model, tokenizer, banks, texts, direction, decoding=None):
    """List of texts -> list of Translation, in the same order; an empty text gives an empty one.

    direction: the names of the source's and the target's bank. decoding: a Decoding; None: greedy. A text that is too
    long for the context, with its longest answer, is divided at the ends of its sentences. Each of
    several processes answers some of the texts, and returns all. Raises UserError for banks or numbers that the model
    does not have."""
    decoding = decoding or Decoding()
    decoding.check(model.config)
    sees_source, sees_both, sep = banks.mask(direction[:1]), banks.mask(direction), separator(tokenizer)
    prefix = banks.slots().to(model.dtype), banks.position_offset
    room = model.config.n_positions - banks.position_offset
    answers = [[*tokenizer.encode(clean(choice)), tokenizer.eot] for choice in decoding.choices or []]

    def fits(text):
        n = len(tokenizer.encode(text)) if len(text) <= MAX_FIELD else math.inf
        return answers or n + 1 + min(decoding.max_new or math.inf, 2 * n + 16) <= room

    texts = [clean(text) for text in texts]  # as training read them: a newline would be a separator
    pieces = [[text] if fits(text) else SENTENCE_END.split(text) for text in texts]
    flat = [(decoding.first + i, j, piece) for i, parts in enumerate(pieces) for j, piece in enumerate(parts)]
    results, prompts = [Translation() for _ in flat], {}
    for number, (i, j, text) in enumerate(flat):
        if len(text) > MAX_FIELD:  # tiktoken panics on such texts, which is no exception
            results[number] = Translation(finished=False, fault=f"more than {MAX_FIELD:,} characters are no sentence")
        elif text:
            ids = tokenizer.encode(text)
            most = decoding.room_for_answer(len(ids), room, answers)
            prompts[number] = Prompt([*ids, sep], most, [sees_source] * len(ids) + [sees_both], stream=(i, j))
    answer = lambda prompts: decode(model, prompts, [tokenizer.eot], prefix, decoding, answers)
    parts = iter(answered(results, prompts, answer, tokenizer))
    return [join([next(parts) for _ in one]) for one in pieces]


def join(parts):
    """The Translations of a text's pieces -> the text's."""
    fault = next((part.fault for part in parts if part.fault), None)
    text = " ".join(part.text for part in parts if part.text)
    return Translation(text, all(part.finished for part in parts), fault, len(parts))


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
