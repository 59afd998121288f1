"""Slots move in units of the base's own keys and values, so a learning rate means the same on every base."""

import pytest
import torch
from conftest import flat, metrics, one_step, projected, random_rows, same, slots_of

from prefix.batches import BatchLoader
from prefix.init import initial_banks, units_of
from prefix.trainer import Settings, Trainer


@torch.no_grad()
def scaled(model):
    """The same function with other keys and values: in each layer and head keys times a random factor c (queries by
    1/c) and values times d (the rows of c_proj that read them by 1/d), c and d between 1/8 and 8."""
    c = model.config
    for block in model.h:
        k, v = (8.0 ** (2 * torch.rand(2, c.n_head) - 1))[:, :, None].expand(-1, -1, c.head_dim).flatten(1)  # (n_embd,)
        factor = torch.cat([1 / k, k, v])
        block.attn.c_attn.weight *= factor
        block.attn.c_attn.bias *= factor
        block.attn.c_proj.weight /= v[:, None]
    return model


@pytest.mark.parametrize("init, reparam", [("text", False), ("random", True), ("zero-effect", False)])
def test_a_base_with_scaled_keys_and_values_trains_to_the_same_losses(model, tokenizer, load, tmp_path, init, reparam):
    corpus = load(random_rows("train", 40))
    config = {"init": init, "prefix_len": 12, "position_offset": 0, "reparam": reparam, "settings": {"seed": 3}}
    settings, losses = Settings(steps=10, lr=0.01 if reparam else 0.1, batch_size=8, warmup=2), []
    ids = torch.randint(100, (2, 20))
    logits = [model(ids)]
    for base in (lambda: model, lambda: scaled(model)):
        banks = initial_banks(config, base(), tokenizer, corpus)
        trainer = Trainer(model, banks, BatchLoader(corpus, tokenizer, settings, model.device), settings, tmp_path)
        losses.append([one_step(trainer)["loss"] for _ in range(10)])
    logits.append(model(ids))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert all((now != then).any() for now, then in zip(banks.slots().key, torch.cat(list(banks.key), dim=2)))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)


def test_units_are_the_standard_deviations_of_the_bases_own_keys_and_values(model, tokenizer, load):
    corpus = load(random_rows("train", 40))
    n = model.config.n_positions // 2
    ids = [i for column in (0, 1) for i in [i for row in corpus.rows("train") for i in corpus.ids(row, column)][:n]]
    qkv = projected(model, lambda: model(torch.tensor([ids])))  # (n_layer, T, 3, n_head, head_dim)
    std = qkv.var(dim=1, unbiased=False).mean(dim=-1).sqrt()  # (n_layer, 3, n_head)
    for unit, which in zip(units_of(model, corpus), (1, 2)):
        torch.testing.assert_close(unit[:, :, 0, 0], std[:, which], rtol=1e-3, atol=1e-5)


@pytest.fixture
def moving(model, tokenizer, load, trainer):
    """A function: settings -> a Trainer of banks from text, in units."""
    corpus = load(random_rows("train", 20) + random_rows("validation", 4))

    def build(out="run", train=None, reparam=False, start=0, **settings):
        config = {"init": "text", "prefix_len": 3, "position_offset": 0, "reparam": reparam, "train_banks": train}
        banks = initial_banks(config | {"settings": {"seed": start}}, model, tokenizer, corpus)
        return trainer(out, banks=banks, corpus=corpus, **settings)

    return build


@pytest.mark.parametrize("reparam", [False, True])
def test_a_run_that_goes_on_keeps_the_units_and_the_network_that_it_began_with(moving, monkeypatch, reparam):
    whole, stopped = moving("whole", reparam=reparam), moving("stopped", reparam=reparam)
    assert whole.run() and stopped.run(3)
    monkeypatch.setattr("prefix.init.UNIT_TOKENS", 20)
    resumed = moving("stopped", reparam=reparam, start=1)  # another network, until it resumes
    assert not torch.equal(resumed.banks.unit[0], whole.banks.unit[0])
    resumed.resume()
    assert resumed.run() and same(slots_of(resumed), slots_of(whole))


def test_each_validation_says_how_far_trained_slots_are_from_their_start_in_units_and_the_others_stay(moving):
    t = moving(train=["fr"], eval_every=3)
    start = flat(t.banks)
    t.run()
    now, last = flat(t.banks), metrics(t.out)[1][-1]
    assert [torch.equal(*pair) for pair in zip(start, now)] == [True, True, False, False]
    moved = [(x - was) / unit for x, was, unit in zip(now[2:], start[2:], t.banks.unit)]
    distance = torch.stack(moved).square().mean(dim=(0, 1, 2, 4)).sqrt()  # (3,), of each slot
    assert last["moved"] == pytest.approx(float(distance.median()), rel=1e-4)
    assert last["moved_max"] == pytest.approx(float(distance.max()), rel=1e-4)
