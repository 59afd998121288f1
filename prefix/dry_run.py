"""What a run would take, without running it: train.py --dry-run."""

import sys
import time
from contextlib import suppress

import torch


def dry_run(trainer, n_rows):
    """Print examples, tokens, memory and time of a run, from one micro-batch of its first step. Writes no file."""
    s, loader, device = trainer.settings, trainer.loader, trainer.model.device
    batch, validation = loader.step(0), loader.batch_of(loader.validation)
    largest = max(batch.micro_batches, key=lambda micro_batch: len(micro_batch.ids))
    for _ in range(2):  # the first time, libraries are loaded and kernels compiled
        began = time.monotonic()
        float(trainer.forward_backward([largest]))
        per_token = (time.monotonic() - began) / len(largest.ids)
    rounds = -(-s.steps // s.eval_every) + 1 if s.eval_every else 0  # the first also measures the base
    tokens = s.steps * batch.n_tokens + rounds * validation.n_tokens / 2  # forward alone
    seconds, epochs = per_token * tokens, s.steps * s.batch_size / len(loader.train)
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    print(f"{n_rows:,} rows; {len(loader.train):,} examples to train on, {len(loader.validation):,} to validate on")
    n = len(batch.micro_batches)
    print(f"{s.batch_size:,} examples a step: about {batch.n_tokens:,} tokens in {n} micro-batches")
    print(f"{s.steps:,} steps: each example {epochs:.2g} times")
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with suppress(ImportError):  # on Windows
        import resource

        used = used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory, each = f"{used / 1e9:.1f} GB" if used else "not measured here", f"{per_token * batch.n_tokens:.2g} s a step"
    print(f"Memory: about {memory}. Time: about {duration} on {device}, {each}")
