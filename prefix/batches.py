"""What each optimizer step sees.

    all training examples, shuffled anew each epoch
        -> the next batch_size of them -> this process's share, sorted by length
        -> micro-batches of like length, packed, on the device

An example is a pair in one direction: (row, source column, target column) of the corpus. All directions are shuffled
together. The examples of step s follow from the seed and s alone, so a run can go on exactly after any step.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from minigpt.files import UserError
from minigpt.memory import out_of_memory
from prefix import distributed
from prefix.data.corpus import sample_rows
from prefix.sequences import n_tokens, pack_pairs, separator

VALIDATION_EXAMPLES = 1000  # at most: enough to choose the best prefix by
MICRO_BATCH_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}  # on a CPU small, for the sake of its caches


@dataclass
class Batch:
    """A process's share of the examples whose losses are summed. n_targets, n_tokens: of all processes together."""

    examples: list  # (source ids, target ids, source bank, target bank), the shortest first
    n_targets: int
    n_tokens: int
    micro_batches: list = ()  # TrainingBatches of at most micro_batch_tokens
    micro_batch_tokens: int = 0


class Batches:
    def __init__(self, corpus, tokenizer, device, batch_size, seed=0, directions=None, micro_batch_tokens=None):
        """corpus: data.Corpus whose columns are the banks, in order. directions: the (source, target) columns to train,
        by number; None: all. micro_batch_tokens: tokens in memory at a time; None: by MICRO_BATCH_TOKENS.
        Raises UserError where nothing is left to train on."""
        self.corpus, self.device, self.batch_size, self.seed = corpus, device, batch_size, seed
        self.sep, self.eot = separator(tokenizer), tokenizer.eot
        self.train = only(corpus.examples("train"), directions)
        self.validation = sample_rows(only(corpus.examples("validation"), directions), VALIDATION_EXAMPLES)
        self.micro_batch_tokens = micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
        self.fitting_tokens = None  # of a micro-batch, since memory last ran out
        self.epoch = self.order = None  # the current epoch and its order
        if not len(self.train):
            raise UserError(f"none of the {len(corpus)} usable pairs falls into the training split: give more data")

    def steps(self, first, end):
        """Yield the Batch of each step from `first` to before `end`. A thread prepares the next one meanwhile."""
        cuda = self.device.type == "cuda"
        in_thread = (torch.cuda.set_device, (torch.cuda.current_device(),)) if cuda else ()
        with ThreadPoolExecutor(1, "batches", *in_thread) as thread:
            upcoming = thread.submit(self.step, first)
            for step in range(first, end):
                batch = upcoming.result()
                if step + 1 < end:
                    upcoming = thread.submit(self.step, step + 1)
                yield batch

    def step(self, step):
        """The Batch of a step: the batch_size next examples of an endless row of shuffled epochs."""
        n, tokens = len(self.train), self.micro_batch_tokens
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        batch = self.share([self.train[self.epoch_order(i // n)[i % n]] for i in places])
        batch.micro_batches, batch.micro_batch_tokens = list(self.pack(batch.examples, tokens)), tokens
        return batch

    def share(self, rows):
        """This process's Batch of some examples, not packed yet. Processes get like amounts."""
        ids = self.corpus.ids
        examples = [(ids(row, s), ids(row, t), int(s), int(t)) for row, s, t in rows]
        n_targets = sum(len(target) + 1 for _, target, _, _ in examples)
        mine = distributed.shard(sorted(examples, key=n_tokens))
        return Batch(mine, n_targets, sum(map(n_tokens, examples)))

    def fitting(self, batch, work, where):
        """work(the micro-batches of a Batch) -> its result. If memory runs out, they are halved until they fit.
        where: for messages. Raises UserError where one example alone does not fit."""
        too_many = None  # tokens
        while True:
            if batch.micro_batch_tokens != (tokens := self.micro_batch_tokens):
                batch.micro_batches, batch.micro_batch_tokens = list(self.pack(batch.examples, tokens)), tokens
            try:
                result = work(batch.micro_batches)
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            # Behind the except clause the activations that the error held on to are free again.
            largest = max((len(micro_batch.ids) for micro_batch in batch.micro_batches), default=0)
            if all(len(micro_batch.packed.lengths) == 1 for micro_batch in batch.micro_batches):
                even = f"out of memory, even with one pair of {largest:,} tokens at a time"
                raise UserError(f"{where}: {even}: set --checkpoint-activations, or lower --max-tokens")
            too_many = too_many or largest
            self.micro_batch_tokens = self.fitting_tokens = min(largest, tokens) // 2
        if too_many:
            say = f"out of memory with micro-batches of {too_many:,} tokens; {self.micro_batch_tokens:,} fit"
            tqdm.write(f"{where}: {say}", file=sys.stderr)
        return result

    def pack(self, examples, tokens):
        """Yield TrainingBatches of at most so many tokens (a longer example stays alone). examples: by length."""
        groups, total = [], 0
        for example in examples:
            if not groups or total + n_tokens(example) > tokens:
                groups.append([])
                total = 0
            groups[-1].append(example)
            total += n_tokens(example)
        for group in groups:
            yield pack_pairs(group, self.sep, self.eot, self.device)

    def epoch_order(self, epoch):
        """The numbers of all training examples, shuffled: one epoch in memory, in the smallest type that holds them."""
        if self.epoch != epoch:
            self.epoch = self.order = None
            order = np.arange(len(self.train), dtype=np.min_scalar_type(len(self.train)))
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.epoch, self.order = epoch, order
        return self.order


def only(examples, directions):
    """The examples (n, 3) that go in one of these directions; all of them, still on disk, for None."""
    if directions is None:
        return examples
    chosen = np.zeros(len(examples), bool)
    for source, target in directions:
        chosen |= (examples[:, 1] == source) & (examples[:, 2] == target)
    return examples[chosen]
