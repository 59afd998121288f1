"""The tokenizer gives the ids that transformers gives, and its errors name the file and the line."""

import json
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import GPTConfig, Tokenizer, UserError
from minigpt.tokenizer import END_OF_TEXT, byte_characters

PIECES = [
    *["the", "The", " river", "n't", "I'll", "WE'VE", "don’t", " they're", "o'clock", "naïve", END_OF_TEXT],
    *["le", " château", "L'œuvre", " n'est-ce pas", "aujourd’hui", " où", "ÇA", " «", "» ", "élève", "e\u0301"],
    *["0", "7", "42", " 12345", "3,14", "½", "٣", " ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u00a0", "\u202f"],
    *[".", "...", " ?!", "…", "(", "_", "--", "🙂", " 👩‍👩‍👧", "🇫🇷", "日本語", " Ελλάδα", "नमस्ते", "\0", "\ufeff"],
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@pytest.fixture(scope="module")
def ours(vocabulary):
    return Tokenizer.from_pretrained(vocabulary)


@pytest.fixture(scope="module")
def theirs(vocabulary):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(vocabulary)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_ids_of_any_text_equal_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)


@settings(deadline=None)
@given(data=st.data())
def test_the_text_of_any_ids_equals_transformers(ours, theirs, data):
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab - 1)))
    assert ours.decode(ids) == theirs.decode(ids)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_decoding_what_was_encoded_gives_the_text_back(ours, text):
    assert ours.decode(ours.encode(text)) == text


@settings(deadline=None)
@given(before=TEXTS, after=TEXTS)
def test_end_of_text_in_a_text_is_ordinary_characters(ours, before, after):
    text = before + END_OF_TEXT + after
    assert ours.eot not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("piece", ["a", " ", " \n", "👩‍", "e\u0301", "\x1b[2J\u202e"])
def test_a_word_or_a_gap_without_end_is_encoded_as_by_transformers(piece, ours, theirs):
    text = (piece * 5_000)[:4_999] + "x"
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    text = (piece * 100_000)[:99_999] + "x"
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_more_white_space_than_the_pattern_can_match_is_an_error_and_no_panic(space, ours):
    with pytest.raises(UserError, match="more than 100,000 spaces in a row"):
        ours.encode(f"a{space * 1_000_000}b")
    assert ours.encode(f"a{space} b" * 200_000)


def test_a_lone_surrogate_is_a_replacement_character(ours):
    assert ours.decode(ours.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"


def test_ids_of_no_token_are_nothing_as_in_transformers(ours, theirs):
    ids = [*ours.encode("one"), ours.n_vocab + 3, *ours.encode(" two")]
    assert ours.decode(ids) == theirs.decode(ids) == "one two"


def test_the_end_of_text_token_is_the_one_that_transformers_has(ours, theirs):
    assert ours.eot == theirs.eos_token_id
    assert ours.n_vocab == len(theirs)
    assert ours.decode([ours.eot]) == END_OF_TEXT


def test_every_byte_is_spelled_by_a_character_of_its_own_that_can_be_printed():
    characters = byte_characters()
    assert sorted(characters) == list(range(256))
    assert len(set(characters.values())) == 256
    assert all(char.isprintable() and not char.isspace() for char in characters.values())
    assert (characters[ord(" ")], characters[ord("\n")], characters[ord("a")]) == ("Ġ", "Ċ", "a")


# A vocabulary of four merges, and what can be wrong with one.

MERGES = ["h e", "l l", "he ll", "hell o"]


def write(directory, merges=MERGES, vocab=None):
    """Both files in `directory`; vocab: by default what the merges make, with shuffled ids."""
    if vocab is None:
        tokens = [*byte_characters().values(), *(merge.replace(" ", "") for merge in MERGES), END_OF_TEXT]
        vocab = {token: (7 * i + 3) % len(tokens) for i, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return vocab


def refusal(directory):
    """The one line that says why the tokenizer does not load."""
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_are_those_of_vocab_json_in_whatever_order_it_has_them(tmp_path):
    vocab = write(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("hello hell") == [vocab["hello"], vocab["Ġ"], vocab["hell"]]
    assert tokenizer.decode([vocab["hello"], vocab["Ġ"], vocab["he"]]) == "hello he"
    assert tokenizer.eot == vocab[END_OF_TEXT]


def test_merges_may_have_windows_line_ends_and_no_version_line(tmp_path):
    vocab = write(tmp_path)
    (tmp_path / "merges.txt").write_bytes("\r\n".join(MERGES).encode())
    assert Tokenizer.from_pretrained(tmp_path).encode("hello") == [vocab["hello"]]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("hello", "expected two tokens, found 'hello'"),
        ("he l l", "expected two tokens, found 'he l l'"),
        ("h  e", "expected two tokens, found 'h  e'"),
        ("l x", "'lx' is not in the vocabulary"),
        ("hel lo", "'hel' is neither a byte nor made by a line above"),
        ("he €", "'€' is neither a byte nor made by a line above"),
        ("h e", "'he' is made by a line above, too"),
        ("\x1b[2J h", r"'\x1b[2J' is neither a byte nor made by a line above"),
    ],
)
def test_a_bad_merge_is_an_error_that_names_file_and_line(line, reason, tmp_path):
    write(tmp_path, [*MERGES[:2], line, *MERGES[2:]])
    assert refusal(tmp_path) == f"{tmp_path}/merges.txt: line 4: {reason}"


def test_an_entry_that_no_merge_makes_is_an_error_that_names_it(tmp_path):
    write(tmp_path, MERGES[:-1])
    assert refusal(tmp_path) == (
        f"{tmp_path}/vocab.json: does not agree with merges.txt: 0 entries missing [], 1 that no merge makes ['hello']"
    )


@pytest.mark.parametrize("token", ["A", "Ġ", END_OF_TEXT])
def test_a_byte_or_an_end_of_text_that_the_vocabulary_lacks_is_an_error_that_names_it(token, tmp_path):
    tokens = [other for other in write(tmp_path) if other != token]
    write(tmp_path, vocab={other: i for i, other in enumerate(tokens)})
    assert f"vocab.json: does not agree with merges.txt: 1 entries missing ['{token}']" in refusal(tmp_path)


def test_end_of_text_made_by_merges_is_an_error_since_text_would_encode_to_it(tmp_path):
    pairs = [(END_OF_TEXT[:i], END_OF_TEXT[i]) for i in range(1, len(END_OF_TEXT))]
    tokens = [*byte_characters().values(), *(left + right for left, right in pairs)]
    write(tmp_path, [f"{left} {right}" for left, right in pairs], {token: i for i, token in enumerate(tokens)})
    reason = f"makes {END_OF_TEXT}, which no text may encode to"
    assert refusal(tmp_path) == f"{tmp_path}/merges.txt: line {len(pairs) + 1}: {reason}"


@pytest.mark.parametrize("i", [261, -1, 5, 10**30])
def test_ids_with_a_hole_or_one_twice_are_an_error(i, tmp_path):
    vocab = write(tmp_path)
    write(tmp_path, vocab=vocab | {"hello": i})
    assert refusal(tmp_path) == f"{tmp_path}/vocab.json: the ids are not 0 .. 260, each once"


@pytest.mark.parametrize("content", ['{"a": "0"}', '{"a": true}', '{"a": 0.0}', '{"a": null}'])
def test_a_vocabulary_that_does_not_map_tokens_to_whole_numbers_is_an_error(content, tmp_path):
    write(tmp_path)
    (tmp_path / "vocab.json").write_text(content)
    assert refusal(tmp_path) == f"{tmp_path}/vocab.json: expected a JSON object of token: id"


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"<!DOCTYPE html>", b"[" * 100_000], ids=["binary", "html", "deep"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(content, file, tmp_path):
    write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / file}: ")


def test_without_the_files_a_vocabulary_of_50257_is_gpt2s(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: SimpleNamespace(name=name, eot_token=50256))
    (tmp_path / "config.json").write_text(json.dumps(GPTConfig().to_dict()))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.encoding.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)


def test_without_the_files_and_the_network_the_error_says_what_is_missing(tmp_path, monkeypatch):
    def get_encoding(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    (tmp_path / "config.json").write_text(json.dumps(GPTConfig().to_dict()))
    assert refusal(tmp_path) == f"{tmp_path}: vocab.json or merges.txt is missing, and tiktoken could not fetch gpt2's"


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_without_one_of_the_files_another_vocabulary_is_an_error(file, tmp_path):
    write(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / "config.json").write_text(json.dumps(GPTConfig(vocab_size=261).to_dict()))
    assert refusal(tmp_path) == (
        f"{tmp_path}: vocab.json or merges.txt is missing, and a vocabulary of 261 is not gpt2's"
    )
