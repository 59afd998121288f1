"""Prefix against k-shot prompting: the same frozen model, the same sentences, the same length limits.

The score of k-shot prompting depends on its examples, so they are drawn several times: its numbers are the mean and the
standard deviation over the draws. The prefix is compared with the draw of the median score, so neither a lucky nor an
unlucky draw decides. The examples are never among the evaluated sentences. Each direction is scored by the metrics that
its target column has, so one evaluation may be of several tasks.
"""

import sys
import time
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from minigpt.files import UserError
from prefix import distributed
from prefix.batches import in_directions
from prefix.data.corpus import sample_rows
from prefix.data.splits import SPLITS
from prefix.decoding import Decoding
from prefix.distributed import log
from prefix.evaluation import metrics
from prefix.evaluation.few_shot import draw_shots, few_shot, form_log_p
from prefix.translation import translate

MAX_CHOICES = 1000  # texts of a column among which an answer can be chosen
BATCHES = 4  # decoded in one step of the progress bar


@dataclass
class System:
    """What one system wrote."""

    name: str
    outputs: list
    scores: dict  # {metric: 0 .. 100}
    counts: dict  # of empty outputs, outputs truncated at their limit, sources cut to fit; seconds for all
    confusion: list | None = None  # how often each class (row) was answered with each (column)
    prompt: str | None = None  # the k-shot examples


@dataclass
class Result:
    """What came out in one direction."""

    source: str
    target: str
    sources: list
    references: list  # the texts that are right for each source
    choices: list | None = None  # the texts that an answer may be, if they are labels
    classes: list = ()  # these and all that occur
    signatures: dict = field(default_factory=dict)  # {metric: settings}
    prefix: System | None = None
    draws: list = field(default_factory=list)
    median: int = 0  # the draw of the median score by the first metric: the one that the prefix is compared with
    form: str = "names"  # one of few_shot.FORMS
    form_log_p: dict = field(default_factory=dict)  # decided the form of the prompts
    difference: dict = field(default_factory=dict)  # {metric: metrics.paired_bootstrap of prefix and median draw}
    attention: list = field(default_factory=list)  # tables of one sentence, from attention_maps

    @property
    def systems(self):
        """The prefix and, if there are draws, the median one."""
        return [self.prefix, *self.draws[self.median :][:1]]


# Which sentences


def sentences(corpus, split, limit, source, target, all_references=False):
    """-> (at most `limit` texts to translate, a list of references for each). split: one of SPLITS, or "all".
    all_references: rows with the same source are one sentence with several references."""
    s, t = map(corpus.columns.index, (source, target))
    examples = [in_directions(corpus.examples(name), [(s, t)]) for name in SPLITS if split in (name, "all")]
    groups = {}  # of rows that are one sentence
    for row in np.sort(np.concatenate(examples)[:, 0]):
        groups.setdefault(corpus.text(row, s) if all_references else row, []).append(row)
    groups = list(groups.values())
    groups = [groups[i] for i in sample_rows(np.arange(len(groups)), limit)]
    return [corpus.text(rows[0], s) for rows in groups], [[corpus.text(row, t) for row in rows] for rows in groups]


def labels_of(corpus, name):
    """The texts that the training split has in a column, in order. Raises UserError if they are too many."""
    column = corpus.columns.index(name)
    texts = sorted({corpus.text(row, column) for row in corpus.rows("train")} - {""})
    if not 0 < len(texts) <= MAX_CHOICES:
        raise UserError(f"labels: {len(texts):,} different texts in column {name!r}, not 1 to {MAX_CHOICES:,}")
    return texts


# The comparison


@dataclass
class Comparison:
    """What is compared, and how."""

    model: object
    tokenizer: object
    banks: object
    corpus: object  # the Corpus that has the sentences
    training: object  # the Corpus whose training split has the examples, and the labels where decoding has no choices
    decoding: Decoding
    split: str  # as the next two in `sentences`
    limit: int
    all_references: bool
    truncate_source: bool  # cut sources that do not fit the context
    shots: int
    draws: int
    seed: int

    def results(self, directions):
        """{(source, target) columns: names of metrics} -> a list of Result, one for each direction that has sentences."""
        results = [self.result(*ends, names) for ends, names in directions.items()]
        if not any(results):
            raise UserError(f"none of the {len(self.corpus)} usable pairs falls into the {self.split} split: give more data")
        return list(filter(None, results))

    def result(self, source, target, names):
        """One direction, or None where it has no sentences. names: of metrics."""
        result = Result(source, target, *sentences(self.corpus, self.split, self.limit, source, target, self.all_references))
        if not result.sources:
            return None
        if metrics.ACCURACY in names:
            result.choices = self.decoding.choices or labels_of(self.training, target)
            result.classes = sorted({*result.choices, *(refs[0] for refs in result.references)})
        scored = metrics.named(names, result.classes)
        result.signatures = {metric.label: metric.signature(result.references) for metric in scored}
        decoding = replace(self.decoding, choices=result.choices)
        answer = lambda texts: translate(self.model, self.tokenizer, self.banks, texts, (source, target), decoding)
        length = lambda text: self.banks.position_offset + self.n_tokens(text) + 1
        result.prefix = self.measure(result, scored, "prefix", answer, length)
        if self.draws:
            self.add_few_shot(result, scored, decoding)
        return result

    def add_few_shot(self, result, scored, decoding):
        """Fill in the draws, and how the prefix differs from the median one."""
        ends, avoid = (result.source, result.target), {*result.sources}
        drawn = [draw_shots(self.training, *ends, self.shots, self.seed + i, avoid) for i in range(self.draws)]
        result.form_log_p = form_log_p(self.model, self.tokenizer, *drawn[0])
        result.form = max(result.form_log_p, key=result.form_log_p.get, default=result.form)
        for shots, _ in drawn:
            shots.form = result.form
            answer = lambda texts: few_shot(self.model, self.tokenizer, shots, texts, decoding)
            length = lambda text: self.n_tokens(shots.text) + self.n_tokens(shots.question(text))
            result.draws.append(self.measure(result, scored, f"{self.shots}-shot", answer, length, shots.text))
        by_score = sorted(range(self.draws), key=lambda i: result.draws[i].scores[scored[0].label])
        result.median = by_score[self.draws // 2]  # of an even number, the better of the two in the middle
        outputs = [system.outputs for system in result.systems]
        for metric in scored:
            result.difference[metric.label] = metrics.paired_bootstrap(metric, *outputs, result.references)

    def n_tokens(self, text):
        return len(self.tokenizer.encode(text))

    def measure(self, result, scored, name, answer, length, prompt=None):
        """answer(texts) -> list of Translation; length(text): tokens of its whole prompt. -> System."""
        step = BATCHES * self.decoding.batch_size
        texts = self.cut_sources(result, name, length) if self.truncate_source else result.sources
        began, bar = time.monotonic(), f"{result.source} -> {result.target} {name}"
        starts = tqdm(range(0, len(texts), step), desc=bar, disable=distributed.rank() > 0 or not sys.stderr.isatty())
        answers = [one for i in starts for one in answer(texts[i : i + step])]
        outputs = [one.text for one in answers]
        counts = {
            "empty": outputs.count(""),
            "truncated": sum(not one.finished for one in answers),
            "sources cut": sum(map(str.__ne__, texts, result.sources)),
            "sources divided": sum(one.pieces > 1 for one in answers),
            "seconds": round(time.monotonic() - began, 2),
        }
        if counts["sources cut"]:
            log(f"{name}: {counts['sources cut']} of {len(texts)} sources were cut at their end to fit the context")
        if faults := [one.fault for one in answers if one.fault]:
            log(f"{name}: {len(faults)} of {len(texts)} sources have no answer: {faults[0]}")
        scores = {metric.label: metric(outputs, result.references) for metric in scored}
        confusion = metrics.confusion(outputs, result.references, result.classes) if result.classes else None
        return System(name, outputs, scores, counts, confusion, prompt)

    def cut_sources(self, result, name, length):
        """The sources, cut at their end where the longest answer would not fit behind them. Raises UserError where
        nothing would be left of one."""
        choices = [self.n_tokens(choice) + 2 for choice in result.choices or []]
        room, texts = self.model.config.n_positions - max(choices, default=self.decoding.max_new), []
        for text in result.sources:
            ids = self.tokenizer.encode(text)
            while ids and (excess := length(text) - room) > 0:
                ids = ids[:-excess]
                text = self.tokenizer.decode(ids).rstrip("\ufffd")
            if not text:
                raise UserError(f"{name}: nothing would be left of a source: lower --max-new-tokens, or --shots")
            texts.append(text)
        return texts
