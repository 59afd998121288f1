"""BLEU and chrF are sacrebleu's; the paired bootstrap says "significant" when it should and not more often."""

import logging
import random
import time
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from prefix.evaluation.metrics import (
    bleu_from_statistics,
    bleu_statistics,
    chrf,
    corpus_bleu,
    mean_sentence_bleu,
    median_index,
    paired_bootstrap,
    signature,
    tokenize_13a,
    verdict,
)

logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # it warns of the odd texts that are the point here
quick = settings(max_examples=150, deadline=None)

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

# Few words, so that n-grams of every order match now and then, and pieces that the tokenizer takes apart.
WORDS = ["a", "b", "c", "A", "cat", "a.", "b,", "3-4", "x-y", "&amp;", "été", "e\u0301te\u0301", "-"]
sentences = st.builds(
    lambda words, end: " ".join(words) + end,
    st.lists(st.sampled_from(WORDS), max_size=9),
    st.sampled_from(["", "", ".", " .", "\n", "-\n", " "]),
)
corpora = st.lists(st.tuples(sentences, sentences), min_size=1, max_size=6)


@st.composite
def corpora_with_several_references(draw, fewest):
    """[(hypothesis, list of `fewest` .. 3 references)]; the hypothesis is now and then one of them."""
    pairs = st.tuples(sentences, st.lists(sentences, min_size=fewest, max_size=3), st.booleans())
    return [(refs[-1] if copy else text, refs) for text, refs, copy in draw(st.lists(pairs, min_size=1, max_size=5))]


def assert_equal_sacrebleu(hypotheses, references):
    """references: a list of strings for each hypothesis. sacrebleu takes them turned round, padded with None."""
    most = max(len(refs) for refs in references)
    turned = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    assert abs(corpus_bleu(hypotheses, references) - sacrebleu.corpus_bleu(hypotheses, turned).score) < 0.005
    assert abs(chrf(hypotheses, references) - sacrebleu.corpus_chrf(hypotheses, turned).score) < 0.005


# Tokens


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_tokens_of_hard_strings_are_sacrebleus(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


@quick
@given(st.text(st.characters() | st.sampled_from("aB1.,-'&;<> \n")))
def test_tokens_of_any_text_are_sacrebleus(text):
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


@quick
@given(st.lists(st.sampled_from([*"ab12.,-'\"!?()[]{}`~^_@:/\\&; \n\t«»é", "&amp;", "&lt;", "<skipped>", "-\n"])))
def test_tokens_of_any_heap_of_marks_are_sacrebleus(pieces):
    text = "".join(pieces)
    assert tokenize_13a(text) == Tokenizer13a()(text).split()


def test_tokens_read_as_expected():
    assert tokenize_13a("«Oui», dit-il: 1,000.5 &amp; 3-4.") == "«Oui» , dit-il : 1,000.5 & 3 - 4 .".split()


# BLEU and chrF


@quick
@given(corpora)
def test_scores_are_sacrebleus(corpus):
    assert_equal_sacrebleu([text for text, _ in corpus], [[ref] for _, ref in corpus])


@quick
@given(corpora_with_several_references(fewest=3))
def test_scores_with_three_references_are_sacrebleus(corpus):
    assert_equal_sacrebleu([text for text, _ in corpus], [refs for _, refs in corpus])


@quick
@given(corpora_with_several_references(fewest=1))
def test_scores_with_as_many_references_as_each_sentence_has_are_sacrebleus(corpus):
    assert_equal_sacrebleu([text for text, _ in corpus], [refs for _, refs in corpus])


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
    ],
)
def test_scores_of_degenerate_corpora_are_sacrebleus(hypotheses, references):
    assert_equal_sacrebleu(hypotheses, [[ref] for ref in references])


def test_a_string_is_a_list_of_one_reference():
    hypotheses, references = ["a b c d e", "f g"], ["a b c d f", "f g h"]
    for metric in (corpus_bleu, mean_sentence_bleu, chrf):
        assert metric(hypotheses, references) == metric(hypotheses, [[ref] for ref in references]) > 0


def test_an_empty_reference_counts_as_one():
    hypotheses, references = ["a b c d", "a"], [["a b c d e f g h i"], ["a b c d", ""]]
    assert_equal_sacrebleu(hypotheses, references)
    assert bleu_statistics(hypotheses, references)[1, -1] == 0  # length 0 is closer to 1 than 4 is


def test_a_perfect_translation_scores_100():
    corpus = ["le chat est sur le tapis .", "oui"]
    assert corpus_bleu(corpus, corpus) == pytest.approx(100) == chrf(corpus, corpus)


def test_statistics_are_the_counts_of_the_paper():
    """Papineni et al. 2002, section 2.1: the second "the" is the last that either reference allows."""
    row = bleu_statistics(["the the the the the the the"], [["The cat is on the mat", "There is a cat on the mat"]])
    assert row.dtype == np.int64 and row.tolist() == [[1, 0, 0, 0, 7, 6, 5, 4, 7, 7]]


@quick
@given(corpora)
def test_statistics_of_sentences_add_up_to_those_of_the_corpus(corpus):
    hypotheses, references = zip(*corpus)
    rows = bleu_statistics(hypotheses, references)
    assert rows.shape == (len(corpus), 10)
    assert bleu_from_statistics(sum(rows)) == corpus_bleu(hypotheses, references)


@pytest.mark.filterwarnings("ignore:(?s).*counts of .-gram overlaps")
@quick
@given(corpora)
def test_mean_sentence_bleu_is_the_mean_of_nltks(corpus):
    hypotheses, references = zip(*corpus)
    scores = [sentence_bleu([ref.split()], text.split()) for text, ref in corpus]
    assert mean_sentence_bleu(hypotheses, references) == pytest.approx(100 * np.mean(scores))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "hypothesis, score", [("a b c d e", 100), ("a b c", 0), ("a b c x d e", 0), ("", 0), ("x", 0)]
)
def test_mean_sentence_bleu_needs_a_matching_4_gram_and_does_not_complain(hypothesis, score):
    assert mean_sentence_bleu([hypothesis], ["a b c d e"]) == pytest.approx(score, abs=1e-6)


def test_no_sentences_score_0():
    assert corpus_bleu([], []) == mean_sentence_bleu([], []) == chrf([], []) == 0.0
    assert bleu_statistics([], []).shape == (0, 10)
    assert paired_bootstrap([], [], []) == {"delta": 0.0, "interval": (0.0, 0.0), "p": 1.0}


@pytest.mark.parametrize("metric", [corpus_bleu, mean_sentence_bleu, chrf, bleu_statistics])
def test_every_hypothesis_needs_a_reference(metric):
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="sentence 2 has no reference"):
        metric(["a", "b"], ["a", []])


@pytest.mark.parametrize("fewest", [1, 2])
def test_signatures_are_sacrebleus_without_its_version(fewest):
    references = [["a b", "c d"], ["e f", "g h"][:fewest]]
    turned = [["a b", "e f"], ["c d", "g h" if fewest == 2 else None]]
    for name, metric in [("BLEU", sacrebleu.BLEU()), ("chrF2", sacrebleu.CHRF())]:
        metric.corpus_score(["a b", "e f"], turned)
        assert signature(name, references) == str(metric.get_signature()).split("|version")[0]


def test_the_signature_of_single_references():
    assert signature("BLEU", ["a", "b"]) == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
    assert signature("chrF2", ["a", "b"]) == "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no"


# The paired bootstrap

VOCABULARY = [f"w{i}" for i in range(100)]


def made_up_sentences(rng, n):
    return [" ".join(rng.choices(VOCABULARY, k=12)) for _ in range(n)]


def with_errors(rng, sentences, rate):
    """Each word replaced by another with probability `rate`."""
    spoil = lambda word: rng.choice(VOCABULARY) if rng.random() < rate else word
    return [" ".join(spoil(word) for word in sentence.split()) for sentence in sentences]


def test_a_system_never_differs_from_itself():
    rng = random.Random(0)
    references = made_up_sentences(rng, 50)
    hypotheses = with_errors(rng, references, 0.3)
    result = paired_bootstrap(hypotheses, hypotheses, references, n_resamples=100)
    assert result == {"delta": 0.0, "interval": (0.0, 0.0), "p": 1.0}


def test_a_clearly_better_system_is_significantly_better():
    rng = random.Random(0)
    references = made_up_sentences(rng, 200)
    better, worse = with_errors(rng, references, 0.2), with_errors(rng, references, 0.4)
    result = paired_bootstrap(better, worse, references)
    low, high = result["interval"]
    assert result["delta"] == corpus_bleu(better, references) - corpus_bleu(worse, references)
    assert 0 < low < result["delta"] < high
    assert result["p"] == 2 / 1001  # not one of a thousand draws went the other way


def test_of_labels_the_difference_is_that_of_the_exact_matches():
    references, better, worse = ["yes"] * 40, ["yes"] * 36 + ["no"] * 4, ["yes"] * 16 + ["no"] * 24
    result = paired_bootstrap(better, worse, references, exact=True)
    low, high = result["interval"]
    assert result["delta"] == pytest.approx(50) and 0 < low < 50 < high and result["p"] == 2 / 1001


def test_exchanging_the_systems_changes_the_sign_alone():
    rng = random.Random(1)
    references = made_up_sentences(rng, 50)
    a, b = with_errors(rng, references, 0.30), with_errors(rng, references, 0.32)
    one, other = paired_bootstrap(a, b, references), paired_bootstrap(b, a, references)
    assert one["p"] == other["p"] and one["delta"] == -other["delta"]
    assert one["interval"] == pytest.approx([-x for x in reversed(other["interval"])])


def test_a_seed_repeats_the_draws_and_another_does_not():
    rng = random.Random(2)
    references = made_up_sentences(rng, 50)
    systems = with_errors(rng, references, 0.3), with_errors(rng, references, 0.3)
    draw = lambda seed: paired_bootstrap(*systems, references, n_resamples=100, seed=seed)
    assert draw(1) == draw(1) != draw(2)


def test_equally_good_systems_are_called_different_about_once_in_twenty():
    rng, p = random.Random(3), []
    for trial in range(100):
        references = made_up_sentences(rng, 100)
        a, b = with_errors(rng, references, 0.3), with_errors(rng, references, 0.3)
        p.append(paired_bootstrap(a, b, references, n_resamples=100, seed=trial)["p"])
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.12
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "p, n, words",
    [
        (2 / 1001, 100, "significant at p = 0.002"),
        (0.0441, 100, "significant at p = 0.044"),
        (0.0519, 1000, "not significant (p = 0.052)"),
        (1.0, 100, "not significant (p = 1.000)"),
        (2 / 1001, 99, "too few sentences to tell"),
        (1.0, 1, "too few sentences to tell"),
    ],
)
def test_of_fewer_than_a_hundred_sentences_there_is_no_verdict(p, n, words):
    assert verdict(p, n) == words


@pytest.mark.parametrize(
    "scores, median", [([5], 0), ([1, 2], 1), ([2, 1], 0), ([9, 3, 5], 2), ([40, 1, 30, 20], 2), ([7, 7, 7], 1)]
)
def test_the_median_is_in_the_middle_or_the_better_of_two(scores, median):
    assert median_index(scores) == median


def test_the_benchmark_holds_the_median_seed_against_the_median_draw_of_each_direction(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import baselines

    rng = random.Random(5)
    references = {name: made_up_sentences(rng, 120) for name in ("a -> b", "b -> a")}

    def row(*rates):
        outputs = {name: with_errors(rng, texts, rate) for (name, texts), rate in zip(references.items(), rates)}
        scores = {name: {"bleu": corpus_bleu(outputs[name], references[name]), "chrf": 0.0} for name in references}
        cost = dict.fromkeys(("trained", "kept_bytes", "train_cpu_seconds", "answer_cpu_seconds", "peak_bytes"), 0)
        return {"directions": scores, "outputs": outputs, "references": references, **cost}

    table = {"prefix": [row(0.1, 0.1), row(0.2, 0.3), row(0.3, 0.2)], "3-shot": [row(0.6, 0.4), row(0.5, 0.5)]}
    baselines.show(table)
    shown = capsys.readouterr().out
    for name, ours, theirs in (("a -> b", 1, 1), ("b -> a", 2, 0)):
        better, worse = table["prefix"][ours]["directions"][name], table["3-shot"][theirs]["directions"][name]
        cell = baselines.compared(*table.values(), name)
        assert cell.startswith(f"{better['bleu'] - worse['bleu']:+.1f} (") and cell in shown


def test_a_thousand_resamples_of_a_thousand_sentences_take_about_a_second():
    rng = random.Random(4)
    references = made_up_sentences(rng, 1000)
    a, b = with_errors(rng, references, 0.3), with_errors(rng, references, 0.3)
    start = time.process_time()
    paired_bootstrap(a, b, references)
    assert time.process_time() - start < 3  # 0.3 s on an idle core
