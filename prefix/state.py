"""What a run needs to go on exactly where it was, and how it tells that it is the same run.

    <run>/last/state.safetensors       the newest save: what is trained, AdamW's moments and, as metadata, the counts of
                                       the trainer and what the run is of
    <run>/last/previous.safetensors    the one before, for the case that the newest is cut all the same: by a disk that
                                       lied, or by a copy of the run to elsewhere
    <run>/metrics.jsonl                never behind a state: who goes on cuts it after the step of the one that is used

The order of the examples is not saved: it follows from the seed and the step (trainer.py).
"""

import json
import math
import os
from dataclasses import asdict

from safetensors import SafetensorError
from safetensors.torch import save_file

from minigpt.errors import UserError
from minigpt.files import flush, open_tensors, replacing
from prefix.distributed import log
from prefix.prefix_file import base_of

METRICS = "metrics.jsonl"
# What is saved of a Trainer besides tensors, by name:
COUNTS = dict(
    step=int, tokens=int, skipped=int, bad=int, good=int, scale=float, best=float, seconds=float, most_tokens=int
)


class State:
    def __init__(self, out, model, banks, corpus, settings, optimizer):
        """out: the run directory, which has last/ by the first save. optimizer: of what is trained of `banks`."""
        self.out, self.metrics = out, out / METRICS
        self.newest, self.previous = out / "last" / "state.safetensors", out / "last" / "previous.safetensors"
        self.model, self.banks, self.corpus, self.settings, self.optimizer = model, banks, corpus, settings, optimizer
        self.newest_is_cut = False

    def exists(self):
        return self.newest.exists() or self.previous.exists()

    def save(self, counts):
        """Everything needed to go on, in one file. The newest state becomes the previous one, if it is whole."""
        tensors = {f"slots.{name}": p.detach() for name, p in self.banks.named_parameters()}
        for i, adam in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in adam.items()}
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        with replacing(self.newest) as temporary:
            if counts["step"]:
                flush(self.metrics)  # a state never is newer than the lines of its steps
            save_file(tensors, temporary, {"counts": json.dumps(counts), "of": json.dumps(self.identity())})
            flush(temporary)  # so that a disk that is full says so while both states still are in their places
            if self.newest.exists() and not self.newest_is_cut:
                os.replace(self.newest, self.previous)
        self.newest_is_cut = False

    def load(self):
        """Put the newest whole state back into the banks and the optimizer. Returns its counts, or None for a run that
        was killed before its first save. Raises UserError where no state is whole, or it is of another run than the one
        at hand, saying in what, or is past its last step."""
        if not self.exists() and not (self.metrics.exists() and self.metrics.stat().st_size):
            return None
        counts, tensors = self.read_newest()
        if counts["step"] > self.settings.steps:
            done = f"{counts['step']:,} steps are done already"
            raise UserError(f"{self.out}: {done}, more than --steps {self.settings.steps:,}: give a larger number")
        self.banks.load_state_dict({name: tensors[f"slots.{name}"] for name, _ in self.banks.named_parameters()})
        adam = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, i, part = name.split(".")
                adam.setdefault(int(i), {})[part] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        return counts

    def read_newest(self):
        """What read() gives for the newer of the two states that is whole."""
        try:
            return self.read(self.newest)
        except UserError as error:
            try:
                found = self.read(self.previous)
            except UserError:
                raise error from None
            self.newest_is_cut = True
            log(f"{error}; going on from the save before it")
            return found

    def read(self, path):
        """A saved state: (counts, tensors by name). Raises UserError for any file that save() did not write for such a
        run as this, before its tensors are read."""
        with open_tensors(path) as file:
            try:
                counts, of = (json.loads(file.metadata()[name]) for name in ("counts", "of"))
                if any(type(counts[name]) is not kind for name, kind in COUNTS.items()) or type(of) is not dict:
                    raise ValueError("a count is not of its type")
                if not all(counts[name] >= 0 for name in COUNTS):
                    raise ValueError("a count is below 0")
                self.check_identity(of)
                return counts, self.tensors_of(file)
            except UserError:  # of check_identity
                raise
            except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise UserError(f"{path}: cannot resume from it: {error}") from error

    def tensors_of(self, file):
        """The tensors of an open state, by name. Raises ValueError where they are not those of such banks."""
        slots = {f"slots.{name}": list(p.shape) for name, p in self.banks.named_parameters()}
        adam = {}  # which there is from the first step on
        for i, p in enumerate(self.optimizer.param_groups[0]["params"]):
            adam |= {f"adam.{i}.exp_avg": list(p.shape), f"adam.{i}.exp_avg_sq": list(p.shape), f"adam.{i}.step": []}
        there = {name: file.get_slice(name) for name in file.keys()}
        if any(part.get_dtype() != "F32" for part in there.values()):
            raise ValueError("a tensor is not of float32")
        if {name: part.get_shape() for name, part in there.items()} not in (slots, slots | adam):
            raise ValueError("its tensors are not those of such banks")
        tensors = {name: file.get_tensor(name) for name in there}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("a number is not finite")
        if any((t < 0).any() for name, t in tensors.items() if name.endswith((".step", ".exp_avg_sq"))):
            raise ValueError("AdamW's count of steps or mean of squares is below 0")
        return tensors

    def identity(self):
        """What a run must be going on with: these banks, this base, these examples, and the settings that decide its
        numbers, all of them by name."""
        base, settings = base_of(self.model), asdict(self.settings)
        names = settings.keys() - {"steps", "save_every"}
        return {
            "columns": self.banks.names,
            "prefix_len": self.banks.prefix_len[0],
            **{name: self.banks.training_record.get(name) for name in ("init", "reparam")},
            "data": self.corpus.fingerprint(),
            "model": base["fingerprint"],
            **{f"model's {name}": value for name, value in base["config"].items()},
            **{name: settings[name] for name in sorted(names)},
            "position_offset": self.banks.position_offset,
        }

    def check_identity(self, of):
        others = {name: ours for name, ours in self.identity().items() if of.get(name) != ours}
        if others:
            found = "; ".join(f"another {name} ({of.get(name)}, here {ours})" for name, ours in others.items())
            raise UserError(f"{self.out}: this run has {found}")


def add_line(path, record):
    """Add a line to metrics.jsonl. Numbers that are not finite, as those of a skipped step, are null: JSON has no
    others. The file is opened anew each time, so that a directory that is gone shows at once."""
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def cut_after(path, step):
    """Cut off the lines of later steps, and one that was not written to its end: what a killed run did after its last
    save."""
    kept = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n") or _step_of(line) > step:
                break
            kept += len(line)
        file.truncate(kept)


def _step_of(line):
    """The step that a line of metrics is of, 0 if it is no such line."""
    try:
        return json.loads(line)["step"] + 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
