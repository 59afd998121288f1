"""Several processes, one run: data parallel by torch.distributed, started by torchrun.

    torchrun --nproc_per_node=8 train.py --prefix-len 10 --model gpt2-xl --data en-fr.csv

Every process holds the whole frozen model and all slots, and works on its share of each batch. One all-reduce per step
adds the gradients of the slots: a few megabytes, since nothing else is trained. Process 0 reads and writes the run's
files, and prints. In a program that torchrun did not start there is one process, and all of this does nothing.
"""

import functools
import os
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from minigpt.files import UserError, escape_control

PATIENCE = 10  # seconds
TIMEOUT = timedelta(hours=6)  # processes wait for the first to encode a large file, or to read a slow pipe


def start(device="auto"):
    """Join the other processes, if torchrun started any; each takes the GPU of its local number. device: as --device.
    Raises UserError where the environment is not torchrun's, or a machine has fewer GPUs than processes."""
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if here > gpus:
                raise ValueError(f"{here} processes on a machine with {gpus} GPUs: give torchrun --nproc_per_node={gpus}")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        with waiting(f"Waiting for the other processes at {os.environ['MASTER_ADDR']} (unset WORLD_SIZE for one alone)"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (KeyError, ValueError, dist.DistError) as error:
        instead = "start several processes with torchrun, or unset WORLD_SIZE for one"
        raise UserError(f"WORLD_SIZE is set, but: {error}; {instead}") from error


@contextmanager
def waiting(notice):
    """Inside, the notice is printed after PATIENCE seconds, and Ctrl-C ends the program: Python's own answer to it would
    wait, too."""
    timer = threading.Timer(PATIENCE, print, [notice], {"file": sys.stderr})
    timer.start()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        timer.cancel()


def finish():
    """Leave the group, so that NCCL ends cleanly: at the end of a program in which all went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items):
    """This process's part of a list: every world_size()-th item from its own number on."""
    return items[rank() :: world_size()]


def all_reduce_sum(tensors):
    """Replace each tensor by its sum over all processes: one all-reduce for all of them, in float32."""
    if world_size() == 1:
        return
    flat = torch.cat([t.flatten().float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))


def all_gather(parts):
    """The results of shard(items) from all processes -> those of all items, in order, in every process."""
    everyone = [parts] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, parts)
    results = [None] * sum(map(len, everyone))
    for number, part in enumerate(everyone):
        results[number :: world_size()] = part
    return results


def broadcast(value):
    """Process 0's value, in every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def rank0_first(work):
    """work() in the first process of each machine, then in the others, which find its files made."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = work() if first else None
    all_gather([])  # a barrier: the first process of every machine is done
    return result if first else work()


def log(text):
    """Print a line to standard error, from process 0 alone."""
    if rank() == 0:
        print(printable(text, sys.stderr), file=sys.stderr)


log_once = functools.cache(log)


def printable(text, stream=None):
    """`text` as it is printed to `stream` (standard output): on a terminal with control characters other than newline
    and tab spelled out, since they come from a model or a stranger's file; anywhere else as it is."""
    return escape_control(text, keep="\n\t") if (stream or sys.stdout).isatty() else text
