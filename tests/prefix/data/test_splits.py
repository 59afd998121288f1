"""A sentence belongs to one split, whatever file, order or spelling it is met in."""

from collections import Counter

from prefix.data.splits import TEST, VALIDATION, split_of


def test_the_splits_are_those_of_the_demos_pretraining():
    assert [split_of(f"This is sentence {i}.") for i in (12, 27, 28)] == ["validation", "test", "train"]


def test_the_shares_are_about_what_they_say():
    n = 20_000
    counts = Counter(split_of(f"sentence {i}") for i in range(n))
    assert abs(counts["validation"] / n - VALIDATION) < 0.005  # five standard deviations
    assert abs(counts["test"] / n - TEST) < 0.007


def test_case_spacing_and_punctuation_do_not_count():
    for i in range(200):
        splits = {split_of(text.format(i)) for text in ("Go on {}.", "go on {} !", "GO ON, {}", " go  on\n«{}»")}
        assert len(splits) == 1


def test_texts_without_a_letter_or_digit_do_not_all_fall_together():
    assert len({split_of("!" * i) for i in range(200)}) > 1
