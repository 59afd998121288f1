"""The baseline: k-shot prompting of the same frozen model, with nothing learned (Radford et al. 2019, section 3.7).

    fr: Où est la gare ?            k aligned pairs from the training split,
    en: Where is the station?       drawn by a seed
    fr: Il pleut.                   then the sentence to translate
    en:                             the model goes on; its line is the translation

The examples are the same for every sentence, so their keys and values are computed once, as a bank read off text,
and shared by the whole batch; each sentence costs only its own two lines.
"""

import numpy as np

from minigpt.errors import UserError
from minigpt.generate import Prompt, generate
from minigpt.scoring import likeliest_answer, max_new_tokens
from prefix.banks import Banks
from prefix.data.rows import clean
from prefix.translation import Translation, answered


def draw_examples(corpus, source, target, k, seed):
    """k pairs (source text, target text) from the training split, drawn without replacement. Raises UserError where
    there are fewer."""
    examples = corpus.examples("train")
    examples = examples[(examples[:, 1] == source) & (examples[:, 2] == target)]
    if k > len(examples):
        raise UserError(f"{k} shots, but {len(examples)} training pairs to draw them from: fewer --shots, or --draws 0")
    chosen = np.random.default_rng((seed, 7)).choice(len(examples), size=k, replace=False)
    return [(corpus.text(row, source), corpus.text(row, target)) for row, _, _ in examples[chosen]]


def prompt_text(pairs, source_name, target_name):
    """The examples as text; "" for none."""
    return "".join(f"{source_name}: {clean(s)}\n{target_name}: {clean(t)}\n" for s, t in pairs)


def few_shot(model, tokenizer, pairs, texts, source_name, target_name, batch_size=32, choices=None):
    """Texts -> a list of Translation, in the same order. choices: the texts that an answer may be, if not all may.
    Raises UserError where the pairs alone fill the context."""
    shots, limit = tokenizer.encode(prompt_text(pairs, source_name, target_name)), model.config.n_positions
    if len(shots) >= limit:
        raise UserError(
            f"{len(pairs)} shots of {len(shots)} tokens fill this model's context of {limit}: fewer --shots"
        )
    bank = Banks.from_prompt(model, "shots", shots) if shots else None
    slots, prompts = bank.slots().to(model.dtype) if bank else None, {}
    answers = [tokenizer.encode(f" {clean(choice)}\n") for choice in choices or []]  # as in prompt_text
    for i, text in enumerate(texts):
        ids = tokenizer.encode(f"{source_name}: {clean(text)}\n{target_name}:")
        left = limit - len(shots) - len(ids)
        most = max_new_tokens(answers, left) if choices else min(2 * len(ids) + 16, left)
        prompts[i] = Prompt(ids, most, [1] * len(ids) if bank else None)

    def answer(prompts):
        if choices:
            return likeliest_answer(model, prompts, answers, slots, len(shots), batch_size)
        return generate(model, prompts, stop_ids(tokenizer), slots, len(shots), batch_size)

    return answered([Translation() for _ in texts], prompts, answer, tokenizer)


def stop_ids(tokenizer):
    """<|endoftext|> and every token with a newline in it: the answer is one line."""
    return {tokenizer.eot} | {i for i in range(tokenizer.n_vocab) if "\n" in tokenizer.decode([i])}
