"""Prefix against k-shot prompting: the same frozen model, the same sentences, the same length limits.

k-shot prompting is drawn several times, because its score depends on the examples: its numbers are the mean of the
draws and their standard deviation. The prefix is compared with the draw whose score is the median, so that neither a
lucky nor an unlucky draw decides. The examples are never among the evaluated sentences.
"""

import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from minigpt.files import UserError
from prefix import distributed
from prefix.data.corpus import sample_rows
from prefix.data.splits import SPLITS, TEST, VALIDATION
from prefix.distributed import log
from prefix.evaluation import metrics
from prefix.evaluation.few_shot import FORMS, draw_shots, few_shot, form_log_p
from prefix.translation import Decoding, translate

MAX_CHOICES = 1000  # texts of a column among which an answer can be chosen


@dataclass
class Plan:
    """What to evaluate, against what. split: one of SPLITS, or "all". limit: sentences in each direction (None: all).
    metrics: names of metrics.METRICS; the first decides which draw is the median. directions: pairs of column names
    (None: all there are). multi_reference: rows with the same source are one sentence with several references.
    truncate_source: cut sources that do not fit the context. training: the Corpus whose training split gives examples
    and labels, by default the evaluated one; its columns may be in another order."""

    split: str = "test"
    limit: int | None = 500
    shots: int = 3
    draws: int = 3
    seed: int = 0
    metrics: list = field(default_factory=lambda: ["bleu", "chrf"])
    directions: set | None = None
    multi_reference: bool = False
    truncate_source: bool = False
    training: object = None


@dataclass
class System:
    """What one system wrote. scores: {metric: 0 .. 100}. empty, truncated: outputs that are empty, or stopped at their
    limit; sources_cut: sources that were cut to fit; seconds: for all of them. prompt: the k-shot examples. confusion:
    of labels, how often each (row) was answered with each (column)."""

    outputs: list
    scores: dict
    empty: int
    truncated: int
    sources_cut: int
    seconds: float
    prompt: str | None = None
    confusion: list | None = None

    def numbers(self):
        """Scores and counts by name."""
        counts = {"empty": self.empty, "truncated": self.truncated, "sources cut": self.sources_cut}
        return {**self.scores, **counts, "seconds": self.seconds}


@dataclass
class FewShot:
    """All draws of a k-shot prompt. form_log_p: what decided the form. median: which draw the prefix is compared with.
    mean, spread: of each of System.numbers over the draws. difference: {metric: what metrics.paired_bootstrap found of
    prefix and median draw}."""

    shots: int
    form: str
    form_log_p: dict
    draws: list
    median: int
    mean: dict
    spread: dict
    difference: dict


@dataclass
class Result:
    """One direction. references: for each source a text, or a list of texts. metrics: {name: label}; signatures:
    {label: settings}. Where answers are chosen, labels: all that occur; commonest: (one of them, its share in %)."""

    source: str
    target: str
    sources: list
    references: list
    choices: list | None = None
    metrics: dict = field(default_factory=dict)
    signatures: dict = field(default_factory=dict)
    prefix: System | None = None
    few_shot: FewShot | None = None
    labels: list | None = None
    commonest: tuple | None = None

    def count_labels(self):
        """Fill in labels and commonest -> {name: Metric} of a classifier."""
        right = [refs if isinstance(refs, str) else refs[0] for refs in self.references]
        (label, n), *_ = Counter(right).most_common(1)
        self.labels, self.commonest = sorted({*self.choices, *right}), (label, 100 * n / len(right))
        accuracy = replace(metrics.METRICS["exact"], label="accuracy")
        return {"accuracy": accuracy, "macro_f1": metrics.macro_f1(self.labels)}


@dataclass
class Evaluation:
    """What evaluate.py found and report.py shows. settings: all it takes to repeat it. directions: a list of Result.
    attention: attention_maps.Attention of one sentence, for the page."""

    settings: dict
    directions: list
    attention: object = None


def rows_to_read(split, limit):
    """How many usable rows of a file hold about `limit` of `split` (None: all): a split is a share of the rows."""
    share = {"test": TEST, "validation": VALIDATION, "train": 1 - TEST - VALIDATION, "all": 1}[split]
    return None if limit is None else math.ceil(1.25 * limit / share) + 1000


def enough(corpus, split, limit, directions):
    """Has the corpus `limit` sentences of a split, or more, in each of these directions between its columns?"""
    ends, columns = examples_of(corpus, split)[:, 1:], corpus.columns
    pairs = [(columns.index(s), columns.index(t)) for s, t in directions if {s, t} <= {*columns}]
    return all((ends == pair).all(axis=1).sum() >= limit for pair in pairs)


def compare(model, tokenizer, banks, corpus, plan, decoding):
    """Evaluate the directions between the corpus's columns -> a list of Result. decoding.choices: [] stands for the
    labels that the training split has in the target column."""
    results, training = [], plan.training or corpus
    for source, target in directions_of(corpus, plan):
        choices = labels_of(training, target) if decoding.choices == [] else decoding.choices
        result = Result(source, target, *sentences(corpus, plan, source, target), choices)
        scored = metrics.named(plan.metrics) if choices is None else result.count_labels()
        result.metrics = {name: metric.label for name, metric in scored.items()}
        result.signatures = {metric.label: metric.signature(result.references) for metric in scored.values()}
        comparison = Comparison(model, tokenizer, plan, replace(decoding, choices=choices), scored, result)
        result.prefix = comparison.prefix(banks)
        result.few_shot = comparison.few_shot(training) if plan.draws else None
        results.append(result)
    return results


def directions_of(corpus, plan):
    """The (source, target) column names to evaluate, in order of the target. Raises UserError where there are none."""
    columns, found = corpus.columns, np.unique(examples_of(corpus, plan.split)[:, 1:], axis=0).tolist()
    pairs = [(columns[s], columns[t]) for s, t in sorted(found, key=lambda pair: pair[::-1])]
    pairs = [pair for pair in pairs if plan.directions is None or pair in plan.directions]
    if not pairs:
        raise UserError(f"none of the {len(corpus)} usable pairs falls into the {plan.split} split: give more data")
    return pairs


def examples_of(corpus, split):
    """The corpus's examples (n, 3) in a split or, for "all", in any of them, in the order of the rows."""
    if split != "all":
        return corpus.examples(split)
    examples = np.concatenate([corpus.examples(name) for name in SPLITS])
    return examples[np.argsort(examples[:, 0], kind="stable")]


def sentences(corpus, plan, source, target):
    """The texts to translate, at most plan.limit of them, and for each its reference or, with multi_reference, the list
    of the references of all rows with that source."""
    examples, (s, t) = examples_of(corpus, plan.split), map(corpus.columns.index, (source, target))
    rows = examples[(examples[:, 1] == s) & (examples[:, 2] == t), 0]
    some = lambda items: items if plan.limit is None else sample_rows(items, plan.limit)
    if not plan.multi_reference:
        rows = some(rows)
        return [corpus.text(row, s) for row in rows], [corpus.text(row, t) for row in rows]
    references = {}
    for row in rows:
        references.setdefault(corpus.text(row, s), []).append(corpus.text(row, t))
    sources = list(references)
    sources = [sources[i] for i in some(np.arange(len(sources)))]
    return sources, [references[text] for text in sources]


def labels_of(corpus, name):
    """The texts that the training split has in a column, in order. Raises UserError where there are too many."""
    column = corpus.columns.index(name)
    texts = sorted({corpus.text(row, column) for row in corpus.rows("train")} - {""})
    if not 0 < len(texts) <= MAX_CHOICES:
        raise UserError(f"--choices: {len(texts):,} different texts in column {name!r}, not 1 to {MAX_CHOICES:,}")
    return texts


@dataclass
class Comparison:
    """One direction: the prefix and k-shot prompting on the same sentences. scored: {name: Metric}."""

    model: object
    tokenizer: object
    plan: Plan
    decoding: Decoding
    scored: dict
    result: Result

    def __post_init__(self):
        if self.plan.truncate_source and not self.decoding.max_new and not self.decoding.choices:
            self.decoding = replace(self.decoding, max_new=self.model.config.n_positions // 4)

    def prefix(self, banks):
        ends = self.result.source, self.result.target
        answer = lambda texts, decoding: translate(self.model, self.tokenizer, banks, texts, *ends, decoding)
        size = lambda text: banks.position_offset + len(self.tokenizer.encode(text)) + 1
        return self.measured("prefix", answer, size)

    def few_shot(self, training):
        plan, result = self.plan, self.result
        draw = lambda seed: draw_shots(training, result.source, result.target, plan.shots, seed, {*result.sources})
        drawn = [draw(plan.seed + i) for i in range(plan.draws)]
        tried = form_log_p(self.model, self.tokenizer, *drawn[0])
        form = max(tried, key=tried.get, default=FORMS[0])
        draws = [self.k_shot(replace(shots, form=form)) for shots, _ in drawn]
        main = next(iter(self.scored))
        median = metrics.median_index([system.scores[main] for system in draws])
        systems = result.prefix.outputs, draws[median].outputs, result.references
        difference = {name: metrics.paired_bootstrap(metric, *systems) for name, metric in self.scored.items()}
        numbers = [system.numbers() for system in draws]
        mean, spread = ({name: float(f([n[name] for n in numbers])) for name in numbers[0]} for f in (np.mean, np.std))
        return FewShot(plan.shots, form, tried, draws, median, mean, spread, difference)

    def k_shot(self, shots):
        answer = lambda texts, decoding: few_shot(self.model, self.tokenizer, shots, texts, decoding)
        examples = len(self.tokenizer.encode(shots.text))
        size = lambda text: examples + len(self.tokenizer.encode(shots.question(text)))
        system = self.measured(f"{len(shots.pairs)}-shot", answer, size)
        return replace(system, prompt=shots.text)

    def measured(self, name, answer, size):
        """Run answer(texts, Decoding) -> list of Translation on the sources -> System. size(text): the tokens of its
        whole prompt."""
        texts, cut = self.cut_sources(name, size) if self.plan.truncate_source else (self.result.sources, 0)
        ends = f"{self.result.source} -> {self.result.target}"
        quiet = distributed.rank() > 0 or not sys.stderr.isatty()
        began = time.monotonic()
        with tqdm(total=len(distributed.shard(texts)), desc=f"{ends} {name}", unit=" sentences", disable=quiet) as bar:
            translations = answer(texts, replace(self.decoding, on_finished=bar.update))
        seconds = time.monotonic() - began
        outputs = [translation.text for translation in translations]
        return System(
            outputs=outputs,
            scores={name: metric(outputs, self.result.references) for name, metric in self.scored.items()},
            empty=sum(not text for text in outputs),
            truncated=sum(not translation.finished for translation in translations),
            sources_cut=cut,
            seconds=round(seconds, 2),
            confusion=self.result.labels and metrics.confusion(outputs, self.result.references, self.result.labels),
        )

    def cut_sources(self, name, size):
        """The sources, cut at their end where the answer would not fit behind them -> (texts, how many were cut)."""
        answers = [len(self.tokenizer.encode(choice)) + 2 for choice in self.decoding.choices or []]
        room = self.model.config.n_positions - max(answers, default=self.decoding.max_new)
        texts = [cut_to_fit(self.tokenizer, text, size, room) for text in self.result.sources]
        cut = sum(text != source for text, source in zip(texts, self.result.sources))
        if cut:
            log(f"{name}: {cut} of {len(texts)} sources were cut at their end to fit the context")
        return texts, cut


def cut_to_fit(tokenizer, text, size, room):
    """The longest beginning of a text, in tokens, with size(beginning) <= room, or "" where there is none."""
    ids = tokenizer.encode(text)
    n = len(ids)
    while n > 0 and (excess := size(text) - room) > 0:
        n = max(0, n - excess)
        text = tokenizer.decode(ids[:n]).rstrip("\ufffd")
    return text
