"""Attention over packed sequences and over slots: one entry, `attend`, and several backends with one signature.

A batch is one long row of N tokens, one sequence after another, without padding (as with cu_seqlens elsewhere). Two
numbers say what a token sees: where its sequence starts, and a bit field of the banks that are open at it.

    token       t0 t1 t2 t3 | t4 t5 | t6 t7 t8        three sequences, N = 9
    start        0  0  0  0 |  4  4 |  6  6  6
    bank_mask    1  1  3  3 |  2  2 |  1  3  3        bit 0: bank 0 is open here; bit 1: bank 1

Token i attends to the tokens start[i] .. i, and beside them to every slot whose bank's bit is set in bank_mask[i]:

    scores = [q . slot keys , q . text keys] / sqrt(head_dim)       one softmax over both
    output = softmax(scores) @ [slot values , text values]

A slot makes no query: nobody would read its output. It has no token and takes no position: its key is learned as it is.
`reference_attention` writes exactly this down. The other backends compute the same without keeping the scores:
`sdpa_attention` by torch's scaled_dot_product_attention, kernels.py in Triton on a GPU. SDPA's is_causal aligns the
diagonal to the top left, so with slots in front, more keys than queries, it would be wrong: there the mask is written out.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F

from minigpt.files import UserError

KERNELS_FROM = (8, 0)  # compute capability: for older GPUs Triton has no tensor-core form of the kernels' products
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of ||ours - exact|| / ||exact||


def to_device(x, device):
    """x on `device`. A pinned, asynchronous copy: it does not wait for what runs on the GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def out_of_memory(error):
    """torch has a class of its own for a full GPU, but only words for a full main memory and in CUDA's libraries."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


class PackedBatch:
    """How N packed tokens fall into B sequences, and which banks are open at each.

    lengths: tokens of each sequence, a list of ints >= 1. bank_mask: (N,), or None where no bank is open anywhere."""

    def __init__(self, lengths, bank_mask=None, device="cpu"):
        self.lengths, self.device = list(lengths), torch.device(device)
        self.n_tokens, self.longest = sum(self.lengths), max(self.lengths)
        self.ragged = min(self.lengths) != self.longest
        self.has_banks = bank_mask is not None
        bank_mask = torch.zeros(self.n_tokens) if bank_mask is None else bank_mask
        self.bank_mask = to_device(bank_mask.to(torch.int32), self.device)
        n = torch.tensor(self.lengths, dtype=torch.int32)
        end = n.cumsum(0, dtype=torch.int32).repeat_interleave(n)  # (N,): the token after each token's sequence
        start = end - n.repeat_interleave(n)  # (N,): the first token of each token's sequence
        self.start, self.end = to_device(start, self.device), to_device(end, self.device)
        self.position = to_device(torch.arange(self.n_tokens) - start, self.device)  # (N,) int64

    @cached_property
    def flat_index(self):
        """(N,): where each token stands in the padded batch (B, T), flattened."""
        row = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        return to_device(row, self.device) * self.longest + self.position

    @cached_property
    def pad_index(self):
        """The inverse, (B * T,): the token in each place of the padded batch; token 0 where there is padding."""
        pad_index = torch.zeros(len(self.lengths) * self.longest, dtype=torch.int64, device=self.device)
        pad_index[self.flat_index] = torch.arange(self.n_tokens, device=self.device)
        return pad_index

    def pad(self, x):
        """(N, ...) -> (B, T, ...). Padding repeats the batch's first token; it follows the text, so no text token sees it."""
        x = x.index_select(0, self.pad_index) if self.ragged else x
        return x.view(len(self.lengths), self.longest, *x.shape[1:])

    def unpad(self, x):
        """(B, T, ...) -> (N, ...), without the padding."""
        x = x.reshape(-1, *x.shape[2:])
        return x.index_select(0, self.flat_index) if self.ragged else x


@dataclass
class Slots:
    """The slots of all banks, one after another. key, value: (n_layer, n_head, S, head_dim) or, of one layer, (n_head,
    S, head_dim); bank: (S,) int32, the number of the bank that each slot belongs to (the bit that opens it)."""

    key: torch.Tensor
    value: torch.Tensor
    bank: torch.Tensor

    def to(self, dtype):
        return self if self.key.dtype == dtype else replace(self, key=self.key.to(dtype), value=self.value.to(dtype))

    def layers(self):
        """The Slots of each layer, as a list. unbind's backward is one stack; that of n_layer times key[i] would add up
        n_layer tensors of the full size."""
        return [Slots(key, value, self.bank) for key, value in zip(self.key.unbind(), self.value.unbind())]

    def visible_slots(self, bank_mask):
        """bank_mask (...) -> (..., S): True for the slots of open banks."""
        return (bank_mask[..., None] >> self.bank) & 1 == 1


def slot_layers(slots, n_layer):
    """One layer's Slots for each layer; None for each where there are no slots."""
    return [None] * n_layer if slots is None else slots.layers()


def attend(qkv, n_head, packed, slots=None, backend="auto"):
    """qkv (N, 3 * n_embd), what c_attn makes of the tokens -> (N, n_embd). slots: those of this layer, or None.

    backend: "plain" is the reference; "auto" takes the Triton kernels on a GPU where they work, else torch's SDPA; so does
    "fused", but on a GPU where they do not it raises UserError."""
    if slots is not None and (slots.bank.numel() == 0 or not packed.has_banks):
        slots = None
    if backend == "plain":
        return reference_attention(qkv, n_head, packed, slots)
    if qkv.is_cuda:
        if kernels_work(qkv.device, qkv.dtype, n_head, qkv.size(1) // 3 // n_head, must=backend == "fused"):
            from minigpt.kernels import triton_attention  # here, because only CUDA builds of torch bring triton

            with torch.cuda.device(qkv.device):  # Triton launches on the current one
                return triton_attention(qkv, n_head, packed, slots)
    return sdpa_attention(qkv, n_head, packed, slots)


def reference_attention(qkv, n_head, packed, slots):
    """The formula above, step by step; the softmax in float32 or better."""
    q, k, v = split_heads(qkv, n_head, packed)  # each (B, n_head, T, head_dim)
    n_slots = 0
    if slots is not None:
        slots, n_slots = slots.to(q.dtype), slots.bank.numel()
    scores = q @ k.transpose(-2, -1)  # (B, n_head, T, T)
    if n_slots:
        scores = torch.cat([q @ slots.key.transpose(-2, -1), scores], dim=-1)  # (B, n_head, T, S + T)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~visible(packed, slots), -torch.inf)
    weights = scores.softmax(dim=-1).to(v.dtype)
    out = weights[..., n_slots:] @ v  # (B, n_head, T, head_dim)
    if n_slots:
        out = out + weights[..., :n_slots] @ slots.value
    return packed.unpad(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def sdpa_attention(qkv, n_head, packed, slots):
    """The same by scaled_dot_product_attention, with the slots copied in front of each sequence's keys."""
    q, k, v = split_heads(qkv, n_head, packed)
    if slots is None:  # with as many keys as queries, is_causal means what it says
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        slots = slots.to(q.dtype)
        k = torch.cat([slots.key.expand(len(k), -1, -1, -1), k], dim=2)  # (B, n_head, S + T, head_dim)
        v = torch.cat([slots.value.expand(len(v), -1, -1, -1), v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(packed, slots))
    return packed.unpad(out.transpose(1, 2)).flatten(1)  # (N, n_embd)


def split_heads(qkv, n_head, packed):
    """Pad, and split into heads: (N, 3 * n_embd) -> q, k, v, each (B, n_head, T, head_dim)."""
    padded = packed.pad(qkv).unflatten(-1, (3, n_head, -1))  # (B, T, 3, n_head, head_dim)
    return padded.permute(2, 0, 3, 1, 4).unbind(0)


def visible(packed, slots):
    """True where a query sees a key: (B, 1, T, S + T) with slots, (T, T) without."""
    causal = torch.ones(packed.longest, packed.longest, dtype=torch.bool, device=packed.device).tril()
    if slots is None:
        return causal
    slot = slots.visible_slots(packed.pad(packed.bank_mask))[:, None]  # (B, 1, T, S)
    return torch.cat([slot, causal.expand(len(slot), 1, -1, -1)], dim=-1)


@cache
def kernels_work(device, dtype, n_head, head_dim, must=False):
    """Whether the kernels work for this dtype and these heads; if not, a notice says why. must: raise UserError then."""
    with torch.cuda.device(device):
        fault = kernel_fault(device, dtype, n_head, head_dim)
    if fault and must:
        raise UserError(f"--attention fused does not work on this GPU: {fault}")
    if fault:
        print(f"Attention is torch's own, not the kernels', on this GPU: {fault}", file=sys.stderr)
    return not fault


def kernel_fault(device, dtype, n_head, head_dim):
    """Why the kernels do not work on `device`, in words, or None: output and all gradients are compared."""
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < KERNELS_FROM:
        return f"its compute capability is {has[0]}.{has[1]}, they need {KERNELS_FROM[0]}.{KERNELS_FROM[1]}"
    g, lengths, n_slots = torch.Generator().manual_seed(0), [70, 1, 33], 45
    N, C, of_slots = sum(lengths), n_head * head_dim, (n_head, n_slots, head_dim)
    inputs = [torch.randn(*shape, generator=g).to(device, dtype) for shape in ((N, 3 * C), of_slots, of_slots, (N, C))]
    packed, results = PackedBatch(lengths, torch.randint(4, (N,), generator=g), device), []
    try:
        from minigpt.kernels import triton_attention

        for attention, precision in (triton_attention, dtype), (reference_attention, torch.float64):
            qkv, key, value, grad = (x.detach().to(precision).requires_grad_() for x in inputs)
            slots = Slots(key, value, (torch.arange(n_slots) % 2).int().to(device))
            keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # not those of a checkpointed block
            with torch.enable_grad(), keep:
                out = attention(qkv, n_head, packed, slots)
            results.append([out, *torch.autograd.grad(out, (qkv, key, value), grad)])
        for name, ours, exact in zip(("output", "gradient of qkv", "of slot keys", "of slot values"), *results):
            error = float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())
            if not error <= TOLERANCE[dtype]:  # also where it is NaN
                return f"{name}: relative error {error:.1g} in {dtype}"
    except Exception as error:  # no triton, no C compiler, no room for a block: many libraries, many classes
        if out_of_memory(error):  # that passes, and is nobody's fault
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
