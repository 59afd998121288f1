"""What a run needs to go on exactly where it was.

    <run>/last/state.safetensors    what is trained, AdamW's moments and, as metadata, the run's Progress and identity
    <run>/metrics.jsonl             a line for each step and validation; never behind the state: a run that goes on cuts
                                    off the lines after the state's step

The order of the examples is not saved: it follows from the seed and the step (batches.py). Only process 0 reads and
writes these files.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import takewhile

from safetensors.torch import save_file

from minigpt.files import UserError, flush, open_tensors, reading, replacing
from prefix.prefix_file import base_of

METRICS = "metrics.jsonl"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # of sources, separators and targets, so far
    seconds: float = 0.0
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    best: float = math.inf  # the lowest validation loss
    base_loss: float | None = None  # the validation loss of the base without slots, once it is known
    fitting_tokens: int | None = None  # of a micro-batch, since memory last ran out
    scaler: dict = field(default_factory=dict)  # of torch.amp.GradScaler, in float16


def state_file(out):
    return out / "last" / "state.safetensors"


def save(out, progress, banks, optimizer, identity):
    """Write all that is needed to go on, whole or not at all."""
    tensors = {f"slots.{name}": p.detach() for name, p in banks.named_parameters()}
    for i, adam in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": value for name, value in adam.items()}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    state_file(out).parent.mkdir(exist_ok=True)
    with replacing(state_file(out)) as temporary:
        if progress.step:
            flush(out / METRICS)  # a state is never newer than the lines of its steps
        save_file(tensors, temporary, {"progress": json.dumps(asdict(progress)), "identity": json.dumps(identity)})


def read(out):
    """(Progress, identity, tensors) of a run, or None where it was killed before its first save. Raises UserError for a
    file that is damaged, or that this version did not write."""
    path = state_file(out)
    if not path.exists() and not ((out / METRICS).exists() and (out / METRICS).stat().st_size):
        return None
    with open_tensors(path) as file, reading(path, "the state of a run of this version"):
        progress, identity = (json.loads(file.metadata()[name]) for name in ("progress", "identity"))
        return Progress(**progress), identity, {name: file.get_tensor(name) for name in file.keys()}


def restore(tensors, banks, optimizer):
    """Put saved tensors back into the banks and the optimizer."""
    banks.load_state_dict({name: tensors[f"slots.{name}"] for name, _ in banks.named_parameters()})
    adam = {}
    for name, tensor in tensors.items():
        if name.startswith("adam."):
            _, i, part = name.split(".")
            adam.setdefault(int(i), {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": adam})


def identity_of(model, banks, corpus, settings):
    """What a run must go on with: these banks, this base, these examples, and the settings that decide its numbers."""
    base, record = base_of(model), banks.training_record
    return {
        "state's format": 2,  # slots move in units
        "columns": banks.names,
        "prefix_len": banks.prefix_len,
        "position_offset": banks.position_offset,
        **{name: record.get(name) for name in ("init", "reparam", "from_prefix", "train_banks", "pairs")},
        "data": corpus.fingerprint(),
        "model": base["fingerprint"],
        "model's config": base["config"],
        **{name: value for name, value in asdict(settings).items() if name not in ("steps", "save_every")},
    }


def check_identity(whose, theirs, ours):
    """Raises UserError that says in what two runs differ."""
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise UserError(f"{whose} has " + "; ".join(f"another {n} ({theirs.get(n)}, here {ours[n]})" for n in other))


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
    """Cut off the lines of later steps, and one without its end: what a killed run did after its last save."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = takewhile(lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step, lines)
    os.truncate(path, sum(map(len, kept)))
