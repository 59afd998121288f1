"""The tokenizer gives the ids that transformers gives, or does not load and says why."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import tiktoken
from conftest import refusal
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minigpt import Tokenizer, UserError
from minigpt.checkpoint import DEMO
from minigpt.tokenizer import END_OF_TEXT, byte_characters

PIECES = [
    *["the", "The", " river", "n't", "I'll", "WE'VE", "don’t", " they're", "o'clock", "naïve", END_OF_TEXT],
    *["le", " château", "L'œuvre", " n'est-ce pas", "aujourd’hui", " où", "ÇA", " «", "» ", "élève", "e\u0301"],
    *["0", "7", "42", " 12345", "3,14", "½", "٣", " ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u00a0", "\u202f"],
    *[".", "...", " ?!", "…", "(", "_", "--", "🙂", " 👩‍👩‍👧", "🇫🇷", "日本語", " Ελλάδα", "नमस्ते", "\0", "\ufeff"],
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
SLOW = settings(deadline=None)
# To shrink what transformers must save each time would take minutes.
FEW = settings(SLOW, max_examples=40, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


@pytest.fixture(scope="module")
def ours(vocabulary):
    return Tokenizer.from_pretrained(vocabulary)


@pytest.fixture(scope="module")
def theirs(vocabulary):
    return transformers_tokenizer(vocabulary)


def transformers_tokenizer(directory, **settings):
    from transformers import AutoTokenizer  # takes seconds: only for those who ask

    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return AutoTokenizer.from_pretrained(directory, **settings)


def assert_same_ids(directory, texts):
    """`directory` gives the ids that it gives in transformers. Returns our tokenizer."""
    theirs, ours = transformers_tokenizer(directory), Tokenizer.from_pretrained(directory)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True), text
    assert ours.eot == theirs.eos_token_id
    return ours


def why_refused(directory):
    """Why its tokenizer does not load, less the directory."""
    return refusal(Tokenizer.from_pretrained, directory).removeprefix(f"{directory}/")


# Published vocabularies.


@settings(SLOW, max_examples=300)
@given(text=TEXTS)
def test_ids_of_any_text_equal_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == text


@SLOW
@given(data=st.data())
def test_the_text_of_any_ids_equals_transformers(ours, theirs, data):
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab + 3)))  # a padded model has ids of no token
    assert ours.decode(ids) == theirs.decode(ids)


@SLOW
@given(before=TEXTS, after=TEXTS)
def test_end_of_text_in_a_text_is_ordinary_characters(ours, before, after):
    text = before + END_OF_TEXT + after
    assert ours.eot not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_the_end_of_text_token_is_the_one_that_transformers_has(ours, theirs):
    assert (ours.eot, ours.n_vocab) == (theirs.eos_token_id, len(theirs))
    assert ours.decode([ours.eot]) == END_OF_TEXT


@pytest.mark.parametrize("piece", ["a", " ", " \n", "👩‍", "e\u0301", "\x1b[2J\u202e"])
def test_a_word_or_a_gap_without_end_is_encoded_as_by_transformers(piece, ours, theirs):
    text = (piece * 5_000)[:4_999] + "x"
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    text = (piece * 100_000)[:99_999] + "x"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_more_white_space_than_the_pattern_can_match_is_an_error_and_no_panic(space, ours):
    assert refusal(ours.encode, f"a{space * 1_000_000}b") == "a text has more than 100,000 spaces in a row"
    assert ours.encode(f"a{space} b" * 200_000)


def test_a_lone_surrogate_is_a_replacement_character(ours):
    assert ours.decode(ours.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"


def test_every_byte_is_spelled_by_a_character_of_its_own_as_in_gpt2s_files(ours):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_characters() == bytes_to_unicode()
    assert (byte_characters()[ord(" ")], byte_characters()[ord("\n")]) == ("Ġ", "Ċ")


# Vocabularies that transformers and tokenizers saved.

SIZE = 302
WORDS = ["foo", "foobar", "bar", "<x>", "[PAD]", " z", "a b", "é", "Ġq", "\n", "ab", "the", "Ⅷ", "\u0301", "日本", "."]
AROUND = ["a", " ", "foo", "b", "é", "\n", "  ", "_", "½", "x1", "Ⓐ", "\u0301", "\x1c", END_OF_TEXT, "the cat"]
CONTENT = st.sampled_from(WORDS) | st.text("ab é<>_\n\x1c½", min_size=1, max_size=4)


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


def save_with(trained, directory, tokens, pad=None, **settings):
    """Save transformers' tokenizer with added tokens, each (content, normalized, special). Returns it."""
    from tokenizers import AddedToken

    tokenizer = transformers_tokenizer(trained, **settings)
    tokenizer.add_tokens([AddedToken(content, normalized=n, special=special) for content, n, special in tokens])
    tokenizer.add_special_tokens({"pad_token": pad} if pad else {})
    tokenizer.save_pretrained(directory)
    return tokenizer


@FEW
@given(tokens=st.lists(st.tuples(CONTENT, st.booleans(), st.booleans()), max_size=5), pad=st.none() | CONTENT,
       prefix_space=st.booleans(), data=st.data())  # fmt: skip
def test_ids_with_any_added_tokens_equal_transformers(trained, tmp_path, tokens, pad, prefix_space, data):
    shutil.rmtree(tmp_path)
    tokenizer = save_with(trained, tmp_path, tokens, pad, add_prefix_space=prefix_space)
    pieces = st.sampled_from([*AROUND, *(content for content, *_ in tokens)]) | st.text(max_size=3)
    ours = assert_same_ids(tmp_path, data.draw(st.lists(st.lists(pieces, max_size=12).map("".join), max_size=5)))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    assert ours.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "tokens",
    [
        [("foo", True, False), ("oba", False, False)],  # those that are not normalized first
        [("foo", False, False), ("oba", True, False)],
        [("foo", True, False), ("foobar", True, False)],  # the longest
        [("foo", True, False), ("foobar", True, True)],  # a special one stays text, with what is in it
        [("foo", True, False), ("foobar", False, True)],
    ],
)
def test_added_tokens_that_overlap_are_found_as_by_transformers(trained, tmp_path, tokens):
    save_with(trained, tmp_path, tokens)
    assert_same_ids(tmp_path, ["foobar foo bar xfoobarfoo"])


@FEW
@given(seed=st.integers())
def test_with_any_merges_ids_equal_transformers_or_the_merge_is_named(tmp_path, seed):
    """tiktoken joins by the rank of the result, tokenizers by the rank of the pair: not the same for all merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng, merges = random.Random(seed), {}
    for _ in range(rng.randint(1, 12)):
        left, right = rng.choices(["a", "b", "c", *merges], k=2)
        merges.setdefault(left + right, (left, right))
    vocab = {token: i for i, token in enumerate([*byte_characters().values(), *merges, END_OF_TEXT])}
    backend = Backend(models.BPE(vocab=vocab, merges=list(merges.values())))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(rng.random() < 0.5), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    try:
        assert_same_ids(tmp_path, ["".join(rng.choices("abc ", k=rng.randint(0, 30))) for _ in range(100)])
    except UserError as error:
        assert "is not a pair that the merges before it leave" in str(error)


@pytest.fixture
def saved(trained, tmp_path):
    """A folder that transformers saved, with a pad token and an added one, and a function that edits its JSON files."""
    tokenizer = transformers_tokenizer(trained)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(tmp_path)

    def edit(file, name, value):
        content = json.loads((tmp_path / file).read_text(encoding="utf-8"))
        *sections, key = name.split(".")
        holder = content
        for section in sections:
            holder = holder[section]
        holder[key] = value(holder[key]) if callable(value) else value
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")

    tmp_path.joinpath("config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path, edit


TEXT = [f"the cat <x> [PAD] sat{END_OF_TEXT}", " foo", ""]
J, C = "tokenizer.json", "tokenizer_config.json"


def last_token(**changes):
    """An edit of tokenizer.json's added tokens: the last of them, <x>, changed."""
    return lambda tokens: [*tokens[:-1], tokens[-1] | changes]


@pytest.mark.parametrize(
    "file, name, value",
    [
        (J, "model.merges", lambda merges: [" ".join(pair) for pair in merges]),
        (J, "pre_tokenizer.trim_offsets", False),
        (J, "post_processor", None),
        (J, "post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
        (J, "truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
        (J, "added_tokens", lambda tokens: tokens[:2]),
        (J, "added_tokens", last_token(special=True, rstrip=True, single_word=True)),
        (C, "tokenizer_class", "GPT2TokenizerFast"),
        (C, "tokenizer_class", "PreTrainedTokenizerFast"),
        (C, "eos_token", "[PAD]"),
        (C, "model_max_length", 8),
        ("config.json", "eos_token_id", 7),
    ],
)
def test_what_does_not_change_ids_is_passed_over(saved, file, name, value):
    folder, edit = saved
    edit(file, name, value)
    assert_same_ids(folder, TEXT)


@pytest.mark.parametrize(
    "file, name, value",
    [
        (J, "normalizer", {"type": "NFC"}),
        (J, "pre_tokenizer", None),
        (J, "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
        (J, "pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
        (J, "pre_tokenizer.use_regex", False),
        (J, "post_processor", {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
        (J, "post_processor.special_tokens", {END_OF_TEXT: {"ids": [0]}}),
        (J, "model.type", "WordPiece"),
        (J, "model.dropout", 0.1),
        (J, "model.continuing_subword_prefix", "##"),
        (J, "model.end_of_word_suffix", "</w>"),
        (J, "model.byte_fallback", True),
        (J, "model.ignore_merges", True),
        (C, "tokenizer_class", "BertTokenizer"),
        (C, "add_bos_token", True),
        (C, "add_eos_token", True),
        (C, "auto_map", {"AutoTokenizer": ["x.Y", None]}),
    ],
)
def test_what_changes_ids_and_is_not_implemented_is_refused_by_name(saved, file, name, value):
    folder, edit = saved
    edit(file, name, value)
    assert why_refused(folder).startswith(f"{file}: {name}") and why_refused(folder).endswith(" is not implemented")


ADDED = {0: END_OF_TEXT, SIZE: "[PAD]", SIZE + 1: "<x>"}
ADDED = {i: {"content": content, "normalized": i > SIZE, "special": i <= SIZE} for i, content in ADDED.items()}
DIFFER = "tokenizer.json and tokenizer_config.json differ in add_prefix_space or in their added tokens"


@pytest.mark.parametrize(
    "file, name, value, why",
    [
        (J, "added_tokens", last_token(lstrip=True), "tokenizer.json: lstrip of the added token '<x>' is not impl"),
        (J, "added_tokens", last_token(rstrip=True), "tokenizer.json: rstrip of the added token '<x>' is not impl"),
        (J, "added_tokens", last_token(single_word=True), "tokenizer.json: single_word of the added token '<x>' is no"),
        (J, "added_tokens", last_token(id=400), f"added token '<x>' has id 400, not {SIZE + 1}"),
        (J, "pre_tokenizer.add_prefix_space", True, DIFFER),
        (C, "add_prefix_space", True, DIFFER),
        (C, "added_tokens_decoder", ADDED | {SIZE + 1: {"content": "<y>"}}, DIFFER),
        (C, "added_tokens_decoder", ADDED | {SIZE + 1: {"content": "<x>", "normalized": False}}, DIFFER),
    ],
)
def test_added_tokens_that_transformers_would_read_otherwise_are_refused(saved, file, name, value, why):
    folder, edit = saved
    edit(C, "added_tokens_decoder", ADDED) if file == C else None
    assert_same_ids(folder, TEXT)
    edit(file, name, value)
    assert why in why_refused(folder)


def test_whatever_changes_ids_changes_the_fingerprint(saved, trained):
    folder, edit = saved
    fingerprints = {Tokenizer.from_pretrained(folder).fingerprint for folder in (trained, folder, folder)}
    assert len(fingerprints) == 2
    edit(J, "added_tokens", last_token(normalized=False))
    fingerprints.add(Tokenizer.from_pretrained(folder).fingerprint)
    edit(J, "pre_tokenizer.add_prefix_space", True)
    edit(C, "add_prefix_space", True)
    assert len(fingerprints | {Tokenizer.from_pretrained(folder).fingerprint}) == 4


def test_special_tokens_do_not_count_as_ids_of_a_text(saved):
    folder, edit = saved
    assert Tokenizer.from_pretrained(folder).n_vocab == SIZE + 2
    edit(J, "added_tokens", lambda tokens: tokens[:2])  # a pad token, for which the model has no row
    assert Tokenizer.from_pretrained(folder).n_vocab == SIZE


def test_added_tokens_in_the_small_files_of_older_transformers_are_read(trained, tmp_path):
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(trained / file, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": SIZE, "</s>": SIZE + 1}))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": {"content": "<x>"}}')
    assert assert_same_ids(tmp_path, TEXT).eot == SIZE + 1
    (tmp_path / "special_tokens_map.json").unlink()
    assert SIZE in assert_same_ids(tmp_path, TEXT).encode("<x>")


def test_special_tokens_in_vocab_json_are_never_made_of_text(trained, tmp_path):
    shutil.copy(trained / "merges.txt", tmp_path)
    vocab = json.loads((trained / "vocab.json").read_text(encoding="utf-8"))
    vocab = {"<s>": 0, "[PAD]": 1} | {token: i + 2 for token, i in vocab.items()} | {"[MASK]": 1000}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    ours = assert_same_ids(tmp_path, ["<s>[PAD]the [MASK]", *PIECES])
    assert ours.decode([0, vocab["the"], 1000]) == "<s>the[MASK]" and ours.n_vocab == SIZE + 2


# A vocabulary of four merges, and what can be wrong with one.

MERGES = ["h e", "l l", "he ll", "hell o"]
TOKENS = [*byte_characters().values(), "he", "ll", "hell", "hello", END_OF_TEXT]
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


def test_merges_may_have_windows_line_ends_and_no_version_line(tmp_path):
    write(tmp_path)
    (tmp_path / "merges.txt").write_bytes("\r\n".join(MERGES).encode())
    assert Tokenizer.from_pretrained(tmp_path).encode("hello") == [VOCAB["hello"]]


def of_bpe(why):
    return f"merges.txt: not a byte-level BPE: {why}"


@pytest.mark.parametrize("line", ["hello", "he l l", "h  e", "hel lo", "he €", "\x1b[2J h", "h e", "h ell", "l lo"])
def test_a_merge_of_other_than_two_tokens_that_bpe_leaves_is_an_error_that_names_it(line, tmp_path):
    write(tmp_path, [*MERGES[:2], line, *MERGES[2:]])
    assert why_refused(tmp_path) == of_bpe(f"merge 3: {line!r} is not a pair that the merges before it leave")


def test_merges_that_double_a_token_without_end_are_refused_before_they_take_minutes(tmp_path):
    write(tmp_path, ["h" * 2**i + " " + "h" * 2**i for i in range(18)])
    assert why_refused(tmp_path).startswith(of_bpe("merge 10: 'hhhh"))


SPELLED_BY_MERGES = [f"{END_OF_TEXT[:i]} {END_OF_TEXT[i]}" for i in range(1, len(END_OF_TEXT))]


@pytest.mark.parametrize(
    "merges, vocab, why",
    [
        (MERGES, {token: i for token, i in VOCAB.items() if token != "A"}, "'A' is missing"),
        (MERGES, {token: i for token, i in VOCAB.items() if token != "hell"}, "'hell' is missing"),
        (MERGES, {token: i for token, i in VOCAB.items() if token != END_OF_TEXT}, f"'{END_OF_TEXT}' is missing"),
        (SPELLED_BY_MERGES, VOCAB, f"merges make its end-of-text token '{END_OF_TEXT}'"),
        *((MERGES, VOCAB | {"hello": i}, "") for i in [-1, 5, "0", True, 0.0, None, [], {}]),
    ],
    ids=str,
)
def test_a_vocabulary_that_lacks_a_token_or_has_bad_ids_is_an_error(merges, vocab, why, tmp_path):
    write(tmp_path, merges, vocab)
    assert why_refused(tmp_path).startswith(of_bpe(why))


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", J, C])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"<!DOCTYPE html>", b"[" * 100_000], ids=["binary", "html", "deep"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(content, file, tmp_path):
    write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert why_refused(tmp_path).startswith(f"{file}: ")


# No tokenizer in the directory.


def test_a_directory_without_a_tokenizer_is_an_error_whatever_its_size_and_name(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    monkeypatch.chdir(tmp_path)
    assert why_refused("gpt2") == "gpt2: no tokenizer: there is no tokenizer.json, nor vocab.json and merges.txt"


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_one_file_of_two_is_an_error_that_names_the_other(file, tmp_path):
    write(tmp_path)
    (tmp_path / file).unlink()
    assert why_refused(tmp_path) == f"{file}: No such file or directory"


@pytest.fixture
def tiktokens(tmp_path, monkeypatch):
    """A function: how tiktoken gets an encoding -> the tokenizer of a gpt2 on disk that has none of its own."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    (tmp_path / "gpt2").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / file, tmp_path / "gpt2")

    def load(get_encoding, name="gpt2"):
        monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
        return Tokenizer.from_pretrained(name)

    return load


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_published_name_may_have_tiktokens_vocabulary(name, tiktokens):
    gpt2 = SimpleNamespace(name="gpt2", eot_token=50256, n_vocab=50257, decode_single_token_bytes=lambda rank: b"a")
    tokenizer = tiktokens({"gpt2": gpt2}.get, name)
    assert (tokenizer.encoding.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)


def test_without_the_network_the_error_says_what_is_missing(tiktokens):
    def get_encoding(name):
        raise ConnectionError("no network")

    assert refusal(tiktokens, get_encoding).endswith("and tiktoken could not fetch gpt2's: no network")
