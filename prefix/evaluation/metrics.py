"""BLEU and chrF: how much of a translation is found in a reference, and whether two systems really differ.

BLEU (Papineni et al. 2002) counts n-grams of tokens. Over the whole corpus, with correct[n] the n-grams of the
hypotheses that a reference has too (each at most as often as there), and total[n] all of them, n = 1 .. 4:

    p[n] = correct[n] / total[n]        brevity = min(1, exp(1 - ref_len / hyp_len))
    BLEU = 100 * brevity * (p[1] * p[2] * p[3] * p[4]) ** (1/4)

The first n with correct[n] = 0 counts as 1/2, the second as 1/4 and so on ("exp" smoothing, Chen & Cherry 2014).
The same translations score several points apart under different tokenizations, so a BLEU without its settings says
little (Post 2018): tokens are those of mteval-v13a, and `signature` names all settings in sacrebleu's words.

chrF (Popović 2015) counts n-grams of characters, spaces left out, n = 1 .. 6, and does not depend on tokens:

    P = mean over n of correct[n] / total in hypotheses[n]
    R = mean over n of correct[n] / total in references[n]        chrF2 = 100 * (1 + 2²) * P * R / (2² * P + R)

`hypotheses` is a list of strings; `references` has one entry for each of them: a string, or a list of strings,
as many as the sentence has. (sacrebleu wants these lists turned round, and None where a sentence has fewer. An
empty string is no padding, here or there: it is a reference of length 0.) Numbers equal sacrebleu's.
"""

import math
import re
import warnings
from collections import Counter
from functools import reduce
from operator import or_

import numpy as np
from nltk.translate.bleu_score import closest_ref_length, sentence_bleu
from nltk.util import everygrams

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2
RESAMPLES = 1000  # of the sentences, for a paired bootstrap
ENOUGH = 100  # sentences for one that can be trusted

SETTINGS = {
    "BLEU": "case:mixed|eff:no|tok:13a|smooth:exp",
    "chrF2": f"case:mixed|eff:yes|nc:{CHRF_ORDER}|nw:0|space:no",
}

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # in this order: "&amp;lt;" ends up as "<"

# Each rule uses up the neighbour it looks at, so of two marks in a row it may miss the second. This is no place to
# be cleverer: the tokens are a convention, and scores compare only between those who keep it.
RULES_13A = [
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII punctuation stands alone, all but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , too, unless a digit comes before
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # and after: 1,000.5 stays whole
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a hyphen only after a digit
]


def signature(metric, references):
    """What must stand beside a score for others to repeat it. metric: "BLEU" or "chrF2"."""
    counts = {1 if isinstance(refs, str) else len(refs) for refs in references}
    return f"nrefs:{counts.pop() if len(counts) == 1 else 'var'}|{SETTINGS[metric]}"


def tokenize_13a(text):
    """The tokens of NIST's mteval-v13a.pl, as sacrebleu has them (Post 2018): text -> list of str."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "  # so that the first and the last character have neighbours
    for pattern, replacement in RULES_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def corpus_bleu(hypotheses, references):
    """BLEU of a corpus, 0 .. 100."""
    return bleu_from_statistics(bleu_statistics(hypotheses, references).sum(axis=0))


def bleu_statistics(hypotheses, references):
    """All that BLEU needs to know of each sentence: (n_sentences, 10) int64, the columns correct[1 .. 4],
    total[1 .. 4], hyp_len, ref_len. Sums of rows are the statistics of a corpus."""
    rows = []
    for hypothesis, refs in _pairs(hypotheses, references):
        # Line ends go first, as in sacrebleu: a hyphen before the last one is no broken word.
        tokens, *refs = (tokenize_13a(text.rstrip()) for text in [hypothesis, *refs])
        grams = _grams(tokens, BLEU_ORDER)
        allowed = reduce(or_, (_grams(ref, BLEU_ORDER) for ref in refs))  # as often as any one reference has it
        lengths = [len(tokens), closest_ref_length(refs, len(tokens))]  # of two as close, the shorter
        rows.append(_by_order(grams & allowed, BLEU_ORDER) + _by_order(grams, BLEU_ORDER) + lengths)
    return np.array(rows, dtype=np.int64).reshape(-1, 2 * BLEU_ORDER + 2)


def bleu_from_statistics(sums):
    """BLEU from (10,) sums of rows of bleu_statistics."""
    correct, total, (hyp_len, ref_len) = np.split(sums, [BLEU_ORDER, 2 * BLEU_ORDER])
    if correct[0] == 0 or total[-1] == 0:  # nothing found, or no 4-gram to look for, which leaves p[4] undefined
        return 0.0
    precision = np.where(correct > 0, correct, 0.5 ** np.cumsum(correct == 0)) / total
    brevity = min(1.0, math.exp(1 - ref_len / hyp_len))
    return 100 * brevity * math.exp(np.log(precision).mean())


def mean_sentence_bleu(hypotheses, references):
    """The mean of nltk's sentence BLEU over whitespace tokens, 0 .. 100: only for comparison with older results. It
    has no smoothing, so a sentence that shares no 4-gram with its reference counts as 0, be it short and perfect."""
    pairs = _pairs(hypotheses, references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of each such sentence
        scores = [sentence_bleu([ref.split() for ref in refs], hypothesis.split()) for hypothesis, refs in pairs]
    return 100 * float(np.mean(scores)) if scores else 0.0


def chrf(hypotheses, references):
    """chrF2 of a corpus, 0 .. 100. Of several references, a sentence is held against the one that suits it best."""
    sums = np.zeros((3, CHRF_ORDER), dtype=np.int64)
    for hypothesis, refs in _pairs(hypotheses, references):
        grams, *refs = (_grams("".join(text.split()), CHRF_ORDER) for text in [hypothesis, *refs])
        sums += max((_chrf_statistics(grams, ref) for ref in refs), key=_chrf_from_statistics)
    return _chrf_from_statistics(sums)


def _chrf_statistics(grams, reference):
    """The n-grams of a hypothesis and of a reference -> (3, 6): correct, total in the one, total in the other."""
    correct, total, wanted = (np.array(_by_order(g, CHRF_ORDER)) for g in (grams & reference, grams, reference))
    return np.array([correct, np.where(wanted > 0, total, 0), wanted])  # where none are wanted, none are wrong


def _chrf_from_statistics(sums):
    correct, total, wanted = sums[:, (sums[1] > 0) & (sums[2] > 0)]  # the means are over orders that both sides have
    if not correct.any():
        return 0.0
    P, R = (correct / total).mean(), (correct / wanted).mean()
    return 100 * float((1 + CHRF_BETA**2) * P * R / (CHRF_BETA**2 * P + R))


def exact_match(hypotheses, references):
    """The share of hypotheses that are a reference, letter by letter, 0 .. 100: the accuracy of a classifier."""
    return _share(_found(hypotheses, references))


def _found(hypotheses, references):
    return np.array([hypothesis in refs for hypothesis, refs in _pairs(hypotheses, references)], dtype=bool)


def _share(found):
    return 100 * float(found.mean()) if len(found) else 0.0


def paired_bootstrap(hypotheses_a, hypotheses_b, references, n_resamples=RESAMPLES, seed=0, exact=False):
    """Would another test set have said the same? (Koehn 2004) Draw as many sentences as there are, with replacement,
    the same for both systems, n_resamples times, and look at BLEU(a) - BLEU(b) in each draw, or at that of the exact
    matches.

    -> {"delta": on the sentences as they are, "interval": (low, high) that holds 95 % of the draws, "p": two-sided}.
    Koehn counts the draws that the seemingly better system does not win; p is twice that share, for we do not know
    beforehand which it will be."""
    statistics, score = bleu_statistics, lambda rows: bleu_from_statistics(rows.sum(axis=0))
    if exact:
        statistics, score = _found, _share
    a, b = statistics(hypotheses_a, references), statistics(hypotheses_b, references)
    delta = lambda rows: score(a[rows]) - score(b[rows])
    n, rng = len(a), np.random.default_rng(seed)
    deltas = np.array([delta(rng.choice(n, size=n)) for _ in range(n_resamples)])
    low, high = np.percentile(deltas, [2.5, 97.5])
    lost = min((deltas <= 0).sum(), (deltas >= 0).sum())
    p = min(1.0, 2 * (lost + 1) / (n_resamples + 1))  # + 1: the real test set is one more draw, so p is never 0
    return {"delta": delta(slice(None)), "interval": (float(low), float(high)), "p": float(p)}


def verdict(p, n_sentences):
    """What the p of a paired bootstrap says, in words."""
    if n_sentences < ENOUGH:
        return "too few sentences to tell"
    return f"significant at p = {p:.3f}" if p < 0.05 else f"not significant (p = {p:.3f})"


def median_index(scores):
    """Which score is the median; of an even number, the better of the two in the middle."""
    return sorted(range(len(scores)), key=scores.__getitem__)[len(scores) // 2]


def _pairs(hypotheses, references):
    """[(hypothesis, list of its references)], checked."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    references = [[refs] if isinstance(refs, str) else list(refs) for refs in references]
    if not all(references):
        raise ValueError(f"sentence {references.index([]) + 1} has no reference")
    return list(zip(hypotheses, references))


def _grams(sequence, order):
    """How often each n-gram of up to `order` tokens (or characters) is there."""
    return Counter(everygrams(sequence, max_len=order))


def _by_order(grams, order):
    """How many n-grams there are of each length 1 .. order, as a list."""
    counts = [0] * order
    for gram, count in grams.items():
        counts[len(gram) - 1] += count
    return counts
