"""Training: what moves and by how much, what each step sees, what is written down, and going on after a stop."""

import csv
import errno
import itertools
import json
import os
import shutil
import signal
import string
import time
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from minigpt import GPT, GPTConfig, Tokenizer, UserError
from minigpt.attention import PackedBatch
from prefix.banks import Banks
from prefix.data import corpus as data
from prefix.data.splits import split_of
from prefix.init import initial_banks, random_banks
from prefix.trainer import BAD_STEPS, Settings, Trainer

PREFIX_LEN, N_LAYER, N_HEAD, HEAD_DIM = 3, 2, 2, 16


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained("demo")


@pytest.fixture
def model(tokenizer):
    return random_model(tokenizer)


def random_model(tokenizer, dtype=torch.float32):
    size = dict(n_positions=128, n_embd=N_HEAD * HEAD_DIM, n_layer=N_LAYER, n_head=N_HEAD)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **size)).to(dtype).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def random_text():
    """A few words of a few letters."""
    letters = [string.ascii_lowercase[i] for i in torch.randint(26, (40,))]
    words = ["".join(letters[i : i + 4]) for i in range(0, 40, 4)]
    return " ".join(words[: int(torch.randint(1, 8, ()))])


def random_rows(split, n, columns=2):
    """n rows that belong to this split."""
    rows = []
    while len(rows) < n:
        row = [random_text() for _ in range(columns)]
        if split_of(row[0]) == split:
            rows.append(row)
    return rows


@pytest.fixture
def load(tmp_path, tokenizer):
    """A function: rows -> the Corpus of a CSV file that holds them."""

    def load(rows, names=("en", "fr")):
        with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([names, *rows])
        return data.load([str(tmp_path / "data.csv")], names, tokenizer, home=tmp_path / "home")

    return load


@pytest.fixture
def corpus(load):
    return load(random_rows("train", 20) + random_rows("validation", 4))


@pytest.fixture
def trainer(model, tokenizer, corpus, tmp_path):
    """A function: settings -> a Trainer of random slots, with a run directory of its own."""

    def build(out="run", slots=None, model=model, corpus=corpus, micro_batch_tokens=None, **settings):
        (tmp_path / out).mkdir(exist_ok=True)
        banks = random_banks(model.config, corpus.columns, PREFIX_LEN, int(torch.randint(1 << 30, ())))
        if slots:
            banks.load_state_dict(slots)
        settings = dict(steps=6, lr=0.05, batch_size=8, warmup=2, eval_every=0) | settings
        return Trainer(model, tokenizer, banks, corpus, Settings(**settings), tmp_path / out, micro_batch_tokens)

    return build


def metrics(trainer):
    """(lines of optimizer steps, lines of validations)"""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open(trainer.out / "metrics.jsonl")]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def slots_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.banks.named_parameters()}


def same(one, other):
    """Are two dicts of tensors equal, bit for bit?"""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved_prefix(trainer):
    banks = Banks.load(trainer.out / "prefix.safetensors", trainer.model)
    return {name: p.detach() for name, p in banks.named_parameters()}


def sentences(corpus, tokenizer, split):
    """Every example of a split, written out: (ids, the open banks of each, number of source ids), as tuples."""
    (sep,) = tokenizer.encode("\n")
    found = []
    for row, s, t in corpus.examples(split).tolist():
        source, target = corpus.ids(row, s).tolist(), corpus.ids(row, t).tolist()
        bank_mask = [1 << s] * len(source) + [1 << s | 1 << t] * (len(target) + 1)
        found.append((tuple(source + [sep] + target), tuple(bank_mask), len(source)))
    return found


def mean_loss(model, tokenizer, slots, examples):
    """The mean of -log p over all target tokens and closing <|endoftext|>s, one sentence at a time."""
    losses = []
    for ids, bank_mask, n_source in examples:
        hidden = model.hidden(torch.tensor(ids), PackedBatch([len(ids)], torch.tensor(bank_mask)), slots)
        targets = torch.tensor([*ids[n_source + 1 :], tokenizer.eot])
        losses.append(cross_entropy(model.logits(hidden[n_source:]), targets, reduction="none"))
    return torch.cat(losses).mean()


def watch(trainer, attribute, note):
    """From now on, call note(arguments, result) after each call of a method."""
    method = getattr(trainer, attribute)

    def watched(*arguments):
        result = method(*arguments)
        note(arguments, result)
        return result

    setattr(trainer, attribute, watched)


def seen_by_the_model(trainer):
    """Lists that fill, while the trainer runs, with what each step shows the model: (ids, open banks) per sentence."""
    steps, current = [], []

    def note_batch(arguments, _):
        batch = arguments[0]
        parts = zip(batch.ids.split(batch.packed.lengths), batch.packed.bank_mask.split(batch.packed.lengths))
        current.extend((tuple(ids.tolist()), tuple(bank_mask.tolist())) for ids, bank_mask in parts)

    def note_step(*_):
        steps.append(list(current))
        current.clear()

    watch(trainer, "nll", note_batch)
    watch(trainer, "optimizer_step", note_step)
    return steps


def gradients_of_a_step(trainer):
    """What the optimizer is given in one step, and the step's line of metrics."""
    found = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in trainer.banks.named_parameters()})
    )
    return trainer.optimizer_step(), found


# What moves


def test_training_moves_all_slots_and_nothing_else(model, trainer):
    before = {name: p.clone() for name, p in model.named_parameters()}
    t = trainer()
    start = slots_of(t)
    assert t.run()
    assert same(before, dict(model.named_parameters()))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for name, now in slots_of(t).items():  # (n_layer, n_head, prefix_len, head_dim)
        assert (now != start[name]).any(dim=-1).all()


def test_the_slots_are_all_that_is_trained(trainer):
    t = trainer()
    trained = [p for group in t.optimizer.param_groups for p in group["params"]]
    assert {name for name, _ in t.banks.named_parameters()} == {"key.0", "key.1", "value.0", "value.1"}
    assert [id(p) for p in trained] == [id(p) for p in t.banks.parameters()]
    assert sum(p.numel() for p in trained) == 2 * 2 * N_LAYER * N_HEAD * PREFIX_LEN * HEAD_DIM


def test_a_base_model_that_is_not_frozen_is_refused(model, trainer):
    model.ln_f.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="ln_f.weight"):
        trainer()


def test_without_training_pairs_there_is_an_error(load, trainer):
    with pytest.raises(UserError, match="none of the 3 usable pairs falls into the training split"):
        trainer(corpus=load(random_rows("test", 3)))


# The gradient


@pytest.mark.parametrize("tokens", [1, 60, 1 << 20])
def test_loss_and_gradient_are_of_the_mean_over_all_targets_however_a_batch_is_cut(tokenizer, corpus, trainer, tokens):
    model, examples = random_model(tokenizer, torch.float64), sentences(corpus, tokenizer, "train")
    t = trainer(model=model, batch_size=len(examples), micro_batch_tokens=tokens, clip=1e9)
    cuts = []
    watch(t, "nll", lambda arguments, _: cuts.append(len(arguments[0].ids)))
    slots = t.banks.slots()
    expected = mean_loss(model, tokenizer, slots, examples)
    expected_gradients = torch.autograd.grad(expected, list(t.banks.parameters()))
    record, gradients = gradients_of_a_step(t)
    assert {1: len(cuts) == len(examples), 60: 1 < len(cuts) < len(examples), 1 << 20: len(cuts) == 1}[tokens]
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-6)
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


def test_the_loss_falls(trainer):
    t = trainer(steps=20, lr=0.5, batch_size=40)
    t.run()
    losses = [line["loss"] for line in metrics(t)[0]]
    assert losses[-1] < losses[0] - 0.3


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_line_to_zero(trainer):
    t = trainer(steps=10, warmup=4, lr=0.2)
    t.run()
    rates = [line["lr"] for line in metrics(t)[0]]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2] + [0.2 * left / 6 for left in (6, 5, 4, 3, 2, 1)])


def test_without_warm_up_the_learning_rate_starts_at_its_peak(trainer):
    t = trainer(steps=4, warmup=0, lr=0.2)
    t.run()
    assert [line["lr"] for line in metrics(t)[0]] == pytest.approx([0.2, 0.15, 0.1, 0.05])


def spoil(trainer, steps):
    """Make the loss of these steps (1, 2 ...) not finite."""
    nll = trainer.nll
    trainer.nll = lambda *batch: nll(*batch) * (float("nan") if trainer.step + 1 in steps else 1.0)


def test_a_step_that_is_not_finite_leaves_the_slots_alone_and_is_counted(trainer):
    t = trainer(steps=5)
    spoil(t, {3})
    history = []
    watch(t, "optimizer_step", lambda *_: history.append(slots_of(t)))
    assert t.run()
    assert [same(a, b) for a, b in zip(history, history[1:])] == [False, True, False, False]
    assert t.skipped == 1
    assert [line["loss"] is None for line in metrics(t)[0]] == [False, False, True, False, False]  # JSON has no NaN
    assert all(p.isfinite().all() for p in t.banks.parameters())


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_and_nine_do_not(trainer):
    t = trainer(steps=2 * BAD_STEPS)
    spoil(t, set(range(2, BAD_STEPS + 1)) | set(range(BAD_STEPS + 2, 2 * BAD_STEPS + 1)))
    assert t.run() and t.skipped == 2 * BAD_STEPS - 2
    t = trainer("other", steps=2 * BAD_STEPS)
    spoil(t, set(range(3, 2 * BAD_STEPS)))
    with pytest.raises(UserError, match="step 12: 10 steps in a row were not finite.*--lr"):
        t.run()


# Too little memory


def short_of_memory(trainer, error, is_too_much):
    """Have memory run out at the end of the work on some micro-batches. is_too_much(tokens, how manieth). Returns a
    list that fills with the tokens of these."""
    nll, failed, seen = trainer.nll, [], []

    def nll_in_little_memory(batch, *arguments):
        loss = nll(batch, *arguments)
        seen.append(len(batch.ids))
        if is_too_much(len(batch.ids), len(seen)):
            failed.append(len(batch.ids))
            loss.register_hook(raise_it)
        return loss

    def raise_it(_):
        raise error

    trainer.nll = nll_in_little_memory
    return failed


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_step_that_ran_out_of_memory_is_repeated_once_in_micro_batches_of_half_the_size(trainer, error, capsys):
    start = slots_of(trainer())
    t, halved, undisturbed = (trainer(out, start, batch_size=20) for out in ("t", "halved", "undisturbed"))
    largest = len(undisturbed.prepare(0).batches[0].ids)
    assert len(undisturbed.prepare(0).batches) == 1
    failed = short_of_memory(t, error, lambda tokens, _: tokens >= largest)
    halved.micro_batch_tokens = largest // 2
    assert t.run() and halved.run() and undisturbed.run()
    assert failed[0] == largest and t.micro_batch_tokens <= largest // 2
    said = f"step 1: out of memory with micro-batches of {largest} tokens: now {largest // 2}"
    assert said in capsys.readouterr().err
    assert len(failed) == 1 and without_seconds(t) == without_seconds(halved)
    assert same(slots_of(t), slots_of(halved))
    ours, theirs = metrics(t)[0][0], metrics(undisturbed)[0][0]
    for name in ("loss", "grad_norm"):  # another cut adds up in another order
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_gradients_of_the_attempt_that_ran_out_of_memory_do_not_count(trainer):
    start = slots_of(trainer())
    _, expected = gradients_of_a_step(trainer("a", start, batch_size=20, micro_batch_tokens=60))
    t = trainer("b", start, batch_size=20, micro_batch_tokens=60)
    n = len(t.prepare(0).batches)
    failed = short_of_memory(t, OUT_OF_MEMORY[0], lambda _, number: number == n)  # all but the last are done
    _, found = gradients_of_a_step(t)
    assert n > 1 and len(failed) == 1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_memory_that_runs_out_again_is_an_error_that_says_which_options_to_lower(trainer):
    t = trainer(batch_size=20)
    start = slots_of(t)
    failed = short_of_memory(t, OUT_OF_MEMORY[1], lambda *_: True)
    with pytest.raises(UserError, match="step 1: out of memory.*--micro-batch-tokens.*--checkpoint-activations"):
        t.run()
    assert len(failed) == 2 and same(slots_of(t), start)


def fail_at_the_validation(trainer, step, times):
    """Have memory run out as often as `times` says in the validation after a step."""
    nll, failed = trainer.nll, []

    def nll_in_little_memory(batch, *arguments):
        if not torch.is_grad_enabled() and trainer.step == step and len(failed) < times:
            failed.append(len(batch.ids))
            raise OUT_OF_MEMORY[0]
        return nll(batch, *arguments)

    trainer.nll = nll_in_little_memory
    return failed


def test_a_validation_that_ran_out_of_memory_is_repeated_in_micro_batches_of_half_the_size(trainer, capsys):
    start = slots_of(trainer())
    t, undisturbed = (trainer(out, start, eval_every=3, batch_size=20) for out in ("t", "undisturbed"))
    failed = fail_at_the_validation(t, 3, times=1)
    cuts = []
    watch(t, "nll", lambda arguments, _: t.step == 3 and cuts.append(len(arguments[0].ids)))
    assert t.run() and undisturbed.run()
    said = f"validation after step 3: out of memory with micro-batches of {failed[0]} tokens: now {failed[0] // 2}"
    assert said in capsys.readouterr().err
    assert len(failed) == 1 and len(cuts) > 2 and t.micro_batch_tokens == failed[0] // 2
    for ours, theirs in zip(metrics(t)[1], metrics(undisturbed)[1]):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


def test_a_validation_that_runs_out_of_memory_again_is_an_error_that_says_which_options_to_lower(trainer):
    t = trainer(eval_every=3)
    failed = fail_at_the_validation(t, 3, times=2)
    with pytest.raises(UserError, match="validation after step 3: out of memory.*--micro-batch-tokens"):
        t.run()
    assert len(failed) == 2


def test_a_run_that_goes_on_keeps_the_micro_batches_that_fitted_unless_told_otherwise(trainer):
    start, settings = slots_of(trainer()), dict(steps=6, batch_size=20, eval_every=0)
    whole, stopped = trainer("whole", start, **settings), trainer("stopped", start, **settings)
    for t in (whole, stopped):
        short_of_memory(t, OUT_OF_MEMORY[0], lambda _, number: number == 1)
    assert whole.run()
    stop_after(stopped, 3)
    assert not stopped.run()
    told, resumed = trainer("stopped", **settings), trainer("stopped", **settings)
    told.resume(300)
    assert told.micro_batch_tokens == 300
    default = resumed.micro_batch_tokens
    resumed.resume()
    assert resumed.micro_batch_tokens == whole.micro_batch_tokens < default
    assert resumed.run()
    assert same(slots_of(resumed), slots_of(whole)) and without_seconds(resumed) == without_seconds(whole)
    undisturbed = trainer("undisturbed", start, **settings)
    assert undisturbed.run()
    assert not same(slots_of(undisturbed), slots_of(whole))  # the last bits tell one cut from another


def test_another_error_in_a_step_is_not_taken_for_too_little_memory(trainer):
    t = trainer()
    short_of_memory(t, RuntimeError("shapes do not match"), lambda *_: True)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        t.run()


# The data


@pytest.mark.parametrize("size, epochs", [(8, 2), (7, 7), (40, 3), (80, 2)])
def test_every_epoch_sees_every_pair_in_both_directions_once(tokenizer, corpus, trainer, size, epochs):
    t = trainer(steps=40 * epochs // size, batch_size=size)
    steps = seen_by_the_model(t)
    t.run()
    everything = Counter((ids, bank_mask) for ids, bank_mask, _ in sentences(corpus, tokenizer, "train"))
    assert everything.total() == 40
    seen = [Counter(step) for step in steps]
    assert sum(seen, Counter()) == Counter({example: n * epochs for example, n in everything.items()})
    if size == 8:
        assert sum(seen[:5], Counter()) == sum(seen[5:], Counter()) == everything
        assert seen[:5] != seen[5:]


def test_both_directions_are_in_a_batch(trainer):
    t = trainer(steps=5)
    steps = seen_by_the_model(t)
    t.run()
    assert any({bank_mask[0] for _, bank_mask in step} == {1, 2} for step in steps)


def test_the_order_follows_from_the_seed_alone(trainer):
    def order(out, **settings):
        t = trainer(out, steps=7, **settings)
        steps = seen_by_the_model(t)
        t.run()
        return [Counter(step) for step in steps]

    first = order("a", seed=5)
    assert order("b", seed=5, lr=0.3, warmup=5, micro_batch_tokens=30) == first
    assert order("c", seed=6) != first


def test_an_epoch_is_numpys_permutation_and_one_of_them_is_in_memory(trainer):
    t = trainer(seed=5)
    for epoch in (0, 1, 0):
        order = t.epoch_order(epoch)
        assert order.tolist() == np.random.default_rng((5, epoch)).permutation(len(t.train_set)).tolist()
        assert order.itemsize == 1 and t.epoch_order(epoch) is order


def test_three_columns_are_three_banks_and_six_directions(load, trainer):
    rows = random_rows("train", 4, columns=3) + [[*random_rows("train", 1)[0], ""]]  # the last has no German
    t = trainer(corpus=load(rows, ("en", "fr", "de")), steps=1, batch_size=6 * 4 + 2)
    assert t.banks.names == ["en", "fr", "de"]
    steps = seen_by_the_model(t)
    t.run()
    directions = Counter((bank_mask[0], bank_mask[-1]) for _, bank_mask in steps[0])
    assert directions == {(1, 3): 5, (2, 3): 5, (1, 5): 4, (4, 5): 4, (2, 6): 4, (4, 6): 4}


# What is written down


def test_metrics_have_a_line_for_each_step_and_for_each_validation(trainer):
    t = trainer(steps=5, eval_every=2)
    t.run()
    steps, validations = metrics(t)
    assert [set(line) for line in steps] == [{"step", "loss", "lr", "grad_norm", "tokens", "seconds"}] * 5
    assert [set(line) for line in validations] == [{"step", "val_loss"}] * 3
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in validations] == [2, 4, 5]  # the last step, too
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(steps, steps[1:]))


def test_tokens_are_the_real_ones(tokenizer, corpus, trainer):
    examples = sentences(corpus, tokenizer, "train")
    t = trainer(steps=1, batch_size=len(examples))
    t.run()
    assert metrics(t)[0][0]["tokens"] == sum(len(ids) for ids, _, _ in examples)


def test_the_validation_loss_is_the_mean_over_all_validation_targets(model, tokenizer, corpus, trainer):
    t = trainer(steps=3, eval_every=3, micro_batch_tokens=30)
    t.run()
    expected = mean_loss(model, tokenizer, t.banks.slots(), sentences(corpus, tokenizer, "validation"))
    assert metrics(t)[1] == [{"step": 3, "val_loss": pytest.approx(expected.item(), rel=1e-5)}]


def test_the_prefix_file_has_the_slots_of_the_best_validation(trainer):
    t = trainer(steps=4, eval_every=1)
    losses, history = iter([3.0, 1.0, 2.0, 1.0]), []
    t.validation_loss = lambda: next(losses)
    watch(t, "validate", lambda *_: history.append(slots_of(t)))
    t.run()
    assert same(saved_prefix(t), history[1]) and not same(saved_prefix(t), history[3])
    record = Banks.load(t.out / "prefix.safetensors", t.model).training_record
    assert (record["step"], record["val_loss"]) == (2, 1.0)


def test_without_validation_the_prefix_file_has_the_last_slots(load, trainer):
    for t in (trainer(eval_every=0), trainer("other", eval_every=1, corpus=load(random_rows("train", 5)))):
        t.run()
        assert same(saved_prefix(t), slots_of(t)) and not metrics(t)[1]


# Stopping and going on


def stop_after(trainer, step, number=signal.SIGINT):
    """Have this process signalled at the end of a step."""
    watch(trainer, "optimizer_step", lambda *_: trainer.step == step and os.kill(os.getpid(), number))


def without_seconds(trainer):
    lines = [json.loads(line) for line in (trainer.out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(one, other):
    assert same(slots_of(one), slots_of(other))
    assert without_seconds(one) == without_seconds(other)
    assert same(saved_prefix(one), saved_prefix(other))
    assert (one.tokens, one.best, one.step) == (other.tokens, other.best, other.step)


LONG = dict(steps=12, save_every=5, eval_every=3, batch_size=7)  # no multiple of another


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(trainer, number):
    start, handler = slots_of(trainer()), signal.getsignal(number)
    whole, stopped = trainer("whole", start, **LONG), trainer("stopped", start, **LONG)
    assert whole.run()
    stop_after(stopped, int(torch.randint(1, 11, ())), number)
    assert not stopped.run() and stopped.step < 12
    assert signal.getsignal(number) is handler
    resumed = trainer("stopped", **LONG)  # other slots, until it resumes
    resumed.resume()
    assert resumed.step == stopped.step and same(slots_of(resumed), slots_of(stopped))
    assert resumed.run()
    assert_same_run(resumed, whole)


def test_a_run_that_was_killed_goes_on_from_its_last_save(trainer, tmp_path):
    start = slots_of(trainer())
    whole, killed = trainer("whole", start, **LONG), int(torch.randint(1, 12, ()))
    watch(whole, "optimizer_step", lambda *_: whole.step == killed and shutil.copytree(whole.out, tmp_path / "copy"))
    assert whole.run()
    with open(tmp_path / "copy" / "metrics.jsonl", "a") as log:
        log.write('{"step": 12, "lo')  # it died while it wrote
    resumed = trainer("copy", **LONG)  # other slots, until it resumes
    resumed.resume()
    assert (killed - 1) // 5 * 5 <= resumed.step < killed  # saved every 5 steps, and after a best validation
    assert resumed.run()
    assert_same_run(resumed, whole)


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(trainer):
    t = trainer(steps=4)
    t.run()
    more = trainer(steps=6)
    more.resume()
    assert more.run()
    assert [line["step"] for line in metrics(more)[0]] == [1, 2, 3, 4, 5, 6]
    assert same(saved_prefix(more), slots_of(more))


def test_a_run_that_goes_on_remembers_its_best_validation(trainer):
    t, losses = trainer(steps=2, eval_every=1), iter([1.0, 2.0])
    t.validation_loss = lambda: next(losses)
    t.run()
    best = saved_prefix(t)
    more = trainer(steps=4, eval_every=1)
    more.validation_loss = lambda: 1.5
    more.resume()
    more.run()
    assert more.best == 1.0 and same(saved_prefix(more), best)


def test_where_the_newest_state_is_cut_or_missing_a_run_goes_on_from_the_one_before(trainer, capsys):
    start = slots_of(trainer())
    whole, cut = trainer("whole", start, **LONG), trainer("cut", start, **LONG)
    assert whole.run() and cut.run()
    path = cut.out / "last" / "state.safetensors"
    content = path.read_bytes()
    for size in (None, 0, 7, 100, int(torch.randint(len(content), ()))):
        path.unlink(missing_ok=True)
        if size is not None:
            path.write_bytes(content[:size])
        resumed = trainer("cut", **LONG)  # other slots, until it resumes
        resumed.resume()
        assert resumed.step == 10 and "state.safetensors" in capsys.readouterr().err
        assert resumed.run()
        assert_same_run(resumed, whole)


def test_a_save_that_cannot_be_flushed_leaves_both_states_as_they_were(trainer, monkeypatch):
    t = trainer(steps=4, save_every=2)
    t.run()
    before = {path.name: path.read_bytes() for path in (t.out / "last").iterdir()}

    def full(path):
        if str(path).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")

    t.optimizer_step()
    for module in ("prefix.state", "minigpt.files"):
        monkeypatch.setattr(f"{module}.flush", full)
    with pytest.raises(UserError, match="state.safetensors: cannot be written: No space left on device"):
        t.save()
    assert {path.name: path.read_bytes() for path in (t.out / "last").iterdir()} == before
    assert set(before) == {"state.safetensors", "previous.safetensors"}


def test_where_no_state_is_whole_there_is_an_error_that_names_the_newest(trainer):
    t = trainer()
    t.run()
    for path in (t.out / "last").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="state.safetensors"):
        trainer().resume()
    shutil.rmtree(t.out / "last")  # and yet there are lines of steps
    with pytest.raises(UserError, match="state.safetensors"):
        trainer().resume()


def test_a_run_that_was_killed_before_its_first_save_begins(trainer):
    t = trainer()
    start = slots_of(t)
    t.resume()
    assert t.step == 0 and same(slots_of(t), start)
    assert t.run()


def test_a_run_does_not_go_on_with_another_base_or_other_data(tokenizer, load, trainer):
    trainer().run()
    with pytest.raises(UserError, match="another model"):
        trainer(model=random_model(tokenizer)).resume()
    with pytest.raises(UserError, match="another data"):
        trainer(corpus=load(random_rows("train", 20))).resume()


@pytest.mark.parametrize(
    "name, value", [("lr", 0.07), ("batch_size", 9), ("seed", 3), ("warmup", 0), ("eval_every", 2)]
)
def test_a_run_does_not_go_on_with_a_setting_that_changes_its_numbers_and_says_which(trainer, name, value):
    trainer().run()
    other = trainer(**{name: value})
    start = slots_of(other)
    with pytest.raises(UserError, match=rf"this run has another {name} \(.*, here {value}\)$"):
        other.resume()
    assert same(slots_of(other), start) and other.step == 0


@pytest.mark.parametrize("record", [{"init": "random"}, {"reparam": True}], ids=str)
def test_a_run_does_not_go_on_with_slots_that_began_otherwise_and_says_how(trainer, record):
    trainer().run()
    other = trainer()
    other.banks.training_record |= record
    ((name, value),) = record.items()
    with pytest.raises(UserError, match=rf"this run has another {name} \(None, here {value}\)$"):
        other.resume()


def test_a_run_does_not_go_back_to_fewer_steps(trainer):
    t = trainer(steps=4)
    t.run()
    fewer = trainer(steps=3)
    with pytest.raises(UserError, match="4 steps are done already, more than --steps 3"):
        fewer.resume()


def test_a_run_goes_on_with_other_steps_saves_and_micro_batches(trainer):
    trainer().run()
    more = trainer(steps=7, save_every="1s", micro_batch_tokens=40)
    more.resume()
    assert more.run() and more.step == 7


def test_a_run_saves_every_so_many_steps_or_seconds(trainer, monkeypatch):
    now = itertools.count(0, 0.25)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    for every in (1, 2, 5, "1s", "2.5s"):
        t = trainer(f"every {every}", steps=12, save_every=every)
        saved, steps = [], 12
        watch(t, "save", lambda *_: saved.append((t.step, t.saved_at)))
        assert t.run()
        if isinstance(every, int):
            assert [step for step, _ in saved] == [0, *range(every, steps, every), steps]
        else:
            waits = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(saved[:-1])]
            assert all(float(every[:-1]) <= wait <= float(every[:-1]) + 1 for wait in waits) and len(waits) > 1


def test_a_run_does_not_go_on_with_more_slots_and_says_so(model, tokenizer, corpus, trainer):
    t = trainer()
    t.run()
    longer = random_banks(model.config, corpus.columns, PREFIX_LEN + 1)
    with pytest.raises(UserError, match=r"this run has another prefix_len \(3, here 4\)$"):
        Trainer(model, tokenizer, longer, corpus, t.settings, t.out).resume()


def test_a_state_whose_tensors_have_another_shape_is_an_error(trainer):
    t = trainer()
    t.run()
    for path in (t.state.newest, t.state.previous):
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        save_file(tensors | {"slots.key.0": tensors["slots.key.0"][:, :, :2].contiguous()}, path, metadata)
    with pytest.raises(UserError, match="cannot resume from it: its tensors are not those of such banks"):
        trainer().resume()


# Where the slots start


def start(model, tokenizer, corpus, init, prefix_len, seed=0):
    config = {"init": init, "prefix_len": prefix_len, "position_offset": 0, "settings": {"seed": seed}}
    return initial_banks(config, model, tokenizer, corpus)


def keys_and_values(model, ids):
    """What the projections of each layer put out for these ids: two of (n_layer, n_head, T, head_dim)."""
    found = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda _, __, out: found.append(out)) for block in model.h]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    qkv = torch.stack(found).unflatten(-1, (3, N_HEAD, HEAD_DIM))  # (n_layer, T, 3, n_head, head_dim)
    return qkv[:, :, 1].transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


def test_slots_start_as_keys_and_values_of_the_first_training_sentences(model, tokenizer, load):
    corpus = load(random_rows("test", 2) + random_rows("train", 9))
    banks = start(model, tokenizer, corpus, "text", 12)
    for column in (0, 1):
        ids = [i for row in corpus.rows("train") for i in corpus.ids(row, column).tolist()][:12]
        for ours, theirs in zip((banks.key[column], banks.value[column]), keys_and_values(model, ids)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_slots_repeat_the_text_where_it_is_shorter_than_they_are(model, tokenizer, load):
    corpus = load(random_rows("train", 1))
    banks = start(model, tokenizer, corpus, "text", 200)
    for column in (0, 1):
        n = len(corpus.ids(0, column))
        for slots in (banks.key[column], banks.value[column]):
            assert slots.size(2) == 200 and torch.equal(slots[:, :, n:], slots[:, :, :-n])


def test_random_slots_follow_from_the_seed(model, tokenizer, corpus):
    draw = lambda seed: dict(start(model, tokenizer, corpus, "random", 4, seed).named_parameters())
    one, again, other = draw(1), draw(1), draw(2)
    assert same(one, again) and not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("init", ["text", "random"])
def test_a_column_without_training_texts_is_an_error_that_names_it(model, tokenizer, load, init):
    corpus = load([[*row, ""] for row in random_rows("train", 3)], ("en", "fr", "de"))
    with pytest.raises(UserError, match="no training pair has a text in the column 'de'"):
        start(model, tokenizer, corpus, init, 4)
