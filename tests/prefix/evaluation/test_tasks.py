"""Banks are not about two languages: more columns, rows that lack some, answers to choose from, several files."""

from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, assert_refused, random_model, random_rows, random_text, write_table

import evaluate
import translate
from minigpt import GPT, GPTConfig, Tokenizer, UserError
from minigpt.generate import Prompt, generate
from prefix import cli
from prefix.data.rows import columns_for
from prefix.decoding import Decoding
from prefix.init import random_banks
from prefix.translation import translate as translate_texts

CONFIG = GPTConfig(vocab_size=61, n_positions=48, n_embd=24, n_layer=2, n_head=3)


@pytest.fixture
def saved(place, workplace):
    """A function: a name, banks -> a folder of this name with their prefix file, whose record names a table of them."""

    def saved(name, ends, base="base", position_offset=0):
        rows = [row for split, n in (("train", 5), ("test", 2)) for row in random_rows(split, n)]
        model = GPT.from_pretrained(place / base)
        banks = random_banks(model.config, ends, 3)
        table = write_table(Path(f"{'-'.join(ends)}.csv"), [ends, *rows])
        banks.position_offset = position_offset
        banks.training_record = {"model": str(place / base), "data": [str(table)], "columns": ends}
        Path(name).mkdir()
        banks.save(f"{name}/prefix.safetensors", model)

    return saved


@pytest.mark.parametrize("files, columns, expected", [
    (["x.de", "x.en"], None, ["en", "de"]),
    (["a.txt", "b.txt"], ["de", "en"], ["de", "en"]),
    (["a.txt", "b.txt", "c.txt"], ["fr", "en", "de"], ["fr", "en", "de"]),
    (["x.en", "x.fr", "x.de"], ["de", "fr"], ["en", "fr", "de"]),
    (["t.csv"], None, ["en", "fr"]),
    (["t.csv"], ["fr", "en"], ["en", "fr"]),
    (["t.csv"], ["fr", "de"], "t.csv: has no column 'de'"),
    (["none.csv"], None, "none.csv: has no column 'en'"),
    (["a.txt", "b.txt"], None, "has no column 'en'; its columns are 'txt', 'txt'; --columns names them"),
    (["x.en", "x.it"], None, "has no column 'fr'; its columns are 'en', 'it'"),
    (["x.de", "x.en"], ["fr"], "has no column 'fr'"),
])  # fmt: skip
def test_columns_are_read_in_the_order_that_they_had_in_training(tmp_path, monkeypatch, files, columns, expected):
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).write_text("fr,x,en\na,b,c\n" if file == "t.csv" else "x,y\na,b\n")
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            columns_for(files, ["en", "fr", "de"], columns)
    else:
        assert columns_for(files, ["en", "fr", "de"], columns) == expected


def test_a_text_without_room_for_the_longest_choice_is_a_fault(place):
    model, tokenizer = GPT.from_pretrained(place / "base"), Tokenizer.from_pretrained(place / "base")
    banks, choices = random_banks(model.config, ["a", "b"], 2), ["x", "one two three four five six seven"]
    longest = max(len(tokenizer.encode(choice)) for choice in choices)
    text = "x"
    while len(tokenizer.encode(text)) + 1 + longest < CONTEXT:
        text += " x"
    fits, does_not = translate_texts(model, tokenizer, banks, [text, text + " x"], ("a", "b"), Decoding(choices=choices))
    assert fits.text in choices and not fits.fault
    assert does_not.text == "" and "no room to answer" in does_not.fault


def test_a_batch_may_mix_banks_of_several_files_and_each_sentence_is_what_it_would_be_alone():
    model = random_model(CONFIG)
    parts = [random_banks(CONFIG, names, n, seed=n) for names, n in ((["en", "fr"], 4), (["de"], 2), (["es", "it"], 5))]
    whole = cli.joined([(f"{i}.safetensors", part) for i, part in enumerate(parts)])
    assert whole.names == ["en", "fr", "de", "es", "it"] and whole.prefix_len == [4, 4, 2, 5, 5]
    prompts, expected = [], []
    for source, target in [("fr", "en"), ("it", "es"), ("en", "fr"), ("de", "de"), ("es", "it")] * 2:
        part = next(part for part in parts if source in part.names)
        ids = torch.randint(60, (int(torch.randint(2, 9, ())),)).tolist()
        masks = lambda banks: [banks.mask([source])] * (len(ids) - 1) + [banks.mask([source, target])]
        prompts.append(Prompt(ids, 8, masks(whole)))
        expected += generate(model, [Prompt(ids, 8, masks(part))], [60], part.slots())
    for batch_size in (1, 4, 32):
        assert generate(model, prompts, [60], whole.slots(), batch_size=batch_size) == expected
    mixed = Prompt([1, 2, 3], 8, [whole.mask(["it"])] * 2 + [whole.mask(["it", "de"])])  # of two files
    assert generate(model, [mixed, *prompts], [60], whole.slots())[1:] == expected


def test_both_commands_take_the_banks_of_several_files(saved, run):
    saved("one", ["en", "fr"])
    saved("two", ["es", "it"])
    both, texts = ["--prefix", "one", "--prefix", "two"], [random_text() for _ in range(9)]
    for source, target, alone in (("fr", "en", "one"), ("it", "es", "two")):
        direction = ["--from", source, "--to", target, *texts]
        assert run(translate, *both, *direction) == run(translate, "--prefix", alone, *direction)
    assert run(translate, *both, "--from", "it", "--to", "fr", *texts)[0] == 0
    code, _, err = run(evaluate, *both)
    assert code == 2 and "two/prefix.safetensors: no one text that they were trained on: name some with --data" in err
    found = []
    for prefixes in (both, ["--prefix", "two"]):
        options = ["--data", "es-it.csv", "--draws", 0, "--hypotheses", "out.tsv"]
        assert run(evaluate, *prefixes, *options)[0] == 0
        found.append(Path("out.tsv").read_text(encoding="utf-8"))
    assert found[0] == found[1] and "\tit\tes\n" in found[0] and "\tfr\t" not in found[0]


def test_files_that_do_not_go_together_are_refused_in_one_line(saved, run):
    saved("one", ["en", "fr"])
    saved("again", ["en", "fr"])
    saved("shifted", ["es", "it"], position_offset=3)
    saved("stranger", ["es", "it"], base="other")
    for name, *words in (
        ("one", "bank 'en' is there twice, in one/prefix.safetensors and in one/prefix.safetensors"),
        ("again", "bank 'en' is there twice, in one/prefix.safetensors and in again/prefix.safetensors"),
        ("shifted", "same position: 3 in shifted/prefix.safetensors, 0 in one/prefix.safetensors"),
        ("stranger", "stranger/prefix.safetensors was trained on", "this model is"),
    ):
        for script, text in ((translate, ["Bonjour"]), (evaluate, [])):
            assert_refused(run(script, "--prefix", "one", "--prefix", name, *text), *words)
