"""Training: what moves and by how much, what each step sees, what is written down, and going on after a stop."""

import itertools
import os
import re
from collections import Counter

import pytest
import torch
from conftest import metrics, one_step, random_rows, same, saved_prefix, slots_of, small_model, stop_after, watch
from torch.nn.functional import cross_entropy

from minigpt import UserError
from minigpt.attention import PackedBatch
from prefix.banks import Banks
from prefix.init import random_banks


def sentences(corpus, tokenizer, split):
    """Every example of a split, written out: (ids, the open banks of each, number of source ids), as tuples."""
    for row, s, t in corpus.examples(split).tolist():
        source, target = corpus.ids(row, s).tolist(), corpus.ids(row, t).tolist()
        bank_mask = [1 << s] * len(source) + [1 << s | 1 << t] * (len(target) + 1)
        yield (*source, *tokenizer.encode("\n"), *target), (*bank_mask,), len(source)


def mean_loss(model, tokenizer, slots, examples):
    """The mean of -log p over all target tokens and closing <|endoftext|>s, one sentence at a time."""
    losses = []
    for ids, bank_mask, n_source in examples:
        hidden = model.hidden(torch.tensor(ids), PackedBatch([len(ids)], torch.tensor(bank_mask)), slots)
        targets = torch.tensor([*ids[n_source + 1 :], tokenizer.eot])
        losses.append(cross_entropy(model.logits(hidden[n_source:]), targets, reduction="none"))
    return torch.cat(losses).mean()


def seen_in(trainer):
    """What each step of a whole run shows the model: Counters of (ids, open banks) per sentence."""
    steps = [Counter()]

    def note(arguments, _):
        ids, packed = arguments[0].ids, arguments[0].packed
        parts = zip(ids.split(packed.lengths), packed.bank_mask.split(packed.lengths))
        steps[-1].update((tuple(ids.tolist()), tuple(bank_mask.tolist())) for ids, bank_mask in parts)

    watch(trainer, "loss", note)
    watch(trainer, "optimizer_step", lambda *_: steps.append(Counter()))
    trainer.run()
    return steps[:-1]


def gradients_of_a_step(trainer):
    """What the optimizer is given in one step, and the step's line of metrics."""
    found, note = {}, lambda *_: found.update({name: p.grad.clone() for name, p in trainer.banks.named_parameters()})
    trainer.optimizer.register_step_pre_hook(note)
    return one_step(trainer), found


# What moves


def test_training_moves_all_slots_and_nothing_else(model, trainer):
    before, t = {name: p.clone() for name, p in model.named_parameters()}, trainer()
    start = slots_of(t)
    assert [p for group in t.optimizer.param_groups for p in group["params"]] == list(t.banks.parameters())
    assert t.run()
    assert same(before, dict(model.named_parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for name, now in slots_of(t).items():  # (n_layer, n_head, prefix_len, head_dim)
        assert (now != start[name]).any(dim=-1).all()


def test_what_cannot_be_trained_is_refused(model, load, trainer):
    with pytest.raises(UserError, match="none of the 3 usable pairs falls into the training split"):
        trainer(corpus=load(random_rows("test", 3)))
    model.ln_f.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="ln_f.weight"):
        trainer()


# The gradient


@pytest.mark.parametrize("tokens", [1, 60, 1 << 20])
def test_loss_and_gradient_are_of_the_mean_over_all_targets_however_a_batch_is_cut(tokenizer, corpus, trainer, tokens):
    model, examples = small_model(tokenizer, torch.float64), [*sentences(corpus, tokenizer, "train")]
    t = trainer(model=model, batch_size=len(examples), micro=tokens, clip=1e9)
    cuts = []
    watch(t, "loss", lambda arguments, _: cuts.append(len(arguments[0].ids)))
    expected = mean_loss(model, tokenizer, t.banks.slots(), examples)
    expected_gradients = torch.autograd.grad(expected, list(t.banks.parameters()))
    record, gradients = gradients_of_a_step(t)
    assert {1: len(cuts) == len(examples), 60: 1 < len(cuts) < len(examples), 1 << 20: len(cuts) == 1}[tokens]
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert record["tokens"] == sum(cuts) == sum(len(ids) for ids, _, _ in examples)
    for ours, theirs in zip(gradients.values(), expected_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_a_gradient_longer_than_the_clip_is_cut_to_it_and_a_shorter_one_left_alone(trainer):
    start = slots_of(trainer())
    free, gradients = gradients_of_a_step(trainer(slots=start, clip=1e9))
    cut, shorter = gradients_of_a_step(trainer(slots=start, clip=free["grad_norm"] / 7))
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert free["grad_norm"] == cut["grad_norm"] == pytest.approx(float(norm), rel=1e-5)  # of the gradient as it was
    for g, s in zip(gradients.values(), shorter.values()):
        torch.testing.assert_close(s, g / 7, rtol=1e-4, atol=1e-9)


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_line_to_zero(trainer):
    falling = [0.2 * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    for steps, warmup, expected in ((10, 4, [0.05, 0.1, 0.15, 0.2, *falling]), (4, 0, [0.2, 0.15, 0.1, 0.05])):
        t = trainer(f"{steps}", steps=steps, warmup=warmup, lr=0.2)
        t.run()
        assert [line["lr"] for line in metrics(t.out)[0]] == pytest.approx(expected)


def test_a_step_that_is_not_finite_leaves_the_slots_alone_and_is_counted_and_ten_in_a_row_end_the_run(trainer):
    t, history = trainer(steps=40), []
    bad = {*range(2, 11), *range(12, 21), *range(22, 32)}  # nine, nine, and ten
    loss = t.loss
    t.loss = lambda *batch: loss(*batch) * (float("nan") if t.progress.step + 1 in bad else 1.0)
    watch(t, "optimizer_step", lambda *_: history.append(slots_of(t)))
    with pytest.raises(UserError, match="step 31: 10 steps in a row were not finite.*--lr"):
        t.run()
    assert t.progress.skipped == len(bad)
    for step, (before, after) in enumerate(zip(history, history[1:]), 2):
        assert same(before, after) == (step in bad)
    assert [line["loss"] is None for line in metrics(t.out)[0]] == [i in bad for i in range(1, 31)]  # no NaN in JSON


# Too little memory


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]
OUT_OF_MEMORY += [RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to")]


def short_of_memory(trainer, is_too_much, error=OUT_OF_MEMORY[0]):
    """Have memory run out at the end of the work on some micro-batches: is_too_much(how manieth), from 1 on."""
    loss, count = trainer.loss, itertools.count(1)

    def run_out(_):
        raise error

    def loss_in_little_memory(*micro_batch):
        value = loss(*micro_batch)
        if is_too_much(next(count)):
            value.register_hook(run_out)
        return value

    trainer.loss = loss_in_little_memory


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_micro_batches_are_halved_until_they_fit_and_stay_so_when_resumed(trainer, error, capsys):
    """Nothing of a failed attempt counts: all is as if they had been so small from the start."""
    start = slots_of(trainer())
    t, quartered = (trainer(out, start, batch_size=20, micro=200) for out in ("t", "quartered"))
    largest = max(len(micro_batch.ids) for micro_batch in t.loader.step(0).micro_batches)
    short_of_memory(t, lambda number: number in (2, 4), error)  # in the first two attempts, when one is done
    stop_after(t, 3)
    assert not t.run()
    fits = t.loader.micro_batch_tokens
    assert fits <= largest // 4
    said = capsys.readouterr().err
    assert f"step 1: out of memory with micro-batches of {largest} tokens; {fits} fit\n" in said
    assert said.count("out of memory") == 1
    resumed = trainer("t", batch_size=20)
    resumed.resume()
    assert resumed.loader.micro_batch_tokens == fits
    quartered.loader.micro_batch_tokens = fits
    assert resumed.run() and quartered.run()
    assert metrics(resumed.out) == metrics(quartered.out) and same(slots_of(resumed), slots_of(quartered))


def test_memory_that_is_too_small_for_one_pair_is_an_error_that_says_what_to_do(trainer):
    t = trainer(batch_size=20)
    start = slots_of(t)
    short_of_memory(t, lambda number: True)
    with pytest.raises(UserError, match="step 1: out of memory, even with one pair.*--checkpoint-activations"):
        t.run()
    assert same(slots_of(t), start)


# The data


@pytest.mark.parametrize("size, epochs", [(8, 2), (7, 7), (80, 2)])
def test_every_epoch_sees_every_pair_in_both_directions_once_in_another_order(tokenizer, corpus, trainer, size, epochs):
    seen = seen_in(trainer(steps=40 * epochs // size, batch_size=size))
    everything = Counter((ids, bank_mask) for ids, bank_mask, _ in sentences(corpus, tokenizer, "train"))
    assert everything.total() == 40
    assert sum(seen, Counter()) == Counter({example: n * epochs for example, n in everything.items()})
    if size == 8:
        assert sum(seen[:5], Counter()) == everything and seen[:5] != seen[5:]
        assert any({bank_mask[0] for _, bank_mask in step} == {1, 2} for step in seen)  # both directions in a batch


def test_the_order_follows_from_the_seed_alone(trainer):
    first = seen_in(trainer("a", seed=5))
    assert seen_in(trainer("b", seed=5, lr=0.3, warmup=5, micro=30)) == first
    assert seen_in(trainer("c", seed=6)) != first


def test_three_columns_are_three_banks_and_six_directions_unless_fewer_are_named(load, trainer):
    rows = random_rows("train", 4, columns=3) + [[*random_rows("train", 1)[0], ""]]  # the last has no German
    corpus = load(rows, ("en", "fr", "de"))
    everything = {(1, 3): 5, (2, 3): 5, (1, 5): 4, (4, 5): 4, (2, 6): 4, (4, 6): 4}
    for directions, expected in ((None, everything), ([(0, 1), (2, 1)], {(1, 3): 5, (4, 6): 4})):
        t = trainer(corpus=corpus, steps=1, batch_size=sum(expected.values()), directions=directions)
        assert t.banks.names == ["en", "fr", "de"]
        assert Counter((bank_mask[0], bank_mask[-1]) for _, bank_mask in seen_in(t)[0].elements()) == expected


# What is written down


def test_metrics_have_a_line_a_step_and_one_a_validation_the_first_with_the_bases_loss(model, tokenizer, corpus, trainer):
    """A validation loss is the mean over all targets."""
    t, examples = trainer(steps=5, eval_every=2, micro=30), [*sentences(corpus, tokenizer, "validation")]
    t.run()
    ours, base = (mean_loss(model, tokenizer, slots, examples).item() for slots in (t.banks.slots(), None))
    steps, validations = metrics(t.out)
    assert [(line["step"], *line) for line in steps] == [(i, "step", "loss", "lr", "grad_norm", "tokens") for i in range(1, 6)]
    assert [line["step"] for line in validations] == [2, 4, 5]
    assert validations[2] == {"step": 5, "val_loss": pytest.approx(ours, rel=1e-5)}
    assert validations[0]["base_loss"] == pytest.approx(base, rel=1e-5)
    record = Banks.load(t.out / "prefix.safetensors", model).training_record
    assert record["base_loss"] == validations[0]["base_loss"]
    t.banks.position_offset = 3  # the base reads text where it was trained to
    assert t.validation_loss(base=True) == validations[0]["base_loss"] and t.validation_loss() != validations[2]["val_loss"]


def test_the_prefix_file_has_the_slots_of_the_best_validation_also_of_a_run_that_goes_on(trainer):
    t, losses, history = trainer(steps=4, eval_every=1), iter([3.0, 1.0, 2.0, 1.0]), []
    t.validation_loss = lambda base=False: 5.0 if base else next(losses)
    watch(t, "validate", lambda *_: history.append(slots_of(t)))
    t.run()
    assert same(saved_prefix(t), history[1]) and not same(saved_prefix(t), history[3])
    record = Banks.load(t.out / "prefix.safetensors", t.model).training_record
    assert (record["step"], record["val_loss"]) == (2, 1.0)
    more = trainer(steps=6, eval_every=1)
    more.validation_loss = lambda: 1.5
    more.resume()
    more.run()
    assert more.progress.best == 1.0 and same(saved_prefix(more), history[1])


def test_without_validation_the_prefix_file_has_the_last_slots(load, trainer):
    for t in (trainer(eval_every=0), trainer("other", eval_every=1, corpus=load(random_rows("train", 5)))):
        t.run()
        assert same(saved_prefix(t), slots_of(t)) and not metrics(t.out)[1]


# Stopping and going on


def test_a_state_that_is_cut_or_missing_is_an_error_that_names_it(trainer):
    t = trainer()
    t.run()
    path = t.out / "last" / "state.safetensors"
    for damage in (lambda: os.truncate(path, 100), path.unlink):
        damage()
        with pytest.raises(UserError, match="state.safetensors"):
            trainer().resume()


def test_a_run_does_not_go_on_with_what_changes_its_numbers_and_says_which(model, tokenizer, load, trainer):
    t = trainer()
    t.run()
    differing = {"model": {"model": small_model(tokenizer)}, "data": {"corpus": load(random_rows("train", 20))}}
    differing["prefix_len ([3, 3], here [4, 4])"] = {"banks": random_banks(model.config, ["en", "fr"], 4)}
    for name, value in {"lr": 0.07, "batch_size": 9, "seed": 3, "warmup": 0, "eval_every": 2}.items():
        differing[f"{name} ({getattr(t.settings, name)}, here {value})"] = {name: value}
    for name, value in {"init": "random", "reparam": True, "pairs": ["en:fr"]}.items():
        banks = random_banks(model.config, ["en", "fr"], 3)
        banks.training_record[name] = value
        differing[f"{name} (None, here {value})"] = {"banks": banks}
    for words, settings in differing.items():
        other = trainer(**settings)
        start = slots_of(other)
        with pytest.raises(UserError, match=re.escape(f"this run has another {words}")):
            other.resume()
        assert same(slots_of(other), start) and other.progress.step == 0


def test_a_finished_run_goes_on_with_more_steps_other_saves_and_other_micro_batches(trainer):
    trainer(steps=4).run()
    more = trainer(steps=6, save_every=1, micro=40)
    more.resume()
    assert more.run() and [line["step"] for line in metrics(more.out)[0]] == [1, 2, 3, 4, 5, 6]
    assert same(saved_prefix(more), slots_of(more))
