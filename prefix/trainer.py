"""The training loop: a frozen model, a stream of sentence pairs, and AdamW on the slots alone.

    one optimizer step:  batch_size examples -> micro-batches of like length, packed -> sum of losses / all targets
                         -> gradients of the slots -> clip -> AdamW

An example is a pair in one direction; all directions are shuffled together, anew each epoch. Which examples step s
sees follows from the seed and s alone, so a run can stop after any step and go on exactly where it was.
"""

import math
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minigpt.attention import Slots
from minigpt.errors import UserError
from minigpt.loss import nll_sum
from prefix import distributed
from prefix.data.corpus import sample_rows
from prefix.sequences import n_tokens, pack_pairs, separator
from prefix.state import COUNTS, METRICS, State, add_line, cut_after

VALIDATION_EXAMPLES = 1000  # at most: enough to choose the best prefix by
MAX_BATCH = 1 << 20  # examples, whose list is in memory
BAD_STEPS = 10  # in a row, and the run gives up
FIRST_SCALE = 8.0  # of the summed loss in float16
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]+)?s")  # such as 60s, between saves
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}  # on a CPU small, for the sake of its caches


@dataclass
class Settings:
    """What decides the numbers of a run, apart from the data, the model and the start."""

    steps: int
    lr: float
    batch_size: int = 64  # examples per optimizer step
    warmup: int = 20  # steps
    eval_every: int = 50  # steps; 0: never
    save_every: int | str = 50  # steps; or seconds, such as "60s"
    seed: int = 0
    clip: float = 1.0  # the largest norm of the slots' gradient
    slot_dropout: float = 0.0  # the probability that a slot is absent from a step
    label_smoothing: float = 0.0  # the share of a target that goes to the whole vocabulary, in training

    def __post_init__(self):
        """Raises UserError for what no option would take: settings may come from a file."""
        whole = {"steps": 1, "batch_size": 1, "warmup": 0, "eval_every": 0, "seed": 0}
        if not isinstance(self.save_every, str) or not SECONDS.fullmatch(self.save_every):
            whole["save_every"] = 1
        for name, least in whole.items():
            value, most = getattr(self, name), MAX_BATCH if name == "batch_size" else 2**63 - 1
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"{name} must be a whole number from {least} to {most:,}, not {value!r}")
        for name, most in {"lr": 1e9, "clip": 1e9, "slot_dropout": 0.99, "label_smoothing": 0.99}.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise UserError(f"{name} must be a number from 0 to {most:g}, not {value!r}")


@dataclass
class Prepared:
    """A step's data in one process. cut: the micro_batch_tokens that it was cut by. targets, tokens: how many there are
    in all processes together."""

    step: int
    cut: int
    batches: list
    targets: int
    tokens: int


class Trainer:
    def __init__(self, model, tokenizer, banks, corpus, settings, out, micro_batch_tokens=None):
        """corpus: data.Corpus whose columns are the banks, in order. out: the run directory, which exists.
        micro_batch_tokens: tokens in memory at a time; None: by MICRO_BATCH_TOKENS."""
        self.model, self.tokenizer, self.banks, self.settings, self.out = model, tokenizer, banks, settings, Path(out)
        self.corpus, self.sep = corpus, separator(tokenizer)
        self.train_set = corpus.examples("train")
        self.validation_set = sample_rows(corpus.examples("validation"), VALIDATION_EXAMPLES)
        if not len(self.train_set):
            raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")
        frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        assert not frozen, f"the base model must be frozen, but {frozen[0]} requires a gradient"
        self.trained = [p for p in banks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.state = State(self.out, model, banks, corpus, settings, self.optimizer)
        self.micro_batch_tokens = micro_batch_tokens or MICRO_BATCH_TOKENS[model.device.type]
        self.most_tokens = 2**63 - 1  # of a micro-batch, since memory last ran out
        self.half = model.dtype == torch.float16
        # of the loss, so that float16 gradients neither vanish nor overflow
        self.scale = FIRST_SCALE if self.half else 1.0
        self.step = self.tokens = self.skipped = self.bad = self.good = 0
        self.best = math.inf
        self.seconds = 0.0
        self.saved_step, self.saved_at = None, -math.inf
        self.stop, self.stopped = [], False  # the signals received; whether all processes agreed to stop
        self.worker, self.upcoming = ThreadPoolExecutor(1), None
        self.epoch = self.order = None  # the epoch that examples_of is in, and its order

    def run(self):
        """Train to settings.steps, validating and saving on the way. Returns False if a signal ended it early."""
        s, first = self.settings, distributed.rank() == 0
        began = time.monotonic() - self.seconds
        bar = tqdm(
            total=s.steps, initial=self.step, unit="step", disable=not (first and sys.stderr.isatty()), file=sys.stderr
        )
        with stop_signals() as self.stop, bar:
            if self.step == 0:
                (self.out / "last").mkdir(exist_ok=True)
                self.save()  # from here on there is something to go on from
            while self.step < s.steps and not self.stopped:
                record = self.optimizer_step()
                self.seconds = record["seconds"] = round(time.monotonic() - began, 3)
                self.log(record)
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, {self.tokens / self.seconds:,.0f} tokens/s", refresh=False
                )
                bar.update()
                due = s.eval_every and (self.step % s.eval_every == 0 or self.step == s.steps)
                better = due and len(self.validation_set) and self.validate(bar)
                if better or self.save_is_due() or self.step == s.steps or self.stopped:
                    self.save()
        if not (self.out / "prefix.safetensors").exists() or not (s.eval_every and len(self.validation_set)):
            self.keep_prefix(None)  # nothing was validated: the newest slots are what there is
        return self.step >= s.steps

    # One step

    def optimizer_step(self):
        """One step of AdamW on the next batch; returns its line of metrics. Skips a step that is not finite."""
        lr = self.settings.lr * self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        prepared = self.take_prepared()
        loss = self.backward(prepared)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
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

    def schedule(self, step):
        """Linear warm-up, then linear decay, which would reach zero one step after the last."""
        s = self.settings
        return min((step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.steps - s.warmup))

    def backward(self, prepared):
        """Gradients of the mean loss over all targets of a step, however it is cut into micro-batches or dealt out to
        processes. Returns the loss."""

        def batches():
            for p in self.trained:
                p.grad = torch.zeros_like(p)
            return self.up_to_date(prepared, prepared.step).batches

        def loss_of(batch):
            loss = self.nll(batch, self.present(prepared.step), self.settings.label_smoothing)
            if loss.requires_grad:  # as it does not where all slots are absent
                (loss * self.scale).backward()  # by a power of two, which 16 bits hold exactly
            return loss.detach()

        total = self.add_up(batches, loss_of, f"step {prepared.step + 1}")
        stop = torch.full_like(total, bool(self.stop))
        grads = [p.grad for p in self.trained]
        torch._foreach_div_(grads, self.scale * prepared.targets)
        distributed.all_reduce_sum([total, stop, *grads])
        self.stopped = bool(self.stop if distributed.world_size() == 1 else stop)  # all processes stop after the same step
        return total / prepared.targets

    def nll(self, batch, slots=None, smoothing=0.0):
        """The summed negative log likelihood of a packed batch's targets. slots: by default all of them."""
        slots = slots or self.banks.slots()
        hidden = self.model.hidden(batch.ids, batch.packed, slots, self.banks.position_offset)  # (N, n_embd)
        return nll_sum(hidden[batch.target_index], self.model.wte.weight, batch.targets, smoothing)

    def present(self, step):
        """The slots that are there in a training step: the same in all its micro-batches and processes."""
        slots, p = self.banks.slots(), self.settings.slot_dropout
        if not p:
            return slots
        draw = np.random.default_rng((self.settings.seed, step, 1)).random(len(slots.bank))
        kept = torch.from_numpy(np.flatnonzero(draw >= p)).to(slots.bank.device)
        return Slots(slots.key[:, :, kept], slots.value[:, :, kept], slots.bank[kept])

    def add_up(self, batches, loss_of, where):
        """The sum of loss_of(batch) over batches(). If memory runs out, micro-batches have half the size from here on,
        and all of it is done once more. Raises UserError if it runs out again."""
        for last in (False, True):
            total, largest = torch.zeros((), device=self.model.device), 0
            try:
                for batch in batches():
                    largest = max(largest, len(batch.ids))
                    total += loss_of(batch)
                return total
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            if not last:  # only here, outside, are the activations that the error held on to free again
                self.micro_batch_tokens = max(1, min(largest or self.micro_batch_tokens, self.micro_batch_tokens) // 2)
                self.most_tokens = self.micro_batch_tokens
                say = f"out of memory with micro-batches of {largest:,} tokens: now {self.micro_batch_tokens:,}"
                tqdm.write(f"{where}: {say}", file=sys.stderr)
        raise UserError(
            f"{where}: out of memory, even in micro-batches of {self.micro_batch_tokens:,}: "
            "lower --micro-batch-tokens, set --checkpoint-activations, or, for long pairs, lower --max-tokens"
        )

    # Validation, and what is written down

    def validate(self, bar):
        """Returns whether these slots are the best so far; if so, they are kept."""
        loss = self.validation_loss()
        self.log({"step": self.step, "val_loss": loss})
        if distributed.rank() == 0:
            bar.write(f"step {self.step}: validation loss {loss:.4f}", file=sys.stderr)
        better = loss < self.best
        if better:
            self.best = loss
            self.keep_prefix(loss)
        return better

    @torch.no_grad()
    def validation_loss(self):
        """Mean negative log likelihood of the validation targets."""
        examples = self.encoded(self.validation_set)
        mine = distributed.shard(sorted(examples, key=n_tokens))
        batches = lambda: map(self.packed, self.micro_batches(mine))
        total = self.add_up(batches, self.nll, f"validation after step {self.step}")
        distributed.all_reduce_sum([total])
        return float(total) / sum(len(target) + 1 for _, target, _, _ in examples)

    def log(self, record):
        if distributed.rank() == 0:
            add_line(self.out / METRICS, record)

    def keep_prefix(self, val_loss):
        if distributed.rank() > 0:
            return
        self.banks.training_record |= {"step": self.step, "val_loss": val_loss, "settings": asdict(self.settings)}
        self.banks.save(self.out / "prefix.safetensors", self.model)

    def save_is_due(self):
        every = self.settings.save_every
        if isinstance(every, str):
            return time.monotonic() - self.saved_at >= float(every.removesuffix("s"))
        return self.step % every == 0

    def save(self):
        """Keep all that is needed to go on exactly."""
        if distributed.rank() > 0:
            return
        self.state.save({name: getattr(self, name) for name in COUNTS})
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def resume(self, micro_batch_tokens=None):
        """Go on from the newest state in self.out; without any, where the run was killed before its first save, begin.
        micro_batch_tokens: how many to try again, whatever ran out of memory before. Raises UserError as State.load."""
        counts = self.state.load()
        if counts is None:
            return
        for name in COUNTS:
            setattr(self, name, counts[name])
        self.micro_batch_tokens = micro_batch_tokens or min(self.micro_batch_tokens, self.most_tokens)
        self.saved_step = self.step
        if not self.half:
            self.scale = 1.0
        elif counts["scale"] == 1.0:  # it comes from a run in another dtype
            self.scale = FIRST_SCALE
        if distributed.rank() == 0:
            cut_after(self.out / METRICS, self.step)

    # The batches

    def take_prepared(self):
        """The batch of this step, and a thread set to prepare the next one while this one runs."""
        prepared = self.up_to_date(self.upcoming and self.upcoming.result(), self.step)
        if self.step + 1 < self.settings.steps:
            self.upcoming = self.worker.submit(self.prepare, self.step + 1)
        return prepared

    def up_to_date(self, prepared, step):
        """`prepared`, if it is this step's and cut as it would be now; otherwise it is made anew, by the one thread that
        may."""
        if prepared and (prepared.step, prepared.cut) == (step, self.micro_batch_tokens):
            return prepared
        return self.worker.submit(self.prepare, step).result()

    def prepare(self, step):
        """This process's packed micro-batches of a step, on the device."""
        cut, examples = self.micro_batch_tokens, self.examples_of(step)
        mine = distributed.shard(sorted(examples, key=n_tokens))  # so that processes get alike amounts
        targets = sum(len(target) + 1 for _, target, _, _ in examples)
        batches = [self.packed(micro) for micro in self.micro_batches(mine)]
        return Prepared(step, cut, batches, targets, sum(map(n_tokens, examples)))

    def packed(self, examples):
        return pack_pairs(examples, self.sep, self.tokenizer.eot, self.model.device)

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
        """The numbers of all training examples, shuffled: one epoch's in memory, in the smallest type that holds them."""
        if self.epoch != epoch:
            self.epoch = self.order = None
            order = np.arange(len(self.train_set), dtype=np.min_scalar_type(len(self.train_set)))
            np.random.default_rng((self.settings.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order

    def encoded(self, rows):
        """(row, source column, target column) each -> (source ids, target ids, source bank, target bank)."""
        return [(self.corpus.ids(row, s), self.corpus.ids(row, t), int(s), int(t)) for row, s, t in rows]


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


def out_of_memory(error):
    """torch has a class of its own for a full GPU, but only words for a full main memory and in CUDA's libraries."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
