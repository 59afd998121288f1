"""The model computes what transformers' GPT-2 computes with the same weights."""

import pytest
import torch
from conftest import copy_tokenizer

from minigpt import GPT, GPTConfig, Tokenizer, UserError
from minigpt.checkpoint import DEMO
from minigpt.config import ACTIVATIONS, PUBLISHED

PARAMETERS = {  # as published (gpt2's 117 M in the paper is a miscount)
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def assert_same_logits(theirs, directory):
    """On random ids that fill the whole context."""
    ids = torch.randint(theirs.config.vocab_size, (2, theirs.config.n_positions))
    ours = GPT.from_pretrained(directory)
    for ours.attention in ("plain", "auto"):
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_equal_transformers_at_the_proportions_of_every_published_size(name, reference, tmp_path):
    shape = PUBLISHED[name]
    theirs = reference(n_embd=shape.n_embd, n_head=shape.n_head, vocab_size=500, n_positions=64)
    assert_same_logits(theirs, tmp_path)


SETTINGS = [
    *({"activation_function": activation} for activation in ACTIVATIONS),
    *({"n_inner": 40}, {"layer_norm_epsilon": 0.1}, {"n_positions": 7}, {"n_layer": 1}, {"n_head": 1}),
    {"reorder_and_upcast_attn": True},  # another way to the same numbers
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_setting_of_config_json_means_what_it_means_in_transformers(settings, reference, tmp_path):
    assert_same_logits(reference(**settings), tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(PUBLISHED[name]).parameters()) == PARAMETERS[name]


def test_logits_of_a_token_do_not_depend_on_later_tokens(reference, tmp_path):
    reference()
    model, ids = GPT.from_pretrained(tmp_path), torch.randint(100, (1, 16))
    torch.testing.assert_close(model(ids)[:, :9], model(ids[:, :9]))


def test_a_text_longer_than_the_context_is_an_error_that_names_both_lengths(reference, tmp_path):
    reference(n_positions=16)
    with pytest.raises(UserError, match="17 positions .* context of 16"):
        GPT.from_pretrained(tmp_path)(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_model_is_frozen_and_of_the_type_it_was_asked_to_be(dtype, reference, tmp_path):
    reference()
    model = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, False)} and model.dtype == dtype
    assert not list(model.buffers()) and not any(module.training for module in model.modules())
    logits = model(torch.zeros(1, 3, dtype=torch.int64))
    assert (logits.dtype, logits.requires_grad) == (dtype, False)


def greedy(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0].tolist()


def assert_same_continuation(theirs, directory):
    """20 greedy tokens after a prompt with accents and an emoji, and the text that they spell."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer.encode("Où est née l'œuvre ? Ça alors 🙂 !\nWhere was it")])
    ours = greedy(GPT.from_pretrained(directory), ids, 20)
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours == theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
    assert tokenizer.decode(ours) == AutoTokenizer.from_pretrained(directory).decode(ours)


def test_the_demo_writes_what_transformers_writes():
    from transformers import GPT2LMHeadModel

    assert_same_continuation(GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32), DEMO)


def test_random_weights_write_what_they_write_in_transformers(vocabulary, reference, tmp_path):
    size = len(Tokenizer.from_pretrained(vocabulary).ids)
    theirs = reference(vocab_size=size, n_positions=64)
    copy_tokenizer(vocabulary, tmp_path)
    assert_same_continuation(theirs, tmp_path)


def test_the_default_config_is_gpt2s():
    assert GPTConfig() == PUBLISHED["gpt2"]
    assert GPTConfig().head_dim == 64 and GPTConfig().mlp_dim == 3072
