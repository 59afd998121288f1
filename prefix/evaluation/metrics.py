"""BLEU, chrF, ROUGE, accuracy and macro-F1, and the paired bootstrap: do two systems differ?

BLEU (Papineni et al. 2002) counts n-grams of tokens over the whole corpus, n = 1 .. 4. correct[n] are those of the
hypotheses that a reference has too (each at most as often as there), total[n] all of them:

    p[n] = correct[n] / total[n]        brevity = min(1, exp(1 - ref_len / hyp_len))
    BLEU = 100 * brevity * (p[1] * p[2] * p[3] * p[4]) ** (1/4)

The first n with correct[n] = 0 counts as 1/2, the second as 1/4 and so on ("exp" smoothing, Chen & Cherry 2014). Tokens are
mteval-v13a's: other tokens give scores several points apart, so a score is published with its signature (Post 2018).

chrF (Popović 2015) counts n-grams of characters without spaces, n = 1 .. 6:

    P = mean over n of correct[n] / total in hypotheses[n]
    R = mean over n of correct[n] / total in references[n]        chrF2 = 100 * (1 + 2²) * P * R / (2² * P + R)

ROUGE (Lin 2004) is for summaries: ROUGE-1 and -2 count words and pairs of words, ROUGE-L the longest common subsequence.
The score is the mean over sentences of F1 = 2 * P * R / (P + R), against the best of the references. Its tokens are runs
of a-z and 0-9, so accented letters separate words: it is made for English.

BLEU and chrF equal sacrebleu's numbers, ROUGE the rouge-score package's. Every metric is a function of counts summed over
sentences, so a bootstrap resamples counts. `hypotheses` are n strings, `references` n lists of strings.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import brevity_penalty, closest_ref_length, modified_precision, sentence_bleu
from nltk.util import everygrams, ngrams

BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2
RESAMPLES = 1000  # draws of a paired bootstrap
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
    label: str  # its name in tables
    settings: str  # what a score must be published with
    count: Callable  # (hypothesis, its references) -> k numbers
    score: Callable  # their sum over sentences (k,) -> 0 .. 100

    def __call__(self, hypotheses, references):
        """The score of a corpus, 0 .. 100."""
        return self.score(self.counts(hypotheses, references).sum(axis=0))

    def counts(self, hypotheses, references):
        """(n, k): the counts of each sentence."""
        return np.array([self.count(*sentence) for sentence in zip(hypotheses, references, strict=True)])

    def signature(self, references):
        """The settings that others need to repeat a score."""
        n = {len(refs) for refs in references}
        return f"nrefs:{n.pop() if len(n) == 1 else 'var'}|{self.settings}"


def mean_score(sums):
    """The score of counts (a sentence's value, 1): their mean in per cent."""
    return 100 * float(sums[0] / sums[1])


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
    """nltk's sentence BLEU over whitespace tokens, to compare with older results. It has no smoothing: a sentence that
    shares no 4-gram with its reference counts as 0, even if it is short and perfect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of each such sentence
        return [sentence_bleu([ref.split() for ref in references], hypothesis.split()), 1]


def chrf_counts(hypothesis, references):
    """correct, total in the hypothesis, total in the best reference, each for n = 1 .. 6."""
    n_grams = lambda text: Counter(everygrams("".join(text.split()), max_len=CHRF_ORDER))
    by_order = lambda grams: np.bincount([len(gram) for gram in grams.elements()], minlength=CHRF_ORDER + 1)[1:]
    found = n_grams(hypothesis)

    def against(reference):
        correct, total, expected = map(by_order, (found & reference, found, reference))
        return np.concatenate([correct, total * (expected > 0), expected])  # an n-gram longer than it is not wrong

    return max((against(n_grams(text)) for text in references), key=chrf_score)


def chrf_score(sums):
    correct, total, expected = sums.reshape(3, CHRF_ORDER)
    both = (total > 0) & (expected > 0)  # the means are over the orders that both sides have
    if not correct[both].any():
        return 0.0
    P, R = (correct[both] / total[both]).mean(), (correct[both] / expected[both]).mean()
    return 100 * float((1 + CHRF_BETA**2) * P * R / (CHRF_BETA**2 * P + R))


stem_of = cache(PorterStemmer().stem)


def rouge_counts(hypothesis, references, overlap, n, stem):
    """(the best F1, 1). overlap(a, b): how many n-grams two lists have in common. Words of four letters on are stemmed."""
    stemmed = lambda word: stem_of(word) if stem and len(word) > 3 else word
    words = lambda text: map(stemmed, re.findall("[a-z0-9]+", text.lower()))
    a, *others = (list(ngrams(words(text), n)) for text in [hypothesis, *references])
    return [max(2 * overlap(a, b) / max(1, len(a) + len(b)) for b in others), 1]  # = 2 * P * R / (P + R)


def clipped(a, b):
    """How many items two lists have in common, each as often as in the list that has fewer."""
    return (Counter(a) & Counter(b)).total()


def longest_common_subsequence(a, b):
    """Its length, from those of all beginnings of `b` with longer and longer beginnings of `a`."""
    lengths = [0] * (len(b) + 1)
    for item in a:
        before, lengths = lengths, [0]
        for j, other in enumerate(b):
            lengths.append(before[j] + 1 if item == other else max(before[j + 1], lengths[j]))
    return lengths[-1]


def right_label(answer, references):
    """The label that is right: of several, the one that was given if it is among them."""
    return answer if answer in references else references[0]


def macro_f1(labels):
    """The Metric that is the mean F1 of those labels that occur in references or answers."""

    def counts(answer, references):
        right = right_label(answer, references)
        return [x for label in labels for x in (answer == right == label, answer == label, right == label)]

    def score(sums):
        correct, answered, right = sums.reshape(-1, 3).T
        occurs = answered + right > 0
        return 100 * float((2 * correct[occurs] / (answered + right)[occurs]).mean())

    return Metric("macro-F1", f"labels:{len(labels)}", counts, score)


def confusion(answers, references, labels):
    """How often each label (row) was answered with each (column), as lists of ints."""
    pairs = Counter((right_label(answer, refs), answer) for answer, refs in zip(answers, references))
    return [[pairs[right, answer] for answer in labels] for right in labels]


def rouge(stem):
    """ROUGE-1, -2 and -L."""
    settings = f"case:lower|tok:rouge-score|stem:{'yes' if stem else 'no'}|f1:sentence-mean"
    return [
        Metric(f"ROUGE-{kind}{'-stem' * stem}", settings, partial(rouge_counts, overlap=overlap, n=n, stem=stem), mean_score)
        for kind, overlap, n in (("1", clipped, 1), ("2", clipped, 2), ("L", longest_common_subsequence, 1))
    ]


METRICS = {
    "bleu": Metric("BLEU", "case:mixed|eff:no|tok:13a|smooth:exp", bleu_counts, bleu_score),
    "chrf": Metric("chrF2", f"case:mixed|eff:yes|nc:{CHRF_ORDER}|nw:0|space:no", chrf_counts, chrf_score),
    "sentence_bleu": Metric("sentence BLEU", "case:mixed|tok:space|smooth:none|nltk", sentence_bleu_counts, mean_score),
    "exact": Metric("exact %", "case:mixed", lambda text, refs: [text in refs, 1], mean_score),
}
GROUPS = {"rouge": rouge(stem=False), "rouge-stem": rouge(stem=True)}
ACCURACY = "accuracy"  # the name for the metrics of answers that are labels
NAMES = [*METRICS, *GROUPS, ACCURACY]


def named(names, labels=()):
    """The Metrics of these of NAMES. labels: those that macro-F1 is the mean over."""
    groups = {name: [metric] for name, metric in METRICS.items()} | GROUPS
    groups[ACCURACY] = [replace(METRICS["exact"], label="accuracy"), macro_f1(labels)]
    return [metric for name in names for metric in groups[name]]


def paired_bootstrap(metric, hypotheses_a, hypotheses_b, references, n_resamples=RESAMPLES, seed=0):
    """Would another test set have said the same (Koehn 2004)? Draw n of the n sentences with replacement, the same for
    both systems, n_resamples times, and compute metric(a) - metric(b) for each draw.

    -> {"delta": on the sentences as they are, "interval": (low, high) around 95 % of the draws, "p": two-sided}. Koehn
    counts the draws that the better system does not win. p is twice that: either may be the better."""
    a, b = metric.counts(hypotheses_a, references), metric.counts(hypotheses_b, references)
    delta = lambda drawn: metric.score(a[drawn].sum(axis=0)) - metric.score(b[drawn].sum(axis=0))
    n, rng = len(a), np.random.default_rng(seed)
    deltas = np.array([delta(rng.choice(n, size=n)) for _ in range(n_resamples)])
    low, high = np.percentile(deltas, [2.5, 97.5])
    lost = min((deltas <= 0).sum(), (deltas >= 0).sum())
    p = min(1.0, 2 * (lost + 1) / (n_resamples + 1))  # + 1: the real test set is one more draw, so p is never 0
    return {"delta": delta(slice(None)), "interval": (float(low), float(high)), "p": float(p)}
