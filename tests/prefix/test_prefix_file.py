"""A prefix file holds what its header says, and what its base can take."""

import json

import pytest
import torch
from conftest import random_model, refusal
from safetensors import safe_open
from safetensors.torch import save_file

from minigpt import GPTConfig
from prefix.banks import Banks
from prefix.init import random_banks

MODEL = random_model(GPTConfig(vocab_size=9, n_positions=16, n_embd=4, n_layer=1, n_head=2))


@pytest.fixture
def changed(tmp_path):
    """A function: other tensors and metadata -> a prefix file that is sound but for these."""

    def changed(tensors=(), **metadata):
        path = tmp_path / "p.safetensors"
        random_banks(MODEL.config, ["en"], 3).save(path, MODEL)
        with safe_open(path, "pt") as file:
            all_tensors, all_metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        save_file(all_tensors | dict(tensors), path, all_metadata | metadata)
        return path

    return changed


@pytest.mark.parametrize("shape", [[2, 2, 3, 2], [1, 1, 3, 2], [1, 2, 3, 3], [12], [1, 2, 3, 2, 1]])
def test_keys_and_values_of_one_shape_that_is_not_the_bases_are_an_error(changed, shape):
    path = changed({"en.key": torch.ones(shape), "en.value": torch.ones(shape)})
    assert f"tensor en.key has shape {shape}, expected [1, 2, " in refusal(Banks.load, path, MODEL)


@pytest.mark.parametrize("names", [["en", "en"], []])
def test_two_banks_of_one_name_and_no_bank_are_an_error(changed, names):
    assert "banks need different names" in refusal(Banks.load, changed(banks=json.dumps(names)), MODEL)
