"""The Triton kernels against the plain path and float64: values and all gradients.

On a machine without a GPU the kernels run in Triton's interpreter (conftest.py sees to that) and are compiled ahead of
time for GPUs that are not there; on a machine with one they run compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from minigpt import kernels  # noqa: E402
from minigpt.attention import PackedBatch, Slots, reference_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of ||ours - float64|| / ||float64||


def random_case(lengths, slots_per_bank, n_head, head_dim, dtype, seed):
    """qkv, slot keys and values, an output gradient, their layout and the banks of the slots."""
    g = torch.Generator().manual_seed(seed)
    N, bank = sum(lengths), torch.arange(len(slots_per_bank)).repeat_interleave(torch.tensor(slots_per_bank)).int()
    bank_mask = torch.randint(1 << len(slots_per_bank), (N,), generator=g)
    shapes = [
        (N, 3 * n_head * head_dim),
        (n_head, len(bank), head_dim),
        (n_head, len(bank), head_dim),
        (N, n_head * head_dim),
    ]
    qkv, key, value, grad = (torch.randn(shape, generator=g) for shape in shapes)
    tensors = [qkv.to(dtype), key.to(dtype).float(), value.to(dtype).float()]  # slots that the cast leaves as they are
    return tensors, grad.to(dtype), PackedBatch(lengths, bank_mask, DEVICE), bank.to(DEVICE)


def results(attend, tensors, grad, packed, bank, n_head, dtype=None):
    """[output, gradients of qkv, of slot keys, of slot values]."""
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    out = attend(tensors[0], n_head, packed, Slots(*tensors[1:], bank))
    return [out, *torch.autograd.grad(out, tensors, grad.to(out), allow_unused=True)]


def assert_close(ours, exact, bound):
    for name, a, b in zip(("output", "qkv", "slot keys", "slot values"), ours, exact):
        if a is None or b is None:  # no slots: nothing to have a gradient
            assert a is None or not a.any(), name
            continue
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: relative error {error:.2e}"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel forgets to write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t
    monkeypatch.setattr(kernels.torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(kernels.torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


CASES = [
    # lengths, slots of each bank, heads, head_dim
    ([1], [0], 1, 16),
    ([1, 1, 1], [1, 1], 2, 16),
    ([70, 3, 64, 65, 1], [10, 10], 2, 64),
    ([5, 130], [3, 0, 70], 1, 80),
    ([33, 64], [200], 1, 128),
    ([40, 9], [7, 5], 3, 25),
]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_float64(case, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter computes on bfloat16's bits as if they were integers: this needs a GPU")
    lengths, slots, n_head, head_dim = case
    args = random_case(lengths, slots, n_head, head_dim, dtype, seed=hash(str(case)) % 1000)
    ours = results(kernels.triton_attention, *args, n_head)
    assert_close(ours, results(reference_attention, *args, n_head, dtype=torch.float64), BOUND[dtype])


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    slots=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    n_head=st.integers(1, 2),
    head_dim=st.sampled_from([16, 20, 32, 64]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking would take minutes here
def test_any_layout_gives_the_plain_path(lengths, slots, n_head, head_dim, seed):
    args = random_case(lengths, slots, n_head, head_dim, torch.float32, seed)
    ours = results(kernels.triton_attention, *args, n_head)
    assert_close(ours, results(reference_attention, *args, n_head, dtype=torch.float64), BOUND[torch.float32])


def test_two_runs_give_the_same_bits():
    args = random_case([50, 30, 90], [10, 20], 2, 64, torch.float16, seed=1)
    for one, other in zip(results(kernels.triton_attention, *args, 2), results(kernels.triton_attention, *args, 2)):
        assert torch.equal(one, other)


def compile_kernels(*arguments):
    """What tests/compile_kernels.py prints, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parents[1] / "compile_kernels.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_one_compiled_variant_of_each_kernel_serves_batches_of_all_sizes():
    assert compile_kernels("variants") == [{kernel.fn.__name__: 1 for kernel in kernels.KERNELS}]


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have


@pytest.mark.parametrize(
    "capability, dtype, head_dim", [(80, "float16", 64), (90, "bfloat16", 64), (90, "bfloat16", 128)]
)
def test_compiled_for_a_gpu_that_is_not_here_every_kernel_fits(capability, dtype, head_dim):
    found = compile_kernels(capability, dtype, head_dim)
    assert len(found) == len(kernels.KERNELS) + 1  # and decode_kernel
    for kernel in found:
        assert kernel["stack"] <= 8, f"registers spill: {kernel}"  # Triton 3.6 spills two, Triton 3.9 none
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["matrix"] > 0 or kernel["kernel"] == "delta_kernel", f"no tensor cores: {kernel}"
