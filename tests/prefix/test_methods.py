"""Other ways to start and to train slots: what each is exactly, and that the rest of training goes with it."""

# ruff: noqa: F401, F811 (fixtures are imported, and then used by their names)

import json
import os
import signal
import sys

import pytest
import torch
from safetensors import safe_open
from test_trainer import (
    N_HEAD,
    N_LAYER,
    PREFIX_LEN,
    corpus,
    gradients_of_a_step,
    load,
    model,
    random_model,
    same,
    saved_prefix,
    slots_of,
    tokenizer,
    trainer,
)
from torch.nn.functional import cross_entropy

import train
from minigpt import GPT, Tokenizer
from minigpt.attention import Slots
from minigpt.loss import nll_sum
from prefix import cli, run
from prefix.banks import Banks
from prefix.data import corpus as data
from prefix.init import initial_banks, random_banks
from prefix.reparam import INNER, Reparametrised
from prefix.run import DEMO_CORPUS
from prefix.sequences import pack_pairs
from prefix.trainer import Settings, Trainer

# What --init zero-effect may change of the demo on sentences that it has not seen: the share of the base's loss and, in
# nats, the mean divergence of a token's distribution, and the log-probability that moves most of all 4,096 of all tokens.
# (Measured: 2e-5, 3e-5 and 1.2; the last is of a word next to which the queries that the keys were fitted to had none
# like it.)
LOSS, MEAN_KL, WORST_LOG_P = 1e-3, 1e-4, 2.0


@pytest.fixture(scope="module")
def demo():
    """The demo checkpoint, its tokenizer and its corpus."""
    tokenizer = Tokenizer.from_pretrained("demo")
    return GPT.from_pretrained("demo"), tokenizer, data.load([DEMO_CORPUS], ("en", "fr"), tokenizer)


@pytest.fixture(scope="module")
def quiet(demo):
    """The slots of --init zero-effect there."""
    model, tokenizer, corpus = demo
    config = {"init": "zero-effect", "prefix_len": 10, "position_offset": 0, "settings": {"seed": 0}}
    return initial_banks(config, model, tokenizer, corpus)


def sentences(demo, split, n):
    """The first n pairs of a split, packed."""
    _, tokenizer, corpus = demo
    examples = [(corpus.ids(r, s), corpus.ids(r, t), int(s), int(t)) for r, s, t in corpus.examples(split)[:n]]
    return pack_pairs(examples, *tokenizer.encode("\n"), tokenizer.eot)


def assert_nearly_the_base(model, batch, slots, offset=0):
    base, ours = (
        model.logits(model.hidden(batch.ids, batch.packed, s, offset)).log_softmax(-1) for s in (None, slots)
    )  # (N, vocab_size)
    kl = (base.exp() * (base - ours)).sum(-1)
    loss, loss_of_base = (-x[batch.target_index].gather(1, batch.targets[:, None]).mean() for x in (ours, base))
    assert abs(loss - loss_of_base) < LOSS * loss_of_base
    assert kl.mean() < MEAN_KL
    assert (ours - base).abs().max() < WORST_LOG_P
    assert (ours.argmax(-1) == base.argmax(-1)).float().mean() > 0.999


@torch.no_grad()
def test_slots_of_zero_effect_leave_the_model_as_it_is_on_sentences_that_they_were_not_fitted_to(demo, quiet):
    model, batch = demo[0], sentences(demo, "test", 100)
    assert_nearly_the_base(model, batch, quiet.slots())
    loud = random_banks(model.config, quiet.names, 10)
    with pytest.raises(AssertionError):
        assert_nearly_the_base(model, batch, loud.slots())


@torch.no_grad()
def test_slots_of_zero_effect_leave_the_model_as_it_is_where_text_starts_behind_them(demo, monkeypatch):
    model, tokenizer, corpus = demo
    config = {"init": "zero-effect", "prefix_len": 100, "position_offset": 100, "settings": {"seed": 0}}
    batch, slots = sentences(demo, "test", 40), initial_banks(config, model, tokenizer, corpus).slots()
    assert_nearly_the_base(model, batch, slots, offset=100)
    monkeypatch.setattr("prefix.init.QUERY_TOKENS", 1000)
    elsewhere = initial_banks(config | {"position_offset": 0}, model, tokenizer, corpus).slots()
    with pytest.raises(AssertionError):
        assert_nearly_the_base(model, batch, elsewhere, offset=100)


def test_all_slots_of_zero_effect_are_different_and_have_values_of_zero(quiet):
    keys = torch.cat(list(quiet.key), dim=2)  # (n_layer, n_head, S, head_dim)
    distance = torch.cdist(keys, keys)
    assert (distance + torch.eye(keys.size(2)) > 0.1).all()
    assert not any(value.any() for value in quiet.value)


def test_slots_of_zero_effect_learn(demo, quiet, tmp_path):
    model, tokenizer, corpus = demo
    banks = Banks(dict(zip(quiet.names, quiet.pairs())))
    settings = Settings(steps=15, lr=0.1, batch_size=16, warmup=1, eval_every=0)
    t = Trainer(model, tokenizer, banks, corpus, settings, tmp_path)
    t.train_set = t.train_set[:16]
    batch, start = sentences(demo, "train", 16), slots_of(t)
    with torch.no_grad():
        before = float(t.nll(batch))
    t.optimizer_step()
    for name, now in slots_of(t).items():  # (n_layer, n_head, prefix_len, head_dim)
        assert (now != start[name]).any(dim=-1).all()
    while t.step < 15:
        t.optimizer_step()
    with torch.no_grad():
        assert float(t.nll(batch)) < 0.97 * before


# --reparam


@pytest.fixture
def reparametrised(model, tokenizer, corpus, tmp_path):
    """A function: settings -> a Trainer of slots behind their network, with a run directory of its own."""

    def build(out="run", seed=3, **settings):
        (tmp_path / out).mkdir(exist_ok=True)
        banks = Reparametrised(random_banks(model.config, corpus.columns, PREFIX_LEN), seed)
        settings = dict(steps=6, lr=0.01, batch_size=8, warmup=2, eval_every=0) | settings
        return Trainer(model, tokenizer, banks, corpus, Settings(**settings), tmp_path / out)

    return build


def flat(banks):
    return [x.detach() for pair in banks.pairs() for x in pair]


def test_reparametrised_slots_are_where_they_start_until_they_are_trained(model, corpus):
    start = random_banks(model.config, corpus.columns, PREFIX_LEN)
    assert all(map(torch.equal, flat(Reparametrised(start)), flat(start)))


def test_the_network_is_that_of_the_paper(model, corpus):
    """Embeddings of n_embd numbers, 512 units of tanh, 2 * n_layer * n_embd numbers out; in these a slot's keys and
    values follow one another layer by layer."""
    banks, n_embd = Reparametrised(random_banks(model.config, corpus.columns, PREFIX_LEN)), model.config.n_embd
    trained = {name: list(p.shape) for name, p in banks.named_parameters() if p.requires_grad}
    wide = 2 * N_LAYER * n_embd
    assert trained == {
        "embedding": [2, PREFIX_LEN, n_embd],
        "network.0.weight": [INNER, n_embd],
        "network.0.bias": [INNER],
        "network.2.weight": [wide, INNER],
        "network.2.bias": [wide],
    }
    torch.nn.init.normal_(banks.network[2].weight)
    (_, _), (key, value) = banks.pairs()
    inner = torch.tanh(banks.network[0](banks.embedding[1, 2]))  # of slot 2 of bank 1
    out = (banks.network[2].weight @ inner + banks.network[2].bias).view(N_LAYER, 2, N_HEAD, -1)
    torch.testing.assert_close(key[:, :, 2], banks.key[1][:, :, 2] + out[:, 0])
    torch.testing.assert_close(value[:, :, 2], banks.value[1][:, :, 2] + out[:, 1])


def test_training_moves_the_embedding_and_the_network_but_not_the_start(reparametrised):
    t = reparametrised()
    before, slots = slots_of(t), flat(t.banks)
    assert t.run()
    for name, now in slots_of(t).items():
        assert torch.equal(now, before[name]) == name.startswith(("key.", "value."))
    assert all((now != then).any(dim=-1).all() for now, then in zip(flat(t.banks), slots))


def test_the_prefix_file_of_a_reparametrised_run_has_the_slots_alone(reparametrised, model):
    t = reparametrised()
    t.run()
    with safe_open(t.out / "prefix.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"en.key", "en.value", "fr.key", "fr.value"}
    loaded = Banks.load(t.out / "prefix.safetensors", model)
    assert all(map(torch.equal, flat(loaded), flat(t.banks)))


def test_a_reparametrised_run_that_was_stopped_goes_on_as_if_it_had_not_been(reparametrised):
    settings = dict(steps=9, save_every=4, eval_every=3, slot_dropout=0.3, label_smoothing=0.1)
    whole, stopped = reparametrised("whole", **settings), reparametrised("stopped", **settings)
    assert whole.run()
    step = stopped.optimizer_step
    stopped.optimizer_step = lambda: (step(), stopped.step == 5 and os.kill(os.getpid(), signal.SIGINT))[0]
    assert not stopped.run() and stopped.step == 6
    resumed = reparametrised("stopped", seed=4, **settings)  # another network, until it resumes
    resumed.resume()
    assert resumed.run()
    assert same(slots_of(resumed), slots_of(whole)) and same(saved_prefix(resumed), saved_prefix(whole))


# --slot-dropout


def test_slots_are_absent_with_the_given_probability_anew_in_each_step(trainer):
    t = trainer(slot_dropout=0.3, seed=5)
    everything = t.banks.slots()

    def kept(t, step):
        """One bool for each slot. Those that are there keep their order, key, value and bank."""
        there = t.present(step)
        found = (everything.key[0, 0][:, None] == there.key[0, 0]).all(-1)  # (S, kept)
        (where,) = found.any(1).nonzero(as_tuple=True)
        for name in ("key", "value"):
            assert torch.equal(getattr(everything, name)[:, :, where], getattr(there, name))
        assert torch.equal(everything.bank[where], there.bank)
        return found.any(1)

    steps = torch.stack([kept(t, step) for step in range(400)])  # (400, S)
    assert (steps.float().mean(0) - 0.7).abs().max() < 0.12  # five standard deviations
    assert len(steps.unique(dim=0)) > 10
    again, other = (trainer(slots=slots_of(t), slot_dropout=0.3, seed=seed, micro_batch_tokens=20) for seed in (5, 6))
    assert torch.equal(torch.stack([kept(again, step) for step in range(50)]), steps[:50])
    assert not torch.equal(torch.stack([kept(other, step) for step in range(50)]), steps[:50])


def test_a_step_with_absent_slots_is_a_step_without_them(trainer, tokenizer):
    model = random_model(tokenizer, torch.float64)
    whole = trainer(model=model, slot_dropout=0.4, clip=1e9)
    there = whole.present(0)
    absent = torch.ones(2 * PREFIX_LEN, dtype=torch.bool)
    for i, key in enumerate(whole.banks.slots().key[0, 0]):
        absent[i] = not (there.key[0, 0] == key).all(-1).any()
    cut = trainer(slots=slots_of(whole), model=model, slot_dropout=0.4, clip=1e9, micro_batch_tokens=30)
    (record, gradients), (record_cut, gradients_cut) = gradients_of_a_step(whole), gradients_of_a_step(cut)
    assert record["loss"] == pytest.approx(record_cut["loss"], rel=1e-6)  # the same slots in all micro-batches
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_cut[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
        bank = int(name[-1])
        moved = gradient.abs().amax(dim=(0, 1, 3)) > 0  # (prefix_len,)
        assert torch.equal(moved, ~absent[bank * PREFIX_LEN : (bank + 1) * PREFIX_LEN])


@pytest.mark.parametrize("how", ["plain", "fused"])
def test_a_step_in_which_all_slots_are_absent_is_the_base_model_and_moves_nothing(trainer, how):
    t = trainer()
    t.model.attention = how
    slots = t.banks.slots()
    t.present = lambda step: Slots(slots.key[:, :, :0], slots.value[:, :, :0], slots.bank[:0])
    prepared = t.prepare(0)
    with torch.no_grad():
        hidden = [t.model.hidden(b.ids, b.packed)[b.target_index] for b in prepared.batches]
        base = sum(nll_sum(h, t.model.wte.weight, b.targets) for h, b in zip(hidden, prepared.batches))
    assert float(t.backward(prepared)) == pytest.approx(float(base) / prepared.targets, rel=1e-5)
    assert not any(p.grad.any() for p in t.banks.parameters())
    before = slots_of(t)
    t.optimizer_step()
    assert same(slots_of(t), before)


# --label-smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_smoothed_loss_and_its_gradient_equal_cross_entropy(monkeypatch, smoothing):
    monkeypatch.setattr("minigpt.loss.CHUNK", 5)
    hidden, wte = torch.randn(13, 8).double().requires_grad_(), torch.randn(31, 8).double()
    targets = torch.randint(31, (13,))
    ours = nll_sum(hidden, wte, targets, smoothing)
    theirs = cross_entropy(hidden @ wte.T, targets, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(3 * loss, hidden)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_training_smooths_and_drops_and_validation_does_not(trainer):
    plain = trainer()
    smooth = trainer(slots=slots_of(plain), label_smoothing=0.2)
    dropped = trainer(slots=slots_of(plain), slot_dropout=0.9)
    losses = {float(t.backward(t.prepare(0))) for t in (plain, smooth, dropped)}
    assert len(losses) == 3
    assert plain.validation_loss() == smooth.validation_loss() == dropped.validation_loss()


# The command


def config_of(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "demo", *options])
    return run.resolve(train.parse_arguments())


def test_every_way_to_start_has_a_learning_rate_of_its_own(monkeypatch):
    for init in ("text", "random", "zero-effect"):
        assert config_of(monkeypatch, "--init", init)["settings"]["lr"] == run.LR["demo"][init]
        assert config_of(monkeypatch, "--init", init, "--reparam")["settings"]["lr"] == run.REPARAM_LR["demo"][init]


def test_zero_effect_behind_positions_that_hold_nothing_is_told_to_be_worse(monkeypatch, capsys):
    zero, behind = ["--init", "zero-effect"], ["--position-offset", "prefix"]
    for options, told in ((zero, 0), (behind, 0), ([*zero, *behind, "--prefix-len", "7"], 1)):
        config_of(monkeypatch, *options)
        err = capsys.readouterr().err
        assert err.count("text at position 7, behind nothing") == err.count("--init text stands in those") == told


def test_a_run_is_done_and_recorded_with_all_of_these_options(monkeypatch, tmp_path, capsys):
    options = ["--init", "zero-effect", "--reparam", "--slot-dropout", "0.1", "--label-smoothing", "0.2"]
    size = ["--steps", "2", "--batch-size", "2", "--limit", "60", "--device", "cpu"]
    monkeypatch.setattr("prefix.init.QUERY_TOKENS", 300)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "demo", *options, *size, "--out", str(tmp_path / "run")])
    train.main()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["init"], config["reparam"]) == ("zero-effect", True)
    assert (config["settings"]["slot_dropout"], config["settings"]["label_smoothing"]) == (0.1, 0.2)
    for option in (["--reparam"], ["--slot-dropout", "0.2"], ["--label-smoothing", "0.1"], ["--init", "random"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "run"), *option])
        with pytest.raises(SystemExit) as end:
            train.main()
        assert end.value.code == 2 and f"{option[0]} cannot be new" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "run"), "--steps", "3"])
    train.main()
    model = GPT.from_pretrained("demo")
    record = Banks.load(tmp_path / "run" / "prefix.safetensors", model).training_record
    assert record["reparam"] is True and record["settings"]["slot_dropout"] == 0.1
