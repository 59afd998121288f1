"""Packed and 8-bit weights: another form of the same model."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import random_model

from minigpt import GPTConfig
from minigpt import quantize as module
from minigpt.cache import Cache, decode_one_token, prefill
from minigpt.quantize import FBGEMM, Int8, OneDNN, fastest_product, prepack, quantize, rounded, saturates

CONFIG = GPTConfig(vocab_size=301, n_positions=64, n_embd=96, n_layer=2, n_head=3)
PRODUCTS = [OneDNN, FBGEMM] if "fbgemm" in torch.backends.quantized.supported_engines else []  # of x86 with AVX2


def in_8_bits(product):
    return lambda model: quantize(model.float(), product)


def packed_in_float32(model):
    with mock.patch.object(module, "packing_pays", lambda model: True):
        return prepack(model.float())


FORMS = [(prepack, 0.03), *((in_8_bits(product), 0.06) for product in PRODUCTS)]
FORMS += [(packed_in_float32, 1e-5)] if torch.backends.mkldnn.is_available() else []
eight_bits = pytest.mark.parametrize("product", PRODUCTS)


@pytest.fixture
def model():
    return random_model(CONFIG, std=0.2).to(torch.bfloat16)


def error(ours, exact):
    return float((ours.float() - exact).norm() / exact.norm())


def times(product, x, weight):
    """x @ weight.T by 8 bits and by the formula. x: from 0 to 255."""
    eight, scale = rounded(weight, saturates(product))
    return product(eight, scale)(x.clone()), x.round() @ (eight.float().T * scale)


@pytest.mark.parametrize("form, bound", FORMS)
@pytest.mark.parametrize("tokens", [1, 8, 41])  # 82 rows are multiplied as 88
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_the_logits_stay_what_they_are_in_decoding_too(form, bound, tokens, activation):
    model = random_model(replace(CONFIG, activation_function=activation), std=0.2).to(torch.bfloat16)
    ids = torch.randint(CONFIG.vocab_size, (2, tokens + 1))
    exact = copy.deepcopy(model).float()(ids)
    model = form(model)
    assert error(model(ids[:, :-1]), exact[:, :-1]) < bound
    cache = Cache(model, 2, tokens + 1)
    with torch.no_grad():
        prefill(model, cache, 0, ids[:, :-1].tolist())
        cache.ids[:, 0] = ids[:, -1]
        assert error(decode_one_token(model, cache, 2)[:, 0], exact[:, -1]) < bound


@eight_bits
@pytest.mark.parametrize("n_in", [3, 36, 72, 512])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_product_of_eight_bits_is_exact(product, n_in, rows):
    steps = torch.randint(0, 256, (rows, n_in)) + (torch.rand(rows, n_in) - 0.5) * 0.9  # away from ties of rounding
    ours, exact = times(product, steps.clamp(0, 255), torch.randn(50, n_in))
    assert error(ours, exact) < 1e-5
    largest = torch.ones(40, n_in)  # no sum of these saturates, nor of the others
    for weight in (largest, -largest, torch.randn(40, n_in).sign()):
        ours, exact = times(product, torch.full((rows, n_in), 255.4), weight)
        assert error(ours, exact) < 1e-6 and error(ours, torch.full((rows, n_in), 255.0) @ weight.T) < 0.01


@eight_bits
@pytest.mark.parametrize("low, high", [(-1, 1), (-2, 9), (-6, 1), (-1e-4, 1e-4)])
def test_a_row_does_not_depend_on_its_neighbours(product, low, high):
    multiply, x = Int8(product, *rounded(torch.randn(50, 96), saturates(product))), low + (high - low) * torch.rand(20, 96)
    together = multiply(torch.cat([x, 1000 * torch.randn(9, 96)]))[:20]
    alone = torch.cat([multiply(row[None]) for row in x])
    apart = (alone - together).norm(dim=1) / alone.norm(dim=1)
    assert (apart < 1e-4).sum() >= 18 and apart.max() < 0.2  # a number halfway between two levels may go to either


@eight_bits
@pytest.mark.parametrize("low, high", [(-1, 1), (-0.2, 9), (-4, 0)])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_row_is_rounded_by_the_range_of_its_own(product, low, high, rows):
    """GELU's results are nearly all positive."""
    weight, x = torch.randn(50, 96), low + (high - low) * torch.rand(rows, 96)
    assert error(Int8(product, *rounded(weight, saturates(product)))(x), x @ weight.T) < 0.02


@pytest.mark.parametrize("pairs_fit", [False, True])
@pytest.mark.parametrize("n_in", [1, 70, 71])
def test_eight_bits_miss_a_weight_by_half_a_step_at_most_and_sums_of_neighbours_fit_where_they_must(pairs_fit, n_in):
    exact = torch.randn(300, n_in)
    weight, scale = rounded(exact, pairs_fit)
    assert ((weight * scale[:, None] - exact).abs() <= 0.501 * scale[:, None]).all()
    neighbours = (weight[:, :-1:2].int() + weight[:, 1::2]).abs()
    assert weight.dtype == torch.int8 and weight.abs().max() == 127
    assert n_in == 1 or (neighbours.max() <= 128) == pairs_fit


@eight_bits
def test_zeros_are_zero_in_eight_bits(model, product):
    model.h[0].mlp.c_fc.weight.zero_()
    in_8_bits(product)(model)
    for block, x in zip(model.h, (torch.randn(2, 96), torch.zeros(2, 96))):
        torch.testing.assert_close(block.mlp.c_fc(x), block.mlp.c_fc.bias.expand(2, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form, bound", FORMS)
def test_the_embedding_of_a_token_is_also_its_row_of_the_head(model, form, bound):
    exact = model.wte.weight.float()
    model = form(model)
    assert error(model.wte(torch.arange(CONFIG.vocab_size)), exact) < 0.01 + bound / 10
    hidden = torch.randn(5, 96).to(model.dtype)
    logits = model.logits(hidden)
    assert error(logits, hidden.float() @ exact.T) < bound and logits.dtype == torch.float32


@pytest.mark.skipif(not PRODUCTS, reason="torch has no 8-bit product for this CPU")
@pytest.mark.parametrize("fast", PRODUCTS)
def test_the_faster_product_is_taken_and_none_where_a_cpu_has_none(model, monkeypatch, fast):
    monkeypatch.setattr(module, "seconds", lambda run, x: 1.0 if isinstance(run.product, fast) else 2.0)
    assert fastest_product(model) is fast
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none"])
    assert fastest_product(model) is None


def test_nothing_is_packed_where_bfloat16_is_emulated(model, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    assert type(prepack(model).wte).__name__ == "Embedding"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("packed, kind", [(0.7, "PackedEmbedding"), (0.9, "Embedding")])
def test_float32_is_packed_where_that_is_a_good_deal_faster(model, monkeypatch, packed, kind):
    monkeypatch.setattr(module, "seconds", lambda run, x: packed if isinstance(run, module.PackedConv1D) else 1.0)
    assert type(prepack(model.float()).wte).__name__ == kind
