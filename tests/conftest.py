"""What several test files share: fresh random numbers, random models and checkpoints, GPT-2 vocabularies, transformers'
GPT-2 as the reference, and a way to run the commands."""

import csv
import io
import json
import os
import shutil
import string
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from minigpt import GPT, GPTConfig, checkpoint
from prefix import cli
from prefix.data.splits import split_of

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


@pytest.fixture(autouse=True)
def pictures_are_for_their_own_tests(request, monkeypatch):
    """Each training run would draw its loss, which takes longer than the smallest of them train."""
    if request.path.name not in ("test_attention_maps.py", "test_report.py"):
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)


def random_model(config, std=0.3):
    """A frozen GPT, all of whose parameters are far from their neutral beginnings."""
    model = GPT(config).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=std)
    return model


def save_random_checkpoint(directory, n_positions=200):
    """A small model with the demo's vocabulary, saved; it is returned, too."""
    size = len(json.loads((checkpoint.DEMO / "vocab.json").read_text(encoding="utf-8")))
    config = GPTConfig(vocab_size=size, n_positions=n_positions, n_embd=32, n_layer=2, n_head=2)
    model = random_model(config, std=0.4)
    checkpoint.save(model, directory)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(checkpoint.DEMO / file, directory)
    return model


def random_text(most=7):
    letters = [string.ascii_lowercase[i] for i in torch.randint(26, (4 * most,))]
    words = ["".join(letters[i : i + 4]) for i in range(0, 4 * most, 4)]
    return " ".join(words[: int(torch.randint(1, most + 1, ()))])


def random_rows(split, n, columns=2):
    """n rows that belong to this split."""
    rows = []
    while len(rows) < n:
        row = [random_text() for _ in range(columns)]
        rows += [row] if split_of(row[0]) == split else []
    return rows


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


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
    from transformers import (  # takes seconds: only for those who ask
        GPT2Config,
        GPT2LMHeadModel,
    )

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


@pytest.fixture
def run(monkeypatch, capsys):
    """A function: a script's module and its arguments -> (exit code, standard output, standard error)."""

    def run(script, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        file = tempfile.TemporaryFile()
        file.write(stdin)
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        capsys.readouterr()
        code = 0
        try:
            with cli.cli_errors():
                script.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def write(tmp_path):
    """A function: a name, str or bytes -> the path of a file that holds them."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
