"""What fits into memory is computed before it is taken."""

from types import SimpleNamespace

import pytest
import torch

from minigpt import GPT, memory
from minigpt.config import PUBLISHED


@pytest.mark.parametrize("dtype, checkpointed, bytes", [(torch.bfloat16, False, 1_536_000), (torch.float32, True, 371_200)])
def test_a_token_of_gpt2_xl_in_flight_takes_so_many_bytes(dtype, checkpointed, bytes):
    model = SimpleNamespace(config=PUBLISHED["gpt2-xl"], dtype=dtype, checkpoint_activations=checkpointed)
    assert memory.token_bytes(model) == bytes


def test_a_token_takes_what_backward_keeps_for_it():
    config = PUBLISHED["distilgpt2"]
    with torch.device("meta"):
        model = GPT(config).requires_grad_(False)
    kept, n = [], 7
    note = lambda x: kept.append(x.nbytes) or x
    attend = lambda i, qkv: torch.nn.functional.scaled_dot_product_attention(*qkv[None].chunk(3, dim=-1), is_causal=True)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: note(x) if x.size(0) == n or x.size(0) == 1 else x, lambda x: x):
        model.blocks(torch.randn(n, config.n_embd, device="meta", requires_grad=True), attend)
    assert 0.9 < sum(kept) / n / memory.token_bytes(model) < 1.5


def test_a_first_micro_batch_is_halved_until_it_fits_into_a_gpus_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 16e9)
    model = SimpleNamespace(config=PUBLISHED["gpt2-xl"], dtype=torch.bfloat16, checkpoint_activations=False)
    for device, fits in (("cuda", 8192), ("cpu", 16384)):
        model.device = torch.device(device)
        assert memory.tokens_that_fit(model, 16384) == fits


def test_an_attempt_that_no_main_memory_holds_gives_nothing():
    assert memory.attempt(torch.empty, 1 << 60) is None
    assert memory.out_of_memory(RuntimeError("could not create a primitive"))  # what oneDNN says
