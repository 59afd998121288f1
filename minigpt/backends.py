"""Which code computes attention: the formula, torch's SDPA, or the Triton kernels where they work.

On their first use on a GPU the kernels are held against the formula in float64: output and all gradients, on a few random
sequences. Where they fail, one notice says why, and SDPA takes their place.
"""

import sys
from functools import cache

import torch

from minigpt.attention import PackedBatch, Slots, reference_attention, sdpa_attention
from minigpt.files import UserError
from minigpt.memory import out_of_memory

KERNELS_FROM = (8, 0)  # compute capability: for older GPUs Triton has no tensor-core form of the kernels' products
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of ||ours - exact|| / ||exact||


def attend(qkv, n_head, packed, slots=None, backend="auto"):
    """qkv (N, 3 * n_embd), what c_attn makes of the tokens -> (N, n_embd). slots: those of this layer, or None.

    backend: "plain" is the formula; "auto" takes the kernels on a GPU where they work, else SDPA; so does "fused", but on
    a GPU where they do not it raises UserError."""
    head_dim = qkv.size(1) // 3 // n_head
    if slots is None or not packed.has_banks:
        slots = Slots.none(qkv, n_head, head_dim)
    if backend == "plain":
        return reference_attention(qkv, n_head, packed, slots)
    if qkv.is_cuda and kernels_work(qkv.device, qkv.dtype, n_head, head_dim, must=backend == "fused"):
        from minigpt.kernels import triton_attention  # here, because only CUDA builds of torch bring triton

        with torch.cuda.device(qkv.device):  # Triton launches on the current one
            return triton_attention(qkv, n_head, packed, slots)
    return sdpa_attention(qkv, n_head, packed, slots)


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
    """Why the kernels do not work on `device`, in words, or None."""
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < KERNELS_FROM:
        return f"its compute capability is {has[0]}.{has[1]}, they need {KERNELS_FROM[0]}.{KERNELS_FROM[1]}"
    g, lengths, n_slots = torch.Generator().manual_seed(0), [70, 1, 33], 45
    N, C, of_slots = sum(lengths), n_head * head_dim, (n_head, n_slots, head_dim)
    inputs = [torch.randn(*shape, generator=g).to(device, dtype) for shape in ((N, 3 * C), of_slots, of_slots, (N, C))]
    packed = PackedBatch(lengths, torch.randint(4, (N,), generator=g), device)
    bank = (torch.arange(n_slots) % 2).int().to(device)

    def results(attention, dtype):
        qkv, key, value, grad = (x.detach().to(dtype).requires_grad_() for x in inputs)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # not those of a checkpointed block
        with torch.enable_grad(), keep:
            out = attention(qkv, n_head, packed, Slots(key, value, bank))
        return [out, *torch.autograd.grad(out, (qkv, key, value), grad)]

    try:
        from minigpt.kernels import triton_attention

        pairs = zip(results(triton_attention, dtype), results(reference_attention, torch.float64))
        for name, (ours, exact) in zip(("output", "gradient of qkv", "of slot keys", "of slot values"), pairs):
            error = float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())
            if not error <= TOLERANCE[dtype]:  # also where it is NaN
                return f"{name}: relative error {error:.1g} in {dtype}"
    except Exception as error:  # no triton, no C compiler, no room for a block: many libraries, many classes
        if out_of_memory(error):  # that passes, and is nobody's fault
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
