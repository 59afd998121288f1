"""What a run would take, without running it: train.py --dry-run."""

import sys
import time
from contextlib import suppress

import torch


def dry_run(trainer, n_rows):
    """Print examples, tokens, memory and time of a run, from one micro-batch of its first step. Writes no file."""
    s, batches, device = trainer.settings, trainer.batches, trainer.model.device
    batch = batches.step(0)
    largest = max(batch.micro_batches, key=lambda micro_batch: len(micro_batch.ids))
    seconds = seconds_per_token(trainer, largest) * batch.n_tokens
    epochs = s.steps * s.batch_size / len(batches.train)
    validation = batches.share(batches.validation)
    rounds = -(-s.steps // s.eval_every) + 1 if s.eval_every else 0  # the first also measures the base
    total = s.steps * seconds + rounds * seconds * validation.n_tokens / batch.n_tokens / 2  # forward alone
    print(f"{n_rows:,} rows; {len(batches.train):,} examples to train on, {len(batches.validation):,} to validate on")
    print(
        f"{s.batch_size:,} examples a step: about {batch.n_tokens:,} tokens in {len(batch.micro_batches)} micro-batches"
    )
    print(f"{s.steps:,} steps: each example {epochs:.2g} times")
    print(f"Memory: about {peak_memory(device)}. Time: about {duration(total)} on {device}, {seconds:.2g} s a step")


def seconds_per_token(trainer, micro_batch):
    for _ in range(2):  # the first time, libraries are loaded and kernels compiled
        began = time.monotonic()
        float(trainer.forward_backward([micro_batch]))
        seconds = time.monotonic() - began
    return seconds / len(micro_batch.ids)


def peak_memory(device):
    used = 0
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        with suppress(ImportError):  # on Windows
            import resource

            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{used / 1e9:.1f} GB" if used else "not measured here"


def duration(seconds):
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
