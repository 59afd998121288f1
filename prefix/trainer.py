"""The training loop: a frozen model, a stream of pairs of texts, and AdamW on the slots alone.

    for each step:                      batches.py deals out its pairs
        for each micro-batch:
            loss, backward              summed over target tokens
        gradients / all targets         one weight for each target token of the step, however it was cut
        all-reduce, clip, AdamW

`Trainer.run` is that loop, `Trainer.optimizer_step` one round of it. A run can be stopped or killed at any time, and
goes on with the same bits.
"""

import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minigpt.files import UserError
from minigpt.loss import nll_sum
from prefix import distributed, state
from prefix.state import METRICS, Progress

MAX_SKIPPED = 10  # steps in a row that are not finite, and the run gives up
FIRST_SCALE, SCALE_DOUBLES_AFTER = 8.0, 500  # of the summed loss in float16; steps


class NotFinite(UserError):
    """A run whose losses or gradients are not finite any more."""


@dataclass
class Settings:
    """What decides a run's result, together with the data, the model and the initial slots."""

    steps: int
    lr: float  # at its peak
    batch_size: int = 64  # examples per optimizer step
    warmup: int = 20  # steps
    eval_every: int = 50  # steps; 0: never
    save_every: int = 50  # steps
    seed: int = 0
    clip: float = 1.0  # the largest norm of the slots' gradient

    def lr_at(self, step):
        """Linear warm-up, then linear decay, which would reach zero one step after the last."""
        return self.lr * min((step + 1) / max(1, self.warmup), (self.steps - step) / max(1, self.steps - self.warmup))


class Trainer:
    def __init__(self, model, banks, loader, settings, out):
        """banks: Banks named as the columns of the loader's corpus, in order; what requires a gradient is trained.
        loader: a BatchLoader. out: the run directory, which exists."""
        moving = [name for name, p in model.named_parameters() if p.requires_grad]
        assert not moving, f"the base model must be frozen, but {moving[0]} requires a gradient"
        self.model, self.banks, self.loader, self.settings, self.out = model, banks, loader, settings, out and Path(out)
        self.trainable = [p for p in banks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(  # so that float16 gradients neither vanish nor overflow
            model.device.type, FIRST_SCALE, growth_interval=SCALE_DOUBLES_AFTER, enabled=model.dtype == torch.float16
        )
        self.progress = Progress()
        self.stop, self.stopped = [], False  # the signals received; whether all processes agreed to stop
        self.identity = state.identity_of(model, banks, loader.corpus, settings)
        state.check_identity(f"process {distributed.rank()}", self.identity, distributed.broadcast(self.identity))

    def run(self, end=None):
        """Train to the step `end` (None: settings.steps), validating and saving on the way. Returns False if a signal
        ended it early."""
        s, p, end = self.settings, self.progress, end or self.settings.steps
        began = time.monotonic() - p.seconds
        quiet = distributed.rank() > 0 or not sys.stderr.isatty()
        bar = tqdm(total=s.steps, initial=p.step, unit="step", disable=quiet, file=sys.stderr)
        with stop_signals() as self.stop, bar:
            if p.step == 0:
                self.save()  # so that a run that is killed in its first step can be resumed
            for batch in self.loader.steps(p.step, end):
                record = self.optimizer_step(batch)
                p.seconds = record["seconds"] = round(time.monotonic() - began, 3)
                self.log(record)
                bar.set_postfix_str(f"loss {record['loss']:.3f}, {p.tokens / p.seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                due = s.eval_every and (p.step % s.eval_every == 0 or p.step == s.steps)
                better = due and len(self.loader.validation) and self.validate()
                if better or p.step % s.save_every == 0 or p.step == end or self.stopped:
                    self.save()
                if self.stopped:
                    break
        if p.best == math.inf:
            self.keep_prefix(None)  # nothing was validated: the newest slots are what there is
        return p.step >= end

    def optimizer_step(self, batch):
        """One step of AdamW; returns its line of metrics. A step that is not finite leaves the slots as they are."""
        p, lr = self.progress, self.settings.lr_at(self.progress.step)
        loss = self.loader.within_memory(batch, self.forward_backward, f"step {p.step + 1}") / batch.n_targets
        for parameter in self.trainable:
            parameter.grad /= batch.n_targets
        stop = torch.full_like(loss, len(self.stop))
        distributed.all_reduce_sum([loss, stop, *(parameter.grad for parameter in self.trainable)])

        self.optimizer.param_groups[0]["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.settings.clip)
        loss, norm, stop = torch.stack([loss, norm, stop]).tolist()  # the one wait for the device
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()

        p.step += 1
        p.tokens += batch.n_tokens
        p.skipped += not finite
        p.skipped_in_a_row = 0 if finite else p.skipped_in_a_row + 1
        self.stopped = stop > 0  # a signal to one process stops all of them, after the same step
        if p.skipped_in_a_row == MAX_SKIPPED:
            said = f"step {p.step}: {MAX_SKIPPED} steps in a row were not finite (loss {loss}, norm {norm})"
            raise NotFinite(f"{said}: try a lower --lr, more --warmup, or --dtype float32")
        return {"step": p.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": batch.n_tokens}

    def forward_backward(self, micro_batches):
        """The summed loss of all target tokens, and its gradients, however they are cut into micro-batches."""
        total = torch.zeros((), device=self.model.device)
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        for micro_batch in micro_batches:
            loss = self.loss(micro_batch, self.banks.slots())
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def loss(self, micro_batch, slots):
        """The sum of -log p over a micro-batch's targets. slots: None for the base alone, where text starts at 0."""
        offset = self.banks.position_offset if slots else 0
        hidden = self.model.hidden(micro_batch.ids, micro_batch.packed, slots, offset)  # (N, n_embd)
        return nll_sum(hidden[micro_batch.target_index], self.model.wte.weight, micro_batch.targets)

    def validate(self):
        """Returns whether these slots are the best so far; if so, they are kept."""
        p = self.progress
        record = {"step": p.step, "val_loss": self.validation_loss(), **self.banks.moved()}
        said = f"step {p.step}: validation loss {record['val_loss']:.4f}"
        if p.base_loss is None:
            p.base_loss = record["base_loss"] = self.validation_loss(base=True)
            said = f"validation loss of the base alone {p.base_loss:.4f}; {said}"
        self.log(record)
        if distributed.rank() == 0:
            tqdm.write(said, file=sys.stderr)
        if better := record["val_loss"] < p.best:
            p.best = record["val_loss"]
            self.keep_prefix(p.best)
        return better

    @torch.no_grad()
    def validation_loss(self, base=False):
        """Mean negative log likelihood of the validation targets. base: all banks closed."""
        batch, slots = self.loader.batch_of(self.loader.validation), None if base else self.banks.slots()
        zero = torch.zeros((), device=self.model.device)  # for a process without pairs
        work = lambda micro_batches: sum((self.loss(micro_batch, slots) for micro_batch in micro_batches), zero)
        total = self.loader.within_memory(batch, work, f"validation after step {self.progress.step}")
        distributed.all_reduce_sum([total])
        return float(total) / batch.n_targets

    def log(self, record):
        if distributed.rank() == 0:
            state.add_line(self.out / METRICS, record)

    def keep_prefix(self, val_loss):
        if distributed.rank() == 0:
            record, p = self.banks.training_record, self.progress
            record |= {"step": p.step, "val_loss": val_loss, "base_loss": p.base_loss, "settings": asdict(self.settings)}
            self.banks.save(self.out / "prefix.safetensors", self.model)

    def save(self):
        """Keep all that is needed to go on exactly."""
        if distributed.rank() == 0:
            self.progress.scaler, self.progress.fitting_tokens = self.scaler.state_dict(), self.loader.fitting_tokens
            state.save(self.out, self.progress, self.banks, self.optimizer, self.identity)

    def resume(self):
        """Go on from the state in self.out; without one, where the run was killed before its first save, begin. Process
        0 reads it for all. Raises UserError for the state of another run, or of more steps than settings.steps."""
        found = distributed.broadcast(state.read(self.out) if distributed.rank() == 0 else None)
        if found is None:
            return
        p, theirs, tensors = found
        state.check_identity(f"{self.out}: this run", theirs, self.identity)
        if p.step > self.settings.steps:
            done = f"{p.step:,} steps are done already, more than --steps {self.settings.steps:,}"
            raise UserError(f"{self.out}: {done}: give a larger number")
        self.progress = p
        state.restore(tensors, self.banks, self.optimizer)
        if p.scaler:  # it is empty in other dtypes
            self.scaler.load_state_dict(p.scaler)
        if p.fitting_tokens:
            self.loader.fitting_tokens = p.fitting_tokens
            self.loader.micro_batch_tokens = min(self.loader.micro_batch_tokens, p.fitting_tokens)
        if distributed.rank() == 0:
            state.cut_after(self.out / METRICS, p.step)


@contextmanager
def stop_signals():
    """Inside, SIGINT and SIGTERM only fill the list that this yields; a second one ends the program as usual."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
