"""Do the Triton kernels work on this GPU? Their first use answers it: a few random sentences, against the formula in float64.

A compiler may be missing, a block may not fit the chip, a driver may be at fault: whatever it is, it is said once, and
torch's own attention takes the kernels' place. With --attention fused it is an error instead.
"""

import sys
from functools import cache

import torch

from minigpt.attention import PackedBatch, Slots, reference_attention
from minigpt.files import UserError

KERNELS_FROM = (8, 0)  # compute capability: for older GPUs Triton has no tensor-core form of the kernels' products
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of ||ours - exact|| / ||exact||


@cache
def passed(device, dtype, n_head, head_dim, must=False):
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
            with torch.enable_grad():
                out = attention(qkv, n_head, packed, slots)
            results.append([out, *torch.autograd.grad(out, (qkv, key, value), grad)])
        for name, ours, exact in zip(("output", "gradient of qkv", "of slot keys", "of slot values"), *results):
            error = float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())
            if not error <= TOLERANCE[dtype]:  # also where it is NaN
                return f"{name}: relative error {error:.1g} in {dtype}"
    except Exception as error:  # no triton, no C compiler, no room for a block: many libraries, many classes
        return f"{type(error).__name__}: {error}".splitlines()[0]
