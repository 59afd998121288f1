"""What a run would take, without running it: train.py --dry-run."""

import sys
import time
from itertools import permutations

import torch

from prefix import distributed
from prefix.rates import trial_steps


def dry_run(trainer, directions, n_rates=1):
    """Print what a run of so many --lr would train and take, from one micro-batch of its first step. Writes no file but
    the token cache."""
    s, loader, device, names = trainer.settings, trainer.loader, trainer.model.device, trainer.banks.names
    batch, validation = loader.step(0), loader.batch_of(loader.validation)
    if distributed.rank() > 0:  # it may have no pairs
        return
    largest = max(batch.micro_batches, key=lambda micro_batch: len(micro_batch.ids))
    for _ in range(2):  # the first time, libraries are loaded and kernels compiled
        began = time.monotonic()
        float(trainer.forward_backward([largest]))
        per_token = (time.monotonic() - began) / len(largest.ids) / distributed.world_size()
    rounds = -(-s.steps // s.eval_every) + 1 if s.eval_every else 0  # the first also measures the base
    steps = s.steps + (n_rates - 1) * trial_steps(s)
    seconds = per_token * (steps * batch.n_tokens + rounds * validation.n_tokens / 2)  # validation: forward alone
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    directions = directions or permutations(range(len(names)), 2)
    arrows = [f"{names[source]} -> {names[target]}" for source, target in directions]
    print(f"Banks {', '.join(names)}; directions {', '.join(arrows)}")
    print(f"Rows: {len(loader.corpus):,}; examples: {len(loader.train):,}, and {len(loader.validation):,} to validate on")
    print(f"A step: {s.batch_size:,} examples, about {batch.n_tokens:,} tokens, micro-batches: {len(batch.micro_batches):,}")
    print(f"Steps: {s.steps:,}; each example comes {rounded(s.steps * s.batch_size / len(loader.train))} times")
    each = f"{rounded(per_token * batch.n_tokens)} s a step"
    print(f"Memory: about {memory / 1e9:.1f} GB. Time: about {rounded(seconds / 60)} min on {device}, {each}")


def rounded(x):
    """x with two digits that count, without an exponent."""
    return f"{float(f'{x:.2g}'):,.12g}"
