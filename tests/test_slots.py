"""What a slot is: the facts that make prefix-tuning right, each against plain arithmetic."""

import math

import pytest
import torch
from conftest import random_model, refusal, same

from minigpt import GPTConfig
from minigpt.attention import PackedBatch, Slots
from minigpt.backends import attend
from minigpt.generate import Prompt, generate
from minigpt.loss import nll_sum
from prefix import cli
from prefix.banks import Banks
from prefix.init import random_banks
from prefix.sequences import pack_pairs

CONFIG = GPTConfig(vocab_size=61, n_positions=48, n_embd=24, n_layer=3, n_head=3)


def tiny(dtype=torch.float64):
    return random_model(CONFIG).to(dtype)


def fresh_banks(model, names=("en", "fr"), prefix_len=4):
    return random_banks(model.config, names, prefix_len, seed=int(torch.randint(1 << 30, ()))).to(model.dtype)


def ids(*shape):
    return torch.randint(CONFIG.vocab_size, shape)


def written_out(qkv, n_head, packed, slots):
    """Attention token by token, from the formula alone: for each the keys that it sees, then a softmax over them."""
    rows = []
    for i, (start, bank_mask) in enumerate(zip(packed.start.tolist(), packed.bank_mask.tolist())):
        heads = []
        for h in range(n_head):
            q, k, v = (x[:, h] for x in qkv.unflatten(-1, (3, n_head, -1)).unbind(1))  # (N, head_dim)
            seen = [s for s, bank in enumerate(slots.bank.tolist()) if bank_mask >> bank & 1]
            keys = torch.cat([slots.key[h, seen], k[start : i + 1]])
            values = torch.cat([slots.value[h, seen], v[start : i + 1]])
            weights = (keys @ q[i] / math.sqrt(q.size(-1))).softmax(0)
            heads.append(weights @ values)
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def random_attention(n_banks=3):
    """A random packed row: ragged sentences, each token with random open banks, and slots of several banks."""
    lengths = torch.randint(1, 9, (4,)).tolist()
    bank_mask = torch.randint(1 << n_banks, (sum(lengths),))
    bank = torch.arange(n_banks).repeat_interleave(torch.randint(0, 4, (n_banks,)))
    shape = (3, len(bank), 8)
    tensors = [torch.randn(sum(lengths), 72), torch.randn(shape), torch.randn(shape)]
    return PackedBatch(lengths, bank_mask), bank, [t.double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", ["plain", "fused"])
@pytest.mark.parametrize("trial", range(5))
def test_attention_and_its_gradients_equal_the_formula_written_out_and_finite_differences(backend, trial):
    packed, bank, tensors = random_attention()
    attention = lambda qkv, k, v: attend(qkv, 3, packed, Slots(k, v, bank), backend)
    outputs = []
    for compute in (attention, lambda qkv, k, v: written_out(qkv, 3, packed, Slots(k, v, bank))):
        out = compute(*tensors)
        outputs.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), tensors, allow_unused=True)))
    for ours, formula in zip(*outputs):
        if formula is not None and formula.numel():
            torch.testing.assert_close(ours, formula, rtol=1e-9, atol=1e-11)
    assert trial or torch.autograd.gradcheck(attention, tensors)  # and finite differences


@pytest.mark.parametrize("backend", ["plain", "fused"])
def test_a_bank_read_off_tokens_stands_for_these_tokens(backend):
    model = tiny()
    model.attention = backend
    prompt, text = ids(1, 7), ids(1, 9)
    bank = Banks.from_prompt(model, "prompt", prompt[0].tolist()).double()
    ours = bank.logits(model, text, open=["prompt"])
    together = model(torch.cat([prompt, text], dim=1))[:, 7:]
    torch.testing.assert_close(ours, together, rtol=1e-5, atol=1e-5)  # the bank's masters are float32


@pytest.mark.parametrize("backend", ["plain", "auto"])
def test_a_closed_bank_is_the_base_bit_for_bit_and_training_changes_no_weight_of_it(model, trainer, tokenizer, backend):
    model.attention, text = backend, torch.randint(tokenizer.n_vocab, (3, 21))
    before, weights = model(text), {name: p.clone() for name, p in model.state_dict().items()}
    training = trainer(lr=0.5)
    assert training.run()
    banks = Banks.load(training.out, model)
    assert same(model.state_dict(), weights)
    assert torch.equal(model(text), before) and torch.equal(banks.logits(model, text, open=[]), before)
    assert not torch.isclose(banks.logits(model, text, open=["fr"]), before).all()


def test_an_empty_bank_is_the_plain_model():
    model, text = tiny(), ids(2, 9)
    torch.testing.assert_close(fresh_banks(model, prefix_len=0).logits(model, text, open=["en", "fr"]), model(text))


def test_the_order_of_banks_and_slots_does_not_matter():
    model, text = tiny(), ids(1, 9)
    banks = fresh_banks(model)
    mirrored = Banks({n: (k.flip(2), v.flip(2)) for n, k, v in reversed(list(zip(banks.names, banks.key, banks.value)))})
    ours, theirs = (b.double().logits(model, text, open=["fr", "en"]) for b in (banks, mirrored))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_bank_is_seen_from_where_it_opens_on_and_not_before():
    model, text = tiny(), ids(9)
    banks, changed = fresh_banks(model), fresh_banks(model)
    changed.load_state_dict({**changed.state_dict(), "key.0": banks.key[0], "value.0": banks.value[0]})
    packed = PackedBatch([9], torch.tensor([1] * 4 + [3] * 5))
    one, other = (model.hidden(text, packed, b.slots()) for b in (banks, changed))  # they differ in bank 1 alone
    torch.testing.assert_close(one[:4], other[:4])
    assert not torch.isclose(one[4:], other[4:]).all(dim=-1).any()


@pytest.mark.parametrize("backend", ["plain", "fused"])
def test_a_ragged_batch_gives_each_sentence_what_it_gets_alone(backend):
    model = tiny()
    model.attention = backend
    slots = fresh_banks(model).slots()
    sentences = [(ids(n), torch.randint(4, (n,))) for n in (5, 1, 12, 3)]
    texts, masks = map(torch.cat, zip(*sentences))
    together = model.hidden(texts, PackedBatch([5, 1, 12, 3], masks), slots)
    alone = [model.hidden(text, PackedBatch([len(text)], bank_mask), slots) for text, bank_mask in sentences]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_loss_of_a_pair_counts_the_target_and_its_end_and_nothing_else():
    batch = pack_pairs([([5, 6, 7], [8, 9], 1, 0), ([], [3, 2, 1], 0, 1), ([4], [], 0, 1)], sep=10, eot=60)
    assert batch.ids.tolist() == [5, 6, 7, 10, 8, 9, 10, 3, 2, 1, 4, 10]
    assert batch.packed.position.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]  # as in pretraining
    assert batch.packed.bank_mask.tolist() == [2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 1, 3]
    assert batch.target_index.tolist() == [3, 4, 5, 6, 7, 8, 9, 11]
    assert batch.targets.tolist() == [8, 9, 60, 3, 2, 1, 60, 60]


def test_the_chunked_loss_and_its_gradient_equal_cross_entropy(monkeypatch):
    monkeypatch.setattr("minigpt.loss.CHUNK", 5)
    hidden, wte, targets = torch.randn(13, 8).double().requires_grad_(), torch.randn(31, 8).double(), ids(13) % 31
    ours = nll_sum(hidden, wte, targets)
    theirs = torch.nn.functional.cross_entropy(hidden @ wte.T, targets, reduction="sum")
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(3 * loss, hidden)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_all_slots_get_gradients_also_after_a_translation_in_between_and_the_base_model_none():
    model = tiny()
    banks = fresh_banks(model)
    batch = pack_pairs([(ids(4), ids(3), 1, 0), (ids(2), ids(6), 0, 1)], sep=10, eot=60)

    def gradients():
        hidden = model.hidden(batch.ids, batch.packed, banks.slots())
        loss = nll_sum(hidden[batch.target_index], model.wte.weight, batch.targets)
        return torch.autograd.grad(loss, list(banks.parameters()))

    before = gradients()
    assert all((g.abs().amax(dim=(-1, -2)) > 0).all() for g in before)
    with torch.no_grad():
        generate(model, [Prompt([1, 2, 3], 5, [1, 1, 3])], [60], banks.slots())
    torch.testing.assert_close(gradients(), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_prefix_file_keeps_every_bit_and_refuses_another_base_naming_both(tmp_path):
    model, other, path = tiny(torch.float32), tiny(), tmp_path / "p.safetensors"
    banks = fresh_banks(model, ["en", "fr", "de"])
    banks.training_record = {"steps": 3}
    banks.save(path, model)
    again = Banks.load(path, model)
    assert again.names == banks.names and again.training_record == {"steps": 3} and again.position_offset == 0
    assert all(torch.equal(a, b) for a, b in zip(banks.parameters(), again.parameters()))
    told = refusal(Banks.load, path, other)
    assert model.fingerprint in told and other.fingerprint in told


def test_slots_and_the_numbers_of_their_banks_are_on_one_device():
    """ "meta" stands for a GPU."""
    banks = random_banks(CONFIG, ["en", "fr"], 3).to("meta")
    joined = cli.joined([("a", banks), ("b", random_banks(CONFIG, ["de"], 2).to("meta"))])
    for slots in (banks.slots(), joined.slots()):
        assert slots.key.device == slots.bank.device == torch.device("meta")
