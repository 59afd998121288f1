"""The training loop: a frozen model, a stream of sentence pairs, and AdamW on the slots alone.

    one optimizer step:  batch_size examples -> micro-batches of like length, packed -> sum of losses / all targets
                         -> gradients of the slots -> clip -> AdamW

An example is a pair in one direction; all directions are shuffled together, anew each epoch. Which examples step s
sees follows from the seed and s alone, so a run can stop after any step and go on exactly where it was.
"""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from minigpt.errors import UserError
from minigpt.files import replacing
from minigpt.loss import nll_sum
from prefix import distributed
from prefix.banks import base_of
from prefix.data import sample_rows
from prefix.translation import pack, separator

VALIDATION_EXAMPLES = 1000  # at most: enough to choose the best prefix by
BAD_STEPS = 10  # in a row, and the run gives up
FIRST_SCALE = 8.0  # of the summed loss in float16
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}  # on a CPU small, for the sake of its caches


@dataclass
class Settings:
    """What decides the numbers of a run, apart from the data, the model and the start."""

    steps: int
    lr: float
    batch_size: int = 64  # examples per optimizer step
    warmup: int = 20  # steps
    eval_every: int = 50  # steps; 0: never
    save_every: int = 50  # steps
    seed: int = 0
    clip: float = 1.0  # the largest norm of the slots' gradient
    micro_batch_tokens: int | None = None  # tokens in memory at a time; None: by MICRO_BATCH_TOKENS


@dataclass
class Prepared:
    """A step's data in one process. targets, tokens: how many there are in all processes together."""

    step: int
    batches: list
    targets: int
    tokens: int


class Trainer:
    def __init__(self, model, tokenizer, banks, corpus, settings, out):
        """corpus: data.Corpus whose columns are the banks, in order. out: the run directory, which exists."""
        self.model, self.tokenizer, self.banks, self.settings, self.out = model, tokenizer, banks, settings, Path(out)
        self.corpus, self.sep = corpus, separator(tokenizer)
        self.train_set = corpus.examples("train")
        self.validation_set = sample_rows(corpus.examples("validation"), VALIDATION_EXAMPLES)
        if not len(self.train_set):
            raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")
        frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        assert not frozen, f"the base model must be frozen, but {frozen[0]} requires a gradient"
        self.optimizer = torch.optim.AdamW(banks.parameters(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.micro_batch_tokens = settings.micro_batch_tokens or MICRO_BATCH_TOKENS[model.device.type]
        self.half = model.dtype == torch.float16
        self.scale = (
            FIRST_SCALE if self.half else 1.0
        )  # of the loss, so that float16 gradients neither vanish nor overflow
        self.step = self.tokens = self.skipped = self.bad = self.good = 0
        self.best = math.inf
        self.seconds = 0.0
        self.stop, self.stopped = [], False  # the signals received; whether all processes agreed to stop
        self.worker, self.upcoming = ThreadPoolExecutor(1), None
        self.epoch_order = lru_cache(1)(self.epoch_order)  # the worker asks for the same epoch again and again

    def run(self):
        """Train to settings.steps, validating and saving on the way. Returns False if a signal ended it early."""
        s, first = self.settings, distributed.rank() == 0
        began = time.monotonic() - self.seconds
        bar = tqdm(
            total=s.steps, initial=self.step, unit="step", disable=not (first and sys.stderr.isatty()), file=sys.stderr
        )
        with stop_signals() as self.stop, bar, open(self.out / "metrics.jsonl" if first else os.devnull, "a") as log:
            if self.step == 0:
                self.save()  # from here on there is something to go on from
            while self.step < s.steps and not self.stopped:
                record = self.optimizer_step()
                self.seconds = record["seconds"] = round(time.monotonic() - began, 3)
                _write_line(log, record)
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, {self.tokens / self.seconds:,.0f} tokens/s", refresh=False
                )
                bar.update()
                if (
                    s.eval_every
                    and (self.step % s.eval_every == 0 or self.step == s.steps)
                    and len(self.validation_set)
                ):
                    self.validate(log, bar)
                if self.step % s.save_every == 0 or self.step == s.steps or self.stopped:
                    self.save()
        if not (self.out / "prefix.safetensors").exists() or not (s.eval_every and len(self.validation_set)):
            self.keep_prefix(None)  # nothing was validated: the newest slots are what there is
        return self.step >= s.steps

    def optimizer_step(self):
        """One step of AdamW on the next batch; returns its line of metrics. Skips a step that is not finite."""
        lr = self.settings.lr * self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        prepared = self.take_prepared()
        loss = self.backward(prepared)
        norm = torch.nn.utils.clip_grad_norm_(self.banks.parameters(), self.settings.clip)
        loss, norm = float(loss), float(norm)  # the one wait for the device: metrics.jsonl shows these numbers
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.bad, self.good = 0, self.good + 1
            if self.half and self.good % 500 == 0:
                self.scale *= 2
        else:
            self.skip_step(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += prepared.tokens
        return {"step": self.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": prepared.tokens}

    def skip_step(self, loss, norm):
        self.skipped, self.bad, self.good = self.skipped + 1, self.bad + 1, 0
        if self.half:
            self.scale /= 2
        if self.bad >= BAD_STEPS:
            raise UserError(
                f"step {self.step + 1}: {BAD_STEPS} steps in a row were not finite (loss {loss}, norm {norm}): "
                "try a lower --lr, more --warmup, or --dtype float32"
            )

    def backward(self, prepared):
        """Gradients of the mean loss over all targets of a step, however it is cut into micro-batches or dealt out to
        processes. Returns the loss."""
        total = torch.zeros((), device=self.model.device)
        stop = torch.full_like(total, bool(self.stop))
        for p in self.banks.parameters():
            p.grad = torch.zeros_like(p)
        for batch in prepared.batches:
            loss = self.nll(batch)
            (loss * self.scale).backward()  # by a power of two, which 16 bits hold exactly
            total += loss.detach()
        grads = [p.grad for p in self.banks.parameters()]
        torch._foreach_div_(grads, self.scale * prepared.targets)
        distributed.add_up([total, stop, *grads])
        self.stopped = bool(self.stop if distributed.world() == 1 else stop)  # all processes stop after the same step
        return total / prepared.targets

    def prepare(self, step):
        """This process's packed micro-batches of a step, on the device."""
        examples = self.examples_of(step)
        mine = distributed.share(sorted(examples, key=n_tokens))  # so that processes get alike amounts
        targets = sum(len(target) + 1 for _, target, _, _ in examples)
        return Prepared(step, [self.packed(m) for m in self.micro_batches(mine)], targets, sum(map(n_tokens, examples)))

    def take_prepared(self):
        """The batch of this step, and a thread set to prepare the next one while this one runs."""
        prepared = self.upcoming.result() if self.upcoming else None
        if prepared is None or prepared.step != self.step:
            prepared = self.prepare(self.step)
        if self.step + 1 < self.settings.steps:
            self.upcoming = self.worker.submit(self.prepare, self.step + 1)
        return prepared

    def packed(self, examples):
        return pack(examples, self.sep, self.tokenizer.eot, self.model.device)

    def nll(self, batch):
        """The summed negative log likelihood of a packed batch's targets."""
        hidden = self.model.hidden(
            batch.ids, batch.layout, self.banks.slots(), self.banks.position_offset
        )  # (N, n_embd)
        return nll_sum(hidden[batch.at], self.model.wte.weight, batch.targets)

    def micro_batches(self, examples):
        """Cut examples into groups of like length that fit micro_batch_tokens (a longer example stays alone)."""
        micro, tokens = [], 0
        for example in sorted(examples, key=n_tokens):
            if micro and tokens + n_tokens(example) > self.micro_batch_tokens:
                yield micro
                micro, tokens = [], 0
            micro.append(example)
            tokens += n_tokens(example)
        if micro:
            yield micro

    def examples_of(self, step):
        """The examples of a step: the batch_size next ones of an endless row of shuffled epochs."""
        n, size = len(self.train_set), self.settings.batch_size
        chosen = []
        for i in range(step * size, (step + 1) * size):
            chosen.append(self.train_set[self.epoch_order(i // n)[i % n]])
        return self.encoded(chosen)

    def epoch_order(self, epoch):
        return np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.train_set))

    def encoded(self, rows):
        """(row, source column, target column) each -> (source ids, target ids, source bank, target bank)."""
        return [(self.corpus.ids(row, s), self.corpus.ids(row, t), int(s), int(t)) for row, s, t in rows]

    def schedule(self, step):
        """Linear warm-up, then linear decay, which would reach zero one step after the last."""
        s = self.settings
        return min((step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.steps - s.warmup))

    @torch.no_grad()
    def validation_loss(self):
        """Mean negative log likelihood of the validation targets."""
        examples = self.encoded(self.validation_set)
        total = torch.zeros((), device=self.model.device)
        for micro in self.micro_batches(distributed.share(sorted(examples, key=n_tokens))):
            total += self.nll(self.packed(micro))
        distributed.add_up([total])
        return float(total) / sum(len(target) + 1 for _, target, _, _ in examples)

    def validate(self, log, bar):
        loss = self.validation_loss()
        _write_line(log, {"step": self.step, "val_loss": loss})
        if distributed.rank() == 0:
            bar.write(f"step {self.step}: validation loss {loss:.4f}", file=sys.stderr)
        if loss < self.best:
            self.best = loss
            self.keep_prefix(loss)

    def keep_prefix(self, val_loss):
        if distributed.rank() > 0:
            return
        self.banks.training_record |= {"step": self.step, "val_loss": val_loss, "settings": asdict(self.settings)}
        self.banks.save(self.out / "prefix.safetensors", self.model)

    def save(self):
        """Everything needed to go on exactly, in one file: last/state.safetensors."""
        if distributed.rank() > 0:
            return
        (self.out / "last").mkdir(exist_ok=True)
        tensors = {f"slots.{name}": p.detach() for name, p in self.banks.named_parameters()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        counts = {name: getattr(self, name) for name in COUNTS}
        with replacing(self.out / "last" / "state.safetensors") as temporary:
            tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
            save_file(tensors, temporary, {"counts": json.dumps(counts), "of": json.dumps(self.identity)})

    @cached_property
    def identity(self):
        """What a run must be going on with: this base and these examples. Read once: it looks at all of them."""
        return {"model": base_of(self.model), "data": self.corpus.fingerprint()}

    def resume(self):
        """Take up the state that save() wrote in self.out."""
        path = self.out / "last" / "state.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                counts, of = (json.loads(file.metadata()[name]) for name in ("counts", "of"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            slots = {name: tensors[f"slots.{name}"] for name, _ in self.banks.named_parameters()}
            self.banks.load_state_dict(slots)
            for name in COUNTS:
                setattr(self, name, counts[name])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: cannot resume from it: {error}") from error
        for what, ours in self.identity.items():
            if not isinstance(of, dict) or of.get(what) != ours:
                raise UserError(f"{path}: this run has another {what} than the one at hand, {ours}: {of}")
        if not self.half:
            self.scale = 1.0
        elif counts["scale"] == 1.0:  # it comes from a run in another dtype
            self.scale = FIRST_SCALE
        state = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, i, part = name.split(".")
                state.setdefault(int(i), {})[part] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if distributed.rank() == 0:
            _keep_lines(self.out / "metrics.jsonl", self.step)


def n_tokens(example):
    """How many real tokens an example takes: its two sides and the separator."""
    source, target, _, _ = example
    return len(source) + 1 + len(target)


COUNTS = ("step", "tokens", "skipped", "bad", "good", "scale", "best", "seconds")


@contextmanager
def stop_signals():
    """Inside, SIGINT and SIGTERM only fill the list that this yields; a second one ends the program as usual."""
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _write_line(file, record):
    """Numbers that are not finite, as those of a skipped step, are null: JSON has no others."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    file.write(json.dumps(record) + "\n")
    file.flush()


def _keep_lines(path, step):
    """Drop the metrics of steps that a killed run made after its last save."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
