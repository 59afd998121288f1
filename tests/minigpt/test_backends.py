"""The kernels are held against the formula at their first use; where they fail, that is said and torch's attention runs.
Without a GPU they run in Triton's interpreter."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from minigpt import UserError, backends, kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_that_work_have_no_fault(dtype):
    assert backends.kernel_fault(DEVICE, dtype, n_head=2, head_dim=16) is None


FAULTS = {
    "raises": (lambda *_: int("no\nnumber"), "ValueError: invalid literal for int"),
    "is wrong": (lambda qkv, *more: 1.01 * right(qkv, *more), "output: relative error 0.01 in torch.float32"),
    "has no number": (lambda qkv, *more: torch.nan * right(qkv, *more), "output: relative error nan in torch.float32"),
    "has a wrong gradient": (lambda qkv, *more: right(qkv, *more) + 0 * qkv[:, :32].detach() + qkv[:, :32] - qkv[:, :32].detach(),
                             "gradient of qkv"),
}  # fmt: skip
right = kernels.triton_attention


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_at_fault_is_told(monkeypatch, fault):
    wrong, said = FAULTS[fault]
    monkeypatch.setattr(kernels, "triton_attention", wrong)
    assert said in backends.kernel_fault(DEVICE, torch.float32, n_head=2, head_dim=16)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_full_gpu_is_no_fault_and_is_not_remembered(monkeypatch, kind):
    def full(*_):
        raise kind("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    backends.kernels_work.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(kind, match="out of memory"):
        patch.setattr(kernels, "triton_attention", full)
        backends.kernels_work(DEVICE, torch.float32, 1, 16)
    assert backends.kernels_work(DEVICE, torch.float32, 1, 16)
    backends.kernels_work.cache_clear()


def test_a_first_use_in_a_checkpointed_block_does_not_disturb_its_backward():
    found, x = [], torch.ones(3, device=DEVICE, requires_grad=True)

    def block(x):
        if not found:
            found.append(backends.kernel_fault(DEVICE, torch.float32, n_head=1, head_dim=16))
        return x.square()

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert found == [None] and x.grad.tolist() == [2, 2, 2]


def test_a_fault_is_one_notice_or_an_error_for_fused_attention(monkeypatch, capsys):
    monkeypatch.setattr(backends, "kernel_fault", lambda *a: "no C compiler")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    backends.kernels_work.cache_clear()
    assert [backends.kernels_work("cuda:0", torch.float16, 2, 16) for _ in range(3)] == [False] * 3
    assert capsys.readouterr().err == "Attention is torch's own, not the kernels', on this GPU: no C compiler\n"
    with pytest.raises(UserError, match="--attention fused does not work on this GPU: no C compiler"):
        backends.kernels_work("cuda:0", torch.float16, 2, 16, must=True)
    backends.kernels_work.cache_clear()
