"""What several test files share: fresh random numbers, GPT-2 vocabularies, and transformers' GPT-2 as the reference."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from minigpt import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: they then run on the CPU

REAL_VOCABULARY = Path(__file__).parents[2] / "shared/data/gpt2_tokenizer"


@pytest.fixture(autouse=True)
def fresh_random_numbers():
    """Other inputs in every run. pytest prints the seed of a test that fails."""
    print(f"torch.manual_seed({torch.seed()})")


@pytest.fixture(autouse=True)
def gpus_are_for_the_kernels(request, monkeypatch):
    """All other tests compare exact tokens and bits on the CPU, also where there is a GPU."""
    if request.path.name != "test_kernels.py":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", params=["gpt2", "demo"])
def vocabulary(request, tmp_path_factory):
    """A directory with a vocab.json and merges.txt, and a config.json that tells transformers whose they are."""
    source = checkpoint.DEMO if request.param == "demo" else REAL_VOCABULARY
    if not source.is_dir():
        pytest.skip(f"gpt2's own vocabulary is not at {source}")
    directory = tmp_path_factory.mktemp(request.param)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(source / file, directory)
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return directory


@pytest.fixture
def reference(tmp_path):
    """A function: settings -> transformers' GPT-2 with random weights, which it has saved in tmp_path."""
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds: only for those who ask

    tiny = dict(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)

    def build(**settings):
        model = GPT2LMHeadModel(GPT2Config(**tiny | settings, attn_implementation="eager")).eval().requires_grad_(False)
        for p in model.parameters():  # far from their neutral beginnings, so that a wrong bias or norm shows
            p += torch.randn_like(p) * (0.1 if p.dim() == 1 else len(p) ** -0.5)
        model.save_pretrained(tmp_path)
        return model

    yield build
    for file in tmp_path.glob("*.safetensors"):  # pytest keeps the rest of the folder
        file.unlink()
