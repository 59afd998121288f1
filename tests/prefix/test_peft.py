"""An adapter of peft's prefix tuning and a bank are the same numbers: the same logits, gradients, text, and bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, edit_json, refusal
from safetensors.torch import load_file, save_file

import train
import translate
from minigpt import GPT, checkpoint
from minigpt.generate import Prompt, generate
from prefix import peft as interchange
from prefix.banks import Banks
from prefix.init import random_banks
from prefix.peft import CONFIG, TENSOR, WEIGHTS, export_bank, import_bank
from prefix.run import DEMO_PREFIX

P = 3  # slots


@pytest.fixture
def base(reference, tmp_path):
    """transformers' GPT-2, the same weights here, and fresh banks for them."""
    theirs, model = reference(), GPT.from_pretrained(tmp_path)
    banks = random_banks(model.config, ["en", "fr"], P, seed=int(torch.randint(1 << 30, ())))
    banks.position_offset = P
    return theirs, model, banks


def test_an_exported_bank_has_the_logits_and_the_slot_gradients_of_peft(base, tmp_path):
    from peft import PeftModel  # takes seconds: only for those who ask

    theirs, model, banks = base
    export_bank(banks, "fr", tmp_path / "adapter")
    adapter = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    weight = adapter.prompt_encoder["default"].embedding.weight.requires_grad_()
    ids = torch.randint(100, (2, 9))
    logits = [banks.logits(model, ids, open=["fr"]), adapter(input_ids=ids).logits]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    ours, peft = (F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") for x in logits)
    key, value = torch.autograd.grad(ours, [banks.key[1], banks.value[1]])
    (rows,) = torch.autograd.grad(peft, weight)
    assert rows.abs().max() > 0.1
    torch.testing.assert_close(interchange.to_embeddings(key, value), rows, rtol=1e-4, atol=1e-4)
    banks.position_offset = 0
    assert not torch.allclose(banks.logits(model, ids, open=["fr"]), logits[1], atol=1e-2)


@pytest.mark.parametrize("position_offset", [0, P])
def test_there_and_back_every_bit_and_the_position_are_kept(base, tmp_path, position_offset):
    _, model, banks = base
    banks.position_offset = position_offset
    export_bank(banks, "fr", tmp_path / "adapter")
    back = import_bank(tmp_path / "adapter", "français", model)
    assert back.names == ["français"] and back.position_offset == position_offset
    assert torch.equal(back.key[0], banks.key[1]) and torch.equal(back.value[0], banks.value[1])


@pytest.mark.parametrize("projection", [False, True])
def test_an_adapter_trained_in_peft_writes_the_same_text_here(base, tmp_path, projection):
    from peft import PrefixTuningConfig, get_peft_model

    theirs, model, _ = base
    config = {"num_virtual_tokens": P, "prefix_projection": projection, "encoder_hidden_size": 16}
    adapter = get_peft_model(theirs, PrefixTuningConfig(task_type="CAUSAL_LM", **config))
    ids = torch.randint(100, (2, 6))
    before = adapter(input_ids=ids).logits.detach()
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        adapter(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save_pretrained(tmp_path / "adapter")
    bank = import_bank(tmp_path / "adapter", "fr", model)
    assert bank.position_offset == P
    logits = adapter(input_ids=ids).logits
    assert not torch.allclose(logits, before, atol=0.1)
    torch.testing.assert_close(bank.logits(model, ids, open=["fr"]), logits, rtol=1e-4, atol=1e-4)
    ours = generate(model, [Prompt(row, 7, [1] * 6) for row in ids.tolist()], [], bank.slots(), P)
    for _ in range(7):  # by peft's forward: its generate drops the prefix under transformers 5.24.0
        ids = torch.cat([ids, adapter(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert [result.ids for result in ours] == ids[:, 6:].tolist()


def test_an_adapter_names_its_base_as_transformers_does(base, tmp_path):
    banks = base[2]
    names = {"gpt2-xl": "openai-community/gpt2-xl", "distilgpt2": "distilbert/distilgpt2", "my/own": "my/own", None: None}
    for model, name in names.items():
        banks.training_record = {"model": model}
        export_bank(banks, "en", tmp_path / f"{name}")
        assert json.loads((tmp_path / f"{name}" / CONFIG).read_text())["base_model_name_or_path"] == name


# The commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step on the demo, with text behind the slots as in peft."""
    place = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIGPT_HOME", str(place / "home"))
        options = ["--steps", "1", "--batch-size", "2", "--limit", "40", "--eval-every", "0", "--device", "cpu"]
        options += ["--model", "demo", "--prefix-len", "4", "--position-offset", "prefix", "--out", place / "run"]
        patch.setattr("sys.argv", ["train.py", *map(str, options)])
        train.main()
    return place / "run"


def test_banks_that_were_in_peft_translate_as_those_of_the_run(run, trained, tmp_path):
    prefixes = []
    for bank in ("en", "fr"):
        code, out, err = run(interchange, "export", trained, "--bank", bank, "--out", tmp_path / bank)
        assert (code, out) == (0, "") and "at position 4 here, at 4 in peft: the same logits" in err
        file = tmp_path / "new" / f"{bank}.safetensors"
        code, out, err = run(interchange, "import", tmp_path / bank, "--bank", bank, "--model", "demo", "--out", file)
        assert (code, out) == (0, "") and "4 slots; text starts at position 4" in err
        assert Banks.load(file).training_record == {"model": "demo"}
        prefixes += ["--prefix", file]
    texts = ["Il pleut.", "Tom est parti hier."]
    code, out, _ = run(translate, *texts, *prefixes)
    assert code == 0 and out == run(translate, *texts, "--prefix", trained)[1] != ""
    err = run(interchange, "export", DEMO_PREFIX, "--bank", "fr", "--out", tmp_path / "demo")[2]
    assert "at position 0 here, at 10 in peft: other logits (train with --position-offset prefix" in err
    assert json.loads((tmp_path / "demo" / CONFIG).read_text())["base_model_name_or_path"] == str(checkpoint.DEMO)


def test_more_slots_than_positions_leave_no_room_for_text(run, tmp_path):
    options = ["--model", "demo", "--prefix-len", 254, "--position-offset", "prefix", "--out", tmp_path / "run"]
    assert_refused(run(train, *options), "too few for text")
    assert not (tmp_path / "run").exists()


# Adapters from strangers

TENSORS = [  # a change of the rows, the tensor's name, what is told
    (lambda rows: rows, "embedding.weight", "expected prompt_embeddings, found embedding.weight"),
    (lambda rows: rows[:, :-1], TENSOR, "is [3, 127] in F32, expected [prefix length, 128]"),
    (lambda rows: rows / 0, TENSOR, "not finite"),
    (lambda rows: rows.repeat(6, 1), TENSOR, "start at 18, not one of 16 positions"),
]


def test_what_is_no_adapter_for_this_model_is_told_in_one_line(base, tmp_path):
    _, model, banks = base
    folder = tmp_path / "adapter"
    export_bank(banks, "fr", folder)
    told = lambda: refusal(import_bank, folder, "fr", model)
    rows = load_file(folder / WEIGHTS)[TENSOR]
    for change, name, words in TENSORS:
        save_file({name: change(rows).contiguous()}, folder / WEIGHTS)
        assert words in told()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "bin is a pickle, which could" in told()
    edit_json(folder / CONFIG, lambda config: config.update(peft_type="LORA"))
    assert "peft_type is 'LORA', expected 'PREFIX_TUNING'" in told()
    (folder / CONFIG).write_text("{")
    assert "adapter_config.json: not JSON" in told()
