"""Texts in, texts out: long texts in parts, sampling by number, and decoding within the memory that there is."""

import pytest
import torch

from minigpt import UserError, memory
from minigpt.cache import Cache
from minigpt.generate import Sampler
from prefix import decoding as algorithms
from prefix.decoding import Decoding
from prefix.translation import SENTENCE_END, translate

TEXTS = ["Il pleut.", "Merci.", "Où est la gare ?", "Je suis là.", "Tom est parti hier soir avec ses amis."]


def written(demo, texts=TEXTS, **options):
    return [result.text for result in translate(*demo, texts, ("fr", "en"), Decoding(**options))]


def test_translating_is_one_call_that_gives_a_text_for_each_text(demo):
    assert written(demo, ["Bonjour", "", "Il\npleut."]) == ["Good afternoon.", "", "It's raining."]


def test_the_end_of_text_token_is_ordinary_text_and_the_target_bank_is_open_from_the_separator_on(demo, monkeypatch):
    asked, generate = [], algorithms.generate
    note = lambda model, prompts, *rest, **named: asked.extend(prompts) or generate(model, prompts, *rest, **named)
    monkeypatch.setattr(algorithms, "generate", note)
    written(demo, ["a <|endoftext|> b"])
    assert demo[1].eot not in asked[0].ids
    assert demo[1].decode(asked[0].ids) == "a <|endoftext|> b\n"
    assert asked[0].bank_mask == [0b10] * (len(asked[0].ids) - 1) + [0b11]  # of en and fr


def test_a_text_that_does_not_fit_is_cut_at_the_ends_of_its_sentences():
    text = "Un deux. « Trois ! » Quatre ? Cinq... six. (Sept.) 8.5 Huit"
    sentences = ["Un deux.", "« Trois ! »", "Quatre ?", "Cinq...", "six.", "(Sept.)", "8.5 Huit"]
    assert SENTENCE_END.split(text) == sentences


def test_numbers_below_those_of_float32_are_the_likeliest_token(demo):
    greedy = written(demo)
    assert written(demo, sampler=Sampler(1e-50)) == written(demo, sampler=Sampler(1.0, top_p=1e-300)) == greedy


# Memory


@pytest.fixture
def caches(monkeypatch):
    """The (rows, capacity) of every cache that decoding takes from now on."""
    taken, build = [], Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda *given: (taken.append(given[2:4]), build(*given))[1])
    return taken


def limit_memory(monkeypatch, amount):
    for module in (memory, algorithms):
        monkeypatch.setattr(module, "free_memory", lambda device: amount / memory.SHARE)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_are_lowered_to_what_memory_has_room_for_and_the_texts_are_the_same(demo, caches, monkeypatch, capsys, beams):
    before = written(demo, beams=beams)
    ((rows, longest),) = caches
    assert rows == len(TEXTS)
    limit_memory(monkeypatch, 2.5 * memory.row_bytes(demo[0], longest, beams))
    assert written(demo, beams=beams) == written(demo, beams=beams) == before
    assert max(rows for rows, _ in caches[1:]) == 2
    assert capsys.readouterr().err == "Memory has room for 2 sentences at a time, not 5\n"


def test_a_beam_for_which_there_is_no_memory_is_one_line_before_any_is_taken(demo, caches, monkeypatch):
    limit_memory(monkeypatch, 5e8)
    with pytest.raises(UserError, match=r"one sentence takes \d\.\d GB with --beam 4096.* for 0\.5: lower --beam"):
        written(demo, beams=4096)
    assert caches == []


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("name, options", [
    ("generate", {"sampler": Sampler(1.0, seed=1)}),
    ("beam_search", {"beams": 2}),
    ("likeliest_answer", {"choices": ["It rains.", "Thank you."]}),
])  # fmt: skip
def test_where_memory_runs_out_rows_are_halved_and_the_texts_are_the_same(demo, monkeypatch, capsys, name, options):
    before, work, tried = written(demo, **options), getattr(algorithms, name), []

    def full(*given, batch_size, **named):
        tried.append(batch_size)
        results = work(*given, batch_size=batch_size, **named)
        if batch_size > 1:
            raise OUT_OF_MEMORY
        return results

    monkeypatch.setattr(algorithms, name, full)
    decoding = Decoding(**options, batch_size=4)
    assert [result.text for result in translate(*demo, TEXTS, ("fr", "en"), decoding)] == before
    assert tried == [4, 2, 1] and decoding.batch_size == 1  # later texts begin there
    assert capsys.readouterr().err == "Out of memory with 4 sentences at a time: now 1\n"


def test_memory_that_one_sentence_exhausts_is_one_line_and_a_bug_is_not_taken_for_it(demo, monkeypatch):
    for error, expected, words in (
        (OUT_OF_MEMORY, UserError, "even with one sentence at a time: lower --beam"),
        (RuntimeError("shapes do not match"), RuntimeError, "shapes"),
    ):
        monkeypatch.setattr(algorithms, "generate", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(expected, match=words):
            written(demo)
