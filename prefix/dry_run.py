"""What a run would take, without running it: train.py --dry-run."""

import sys
import time

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
    seconds = per_token * (s.steps * batch.n_tokens + rounds * validation.n_tokens / 2)  # validation: forward alone
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{n_rows:,} rows; {len(loader.train):,} examples to train on, {len(loader.validation):,} to validate on")
    tokens = f"about {batch.n_tokens:,} tokens in {len(batch.micro_batches)} micro-batches"
    print(f"{s.batch_size:,} examples a step: {tokens}")
    print(f"{s.steps:,} steps: each example {s.steps * s.batch_size / len(loader.train):.2g} times")
    each = f"{per_token * batch.n_tokens:.2g} s a step"
    print(f"Memory: about {memory / 1e9:.1f} GB. Time: about {seconds / 60:.1f} min on {device}, {each}")
