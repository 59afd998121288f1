"""Prefix against k-shot prompting: the same frozen model, the same sentences, the same decoding.

k-shot prompting is drawn several times, because which examples are drawn moves its score; its line in the table is
the mean of the draws and their standard deviation.
"""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np

from minigpt.errors import UserError
from minigpt.splits import TEST, VALIDATION
from prefix import metrics
from prefix.data import sample_rows
from prefix.few_shot import draw_examples, few_shot, prompt_text
from prefix.translation import translate


@dataclass
class Score:
    """One system's result on one set of sentences. empty and cut count outputs; seconds is for all of them."""

    bleu: float
    chrf: float
    sentence_bleu: float
    empty: int
    cut: int
    seconds: float


def rows_to_read(split, limit):
    """How many usable rows of a file hold about `limit` of `split` (None: all): a split is a share of the rows."""
    share = {"test": TEST, "validation": VALIDATION, "train": 1 - TEST - VALIDATION}[split]
    return None if limit is None else math.ceil(1.25 * limit / share) + 1000


def compare(model, tokenizer, banks, corpus, split, limit, shots, draws, seed=0, beams=1, batch_size=32):
    """Evaluate every direction between the corpus's columns -> a list of dicts, one per direction."""
    examples = corpus.examples(split)
    directions = sorted({(int(s), int(t)) for _, s, t in examples}, key=lambda d: (d[1], d[0]))
    if not directions:
        raise UserError(f"none of the {len(corpus)} usable pairs falls into the {split} split: give more data")
    reports = []
    for source, target in directions:
        here = examples[(examples[:, 1] == source) & (examples[:, 2] == target)]
        rows = [row for row, _, _ in (here if limit is None else sample_rows(here, limit))]
        sources = [corpus.text(row, source) for row in rows]
        references = [corpus.text(row, target) for row in rows]
        names = corpus.columns[source], corpus.columns[target]
        drawn = []
        for draw in range(draws):
            pairs = draw_examples(corpus, source, target, shots, seed + draw)
            answer = lambda: few_shot(model, tokenizer, pairs, sources, *names, batch_size=batch_size)
            drawn.append((*timed(references, answer), prompt_text(pairs, *names)))
        outputs, score = timed(
            references, lambda: translate(model, tokenizer, banks, sources, *names, batch_size=batch_size, beams=beams)
        )
        reports.append(report(names, sources, references, outputs, score, drawn))
    return reports


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
        empty=sum(not text for text in texts),
        cut=sum(not result.finished for result in results),
        seconds=round(seconds, 2),
    )
    return texts, score


def report(names, sources, references, outputs, score, drawn):
    """What --json holds of a direction. drawn: (texts, Score, prompt) of each k-shot draw."""
    few = None
    if drawn:
        scores = [asdict(s) for _, s, _ in drawn]
        few = {
            "mean": {name: float(np.mean([s[name] for s in scores])) for name in scores[0]},
            "spread": {name: float(np.std([s[name] for s in scores])) for name in scores[0]},
            "draws": scores,
            "prompts": [prompt for _, _, prompt in drawn],
            "outputs": [texts for texts, _, _ in drawn],
            "difference": metrics.paired_bootstrap(outputs, drawn[0][0], references),  # to the first draw
        }
    return {
        "source": names[0],
        "target": names[1],
        "sentences": len(references),
        "prefix": asdict(score),
        "few_shot": few,
        "sources": sources,
        "references": references,
        "outputs": outputs,
    }


def table(report, shots):
    """One direction as lines of text."""
    n = report["sentences"]
    lines = [f"{report['source']} -> {report['target']}, {n} sentence{'s' * (n != 1)}"]
    lines.append(f"  {'':10}{'BLEU':>14}{'chrF':>14}{'sentence BLEU':>16}{'empty':>8}{'cut':>6}{'seconds':>9}")
    lines.append(_line("prefix", report["prefix"]))
    if report["few_shot"]:
        mean, spread = report["few_shot"]["mean"], report["few_shot"]["spread"]
        lines.append(_line(f"{shots}-shot", mean, spread))
        if mean["bleu"] > 0:
            lines.append(f"  prefix over {shots}-shot: {report['prefix']['bleu'] / mean['bleu']:.1f}x BLEU")
        lines.append(_difference(**report["few_shot"]["difference"]))
    return lines


def _difference(delta, interval, p):
    verdict = f"significant at p = {p:.2g}" if p < 0.05 else f"not significant (p = {p:.2g})"
    return (
        f"  prefix minus the first draw: {delta:+.2f} BLEU (95 %: {interval[0]:+.2f} to {interval[1]:+.2f}), {verdict}"
    )


def _line(name, score, spread=None):
    def cell(metric):
        around = f" ± {spread[metric]:.1f}" if spread else ""
        return f"{score[metric]:.2f}{around}"

    counts = f"{score['empty']:8.0f}{score['cut']:6.0f}{score['seconds']:9.1f}"
    return f"  {name:10}{cell('bleu'):>14}{cell('chrf'):>14}{cell('sentence_bleu'):>16}{counts}"


def examples(report, n, shots):
    """The first n sentences side by side, as lines of text."""
    lines = []
    for i in range(min(n, report["sentences"])):
        lines.append(f"  {report['source']:>10}  {report['sources'][i]}")
        lines.append(f"  {'reference':>10}  {report['references'][i]}")
        if report["few_shot"]:
            lines.append(f"  {f'{shots}-shot':>10}  {report['few_shot']['outputs'][0][i]}")
        lines += [f"  {'prefix':>10}  {report['outputs'][i]}", ""]
    return lines
