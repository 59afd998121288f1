"""The baseline: k-shot prompting of the same frozen model, with nothing learned (Radford et al. 2019, section 3.7).

    with names                       in bare lines

    fr: Où est la gare ?             Où est la gare ?            k pairs from the training split,
    en: Where is the station?        Where is the station?       drawn by a seed

    fr: Il pleut.                    Il pleut.                   then the sentence to translate;
    en:                                                          the model's next line is the translation

(The blank line between pairs is there in bare lines only.) A model answers better in the form that it met in
pretraining, so both are tried on a few other training pairs. The examples are the same for every sentence: their keys
and values are computed once, as a bank, and shared by the whole batch.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

import numpy as np

from minigpt.files import UserError
from minigpt.generate import Prompt
from minigpt.scoring import log_p, max_new_tokens
from prefix.banks import Banks
from prefix.batches import in_directions
from prefix.data.rows import clean
from prefix.decoding import Decoding, decode
from prefix.translation import Translation, answered

FORMS = {"names": "lines that begin with the columns' names", "lines": "bare lines"}
TRIALS = 12  # training pairs on which the two forms are compared


@dataclass
class Shots:
    """A k-shot prompt."""

    pairs: list  # (source text, target text)
    source: str  # the names of their columns
    target: str
    form: str = "names"  # one of FORMS

    @property
    def text(self):
        """The examples; "" for none."""
        return "".join(self.question(source) + self.answer(target) for source, target in self.pairs).removeprefix("\n")

    def question(self, text):
        """The text behind the examples. In bare lines a blank line comes first, as it does between examples."""
        if self.form == "lines":
            return "\n" * bool(self.pairs) + f"{clean(text)}\n"
        return f"{self.source}: {clean(text)}\n{self.target}:"

    def answer(self, text):
        return f"{clean(text)}\n" if self.form == "lines" else f" {clean(text)}\n"

    def read(self, model, tokenizer):
        """The examples as a bank -> (Slots or None, position_offset). Raises UserError if they alone fill the context."""
        ids, limit = tokenizer.encode(self.text), model.config.n_positions
        if len(ids) >= limit:
            shots = f"{len(self.pairs)} shots of {len(ids)} tokens"
            raise UserError(f"{shots} fill this model's context of {limit}: fewer --shots")
        slots = Banks.from_prompt(model, "shots", ids).slots().to(model.dtype) if ids else None
        return slots, len(ids)

    def prompt(self, tokenizer, text):
        """A text's question, which sees the bank of examples."""
        ids = tokenizer.encode(self.question(text))
        return Prompt(ids, 0, [1] * len(ids) if self.pairs else None)


def draw_shots(corpus, source, target, k, seed, avoid=()):
    """-> (Shots of k training pairs, TRIALS other pairs or as many as are left), none with a source text in `avoid`.
    source, target: names of columns. Raises UserError for too few pairs."""
    s, t = map(corpus.columns.index, (source, target))
    rows = np.random.default_rng((seed, 7)).permutation(in_directions(corpus.examples("train"), [(s, t)])[:, 0])
    pairs = ((corpus.text(row, s), corpus.text(row, t)) for row in rows)
    pairs = (pair for pair in pairs if pair[0] not in avoid)
    shots = list(islice(pairs, k))
    if len(shots) < k:
        raise UserError(f"{k} shots, but {len(shots)} training pairs to draw them from: fewer --shots, or --draws 0")
    return Shots(shots, source, target), list(islice(pairs, TRIALS))


def form_log_p(model, tokenizer, shots, trials):
    """{form: the mean over `trials` of log p(target text and the end of its line | examples, source text)}, over the
    trials that fit into the context in both forms; {} if none does."""
    forms, scores = [replace(shots, form=form) for form in FORMS], []  # scores: of each trial, its log p in each form
    prefixes = [form.read(model, tokenizer) for form in forms]
    for source, target in trials:
        pairs = [(form.prompt(tokenizer, source), tokenizer.encode(form.answer(target))) for form in forms]
        lengths = [n + len(prompt.ids) + len(answer) - 1 for (_, n), (prompt, answer) in zip(prefixes, pairs)]
        if max(lengths) <= model.config.n_positions:
            scores.append([float(log_p(model, [pair], *prefix)) for pair, prefix in zip(pairs, prefixes)])
    return {form: sum(values) / len(values) for form, values in zip(FORMS, zip(*scores))}


def few_shot(model, tokenizer, shots, texts, decoding=None):
    """Texts -> a list of Translation, in the same order: greedy, or the likeliest of decoding.choices. Raises UserError
    if the examples alone fill the context."""
    greedy = replace(decoding or Decoding(), beams=1)
    prefix = shots.read(model, tokenizer)
    answers = [tokenizer.encode(shots.answer(choice)) for choice in greedy.choices or []]
    prompts = {i: shots.prompt(tokenizer, text) for i, text in enumerate(texts)}
    for i, prompt in prompts.items():
        n = len(tokenizer.encode(clean(texts[i])))
        left = model.config.n_positions - prefix[1] - len(prompt.ids)  # behind the examples and the question
        prompt.max_new = max_new_tokens(answers, left) if answers else min(greedy.max_new or 2 * n + 16, left)
    answer = lambda prompts: decode(model, prompts, stop_ids(tokenizer), prefix, greedy, answers)
    return answered([Translation() for _ in texts], prompts, answer, tokenizer)


@cache
def stop_ids(tokenizer):
    """<|endoftext|> and every token with a newline in it: the answer is one line."""
    return {tokenizer.eot} | {i for i in range(tokenizer.n_vocab) if "\n" in tokenizer.decode([i])}
