"""BLEU, chrF, ROUGE and accuracy: how much of an output is found in a reference, and whether two systems differ.

BLEU (Papineni et al. 2002) counts n-grams of tokens. Over the whole corpus, with correct[n] the n-grams of the
hypotheses that a reference has too (each at most as often as there), and total[n] all of them, n = 1 .. 4:

    p[n] = correct[n] / total[n]        brevity = min(1, exp(1 - ref_len / hyp_len))
    BLEU = 100 * brevity * (p[1] * p[2] * p[3] * p[4]) ** (1/4)

The first n with correct[n] = 0 counts as 1/2, the second as 1/4 and so on ("exp" smoothing, Chen & Cherry 2014).
The same translations score several points apart under different tokenizations, so a BLEU without its settings says
little (Post 2018): tokens are mteval-v13a's, and the signature names all settings in sacrebleu's words.

chrF (Popović 2015) counts n-grams of characters, spaces left out, n = 1 .. 6, and does not depend on tokens:

    P = mean over n of correct[n] / total in hypotheses[n]
    R = mean over n of correct[n] / total in references[n]        chrF2 = 100 * (1 + 2²) * P * R / (2² * P + R)

ROUGE (Lin 2004) is for summaries. ROUGE-1 and ROUGE-2 count words and pairs of words, ROUGE-L the longest common
subsequence. The score is the mean over sentences of F1 = 2 * P * R / (P + R), against the best of the references.
Its tokens are runs of a-z and 0-9, so accented letters separate words: it is made for English.

BLEU and chrF equal sacrebleu's numbers, ROUGE the rouge-score package's. Every metric here is a function of the sum,
over sentences, of one row of counts each, so that a bootstrap resamples rows and counts nothing again.
`hypotheses` is a list of strings; `references` has a string for each, or a list of strings.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import (
    brevity_penalty,
    closest_ref_length,
    modified_precision,
    sentence_bleu,
)
from nltk.util import everygrams, ngrams

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2
RESAMPLES = 1000  # of the sentences, for a paired bootstrap
ENOUGH = 100  # sentences for a verdict

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # in this order: "&amp;lt;" ends up as "<"

# Each rule consumes the neighbour it looks at, so of two marks in a row it may miss the second. That is the convention:
# scores compare only between those who keep it.
RULES_13A = [
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII punctuation stands alone, all but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , too, unless a digit comes before
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # and after: 1,000.5 stays whole
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a hyphen only after a digit
]


@dataclass(frozen=True)
class Metric:
    """label: its name in tables. settings: what must be said beside a score. counts(hypothesis, list of references) ->
    a row of k numbers. score(the sum of rows (k,)) -> 0 .. 100."""

    label: str
    settings: str
    counts: Callable
    score: Callable

    def __call__(self, hypotheses, references):
        """The score of a corpus, 0 .. 100; 0 for no sentences."""
        rows = self.rows(hypotheses, references)
        return self.score(rows.sum(axis=0)) if len(rows) else 0.0

    def rows(self, hypotheses, references):
        """One row of counts for each sentence: (n, k)."""
        return np.array([self.counts(*pair) for pair in _pairs(hypotheses, references)])

    def signature(self, references):
        """The settings that others need to repeat a score."""
        counts = {1 if isinstance(refs, str) else len(refs) for refs in references}
        return f"nrefs:{counts.pop() if len(counts) == 1 else 'var'}|{self.settings}"


def _pairs(hypotheses, references):
    """[(hypothesis, list of its references)], checked."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    references = [[refs] if isinstance(refs, str) else list(refs) for refs in references]
    if not all(references):
        raise ValueError(f"sentence {references.index([]) + 1} has no reference")
    return list(zip(hypotheses, references))


def mean_score(sums):
    """The score of rows (value of a sentence, 1): their mean in per cent."""
    return 100 * float(sums[0] / sums[1])


# BLEU


def tokenize_13a(text):
    """The tokens of NIST's mteval-v13a.pl, as in sacrebleu (Post 2018): text -> list of str."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "  # so that the first and the last character have neighbours
    for pattern, replacement in RULES_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu_counts(hypothesis, references):
    """correct[1 .. 4], total[1 .. 4], hyp_len, ref_len of a sentence."""
    # Line ends go first, as in sacrebleu: a hyphen before the last one is no broken word.
    tokens, *references = (tokenize_13a(text.rstrip()) for text in [hypothesis, *references])
    orders = range(1, BLEU_ORDER + 1)
    correct = [modified_precision(references, tokens, n).numerator for n in orders]
    total = [max(0, len(tokens) - n + 1) for n in orders]
    return [*correct, *total, len(tokens), closest_ref_length(references, len(tokens))]  # of two as close, the shorter


def bleu_score(sums):
    correct, total, (hyp_len, ref_len) = np.split(sums, [BLEU_ORDER, 2 * BLEU_ORDER])
    if correct[0] == 0 or total[-1] == 0:  # nothing found, or no 4-gram, which leaves p[4] undefined
        return 0.0
    precision = np.where(correct > 0, correct, 0.5 ** np.cumsum(correct == 0)) / total
    return 100 * float(brevity_penalty(ref_len, hyp_len) * math.exp(np.log(precision).mean()))


def sentence_bleu_counts(hypothesis, references):
    """nltk's sentence BLEU over whitespace tokens, only for comparison with older results. It has no smoothing, so a
    sentence that shares no 4-gram with its reference counts as 0, even if it is short and perfect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of each such sentence
        return [sentence_bleu([ref.split() for ref in references], hypothesis.split()), 1]


# chrF


def chrf_counts(hypothesis, references):
    """correct, total in the hypothesis, total in the reference that suits best, each for n = 1 .. 6."""
    grams, *references = (
        Counter(everygrams("".join(s.split()), max_len=CHRF_ORDER)) for s in [hypothesis, *references]
    )
    return max((_chrf_row(grams, reference) for reference in references), key=chrf_score)


def _chrf_row(grams, reference):
    correct, total, expected = (_by_order(counts) for counts in (grams & reference, grams, reference))
    total = np.where(expected > 0, total, 0)  # where the reference has no n-gram, none is wrong
    return np.concatenate([correct, total, expected])


def _by_order(grams):
    """How many n-grams there are of each length: (6,)."""
    counts = np.zeros(CHRF_ORDER, dtype=np.int64)
    for gram, count in grams.items():
        counts[len(gram) - 1] += count
    return counts


def chrf_score(sums):
    correct, total, expected = sums.reshape(3, CHRF_ORDER)
    both = (total > 0) & (expected > 0)  # the means are over orders that both sides have
    if not correct[both].any():
        return 0.0
    P, R = (correct[both] / total[both]).mean(), (correct[both] / expected[both]).mean()
    return 100 * float((1 + CHRF_BETA**2) * P * R / (CHRF_BETA**2 * P + R))


# ROUGE


@cache
def _stem(word, stemmer=PorterStemmer()):
    return stemmer.stem(word) if len(word) > 3 else word


def rouge_tokens(text, stem):
    words = re.findall("[a-z0-9]+", text.lower())
    return [_stem(word) for word in words] if stem else words


def rouge_counts(hypothesis, references, common, n, stem):
    """(the best F1, 1). common(a, b): how much two lists of n-grams share."""
    a, *others = (list(ngrams(rouge_tokens(text, stem), n)) for text in [hypothesis, *references])
    return [max(2 * common(a, b) / max(1, len(a) + len(b)) for b in others), 1]  # 2 * P * R / (P + R)


def clipped(a, b):
    """How many items two lists share, each as often as in the one that has fewer."""
    return (Counter(a) & Counter(b)).total()


def longest_common_subsequence(a, b):
    """Its length, row by row of the table of all beginnings of `a` and of `b`."""
    row = [0] * (len(b) + 1)
    for item in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if item == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge(name, common, n, stem):
    settings = f"case:lower|tok:rouge-score|stem:{'yes' if stem else 'no'}|f1:sentence-mean"
    return Metric(name, settings, partial(rouge_counts, common=common, n=n, stem=stem), mean_score)


# Labels


def macro_f1(labels):
    """The Metric that is the mean of the F1 of each of these labels that occurs in references or outputs."""

    def counts(hypothesis, references):
        wanted = truth(hypothesis, references)
        return [x for label in labels for x in (hypothesis == wanted == label, hypothesis == label, wanted == label)]

    def score(sums):
        right, given, wanted = sums.reshape(-1, 3).T
        occurs = given + wanted > 0
        return 100 * float((2 * right[occurs] / (given + wanted)[occurs]).mean())

    return Metric("macro-F1", f"labels:{len(labels)}", counts, score)


def truth(hypothesis, references):
    """The label that is right: of several, the one that was given, if it is among them."""
    return hypothesis if hypothesis in references else references[0]


def confusion(hypotheses, references, labels):
    """How often each label (row) was answered with each (column), as lists of ints."""
    pairs = Counter((truth(text, refs), text) for text, refs in _pairs(hypotheses, references))
    return [[pairs[wanted, given] for given in labels] for wanted in labels]


METRICS = {
    "bleu": Metric("BLEU", "case:mixed|eff:no|tok:13a|smooth:exp", bleu_counts, bleu_score),
    "chrf": Metric("chrF2", f"case:mixed|eff:yes|nc:{CHRF_ORDER}|nw:0|space:no", chrf_counts, chrf_score),
    "sentence_bleu": Metric("sentence BLEU", "case:mixed|tok:space|smooth:none|nltk", sentence_bleu_counts, mean_score),
    "exact": Metric("exact %", "case:mixed", lambda text, refs: [text in refs, 1], mean_score),
}
for _end, _stems in (("", False), ("-stem", True)):
    METRICS |= {
        f"rouge1{_end}": rouge(f"ROUGE-1{_end}", clipped, 1, _stems),
        f"rouge2{_end}": rouge(f"ROUGE-2{_end}", clipped, 2, _stems),
        f"rougeL{_end}": rouge(f"ROUGE-L{_end}", longest_common_subsequence, 1, _stems),
    }
GROUPS = {"rouge": ["rouge1", "rouge2", "rougeL"], "rouge-stem": ["rouge1-stem", "rouge2-stem", "rougeL-stem"]}


def named(names):
    """{name: Metric} for names of METRICS or of GROUPS."""
    return {name: METRICS[name] for group in names for name in GROUPS.get(group, [group])}


# Do two systems differ?


def paired_bootstrap(metric, hypotheses_a, hypotheses_b, references, n_resamples=RESAMPLES, seed=0):
    """Would another test set have said the same? (Koehn 2004) Draw as many sentences as there are, with replacement,
    the same for both systems, n_resamples times, and look at metric(a) - metric(b) in each draw.

    -> {"delta": on the sentences as they are, "interval": (low, high) that holds 95 % of the draws, "p": two-sided}.
    Koehn counts the draws that the seemingly better system does not win; p is twice that share, for we do not know
    beforehand which it will be."""
    a, b = metric.rows(hypotheses_a, references), metric.rows(hypotheses_b, references)
    if not len(a):
        return {"delta": 0.0, "interval": (0.0, 0.0), "p": 1.0}
    delta = lambda rows: metric.score(a[rows].sum(axis=0)) - metric.score(b[rows].sum(axis=0))
    n, rng = len(a), np.random.default_rng(seed)
    deltas = np.array([delta(rng.choice(n, size=n)) for _ in range(n_resamples)])
    low, high = np.percentile(deltas, [2.5, 97.5])
    lost = min((deltas <= 0).sum(), (deltas >= 0).sum())
    p = min(1.0, 2 * (lost + 1) / (n_resamples + 1))  # + 1: the real test set is one more draw, so p is never 0
    return {"delta": delta(slice(None)), "interval": (float(low), float(high)), "p": float(p)}


def verdict(p):
    """What the p of a paired bootstrap on ENOUGH sentences or more says, in words."""
    return f"significant at p = {p:.3f}" if p < 0.05 else f"not significant (p = {p:.3f})"


def median_index(scores):
    """Which score is the median; of an even number, the better of the two in the middle."""
    return sorted(range(len(scores)), key=scores.__getitem__)[len(scores) // 2]
