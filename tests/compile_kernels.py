"""Compile every kernel for GPUs that are not there, and print what the compiler made of it, one JSON line each.

    python tests/compile_kernels.py 90 bfloat16 64        compute capability, dtype, head_dim
    python tests/compile_kernels.py variants              how often Triton compiles each kernel for batches of all sizes

Triton needs no GPU to compile for one; the machine code's resources are read with the cuobjdump that it brings along.
Run as a program of its own, because kernels imported for the interpreter cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from minigpt import decode_kernel, kernels  # noqa: E402
from minigpt.attention import PackedBatch, Slots  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "fp32": ("lse", "delta", "grad_key", "grad_value"),
    "i32": ("start", "end", "bank_mask", "bank"),
    "i64": ("state",),
    "u8": ("visible",),
}
SCALARS = {"fp32": ("scale", "factor"), "i32": ("N", "S", "part", "rows", "Q", "capacity")}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
N_HEAD, BEAMS = 12, 5
KERNELS = (*kernels.KERNELS, decode_kernel.decode_kernel)


def type_of(name, dtype):
    """The type of a kernel's argument, in Triton's words; capitals other than N, S and Q are compile-time constants."""
    for kinds, star in ((POINTERS, "*"), (SCALARS, "")):
        for kind, names in kinds.items():
            if name in names:
                return star + kind
    return "constexpr" if name.isupper() else f"*{DTYPES[dtype]}"


def compile_kernel(kernel, capability, dtype, head_dim):
    if kernel is decode_kernel.decode_kernel:
        constants = decode_kernel.constants(N_HEAD, head_dim, BEAMS, getattr(torch, dtype))
    else:
        constants = kernels.constants(kernel, N_HEAD, head_dim, getattr(torch, dtype))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    types = {name: type_of(name, dtype) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, types, constexprs=values, attrs=aligned), target=target, options=options)


def resources(compiled):
    """Registers and stack (spills) per thread, shared memory per program, and matrix instructions in the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    matrix = len(re.findall(r"mma\.sync|wgmma\.mma_async", compiled.asm["ptx"]))
    return dict(registers=int(registers), stack=int(stack), shared=compiled.metadata.shared, matrix=matrix)


class Compiled:
    """A kernel that is compiled as a launch would compile it, and not run. hashes: of what was compiled."""

    def __init__(self, kernel):
        self.kernel, self.hashes = kernel, set()

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.hashes.add(
            self.kernel.warmup(*arguments, grid=grid, **constants).hash
        )


def variants(dtype=torch.bfloat16, n_head=2, head_dim=16):
    """{kernel: how many variants of it forward and backward need for batches and slots of different numbers}."""
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(device)
    compiled = {kernel.fn.__name__: Compiled(kernel) for kernel in kernels.KERNELS}
    for name, kernel in compiled.items():
        setattr(kernels, name, kernel)
    kernels.KERNELS = tuple(compiled.values())
    for lengths, S in ([63, 100], 20), ([60, 100], 16), ([1], 1), ([37], 0), ([4000], 161):
        qkv = torch.randn(sum(lengths), 3 * n_head * head_dim, dtype=dtype, requires_grad=True)
        key, value = torch.randn(2, n_head, S, head_dim, requires_grad=True).unbind()
        packed = PackedBatch(lengths, torch.ones(sum(lengths)))
        slots = Slots(key, value, torch.zeros(S, dtype=torch.int32))
        kernels.triton_attention(qkv, n_head, packed, slots).sum().backward()
    return {name: len(kernel.hashes) for name, kernel in compiled.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["variants"]:
        sys.exit(print(json.dumps(variants())))
    capability, dtype, head_dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for kernel in KERNELS:
        compiled = compile_kernel(kernel, capability, dtype, head_dim)
        print(json.dumps({"kernel": kernel.fn.__name__, **resources(compiled)}), flush=True)
