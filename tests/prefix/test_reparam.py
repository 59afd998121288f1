"""Slots behind Li and Liang's network: what it is exactly, and that the rest of training goes with it."""

import torch
from conftest import flat, slots_of
from safetensors import safe_open

from prefix.banks import Banks
from prefix.init import random_banks
from prefix.reparam import INNER, Reparametrised


def test_the_network_is_that_of_the_paper_and_slots_begin_where_they_start(model):
    """Embeddings of n_embd numbers, 512 units of tanh, 2 * n_layer * n_embd numbers out; in these a slot's keys and
    values follow one another layer by layer."""
    n_layer, n_embd = model.config.n_layer, model.config.n_embd
    banks = Reparametrised(random_banks(model.config, ["en", "fr"], 3))
    wide = 2 * n_layer * n_embd
    assert {name: list(p.shape) for name, p in banks.named_parameters() if p.requires_grad} == {
        "embedding": [2, 3, n_embd],
        "network.0.weight": [INNER, n_embd],
        "network.0.bias": [INNER],
        "network.2.weight": [wide, INNER],
        "network.2.bias": [wide],
    }
    assert all(map(torch.equal, flat(banks), [x for pair in zip(banks.key, banks.value) for x in pair]))  # at its start
    torch.nn.init.normal_(banks.network[2].weight)
    (_, _), (key, value) = banks.key_values()
    inner = torch.tanh(banks.network[0](banks.embedding[1, 2]))  # of slot 2 of bank 1
    out = (banks.network[2].weight @ inner + banks.network[2].bias).view(n_layer, 2, model.config.n_head, -1)
    torch.testing.assert_close(key[:, :, 2], banks.key[1][:, :, 2] + out[:, 0])
    torch.testing.assert_close(value[:, :, 2], banks.value[1][:, :, 2] + out[:, 1])


def test_training_moves_the_network_but_not_the_start_and_the_prefix_file_has_the_slots_alone(trainer, model):
    t = trainer(banks=Reparametrised(random_banks(model.config, ["en", "fr"], 3)), lr=0.01)
    before, slots = slots_of(t), flat(t.banks)
    assert t.run()
    for name, now in slots_of(t).items():
        assert torch.equal(now, before[name]) == name.startswith(("key.", "value.", "unit.", "z."))
    assert all((now != then).any(dim=-1).all() for now, then in zip(flat(t.banks), slots))
    with safe_open(t.out / "prefix.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"en.key", "en.value", "fr.key", "fr.value"}
    assert all(map(torch.equal, flat(Banks.load(t.out, model)), flat(t.banks)))
