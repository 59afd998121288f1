"""Where only some answers are allowed, the likeliest is taken, and likely means what it says."""

import itertools

import pytest
import torch
from conftest import random_model

from minigpt import GPTConfig
from minigpt.generate import Prompt
from minigpt.scoring import likeliest_answer, log_p, max_new_tokens
from prefix.init import random_banks

CONFIG = GPTConfig(vocab_size=61, n_positions=48, n_embd=24, n_layer=2, n_head=3)


@pytest.fixture
def model():
    return random_model(CONFIG)


@torch.no_grad()
def written_out(model, prompt, answer, banks):
    """log p of an answer, token by token, without packing."""
    total = 0.0
    for i in range(len(answer)):
        ids = torch.tensor([prompt.ids + answer[:i]])
        total += float(banks.logits(model, ids, open=["a", "b"])[0, -1].log_softmax(-1)[answer[i]])
    return total


def test_an_answer_scores_the_probability_of_its_tokens_and_of_its_end(model):
    banks = random_banks(CONFIG, ["a", "b"], 3)
    prompts = [Prompt(torch.randint(60, (n,)).tolist(), 5, [3] * n) for n in (4, 1, 7)]
    answers = [torch.randint(60, (n,)).tolist() + [60] for n in (1, 3, 2, 0)]
    pairs = list(itertools.product(prompts, answers))
    expected = [written_out(model, prompt, answer, banks) for prompt, answer in pairs]
    torch.testing.assert_close(log_p(model, pairs, banks.slots()), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    best = [max(answers, key=lambda a: written_out(model, prompt, a, banks)) for prompt in prompts]
    for batch_size in (1, 3, 32):
        chosen = likeliest_answer(model, prompts, answers, banks.slots(), batch_size=batch_size)
        assert [result.ids for result in chosen] == [answer[:-1] for answer in best]
        assert all(result.finished for result in chosen)


@pytest.mark.parametrize("left, tokens", [(1, 0), (2, 3), (9, 3)])
def test_the_last_token_of_the_longest_answer_needs_no_room(left, tokens):
    assert max_new_tokens([[1], [1, 2, 3]], left) == tokens
