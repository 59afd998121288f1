"""BLEU and chrF are sacrebleu's, ROUGE is rouge-score's; the paired bootstrap says "significant" when it should and not
more often."""

import logging
import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from prefix.evaluation.metrics import (
    METRICS,
    confusion,
    macro_f1,
    median_index,
    named,
    paired_bootstrap,
    tokenize_13a,
    verdict,
)

logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns of the odd texts that are the point here
quick = settings(max_examples=150, deadline=None)
bleu, chrf, exact, mean_sentence_bleu = (METRICS[name] for name in ("bleu", "chrf", "exact", "sentence_bleu"))

HARD = {
    "French guillemets": "« Bonjour », dit-il. «\u00a0Ça va\u202f?\u00a0»",
    "numbers": "1,000.5 and 3.14, 2-3 or .5 and 5. Then 10-year, x-1 and 1,a",
    "hyphens": "well-known - re-elected -- a- -b 5-a",
    "entities": "Q&amp;A &quot;x&quot; &lt;b&gt; &amp;lt; &amp;amp;quot; & AT&T &nbsp;",
    "skipped": "<skipped> a <skip<skipped>ped> b-<skipped>\nc",
    "hyphen at a line's end": "a re-\nelected b\nc -\n",
    "runs of marks": "a.,b ,,. ... 1.,2 .,. a.b.c. 1..2 (a).,",
    "apostrophes": "l'homme d’aujourd'hui 'tis ``quoted''",
    "white space": " a\tb\r\nc\u2028d\x1ce\u3000f ",
    "other scripts": "٣.١٤ 你好。Привет, мир! 👩‍🚀.",
    "half a surrogate pair": "a\ud800.b",
    "nothing": "",
    "blank": " \n ",
}

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


def assert_equal_to_the_references(hypotheses, references):
    """references: a list of strings for each hypothesis. sacrebleu takes them turned round, padded with None."""
    most = max(len(refs) for refs in references)
    turned = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    assert abs(bleu(hypotheses, references) - sacrebleu.corpus_bleu(hypotheses, turned).score) < 0.005
    assert abs(chrf(hypotheses, references) - sacrebleu.corpus_chrf(hypotheses, turned).score) < 0.005
    for end, stemmed in (("", False), ("-stem", True)):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmed)
        scores = [scorer.score_multi(refs, text) for text, refs in zip(hypotheses, references)]
        for name in scores[0]:
            theirs = 100 * np.mean([score[name].fmeasure for score in scores])
            assert abs(METRICS[name + end](hypotheses, references) - theirs) < 0.005


# Tokens


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_tokens_of_hard_strings_are_sacrebleus(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


@quick
@given(
    st.text(st.characters() | st.sampled_from("aB1.,-'&;<> \n"))
    | st.lists(st.sampled_from([*"ab12.,-'\"!?()[]{}`~^_@:/\\&; \n\t«»é", "&amp;", "&lt;", "<skipped>", "-\n"])).map(
        "".join
    )
)
@example("«Oui», dit-il: 1,000.5 &amp; 3-4.")
def test_tokens_of_any_text_are_sacrebleus(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


# Scores


@quick
@given(corpora(1, 1) | corpora(3, 3) | corpora())
def test_scores_are_those_of_the_reference_packages_with_as_many_references_as_each_sentence_has(corpus):
    assert_equal_to_the_references(*zip(*corpus))


@pytest.mark.parametrize(
    "hypotheses, references",
    [
        ([""], [""]),
        ([""], ["the cat sat on the mat"]),
        (["the cat sat on the mat"], [""]),
        (["", ""], ["a b c d", "e f g h"]),
        (["", "a b c d e"], ["a b c d", "a b c d e"]),
        (["a b c"], ["a b c"]),
        (["a b c", "d"], ["a b c", "d"]),
        (["v w x y z"], ["a b c d e"]),
        (["a x b y c"], ["a b c d e"]),
        (["a"], ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]),
        (["the the the the the the the"], ["the cat is on the mat"]),
        (["The Cat"], ["the cat sat on the mat"]),
        (["ab"], ["abcdefgh"]),
        (["abcdefgh"], ["ab"]),
        (["Happily RUNNING flies, was is"], ["happy runs fly be"]),
        (["日本 Ça İstanbul œuvre"], ["a stanbul uvre"]),
    ],
)
def test_scores_of_degenerate_corpora_are_those_of_the_reference_packages(hypotheses, references):
    assert_equal_to_the_references(hypotheses, [[ref] for ref in references])


def test_an_empty_reference_counts_as_one():
    hypotheses, references = ["a b c d", "a"], [["a b c d e f g h i"], ["a b c d", ""]]
    assert_equal_to_the_references(hypotheses, references)
    assert bleu.rows(hypotheses, references)[1, -1] == 0  # length 0 is closer to 1 than 4 is


def test_rouge_l_is_the_longest_common_subsequence_and_stems_are_porters():
    """Lin 2004, section 3.1: one pair of sentences with the same words, in two orders."""
    for text, score in (("police kill the gunman", 75), ("the gunman kill police", 50)):
        assert METRICS["rougeL"]([text], ["police killed the gunman"]) == pytest.approx(score)
    assert METRICS["rougeL-stem"](["police kill the gunmans"], ["police killed the gunman"]) == pytest.approx(100)


def test_counts_are_those_of_the_paper():
    """Papineni et al. 2002, section 2.1: the second "the" is the last that either reference allows."""
    row = bleu.rows(["the the the the the the the"], [["The cat is on the mat", "There is a cat on the mat"]])
    assert row.tolist() == [[1, 0, 0, 0, 7, 6, 5, 4, 7, 7]]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_takes_strings_or_lists_and_every_hypothesis_needs_a_reference(name):
    metric, hypotheses, references = METRICS[name], ["a b c d e", "f g"], ["a b c d e", "f g h"]
    assert metric(hypotheses, references) == metric(hypotheses, [[ref] for ref in references]) > 0
    assert metric(references, references) == pytest.approx(50 if name == "sentence_bleu" else 100)
    assert metric([], []) == 0.0
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        metric(hypotheses, ["a"])
    with pytest.raises(ValueError, match="sentence 2 has no reference"):
        metric(hypotheses, ["a", []])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("hypothesis, score", [("a b c d e", 100), ("a b c", 0), ("a b c x d e", 0), ("", 0), ("x", 0)])
def test_mean_sentence_bleu_needs_a_matching_4_gram_and_does_not_complain(hypothesis, score):
    assert mean_sentence_bleu([hypothesis], ["a b c d e"]) == pytest.approx(score, abs=1e-6)


@pytest.mark.filterwarnings("ignore:(?s).*counts of .-gram overlaps")
@quick
@given(corpora(1, 1))
def test_mean_sentence_bleu_is_the_mean_of_nltks(corpus):
    scores = [sentence_bleu([ref.split()], text.split()) for text, (ref,) in corpus]
    assert mean_sentence_bleu(*zip(*corpus)) == pytest.approx(100 * np.mean(scores))


@pytest.mark.parametrize("fewest", [1, 2])
def test_signatures_are_sacrebleus_without_its_version(fewest):
    references = [["a b", "c d"], ["e f", "g h"][:fewest]]
    turned = [["a b", "e f"], ["c d", "g h" if fewest == 2 else None]]
    for ours, theirs in [(bleu, sacrebleu.BLEU()), (chrf, sacrebleu.CHRF())]:
        theirs.corpus_score(["a b", "e f"], turned)
        assert ours.signature(references) == str(theirs.get_signature()).split("|version")[0]


def test_the_signature_of_rouge_says_whether_words_are_stems():
    plain, stems = (next(iter(named([group]).values())) for group in ("rouge", "rouge-stem"))
    assert plain.signature(["a"]) == "nrefs:1|case:lower|tok:rouge-score|stem:no|f1:sentence-mean"
    assert stems.signature([["a"], ["b", "c"]]) == "nrefs:var|case:lower|tok:rouge-score|stem:yes|f1:sentence-mean"
    assert [*named(["chrf", "rouge"])] == ["chrf", "rouge1", "rouge2", "rougeL"]


# Labels

LABELS = ["anger", "fear", "joy"]


def test_macro_f1_is_the_mean_of_the_labels_that_occur():
    given, wanted = ["joy", "joy", "joy", "anger"], ["joy", "joy", "anger", "anger"]
    # joy: P 2/3, R 1; anger: P 1, R 1/2; fear does not occur
    assert macro_f1(LABELS)(given, wanted) == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    assert macro_f1(LABELS)(["fear"] * 4, wanted) == 0 and macro_f1(LABELS)(wanted, wanted) == 100


def test_a_confusion_matrix_counts_answers_by_what_was_right():
    given, wanted = ["joy", "joy", "fear", "anger"], ["joy", "anger", ["anger", "fear"], ["joy", "fear"]]
    assert confusion(given, wanted, LABELS) == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]  # of several, the one that was given


def test_an_exact_match_is_any_of_the_references():
    assert exact(["a b", "b", "c", ""], [["x", "a b"], "b", ["c."], "c"]) == 50


# The paired bootstrap

VOCABULARY = [f"w{i}" for i in range(100)]


def made_up_sentences(rng, n):
    return [" ".join(rng.choices(VOCABULARY, k=12)) for _ in range(n)]


def with_errors(rng, sentences, rate):
    """Each word replaced by another with probability `rate`."""
    spoil = lambda word: rng.choice(VOCABULARY) if rng.random() < rate else word
    return [" ".join(spoil(word) for word in sentence.split()) for sentence in sentences]


@pytest.mark.parametrize("name", METRICS)
def test_a_system_never_differs_from_itself(name):
    rng = random.Random(0)
    references = made_up_sentences(rng, 50)
    hypotheses = with_errors(rng, references, 0.3)
    same = {"delta": 0.0, "interval": (0.0, 0.0), "p": 1.0}
    assert paired_bootstrap(METRICS[name], hypotheses, hypotheses, references, n_resamples=50) == same
    assert paired_bootstrap(METRICS[name], [], [], []) == same


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge2", "rougeL", "sentence_bleu"])
def test_a_clearly_better_system_is_significantly_better(name):
    rng = random.Random(0)
    references = made_up_sentences(rng, 200)
    better, worse = with_errors(rng, references, 0.2), with_errors(rng, references, 0.5)
    result = paired_bootstrap(METRICS[name], better, worse, references)
    low, high = result["interval"]
    assert result["delta"] == METRICS[name](better, references) - METRICS[name](worse, references)
    assert 0 < low < result["delta"] < high
    assert result["p"] == 2 / 1001  # not one of a thousand draws went the other way


@pytest.mark.parametrize("metric, delta", [(exact, 50), (macro_f1(["no", "yes"]), 100 * (18 / 19 - 4 / 7) / 2)])
def test_labels_are_resampled_by_their_own_metrics(metric, delta):
    references, better, worse = ["yes"] * 40, ["yes"] * 36 + ["no"] * 4, ["yes"] * 16 + ["no"] * 24
    result = paired_bootstrap(metric, better, worse, references)
    low, high = result["interval"]
    assert result["delta"] == pytest.approx(delta) and 0 < low < delta < high and result["p"] == 2 / 1001


def test_exchanging_the_systems_changes_the_sign_alone():
    rng = random.Random(1)
    references = made_up_sentences(rng, 50)
    a, b = with_errors(rng, references, 0.30), with_errors(rng, references, 0.32)
    one, other = paired_bootstrap(bleu, a, b, references), paired_bootstrap(bleu, b, a, references)
    assert one["p"] == other["p"] and one["delta"] == -other["delta"]
    assert one["interval"] == pytest.approx([-x for x in reversed(other["interval"])])


def test_a_seed_repeats_the_draws_and_another_does_not():
    rng = random.Random(2)
    references = made_up_sentences(rng, 50)
    systems = with_errors(rng, references, 0.3), with_errors(rng, references, 0.3)
    draw = lambda seed: paired_bootstrap(bleu, *systems, references, n_resamples=100, seed=seed)
    assert draw(1) == draw(1) != draw(2)


def test_equally_good_systems_are_called_different_about_once_in_twenty():
    rng, p = random.Random(3), []
    for trial in range(100):
        references = made_up_sentences(rng, 100)
        a, b = with_errors(rng, references, 0.3), with_errors(rng, references, 0.3)
        p.append(paired_bootstrap(bleu, a, b, references, n_resamples=100, seed=trial)["p"])
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.12
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "p, words",
    [
        (2 / 1001, "significant at p = 0.002"),
        (0.0519, "not significant (p = 0.052)"),
        (1, "not significant (p = 1.000)"),
    ],
)
def test_a_verdict_is_at_five_per_cent(p, words):
    assert verdict(p) == words


@pytest.mark.parametrize(
    "scores, median", [([5], 0), ([1, 2], 1), ([2, 1], 0), ([9, 3, 5], 2), ([40, 1, 30, 20], 2), ([7, 7, 7], 1)]
)
def test_the_median_is_in_the_middle_or_the_better_of_two(scores, median):
    assert median_index(scores) == median
