"""How much memory is free, and how many tokens of training or rows of decoding fit: computed before any of it is taken."""

import math

import torch

SHARE = 0.8  # of the free memory that activations or a cache may take


def out_of_memory(error):
    """torch has a class of its own for a full GPU, but only words for a full main memory and in CUDA's libraries."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not create a primitive")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def attempt(work, *arguments):
    """work(*arguments), or None where memory runs out. By then all is free again that the error held on to."""
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise


def free_memory(device):
    """Bytes that can still be taken on `device`; infinity where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds in reserve
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return math.inf


def token_bytes(model):
    """Bytes that a token in flight takes until backward: in each layer the residual twice, q, k, v, attention's output
    and the MLP's hidden values (no input of a frozen matrix). With checkpointed activations, one residual a layer."""
    c, size = model.config, model.dtype.itemsize
    block = 6 * c.n_embd + c.mlp_dim
    return size * (c.n_layer * c.n_embd + block if model.checkpoint_activations else c.n_layer * block)


def tokens_that_fit(model, tokens):
    """`tokens`, on a GPU halved until as many in flight fit into the free memory."""
    while model.device.type == "cuda" and tokens > 1 and tokens * token_bytes(model) > SHARE * free_memory(model.device):
        tokens //= 2
    return tokens


def row_bytes(model, capacity, beams=1):
    """Bytes of one row of a cache with room for `capacity` tokens, and of the step that reads it."""
    c, size = model.config, model.dtype.itemsize
    cache = 2 * c.n_layer * c.n_embd * capacity * size
    masks = beams * capacity * (2 + 4)  # which entry belongs to which beam, what each sees, and that as a float32 bias
    logits = beams * c.vocab_size * (size + 4 * 4)  # and three tensors like them in float32
    return cache + masks + logits


def rows_that_fit(model, capacity, rows, beams=1, kept=0):
    """`rows`, halved until their cache fits into the free memory, `kept` bytes included: 0 if not even one does."""
    free = SHARE * (free_memory(model.device) + kept)
    while rows and rows * row_bytes(model, capacity, beams) > free:
        rows //= 2
    return rows
