"""k-shot prompting: the examples are a bank, and the two forms of a prompt are tried fairly."""

import pytest
import torch

from minigpt import UserError
from minigpt.generate import Prompt, generate
from prefix.data.rows import clean
from prefix.evaluation.few_shot import FORMS, Shots, draw_shots, few_shot, form_log_p
from prefix.translation import Decoding

PAIRS = [("Il pleut.", "It's raining."), ("Où est-il ?", "Where is he?"), ("Merci.", "Thank you.")]
ASKED = ["Le chien dort.", "Il est\ntard.", "Oui."]
WRITTEN = {
    "names": "fr: Il pleut.\nen: It's raining.\nfr: Où est-il ?\nen: Where is he?\nfr: Le chien dort.\nen:",
    "lines": "Il pleut.\nIt's raining.\n\nOù est-il ?\nWhere is he?\n\nLe chien dort.\n",
}


@pytest.fixture
def model(demo):
    return demo[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_reads_as_it_should_in_both_forms(form):
    shots = Shots(PAIRS[:2], "fr", "en", form)
    assert shots.text + shots.question("Le chien dort.") == WRITTEN[form]
    assert Shots([], "fr", "en", form).text == "" and not Shots([], "fr", "en", form).question("x").startswith("\n")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [0, 2])
def test_examples_in_a_shared_bank_give_the_output_of_plain_prompting(model, tokenizer, form, k):
    shots = Shots(PAIRS[:k], "fr", "en", form)
    ours = few_shot(model, tokenizer, shots, ASKED, Decoding(batch_size=2))
    assert any(answer.text for answer in ours)
    for text, answer in zip(ASKED, ours):
        ids, own = tokenizer.encode(shots.text + shots.question(text)), tokenizer.encode(shots.question(text))
        assert ids == tokenizer.encode(shots.text) + own  # cutting the prompt in two changes no token
        plain = generate(model, [Prompt(ids, 2 * len(tokenizer.encode(text)) + 16)], [tokenizer.eot])[0]
        assert answer.text == clean(tokenizer.decode(plain.ids).split("\n")[0])  # its next line


@torch.no_grad()
def written_out(model, tokenizer, shots, source, target):
    """log p of a target text after the whole prompt, token by token."""
    asked, answer = shots.text + shots.question(source), shots.answer(target)
    ids = tokenizer.encode(asked) + tokenizer.encode(answer)
    logp, n = model(torch.tensor([ids]))[0].log_softmax(-1), len(tokenizer.encode(asked))
    return sum(float(logp[i - 1, ids[i]]) for i in range(n, len(ids)))


@pytest.mark.parametrize("k", [0, 1])
def test_a_form_is_judged_by_the_mean_log_probability_of_other_targets(model, tokenizer, k):
    shots, trials = Shots(PAIRS[:k], "fr", "en"), PAIRS[1:]
    found = form_log_p(model, tokenizer, shots, trials)
    assert [*found] == [*FORMS]
    for form, value in found.items():
        asked = Shots(shots.pairs, "fr", "en", form)
        assert value == pytest.approx(sum(written_out(model, tokenizer, asked, *pair) for pair in trials) / 2, abs=1e-3)


def test_a_trial_that_does_not_fit_into_the_context_is_left_out_of_both_forms(model, tokenizer):
    shots, long = Shots(PAIRS[:1], "fr", "en"), ("mot " * 300, "word")
    assert form_log_p(model, tokenizer, shots, [PAIRS[1], long]) == form_log_p(model, tokenizer, shots, PAIRS[1:2])
    assert form_log_p(model, tokenizer, shots, [long]) == {}


def test_examples_and_trials_are_training_pairs_and_none_is_to_be_evaluated(cats):
    training = {(cats.text(row, 1), cats.text(row, 0)) for row in cats.rows("train")}
    avoid = {source for source, _ in [*training][:20]}
    shots, trials = draw_shots(cats, "fr", "en", 5, 0, avoid)
    assert (len({*shots.pairs}), len({*trials})) == (5, 12)
    assert {*shots.pairs, *trials} <= training and len({*shots.pairs, *trials}) == 17
    assert not {source for source, _ in [*shots.pairs, *trials]} & avoid
    assert draw_shots(cats, "fr", "en", 5, 0, avoid) == (shots, trials) != draw_shots(cats, "fr", "en", 5, 1, avoid)
    left = len(training) - 20
    with pytest.raises(UserError, match=f"{left + 1} shots, but {left} training pairs to draw them from"):
        draw_shots(cats, "fr", "en", left + 1, 0, avoid)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_can_be_chosen_in_both_forms(model, tokenizer, form):
    shots, choices = Shots(PAIRS, "fr", "en", form), ["It is late.", "The dog sleeps.", "Yes."]
    answers = few_shot(model, tokenizer, shots, ASKED, Decoding(choices=choices))
    best = [max(choices, key=lambda c: written_out(model, tokenizer, shots, text, c)) for text in ASKED]
    assert [answer.text for answer in answers] == best
