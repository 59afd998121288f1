"""The tokenizer gives the ids that transformers gives, or does not load and says why."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import copy_tokenizer, edit_json, why_refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt import Tokenizer, UserError, checkpoint
from minigpt.tokenizer import BYTE, END_OF_TEXT

PIECES = [
    *["the", "The", " river", "n't", "I'll", "WE'VE", "don’t", " they're", "o'clock", "naïve", END_OF_TEXT],
    *["le", " château", "L'œuvre", " n'est-ce pas", "aujourd’hui", " où", "ÇA", " «", "» ", "élève", "e\u0301"],
    *["0", "7", "42", " 12345", "3,14", "½", "٣", " ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u00a0", "\u202f"],
    *[".", "...", " ?!", "…", "(", "_", "--", "🙂", " 👩‍👩‍👧", "🇫🇷", "日本語", " Ελλάδα", "नमस्ते", "\0", "\ufeff"],
]
REAL = Path(__file__).parents[3] / "shared/data/gpt2_tokenizer"
SIZE = 302  # tokens of `trained`
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
SLOW = settings(deadline=None)


def transformers_tokenizer(directory):
    from transformers import AutoTokenizer  # takes seconds: only for those who ask

    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(directory)


def assert_same_ids(directory, texts):
    """`directory` gives the ids that it gives in transformers. Returns our tokenizer."""
    theirs, ours = transformers_tokenizer(directory), Tokenizer.from_pretrained(directory)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True), text
    assert ours.eot == theirs.eos_token_id
    return ours


# Published vocabularies.


@pytest.fixture(scope="module", params=[REAL, checkpoint.DEMO], ids=["gpt2", "demo"])
def both(request, tmp_path_factory):
    """Our tokenizer and transformers' of a published vocab.json and merges.txt."""
    if not request.param.is_dir():
        pytest.skip(f"gpt2's own vocabulary is not at {REAL}")
    copy_tokenizer(request.param, folder := tmp_path_factory.mktemp("vocabulary"))
    return Tokenizer.from_pretrained(folder), transformers_tokenizer(folder)


@settings(SLOW, max_examples=300)
@given(text=TEXTS)
@example(text=f"a{END_OF_TEXT}b {END_OF_TEXT}{END_OF_TEXT}\n")  # ordinary characters
@example(text="a" * 4_999 + "x")  # a word without end, and gaps
@example(text=" " * 4_999 + "x")
@example(text=" \n" * 2_500 + "x")
@example(text="👩‍" * 2_500 + "x")
def test_ids_of_any_text_equal_transformers(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ids) == text and ours.eot not in ids


@SLOW
@given(data=st.data())
def test_the_text_of_any_ids_equals_transformers(both, data):
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab + 3)))  # a padded model has ids of no token
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ours.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"  # lone surrogates


# A vocabulary of four merges.

MERGES = ["h e", "l l", "he ll", "hell o"]
TOKENS = [*BYTE, "he", "ll", "hell", "hello", END_OF_TEXT]
VOCAB = {token: (7 * i + 3) % len(TOKENS) for i, token in enumerate(TOKENS)}  # ids in no order


def write(directory, merges=MERGES, vocab=VOCAB):
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def test_ids_are_those_of_vocab_json_in_whatever_order_it_has_them(tmp_path):
    write(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("hello hell") == [VOCAB["hello"], VOCAB["Ġ"], VOCAB["hell"]]
    assert tokenizer.decode([VOCAB["hello"], VOCAB["Ġ"], VOCAB["he"]]) == "hello he"
    assert tokenizer.eot == VOCAB[END_OF_TEXT]
    (tmp_path / "merges.txt").write_bytes("\r\n".join(MERGES).encode())  # Windows' line ends, and no version line
    assert Tokenizer.from_pretrained(tmp_path).encode("hello") == [VOCAB["hello"]]


@pytest.mark.parametrize("number", range(12))
def test_with_any_merges_ids_equal_transformers_or_the_merge_is_named(tmp_path, number):
    """tiktoken joins by the rank of the result, tokenizers by the rank of the pair: not the same for all merges."""
    rng, merges = random.Random(torch.initial_seed()), {}
    for _ in range(rng.randint(1, 12)):
        left, right = rng.choices(["a", "b", "c", *merges], k=2)
        merges.setdefault(left + right, f"{left} {right}")
    write(tmp_path, merges.values(), {token: i for i, token in enumerate([*BYTE, *merges, END_OF_TEXT])})
    try:
        assert_same_ids(tmp_path, ["".join(rng.choices("abc ", k=rng.randint(0, 30))) for _ in range(100)])
    except UserError as error:
        assert "is not a pair that the merges before it leave" in str(error)


# Vocabularies that transformers and tokenizers saved.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """vocab.json and merges.txt of a small vocabulary that tokenizers trained; its id 0 is <|endoftext|>."""
    from tokenizers import ByteLevelBPETokenizer

    bpe, folder = ByteLevelBPETokenizer(), tmp_path_factory.mktemp("trained")
    corpus = ["the cat sat on the mat, l'été déjà où  aab aba aaaa abab 123 \n\n  foo foobar bar baz"] * 3
    bpe.train_from_iterator(corpus, 320, min_frequency=1, special_tokens=[END_OF_TEXT], show_progress=False)
    assert bpe.get_vocab_size() == SIZE
    bpe.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def saved_once(trained, tmp_path_factory):
    tokenizer = transformers_tokenizer(trained)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder that transformers saved, with two special tokens added, and a function: one of its JSON files, a path of
    names in it and the new value, or a function of the old one."""

    def edit(file, name, value):
        def change(holder):
            *sections, key = name.split(".")
            for section in sections:
                holder = holder[section]
            holder[key] = value(holder[key]) if callable(value) else value

        edit_json(tmp_path / file, change)

    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path, edit


TEXT = [f"the cat <x> [PAD] sat{END_OF_TEXT}", " foo", ""]
J, C = "tokenizer.json", "tokenizer_config.json"


def last_token(**changes):
    """An edit of tokenizer.json's added tokens: the last of them, <x>, changed."""
    return lambda tokens: [*tokens[:-1], tokens[-1] | changes]


@pytest.mark.parametrize("file, name, value", [
    (J, "model.merges", lambda merges: [" ".join(pair) for pair in merges]),
    (J, "post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
    (J, "truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    (J, "added_tokens", lambda tokens: tokens[:2]),
    (J, "added_tokens", last_token(special=True, rstrip=True, single_word=True)),
    (C, "tokenizer_class", "PreTrainedTokenizerFast"),
    (C, "eos_token", "[PAD]"),
    (C, "model_max_length", 8),
])  # fmt: skip
def test_what_does_not_change_ids_is_passed_over(saved, file, name, value):
    folder, edit = saved
    edit(file, name, value)
    tokenizer = assert_same_ids(folder, TEXT)
    assert tokenizer.n_vocab == max(SIZE, tokenizer.eot + 1)  # other special tokens do not count


NOT_IMPLEMENTED = {
    J: {
        "normalizer": [{"type": "NFC"}],
        "pre_tokenizer": [None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}],
        "pre_tokenizer.use_regex": [False],
        "pre_tokenizer.add_prefix_space": [True],
        "post_processor": [{"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}],
        "post_processor.special_tokens": [{END_OF_TEXT: {"ids": [0]}}],
        "model.type": ["WordPiece"],
        "model.end_of_word_suffix": ["</w>"],
        "model.byte_fallback": [True],
        "model.ignore_merges": [True],
    },
    C: {
        "tokenizer_class": ["BertTokenizer"],
        "add_prefix_space": [True],
        "add_bos_token": [True],
        "auto_map": [{"AutoTokenizer": ["x.Y", None]}],
    },
}


def test_what_changes_ids_and_is_not_implemented_is_refused_by_name(saved):
    folder, edit = saved
    for file, refused in NOT_IMPLEMENTED.items():
        sound = (folder / file).read_text(encoding="utf-8")
        for name, value in ((name, value) for name, values in refused.items() for value in values):
            edit(file, name, value)
            why = why_refused(Tokenizer.from_pretrained, folder)
            assert why.startswith(f"{file}: {name}") and why.endswith(" is not implemented")
            (folder / file).write_text(sound, encoding="utf-8")


@pytest.mark.parametrize("name, value, why", [
    (J, last_token(special=False), "text encodes to its added token '<x>', which is not implemented"),
    (J, last_token(id=400), f"added token '<x>' has id 400, not {SIZE + 1}"),
    (C, {SIZE + 1: {"content": "<y>", "special": True}}, f"added token '<x>' has id {SIZE + 1}, not {SIZE + 2}"),
    (C, {SIZE + 1: {"content": "<x>", "special": False}}, "text encodes to its added token '<x>'"),
])  # fmt: skip
def test_added_tokens_that_transformers_would_read_otherwise_are_refused(saved, name, value, why):
    folder, edit = saved
    edit(name, "added_tokens" if name == J else "added_tokens_decoder", value)
    assert why_refused(Tokenizer.from_pretrained, folder).startswith(f"{J}: not a byte-level BPE: {why}")


def test_whatever_changes_ids_changes_the_fingerprint(saved, trained):
    folder, edit = saved
    fingerprints = {Tokenizer.from_pretrained(folder).fingerprint for folder in (trained, folder, folder)}
    edit(C, "eos_token", "[PAD]")
    assert len(fingerprints | {Tokenizer.from_pretrained(folder).fingerprint}) == 3


def test_tokens_added_by_an_old_transformers_are_refused(trained, tmp_path):
    copy_tokenizer(trained, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": SIZE}))
    assert "added_tokens.json is not read" in why_refused(Tokenizer.from_pretrained, tmp_path)


def test_special_tokens_in_vocab_json_are_never_made_of_text(trained, tmp_path):
    copy_tokenizer(trained, tmp_path)
    vocab = json.loads((trained / "vocab.json").read_text(encoding="utf-8"))
    vocab = {"<s>": 0, "[PAD]": 1} | {token: i + 2 for token, i in vocab.items()} | {"[MASK]": 1000}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    ours = assert_same_ids(tmp_path, ["<s>[PAD]the [MASK]", *PIECES])
    assert ours.decode([0, vocab["the"], 1000]) == "<s>the[MASK]" and ours.n_vocab == SIZE + 2


# What can be wrong with a vocabulary.


@pytest.mark.parametrize("line", ["hello", "he l l", "hel lo", "he €", "h e", "h ell", "l lo"])
def test_a_merge_of_other_than_two_tokens_that_bpe_leaves_is_an_error_that_names_it(line, tmp_path):
    write(tmp_path, [*MERGES[:2], line, *MERGES[2:]])
    assert f"merge 3: {line!r} is not a pair" in why_refused(Tokenizer.from_pretrained, tmp_path)


SPELLED_BY_MERGES = [f"{END_OF_TEXT[:i]} {END_OF_TEXT[i]}" for i in range(1, len(END_OF_TEXT))]


@pytest.mark.parametrize("merges, vocab, why", [
    *((MERGES, {t: i for t, i in VOCAB.items() if t != gone}, f"'{gone}' is missing") for gone in TOKENS[-3:]),
    (SPELLED_BY_MERGES, VOCAB, f"merges make its end-of-text token '{END_OF_TEXT}'"),
    *((MERGES, VOCAB | {"hello": i}, "") for i in [-1, 5, "0", True, None, []]),
], ids=str)  # fmt: skip
def test_a_vocabulary_that_lacks_a_token_or_has_bad_ids_is_an_error(merges, vocab, why, tmp_path):
    write(tmp_path, merges, vocab)
    assert why_refused(Tokenizer.from_pretrained, tmp_path).startswith(f"merges.txt: not a byte-level BPE: {why}")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", J, C])
def test_a_file_that_is_something_else_is_an_error_that_names_it(file, tmp_path):
    write(tmp_path)
    (tmp_path / file).write_bytes(b"\xff\xfe")
    assert why_refused(Tokenizer.from_pretrained, tmp_path).startswith(f"{file}: ")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_directory_without_a_tokenizer_is_an_error_whatever_its_size_and_name(file, tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    (tmp_path / file).unlink()
    assert why_refused(Tokenizer.from_pretrained, tmp_path) == f"{file}: No such file or directory"
