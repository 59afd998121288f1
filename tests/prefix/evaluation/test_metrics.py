"""BLEU and chrF are sacrebleu's, ROUGE is rouge-score's; the paired bootstrap says "significant" when it should and not
more often."""

import logging
import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from prefix.evaluation.metrics import ACCURACY, NAMES, confusion, macro_f1, named, paired_bootstrap, tokenize_13a

logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns of the odd texts that are the point here
quick = settings(max_examples=150, deadline=None)
bleu, chrf, exact = named(["bleu", "chrf", "exact"])
ALL = {metric.label: metric for metric in named([name for name in NAMES if name != ACCURACY])}
LABELS = ["anger", "fear", "joy"]
VOCABULARY = [f"w{i}" for i in range(100)]

# Few words, so that n-grams of every order match now and then, pieces that the tokenizers take apart, words with stems.
WORDS = ["a", "b", "c", "A", "cat", "cats", "running", "a.", "b,", "3-4", "x-y", "&amp;", "été", "e\u0301te\u0301", "-"]
sentences = st.builds(
    lambda words, end: " ".join(words) + end,
    st.lists(st.sampled_from(WORDS), max_size=9),
    st.sampled_from(["", "", ".", " .", "\n", "-\n", " "]),
)


@st.composite
def corpora(draw, fewest=1, most=3):
    """[(hypothesis, list of `fewest` .. `most` references)]; the hypothesis is now and then one of them."""
    pairs = st.tuples(sentences, st.lists(sentences, min_size=fewest, max_size=most), st.booleans())
    return [(refs[-1] if copy else text, refs) for text, refs, copy in draw(st.lists(pairs, min_size=1, max_size=5))]


SIGNS = [*"ab12.,-'\"!?()[]{}`~^_@:/\\&; \n\t«»é", "&amp;", "&lt;", "<skipped>", "-\n"]


@quick
@example("« Bonjour », dit-il. «\u00a0Ça va\u202f?\u00a0» ٣.١٤ 你好。👩‍🚀. a\ud800.b c\x1ce\u3000f")
@example("Q&amp;A &amp;lt; &amp;amp;quot; &nbsp; <skip<skipped>ped> 1,000.5-.5 re-\nelected -\n")
@given(st.text(st.characters() | st.sampled_from("aB1.,-'&;<> \n")) | st.lists(st.sampled_from(SIGNS)).map("".join))
def test_tokens_of_any_text_are_sacrebleus(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


@quick
@example([("", ["a b c d"]), ("", ["e f g h"])])
@example([("", ["a b c d"]), ("a b c d e", ["a b c d e"])])
@example([("the cat sat on the mat", [""])])
@example([("a b c", ["a b c"]), ("d", ["d"])])
@example([("v w x y z", ["a b c d e"])])
@example([("ab", ["abcdefgh"])])
@example([("abcdefgh", ["ab"])])
@example([("Happily RUNNING flies, was is", ["happy runs fly be"])])
@example([("日本 Ça İstanbul œuvre", ["a stanbul uvre"])])
@example([("a b c d", ["a b c d e f g h i"]), ("a", ["a b c d", ""])])  # length 0 is closer to 1 than 4 is
@given(corpora(1, 1) | corpora(3, 3) | corpora())
def test_scores_are_those_of_the_reference_packages_with_as_many_references_as_each_sentence_has(corpus):
    hypotheses, references = zip(*corpus)
    most = max(len(refs) for refs in references)
    turned = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]  # as sacrebleu takes them
    assert abs(bleu(hypotheses, references) - sacrebleu.corpus_bleu(hypotheses, turned).score) < 0.005
    assert abs(chrf(hypotheses, references) - sacrebleu.corpus_chrf(hypotheses, turned).score) < 0.005
    for end, stemmed in (("", False), ("-stem", True)):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmed)
        scores = [scorer.score_multi(refs, text) for text, refs in zip(hypotheses, references)]
        for name in scores[0]:
            theirs = 100 * np.mean([score[name].fmeasure for score in scores])
            assert abs(ALL[name.replace("rouge", "ROUGE-") + end](hypotheses, references) - theirs) < 0.005


@pytest.mark.parametrize("name, hypothesis, reference, score", [
    ("ROUGE-L", "police kill the gunman", "police killed the gunman", 75),  # Lin 2004, section 3.1
    ("ROUGE-L", "the gunman kill police", "police killed the gunman", 50),
    ("ROUGE-L-stem", "police kill the gunmans", "police killed the gunman", 100),
    ("sentence BLEU", "a b c d e", "a b c d e", 100),
    ("sentence BLEU", "a b c", "a b c", 0),
    ("sentence BLEU", "a b c x d e", "a b c d e", 0),
    ("sentence BLEU", "", "a b c d e", 0),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_scores_worked_out_by_hand(name, hypothesis, reference, score):
    assert ALL[name]([hypothesis, ""], [["other", reference], ["c"]]) == pytest.approx(score / 2, abs=1e-6)


@pytest.mark.parametrize("second", [["g h"], []])
def test_signatures_are_sacrebleus_without_its_version(second):
    turned = [["a b", "e f"], ["c d", *(second or [None])]]
    for ours, theirs in [(bleu, sacrebleu.BLEU()), (chrf, sacrebleu.CHRF())]:
        theirs.corpus_score(["a b", "e f"], turned)
        assert ours.signature([["a b", "c d"], ["e f", *second]]) == str(theirs.get_signature()).split("|version")[0]


def test_groups_of_metrics_have_names_and_the_signature_of_rouge_says_whether_words_are_stems():
    for group, stem in (("rouge", "no"), ("rouge-stem", "yes")):
        signature = f"nrefs:1|case:lower|tok:rouge-score|stem:{stem}|f1:sentence-mean"
        assert [metric.signature([["a"]]) for metric in named([group])] == [signature] * 3
    labels = [metric.label for metric in named(["chrf", "rouge", "accuracy"], LABELS)]
    assert labels == ["chrF2", "ROUGE-1", "ROUGE-2", "ROUGE-L", "accuracy", "macro-F1"]


def test_macro_f1_is_the_mean_of_the_labels_that_occur():
    given, right = ["joy", "joy", "joy", "anger"], [["joy"], ["joy"], ["anger"], ["anger"]]
    # joy: P 2/3, R 1; anger: P 1, R 1/2; fear does not occur
    assert macro_f1(LABELS)(given, right) == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    assert macro_f1(LABELS)(["fear"] * 4, right) == 0 and macro_f1(LABELS)([refs[0] for refs in right], right) == 100


def test_a_confusion_matrix_counts_answers_by_what_was_right():
    given, right = ["joy", "joy", "fear", "anger"], [["joy"], ["anger"], ["anger", "fear"], ["fear", "joy"]]
    assert confusion(given, right, LABELS) == [[0, 0, 1], [1, 1, 0], [0, 0, 1]]  # of several, the one that was given


def test_an_exact_match_is_any_of_the_references():
    assert exact(["a b", "b", "c", ""], [["x", "a b"], ["b"], ["c."], ["c"]]) == 50


def with_errors(rng, references, rate):
    """Each word replaced by another with probability `rate`."""
    spoil = lambda word: rng.choice(VOCABULARY) if rng.random() < rate else word
    return [" ".join(spoil(word) for word in text.split()) for (text,) in references]


def made_up(seed, n, *rates):
    """(a system's outputs for each rate of errors ..., references) of n sentences."""
    rng = random.Random(seed)
    references = [[" ".join(rng.choices(VOCABULARY, k=12))] for _ in range(n)]
    return *(with_errors(rng, references, rate) for rate in rates), references


def test_a_clearly_better_system_is_significantly_better_and_one_never_differs_from_itself():
    better, worse, references = made_up(0, 200, 0.2, 0.5)
    result = paired_bootstrap(chrf, better, worse, references)
    low, high = result["interval"]
    assert result["delta"] == chrf(better, references) - chrf(worse, references)
    assert 0 < low < result["delta"] < high
    assert result["p"] == 2 / 1001  # not one of a thousand draws went the other way
    assert paired_bootstrap(bleu, better, better, references, 50) == {"delta": 0.0, "interval": (0.0, 0.0), "p": 1.0}


def test_the_same_sentences_are_drawn_for_both_systems_and_exchanging_them_changes_the_sign_alone():
    references, right = [["x"]] * 40, ["x"] * 20 + ["y"] * 20
    better = right[:20] + ["x"] + right[21:]  # by one sentence: no draw can say that the other is
    assert paired_bootstrap(exact, right, better, references)["interval"][1] == 0
    low, high = paired_bootstrap(exact, right * 10, ["y"] * 400, references * 10)["interval"]  # 50 ± 1.96 * 2.5
    assert (low, high) == pytest.approx((45.1, 54.9), abs=0.8)
    a, b, references = made_up(1, 50, 0.30, 0.32)
    one, other = paired_bootstrap(bleu, a, b, references), paired_bootstrap(bleu, b, a, references)
    assert one["p"] == other["p"] and one["delta"] == -other["delta"]
    assert one["interval"] == pytest.approx([-x for x in reversed(other["interval"])])
    assert paired_bootstrap(bleu, a, b, references, seed=1) != one


def test_equally_good_systems_are_called_different_about_once_in_twenty():
    p = [paired_bootstrap(bleu, *made_up(trial, 40, 0.3, 0.3), 100, trial)["p"] for trial in range(100)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.12
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.15)
