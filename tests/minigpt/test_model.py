"""The model computes what transformers' GPT-2 computes with the same weights."""

import pytest
import torch

from minigpt import GPT, Tokenizer, UserError
from minigpt.checkpoint import DEMO
from minigpt.config import ACTIVATIONS, PUBLISHED

PARAMETERS = {  # as published (gpt2's 117 M in the paper is a miscount)
    "distilgpt2": 81_912_576,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(PUBLISHED[name]).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("settings", [
    *({"n_embd": size.n_embd, "n_head": size.n_head, "vocab_size": 500, "n_positions": 64} for size in PUBLISHED.values()),
    *({"activation_function": activation} for activation in ACTIVATIONS),
    *({"n_inner": 40}, {"layer_norm_epsilon": 0.1}, {"n_positions": 7}, {"n_layer": 1}, {"n_head": 1}),
    {"reorder_and_upcast_attn": True},  # another way to the same numbers
], ids=str)  # fmt: skip
def test_logits_equal_transformers_at_every_published_proportion_and_for_every_setting(settings, reference, tmp_path):
    theirs = reference(**settings)
    ours, ids = GPT.from_pretrained(tmp_path), torch.randint(theirs.config.vocab_size, (2, theirs.config.n_positions))
    for ours.attention in ("auto", "plain"):
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_text_longer_than_the_context_is_an_error_that_names_both_lengths(reference, tmp_path):
    reference(n_positions=16)
    with pytest.raises(UserError, match="17 positions .* context of 16"):
        GPT.from_pretrained(tmp_path)(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_model_is_frozen_and_what_it_was_asked_to_be(dtype, reference, tmp_path):
    reference()
    model = GPT.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model.dtype}
    assert not list(model.buffers()) and not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    logits = model(torch.zeros(1, 3, dtype=torch.int64))
    assert (logits.dtype, logits.requires_grad, logits.device) == (torch.float32, False, model.device)


def test_the_demo_writes_what_transformers_writes():
    """20 greedy tokens after a prompt with accents and an emoji, and the text that they spell."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = GPT.from_pretrained(DEMO), Tokenizer.from_pretrained(DEMO)
    ids = ours = torch.tensor([tokenizer.encode("Où est née l'œuvre ? Ça alors 🙂 !\nWhere was it")])
    for _ in range(20):
        ours = torch.cat([ours, model(ours)[:, -1:].argmax(dim=-1)], dim=1)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32).generate(ids, **settings))
    assert tokenizer.decode(ours[0].tolist()) == AutoTokenizer.from_pretrained(DEMO).decode(ours[0])
