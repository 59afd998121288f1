"""What a run would take, without running it: train.py --dry-run."""

import sys
import time

import torch


def dry_run(trainer, n_rows, directions):
    """Print what a run would train and take, from one micro-batch of its first step. Writes no file."""
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
    print(f"Banks {', '.join(trainer.banks.names)}; directions {', '.join(directions)}")
    examples = counted(len(loader.train), "example")
    print(f"{counted(n_rows, 'row')}; {examples} to train on, {len(loader.validation):,} to validate on")
    tokens = f"about {batch.n_tokens:,} tokens in {counted(len(batch.micro_batches), 'micro-batch')}"
    print(f"{counted(s.batch_size, 'example')} a step: {tokens}")
    print(f"{counted(s.steps, 'step')}: each example {rounded(s.steps * s.batch_size / len(loader.train))} times")
    each = f"{rounded(per_token * batch.n_tokens)} s a step"
    print(f"Memory: about {memory / 1e9:.1f} GB. Time: about {rounded(seconds / 60)} min on {device}, {each}")


def counted(n, noun):
    return f"{n:,} {noun}{('es' if noun.endswith('h') else 's') * (n != 1)}"


def rounded(x):
    """x with two digits that count, without an exponent."""
    return f"{float(f'{x:.2g}'):,.12g}"
