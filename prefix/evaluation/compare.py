"""Prefix against k-shot prompting: the same frozen model, the same sentences, the same decoding.

k-shot prompting is drawn several times, because which examples are drawn moves its score; its line in the table is
the mean of the draws and their standard deviation. The prefix is held against the draw whose score is the median, for a
lucky or an unlucky one shall not decide.
"""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np

from minigpt.errors import UserError
from prefix.data.corpus import sample_rows
from prefix.data.splits import SPLITS, TEST, VALIDATION
from prefix.evaluation import metrics
from prefix.evaluation.few_shot import draw_examples, few_shot, prompt_text
from prefix.translation import translate

MAX_CHOICES = 1000  # texts of a column among which an answer can be chosen
REFERENCES_SHOWN = 3  # of a sentence that has more
SCORES = {"bleu": "BLEU", "chrf": "chrF", "sentence_bleu": "sentence BLEU", "exact": "exact %"}


@dataclass
class Score:
    """One system's result on one set of sentences. exact: the share of outputs, 0 .. 100, that are a reference. empty
    and cut count outputs; seconds is for all of them."""

    bleu: float
    chrf: float
    sentence_bleu: float
    exact: float
    empty: int
    cut: int
    seconds: float


def rows_to_read(split, limit):
    """How many usable rows of a file hold about `limit` of `split` (None: all): a split is a share of the rows."""
    share = {"test": TEST, "validation": VALIDATION, "train": 1 - TEST - VALIDATION, "all": 1}[split]
    return None if limit is None else math.ceil(1.25 * limit / share) + 1000


def enough(corpus, split, limit, wanted):
    """Has the corpus `limit` sentences of a split, or more, in each wanted direction between its columns?"""
    ends, columns = examples_of(corpus, split)[:, 1:], corpus.columns
    pairs = [(columns.index(s), columns.index(t)) for s, t in wanted if {s, t} <= {*columns}]
    return all((ends == pair).all(axis=1).sum() >= limit for pair in pairs)


def compare(
    model,
    tokenizer,
    banks,
    corpus,
    *,
    split,
    limit,
    shots,
    draws,
    seed=0,
    beams=1,
    batch_size=32,
    wanted=None,
    together=False,
    choices=None,
    training=None,
):
    """Evaluate the directions between the corpus's columns -> a list of dicts, one per direction.

    split: one of prefix.data.splits.SPLITS, or "all". wanted: the directions, as pairs of names (None: all there are).
    together: rows with the same source are one sentence with several references. choices: the texts that an answer may
    be; [] stands for those that the training split has in the target column. training: the corpus whose training split
    gives the k-shot examples and these choices, by default this one; its columns may be in another order."""
    examples, training, columns = examples_of(corpus, split), training or corpus, corpus.columns
    directions = sorted(np.unique(examples[:, 1:], axis=0).tolist(), key=lambda d: (d[1], d[0]))
    directions = [(s, t) for s, t in directions if wanted is None or (columns[s], columns[t]) in wanted]
    if not directions:
        raise UserError(f"none of the {len(corpus)} usable pairs falls into the {split} split: give more data")
    reports = []
    for source, target in directions:
        names = columns[source], columns[target]
        rows = examples[(examples[:, 1] == source) & (examples[:, 2] == target), 0]
        sources, references = sentences(corpus, rows, source, target, limit, together)
        answers = None if choices is None else choices or labels(training, names[1])
        index = training.columns.index
        prompts = [draw_examples(training, *map(index, names), shots, seed + draw) for draw in range(draws)]
        options = {"beams": beams, "batch_size": batch_size, "choices": answers}
        reports.append(one_direction(model, tokenizer, banks, names, sources, references, prompts, **options))
    return reports


def one_direction(model, tokenizer, banks, names, sources, references, prompts, beams, batch_size, choices):
    """Translate `sources` by the prefix and after the pairs of each k-shot prompt -> what `report` makes of it."""
    options, drawn = {"batch_size": batch_size, "choices": choices}, []
    for pairs in prompts:
        answer = lambda: few_shot(model, tokenizer, pairs, sources, *names, **options)
        drawn.append((*timed(references, answer), prompt_text(pairs, *names)))
    answer = lambda: translate(model, tokenizer, banks, sources, *names, beams=beams, **options)
    outputs, score = timed(references, answer)
    return report(names, sources, references, outputs, score, drawn, choices)


def examples_of(corpus, split):
    """The corpus's examples (n, 3) in a split or, for "all", in any of them, in the order of the rows."""
    if split != "all":
        return corpus.examples(split)
    examples = np.concatenate([corpus.examples(name) for name in SPLITS])
    return examples[np.argsort(examples[:, 0], kind="stable")]


def sentences(corpus, rows, source, target, limit, together):
    """The texts to translate, at most `limit` of them, and for each its reference or, with `together`, the list of the
    references of all rows with that source."""
    if not together:
        rows = rows if limit is None else sample_rows(rows, limit)
        return [corpus.text(row, source) for row in rows], [corpus.text(row, target) for row in rows]
    references = {}
    for row in rows:
        references.setdefault(corpus.text(row, source), []).append(corpus.text(row, target))
    sources = list(references)
    if limit is not None:
        sources = [sources[i] for i in sample_rows(np.arange(len(sources)), limit)]
    return sources, [references[text] for text in sources]


def labels(corpus, name):
    """The texts that the training split has in a column, in order. Raises UserError where there are too many."""
    column = corpus.columns.index(name)
    texts = sorted({corpus.text(row, column) for row in corpus.rows("train")} - {""})
    if not 0 < len(texts) <= MAX_CHOICES:
        raise UserError(f"--choices: {len(texts):,} different texts in column {name!r}, not 1 to {MAX_CHOICES:,}")
    return texts


def timed(references, answer):
    """Run `answer`, which returns a Translation for each reference -> (texts, Score)."""
    began = time.monotonic()
    results = answer()
    seconds = time.monotonic() - began
    texts = [result.text for result in results]
    score = Score(
        bleu=metrics.corpus_bleu(texts, references),
        chrf=metrics.chrf(texts, references),
        sentence_bleu=metrics.mean_sentence_bleu(texts, references),
        exact=metrics.exact_match(texts, references),
        empty=sum(not text for text in texts),
        cut=sum(not result.finished for result in results),
        seconds=round(seconds, 2),
    )
    return texts, score


def report(names, sources, references, outputs, score, drawn, choices=None):
    """What --json holds of a direction. drawn: (texts, Score, prompt) of each k-shot draw."""
    few = None
    if drawn:
        scores = [asdict(s) for _, s, _ in drawn]
        median = metrics.median_index([s["exact" if choices else "bleu"] for s in scores])
        found = metrics.paired_bootstrap(outputs, drawn[median][0], references, exact=bool(choices))
        few = {
            "mean": {name: float(np.mean([s[name] for s in scores])) for name in scores[0]},
            "spread": {name: float(np.std([s[name] for s in scores])) for name in scores[0]},
            "draws": scores,
            "prompts": [prompt for _, _, prompt in drawn],
            "outputs": [texts for texts, _, _ in drawn],
            "difference": {"draw": median, **found},
        }
    return {
        "source": names[0],
        "target": names[1],
        "sentences": len(references),
        "choices": choices,
        "prefix": asdict(score),
        "few_shot": few,
        "sources": sources,
        "references": references,
        "outputs": outputs,
    }


def scores_of(report):
    """The scores that say something of a direction: of a choice, only whether it is right."""
    return ["exact"] if report["choices"] else list(SCORES)


def table(report, shots):
    """One direction as lines of text."""
    n, shown = report["sentences"], scores_of(report)
    lines = [f"{report['source']} -> {report['target']}, {n} sentence{'s' * (n != 1)}"]
    head = "".join(f"{SCORES[name]:>15}" for name in shown)
    lines.append(f"  {'':10}{head}{'empty':>8}{'cut':>6}{'seconds':>9}")
    lines.append(_line("prefix", shown, report["prefix"]))
    if report["few_shot"]:
        mean, spread = report["few_shot"]["mean"], report["few_shot"]["spread"]
        lines.append(_line(f"{shots}-shot", shown, mean, spread))
        if "bleu" in shown and mean["bleu"] >= 0.1:
            lines.append(f"  prefix over {shots}-shot: {report['prefix']['bleu'] / mean['bleu']:.1f}x BLEU")
        lines.append(f"  {difference(report)}")
    return lines


def difference(report):
    """What metrics.paired_bootstrap found, in words."""
    found, score = report["few_shot"]["difference"], SCORES[scores_of(report)[0]]
    (low, high), verdict = found["interval"], metrics.verdict(found["p"], report["sentences"])
    around = f"95 % of {metrics.RESAMPLES:,} resamples: {low:+.2f} to {high:+.2f}"
    return f"prefix minus the median draw: {found['delta']:+.2f} {score} ({around}), {verdict}"


def _line(name, shown, score, spread=None):
    def cell(metric):
        around = f" ± {spread[metric]:.1f}" if spread else ""
        return f"{score[metric]:.2f}{around}"

    cells = "".join(f"{cell(metric):>15}" for metric in shown)
    return f"  {name:10}{cells}{score['empty']:8.0f}{score['cut']:6.0f}{score['seconds']:9.1f}"


def examples(report, n, shots):
    """The first n sentences side by side, as lines of text."""
    lines = []
    for i in range(min(n, report["sentences"])):
        lines.append(f"  {report['source']:>10}  {report['sources'][i]}")
        references = report["references"][i]
        references = [references] if isinstance(references, str) else references
        lines += [f"  {'reference':>10}  {text}" for text in references[:REFERENCES_SHOWN]]
        if len(references) > REFERENCES_SHOWN:
            lines.append(f"  {'':10}  (and {len(references) - REFERENCES_SHOWN} more references)")
        if report["few_shot"]:
            lines.append(f"  {f'{shots}-shot':>10}  {report['few_shot']['outputs'][0][i]}")
        lines += [f"  {'prefix':>10}  {report['outputs'][i]}", ""]
    return lines
