"""Packed and 8-bit weights: another form of the same model."""

import copy

import pytest
import torch

from minigpt import GPT, GPTConfig
from minigpt.attention import Slots
from minigpt.cache import attend_cached
from minigpt.cache import Cache, decode_one_token, prefill
from minigpt.quantize import ROWS, Int8Weight, prepack, quantize

CONFIG = GPTConfig(vocab_size=301, n_positions=64, n_embd=96, n_layer=2, n_head=3)


@pytest.fixture
def model():
    model = GPT(CONFIG).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(torch.bfloat16)


def error(ours, exact):
    return float((ours.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("form, bound", [(prepack, 0.03), (quantize, 0.06)])
@pytest.mark.parametrize("tokens", [1, ROWS, ROWS + 1, 40])
def test_the_logits_stay_what_they_are(model, form, bound, tokens):
    ids = torch.randint(CONFIG.vocab_size, (1, tokens))
    exact = copy.deepcopy(model).float()(ids)
    assert error(form(copy.deepcopy(model))(ids), exact) < bound


def test_eight_bits_miss_a_weight_by_half_a_step_at_most(model):
    exact = model.h[0].mlp.c_fc.weight.float().T
    ours = quantize(model).h[0].mlp.c_fc
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((ours.weight * ours.scale[:, None].float() - exact).abs() <= 0.51 * step).all()
    assert ours.weight.dtype == torch.int8


def test_a_matrix_of_zeros_is_zero_in_eight_bits(model):
    model.h[0].mlp.c_fc.weight.zero_()
    assert not quantize(model).h[0].mlp.c_fc.product(torch.ones(1, 96, dtype=torch.bfloat16)).any()


@pytest.mark.parametrize("form", [prepack, quantize])
def test_the_embedding_of_a_token_is_also_its_row_of_the_head(model, form):
    exact = model.wte.weight.float()
    model = form(model)
    assert error(model.wte(torch.arange(CONFIG.vocab_size)), exact) < 0.01
    hidden = torch.randn(5, 96).to(torch.bfloat16)
    assert error(model.logits(hidden), hidden.float() @ exact.T) < 0.02


@pytest.mark.parametrize("form, bound", [(prepack, 0.03), (quantize, 0.06)])
def test_a_model_in_another_form_decodes(model, form, bound):
    ids = torch.randint(CONFIG.vocab_size, (2, 12))
    exact = copy.deepcopy(model).float()(ids)[:, -1]
    cache = Cache(form(model), 2, 12)
    with torch.no_grad():
        prefill(model, cache, 0, [row[:-1].tolist() for row in ids])
        cache.ids[:, 0] = ids[:, -1]
        assert error(decode_one_token(model, cache, 2)[:, 0], exact) < bound


@pytest.mark.parametrize("n_embd", [3, 36, 72])
def test_eight_bits_take_any_width(n_embd):
    layer = Int8Weight(torch.randn(5, n_embd))
    x = torch.randn(2, n_embd).bfloat16()
    assert error(layer.product(x), x.float() @ (layer.weight * layer.scale[:, None].float()).T) < 0.02


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("B, Q, T, S", [(1, 1, 1, 3), (3, 1, 20, 7), (2, 4, 9, 5), (3, 2, 8, 0)])
def test_cached_attention_without_scores_in_memory_equals_the_formula(dtype, bound, B, Q, T, S):
    """Every query sees at least one cached key, its own; of the slots it may see none."""
    q, key, value = (torch.randn(B, 3, n, 16, dtype=dtype) for n in (Q, T, T))
    slots = Slots(torch.randn(3, S, 16), torch.randn(3, S, 16), torch.zeros(S, dtype=torch.int32)) if S else None
    sees = torch.rand(B, Q, S + T) < 0.5
    sees[..., -1] = True
    sees[0, :, :S] = False
    bias = torch.zeros(B, Q, S + T, dtype=dtype).masked_fill(~sees, -torch.inf)
    fused = attend_cached(q, key, value, bias, slots)
    exact = attend_cached(q.double(), key.double(), value.double(), bias.double(), slots, "plain")
    assert error(fused, exact) < bound
