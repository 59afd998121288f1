"""The other ways to steer a model, with which the prefix is compared, are what they say they are."""

import numpy as np
import pytest
import torch
from benchmarks.ways import FineTuning, LoRA, Nearest, Prefix, PromptTuning, nearest_shots, opening, train, trigrams

from minigpt.generate import Prompt, generate
from prefix.data.rows import clean
from prefix.evaluation.few_shot import Shots, few_shot

TEXTS = ["Le chat dort.", "Le chien dort.", "Il pleut à Paris.", "Où est la gare ?", "Il pleut.", "LE CHAT dort."]


@pytest.fixture
def model(demo):
    return demo[0]


@pytest.fixture
def examples(cats):
    """Two pairs of unlike length, one in each direction."""
    return [(cats.ids(3, 0), cats.ids(3, 1), 0, 1), (cats.ids(12, 1)[:4], cats.ids(12, 0), 1, 0)]


def test_prompt_embeddings_that_are_those_of_tokens_are_these_tokens(model, tokenizer, cats, examples):
    way = PromptTuning("demo", tokenizer, cats, length=2)  # its embeddings start as those of these:
    front = [opening(cats, column, 2) for column in (0, 1)]
    batch = way.pack(examples)
    rows = [[*front[s], *source, *front[t], way.sep, *target] for source, target, s, t in examples]
    expected = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    found = way.model.logits(way.model.hidden(batch.ids, batch.packed))  # and of no more columns: they never come out
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    encoded = [tokenizer.encode(text) for text in TEXTS]
    prompts = [Prompt([*front[1], *ids, *front[0], way.sep], 2 * len(ids) + 16) for ids in encoded]
    answers = [clean(tokenizer.decode(result.ids)) for result in generate(model, prompts, [tokenizer.eot])]
    assert [translation.text for translation in way.translate(TEXTS, "fr", "en")] == answers and any(answers)


def test_fine_tuning_reads_the_prompt_that_decoding_asks_with(tokenizer, cats, examples):
    batch = FineTuning("demo", tokenizer, cats).pack(examples)
    asked = ["en: The cat number 3 sleeps.\nfr:", f"fr: {tokenizer.decode(examples[1][0])}\nen:"]
    answers = [" Le chat numéro 3 dort.", " The cat number 12 sleeps."]
    assert tokenizer.decode(batch.ids) == asked[0] + answers[0] + asked[1] + answers[1]
    assert tokenizer.decode(batch.targets) == "".join(f"{answer}<|endoftext|>" for answer in answers)
    ends = batch.targets == tokenizer.eot
    assert torch.equal(batch.ids[batch.target_index[~ends] + 1], batch.targets[~ends])
    assert (batch.target_index[ends] + 1).tolist() == [batch.packed.lengths[0], len(batch.ids)]


def test_lora_merged_into_our_weights_gives_the_logits_that_peft_gives(tokenizer, cats, examples, model):
    way = LoRA("demo", tokenizer, cats)
    batch = way.pack(examples)
    plain = model.hidden(batch.ids, batch.packed)
    torch.testing.assert_close(way.hidden(batch).detach(), plain, rtol=0, atol=1e-4)  # before training: nothing added
    with torch.no_grad():
        for p in way.parameters():
            p.normal_(std=0.1)
    theirs = way.hidden(batch).detach()
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(way.tuned.hidden(batch.ids, batch.packed), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, trained", [(Prefix, 61440), (PromptTuning, 5120), (FineTuning, None), (LoRA, 61440)])
def test_each_way_trains_what_it_says_and_nothing_else(kind, trained, tokenizer, cats):
    way = kind("demo", tokenizer, cats)
    learned = list(way.parameters())
    assert sum(p.numel() for p in learned) == (trained or sum(p.numel() for p in way.model.parameters()))
    frozen = [p for p in way.model.parameters() if all(p is not q for q in learned)]
    before = [p.detach().clone() for p in learned], [p.detach().clone() for p in frozen]
    train(way, cats, steps=2, lr=1e-3, batch_size=4)
    after = learned, frozen
    unchanged = [[torch.equal(old, new) for old, new in zip(*both)] for both in zip(before, after)]
    assert not any(unchanged[0]) and all(unchanged[1])


def test_the_nearest_texts_are_those_of_the_largest_cosine():
    nearest, grams = Nearest(TEXTS), sorted({gram for text in TEXTS for gram in trigrams(text)})
    n = np.array([[trigrams(text)[gram] for gram in grams] for text in TEXTS])  # (texts, trigrams)
    weights = n * np.log(1 + len(TEXTS) / (n > 0).sum(axis=0))
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    for text, row in zip(TEXTS, weights):
        np.testing.assert_allclose(nearest.similarity(text), weights @ row, atol=1e-12)
    assert nearest("Le chat dort ?", 3).tolist() == [1, 5, 0]  # the likest last; of equals, the first
    assert nearest.similarity("xyz").tolist() == [0] * len(TEXTS)


def test_a_nearest_prompt_is_a_few_shot_prompt_with_shots_of_its_own(model, tokenizer):
    answers = ["The cat sleeps.", "The dog sleeps.", "It's raining in Paris.", "Where is it?", "It's raining."]
    pairs = list(zip(TEXTS, answers))
    asked = ["Le chien dort ?", "Il pleut à Rome."]
    found, fewer = nearest_shots(model, tokenizer, pairs, asked, "fr", "en", k=2)
    for text, shots, answer in zip(asked, [(0, 1), (4, 2)], found):
        shared = few_shot(model, tokenizer, Shots([pairs[i] for i in shots], "fr", "en"), [text])
        assert [answer] == shared and answer.text
    assert fewer == 0


def test_the_shots_least_alike_make_room_where_the_context_is_full(model, tokenizer):
    pairs = [("Le chat dort. " * n, "The cat sleeps. " * n) for n in (1, 5, 20)]
    found, fewer = nearest_shots(model, tokenizer, pairs, ["Le chat dort."], "fr", "en", k=3)
    assert fewer == 1 and found[0].text and len(tokenizer.encode(Shots(pairs, "fr", "en").text)) > 256
