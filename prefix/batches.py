"""What each optimizer step sees.

    all training examples, shuffled anew each epoch
        -> the next batch_size of them -> this process's shard, sorted by length: a Batch
        -> pairs of like length, packed, on the device: its MicroBatches

An example is a row of the corpus in one direction: (row, source column, target column). All directions are shuffled
together. The examples of step s follow from the seed and s alone, so a run can go on exactly after any step.
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from minigpt.files import UserError
from minigpt.memory import attempt
from prefix import distributed
from prefix.data.corpus import sample_rows
from prefix.sequences import n_tokens, pack_pairs, pairs_of, separator

VALIDATION_EXAMPLES = 1000  # at most: enough to choose the best prefix by
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}  # small on a CPU, so that activations stay in its caches


@dataclass
class Batch:
    """This process's share of a step."""

    pairs: list  # the shortest first
    n_targets: int  # of all processes together
    n_tokens: int  # of all processes together
    micro_batches: list = ()  # the pairs, packed
    micro_batch_tokens: int = 0  # how many each of these may have


class BatchLoader:
    def __init__(self, corpus, tokenizer, settings, device, directions=None, micro_batch_tokens=None):
        """corpus: data.Corpus whose columns are the banks, in order. settings: the trainer's, of which batch_size and
        seed. directions: the (source, target) columns to train, by number; None: all. micro_batch_tokens: tokens in
        memory at a time; None: by MICRO_BATCH_TOKENS. Raises UserError where nothing is left to train on."""
        self.corpus, self.device, self.batch_size, self.seed = corpus, device, settings.batch_size, settings.seed
        self.sep, self.eot = separator(tokenizer), tokenizer.eot
        self.train = in_directions(corpus.examples("train"), directions)
        self.validation = sample_rows(in_directions(corpus.examples("validation"), directions), VALIDATION_EXAMPLES)
        self.micro_batch_tokens = micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
        self.fitting_tokens = None  # of a micro-batch, since memory last ran out
        self.epoch = self.order = None  # the current epoch and its order
        if not len(self.train):
            raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")

    def steps(self, first, end):
        """Yield the Batch of each step from `first` to before `end`. A thread prepares the next one meanwhile."""
        with ThreadPoolExecutor(1) as thread:
            if self.device.type == "cuda":
                thread.submit(torch.cuda.set_device, torch.cuda.current_device())
            upcoming = thread.submit(self.step, first)
            for step in range(first, end):
                batch = upcoming.result()
                if step + 1 < end:
                    upcoming = thread.submit(self.step, step + 1)
                yield batch

    def step(self, step):
        """The Batch of a step: the next batch_size examples of epoch after epoch, each shuffled."""
        n, first = len(self.train), step * self.batch_size
        places = range(first, first + self.batch_size)
        return self.batch_of([self.train[self.epoch_order(i // n)[i % n]] for i in places])

    def batch_of(self, examples):
        """This process's Batch of some examples. Processes get like amounts of tokens."""
        pairs = sorted(pairs_of(self.corpus, examples), key=n_tokens)
        n_targets = sum(len(target) + 1 for _, target, _, _ in pairs)
        batch = Batch(distributed.shard(pairs), n_targets, sum(map(n_tokens, pairs)))
        self.cut(batch)
        return batch

    def cut(self, batch):
        """Cut a Batch into MicroBatches of at most micro_batch_tokens; a longer pair stays alone."""
        batch.micro_batch_tokens, groups, total = self.micro_batch_tokens, [], math.inf
        for pair in batch.pairs:
            total += n_tokens(pair)
            if total > batch.micro_batch_tokens:
                groups.append([])
                total = n_tokens(pair)
            groups[-1].append(pair)
        batch.micro_batches = [pack_pairs(group, self.sep, self.eot, self.device) for group in groups]

    def within_memory(self, batch, work, where):
        """work(the MicroBatches of `batch`) -> its result. Where memory runs out, the batch is cut into smaller ones,
        and all of the work is done again; later batches are cut so from the start. where: named in messages. Raises
        UserError where one pair alone does not fit."""
        if batch.micro_batch_tokens != self.micro_batch_tokens:
            self.cut(batch)
        too_many = None  # tokens
        while (result := attempt(work, batch.micro_batches)) is None:
            largest = max((len(micro_batch.ids) for micro_batch in batch.micro_batches), default=0)
            if all(len(micro_batch.packed.lengths) == 1 for micro_batch in batch.micro_batches):
                even = f"out of memory, even with one pair of {largest:,} tokens at a time"
                raise UserError(f"{where}: {even}: set --checkpoint-activations, or lower --max-tokens")
            too_many = too_many or largest
            self.micro_batch_tokens = self.fitting_tokens = min(largest, self.micro_batch_tokens) // 2
            self.cut(batch)
        if too_many:
            say = f"out of memory with micro-batches of {too_many:,} tokens; {self.micro_batch_tokens:,} fit"
            tqdm.write(f"{where}: {say}", file=sys.stderr)
        return result

    def epoch_order(self, epoch):
        """The numbers of all training examples, shuffled. One epoch is in memory."""
        if self.epoch != epoch:
            self.epoch, self.order = epoch, np.arange(len(self.train), dtype=np.int32)
            np.random.default_rng((self.seed, epoch)).shuffle(self.order)
        return self.order


def in_directions(examples, directions):
    """The examples (n, 3) that go in one of these directions; all of them, still on disk, for None."""
    if directions is None:
        return examples
    chosen = np.zeros(len(examples), bool)
    for source, target in directions:
        chosen |= (examples[:, 1] == source) & (examples[:, 2] == target)
    return examples[chosen]
