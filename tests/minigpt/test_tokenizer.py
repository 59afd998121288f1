"""The tokenizer gives the ids that transformers gives, or does not load and says why."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import tiktoken
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
FEW = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # to shrink would take minutes
)


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


# Published vocabularies.


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_ids_of_any_text_equal_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == text


@settings(deadline=None)
@given(data=st.data())
def test_the_text_of_any_ids_equals_transformers(ours, theirs, data):
    ids = data.draw(st.lists(st.integers(0, ours.n_vocab - 1)))
    assert ours.decode(ids) == theirs.decode(ids)


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


SIZE = 302
CONTENTS = [
    "foo",
    "foobar",
    "bar",
    "<x>",
    "[PAD]",
    " z",
    "a b",
    "é",
    "Ġq",
    "\n",
    "ab",
    "the",
    "Ⅷ",
    "\u0301",
    "日本",
    ".",
]
CONTENT = st.sampled_from(CONTENTS) | st.text("ab é<>_\n\x1c½", min_size=1, max_size=4)
FLAGS = st.fixed_dictionaries(
    dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], st.booleans())
)
AROUND = ["a", " ", "foo", "b", "é", "\n", "  ", "_", "½", "x1", "Ⓐ", "\u0301", "\x1c", END_OF_TEXT, "the cat"]


def added_token(content, flags):
    from tokenizers import AddedToken

    if content.strip() != content:  # tokenizers panics where a token of blanks is stripped
        flags = flags | {"lstrip": False, "rstrip": False}
    return AddedToken(content, **flags)


@FEW
@given(tokens=st.lists(st.builds(added_token, CONTENT, FLAGS), max_size=5), pad=st.none() | CONTENT,
       prefix_space=st.booleans(), data=st.data())  # fmt: skip
def test_ids_with_any_added_tokens_equal_transformers(trained, tmp_path, tokens, pad, prefix_space, data):
    shutil.rmtree(tmp_path)
    tokenizer = transformers_tokenizer(trained, add_prefix_space=prefix_space)
    tokenizer.add_tokens(tokens)
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(tmp_path)
    pieces = st.sampled_from([*AROUND, *map(str, tokens)]) | st.text(max_size=3)
    ours = assert_same_ids(tmp_path, data.draw(st.lists(st.lists(pieces, max_size=12).map("".join), max_size=5)))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1)))
    assert ours.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"normalized": False},
        {"single_word": True},
        {"lstrip": True},
        {"rstrip": True},
        {"lstrip": True, "rstrip": True},
        {"special": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("content", ["foo", "fo", "oba", "bar"])
def test_each_flag_of_an_added_token_means_what_it_means_in_transformers(trained, tmp_path, content, flags):
    tokenizer = transformers_tokenizer(trained)
    others = [added_token(other, {"rstrip": True}) for other in ("foo", "foob") if other != content]
    tokenizer.add_tokens([*others, added_token("oo", {"normalized": False}), added_token(content, flags)])
    tokenizer.save_pretrained(tmp_path)
    words = [
        "foobar",
        "foo   bar",
        "xfoo fox fo",
        "foo bar.",
        " bar\u0301 bar½ bar_ barⒶ bar",
        "a\x1cbar\x1c a",
        "foo<x>",
    ]
    assert_same_ids(tmp_path, words)


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
        assert "makes a token that other merges make" in str(error)


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


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("tokenizer.json", "model.merges", lambda merges: [" ".join(pair) for pair in merges]),
        ("tokenizer.json", "pre_tokenizer.trim_offsets", False),
        ("tokenizer.json", "post_processor", None),
        ("tokenizer.json", "post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
        ("tokenizer.json", "truncation", dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)),
        ("tokenizer.json", "added_tokens", lambda tokens: tokens[:2]),
        ("tokenizer_config.json", "tokenizer_class", "GPT2TokenizerFast"),
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
        ("tokenizer_config.json", "eos_token", "[PAD]"),
        ("tokenizer_config.json", "model_max_length", 8),
        ("config.json", "eos_token_id", 7),
    ],
)  # fmt: skip
def test_what_does_not_change_ids_is_passed_over(saved, file, name, value):
    folder, edit = saved
    edit(file, name, value)
    assert_same_ids(folder, TEXT)


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("tokenizer.json", "normalizer", {"type": "NFC"}),
        ("tokenizer.json", "pre_tokenizer", None),
        ("tokenizer.json", "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
        ("tokenizer.json", "pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
        ("tokenizer.json", "pre_tokenizer.use_regex", False),
        ("tokenizer.json", "post_processor", {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
        ("tokenizer.json", "post_processor.special_tokens", {END_OF_TEXT: {"ids": [0]}}),
        ("tokenizer.json", "model.type", "WordPiece"),
        ("tokenizer.json", "model.dropout", 0.1),
        ("tokenizer.json", "model.continuing_subword_prefix", "##"),
        ("tokenizer.json", "model.end_of_word_suffix", "</w>"),
        ("tokenizer.json", "model.byte_fallback", True),
        ("tokenizer.json", "model.ignore_merges", True),
        ("tokenizer_config.json", "tokenizer_class", "BertTokenizer"),
        ("tokenizer_config.json", "add_bos_token", True),
        ("tokenizer_config.json", "add_eos_token", True),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["x.Y", None]}),
    ],
)
def test_what_changes_ids_and_is_not_implemented_is_refused_by_name(saved, file, name, value):
    folder, edit = saved
    edit(file, name, value)
    reason = refusal(folder)
    assert reason.startswith(f"{folder / file}: {name}") and reason.endswith(" is not implemented")


@pytest.mark.parametrize("file, name", [("tokenizer.json", "pre_tokenizer.add_prefix_space"),
                                        ("tokenizer_config.json", "add_prefix_space")])  # fmt: skip
def test_files_that_differ_in_add_prefix_space_are_refused(saved, file, name):
    folder, edit = saved
    edit(file, name, True)
    assert "add_prefix_space is" in refusal(folder)


def test_files_that_differ_in_their_added_tokens_are_refused(saved):
    folder, edit = saved
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {0: END_OF_TEXT, SIZE: "[PAD]", SIZE + 1: "<x>"}
    tokens = {i: {"content": content} | flags for i, content in added.items()}
    tokens[SIZE + 1] |= {"normalized": True, "special": False}
    edit("tokenizer_config.json", "added_tokens_decoder", tokens)
    assert_same_ids(folder, TEXT)
    tokens[SIZE + 1]["rstrip"] = True
    edit("tokenizer_config.json", "added_tokens_decoder", tokens)
    assert refusal(folder).endswith("the added tokens are not those of tokenizer_config.json")


def test_whatever_changes_ids_changes_the_fingerprint(saved, trained):
    folder, edit = saved
    fingerprints = {Tokenizer.from_pretrained(folder).fingerprint for folder in (trained, folder, folder)}
    assert len(fingerprints) == 2
    edit("tokenizer.json", "added_tokens", lambda tokens: [*tokens[:2], tokens[2] | {"rstrip": True}])
    fingerprints.add(Tokenizer.from_pretrained(folder).fingerprint)
    edit("tokenizer.json", "pre_tokenizer.add_prefix_space", True)
    edit("tokenizer_config.json", "add_prefix_space", True)
    assert len(fingerprints | {Tokenizer.from_pretrained(folder).fingerprint}) == 4


def test_special_tokens_do_not_count_as_ids_of_a_text(saved):
    folder, edit = saved
    assert Tokenizer.from_pretrained(folder).n_vocab == SIZE + 2
    edit("tokenizer.json", "added_tokens", lambda tokens: tokens[:2])  # a pad token, for which the model has no row
    assert Tokenizer.from_pretrained(folder).n_vocab == SIZE


def test_an_added_token_with_an_id_that_transformers_would_not_give_it_is_refused(saved):
    folder, edit = saved
    edit("tokenizer.json", "added_tokens", lambda tokens: [*tokens[:2], tokens[2] | {"id": 400}])
    assert transformers_tokenizer(folder).encode("<x>") == [SIZE + 1]
    assert refusal(folder).endswith(f"added token '<x>' has id 400, not {SIZE + 1}")


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


def write(directory, merges=MERGES, vocab=None):
    """Both files in `directory`; vocab: by default what MERGES make, with shuffled ids."""
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


@pytest.mark.parametrize("line", ["hello", "he l l", "h  e", "hel lo", "he €", "\x1b[2J h"])
def test_a_merge_that_is_not_two_tokens_made_before_is_an_error_that_names_it(line, tmp_path):
    write(tmp_path, [*MERGES[:2], line, *MERGES[2:]])
    quoted = repr(line)
    assert refusal(tmp_path) == (
        f"{tmp_path}/merges.txt: not a byte-level BPE: merge 3: {quoted} is not two tokens that are there before it"
    )


@pytest.mark.parametrize("line", ["h e", "h ell"])
def test_a_token_made_in_two_ways_is_an_error_that_names_the_merge(line, tmp_path):
    write(tmp_path, ["h e", "l l", "e ll", "he ll", line])
    assert refusal(tmp_path).endswith("makes a token that other merges make")


@pytest.mark.parametrize("token", ["A", "Ġ", "hello"])
def test_a_byte_or_a_merge_that_the_vocabulary_lacks_is_an_error_that_names_it(token, tmp_path):
    tokens = [other for other in write(tmp_path) if other != token]
    write(tmp_path, vocab={other: i for i, other in enumerate(tokens)})
    assert refusal(tmp_path).endswith(f"its vocabulary lacks 1 bytes or merged tokens, the first {token!r}")


def test_a_vocabulary_without_an_end_of_text_is_an_error(tmp_path):
    tokens = [token for token in write(tmp_path) if token != END_OF_TEXT]
    write(tmp_path, vocab={token: i for i, token in enumerate(tokens)})
    assert refusal(tmp_path).endswith(f"its end-of-text token {END_OF_TEXT!r} is not in it")


def test_end_of_text_made_by_merges_is_an_error_since_text_would_encode_to_it(tmp_path):
    pairs = [(END_OF_TEXT[:i], END_OF_TEXT[i]) for i in range(1, len(END_OF_TEXT))]
    tokens = [*byte_characters().values(), *(left + right for left, right in pairs)]
    write(tmp_path, [f"{left} {right}" for left, right in pairs], {token: i for i, token in enumerate(tokens)})
    assert refusal(tmp_path).endswith(f"its end-of-text token {END_OF_TEXT!r} is made by merges")


@pytest.mark.parametrize("i", [-1, 5, "0", True, 0.0, None, [], {}])
def test_ids_that_are_no_whole_numbers_or_stand_twice_are_an_error(i, tmp_path):
    vocab = write(tmp_path)
    write(tmp_path, vocab=vocab | {"hello": i})
    assert refusal(tmp_path).startswith(f"{tmp_path}/merges.txt: not a byte-level BPE: ")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"<!DOCTYPE html>", b"[" * 100_000], ids=["binary", "html", "deep"])
def test_a_file_that_is_something_else_is_an_error_that_names_it(content, file, tmp_path):
    write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / file}: ")


# No tokenizer in the directory.


def test_a_directory_without_a_tokenizer_is_an_error_whatever_its_size(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    told = f"{tmp_path}: no tokenizer: there is no tokenizer.json, nor vocab.json and merges.txt"
    assert refusal(tmp_path) == told
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gpt2: no tokenizer: "):  # a directory, whatever its name
        Tokenizer.from_pretrained("gpt2")


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_one_file_of_two_is_an_error_that_names_the_other(file, tmp_path):
    write(tmp_path)
    (tmp_path / file).unlink()
    assert refusal(tmp_path) == f"{tmp_path / file}: No such file or directory"


@pytest.fixture
def gpt2_without_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    (tmp_path / "gpt2").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / file, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_published_name_may_have_tiktokens_vocabulary(name, gpt2_without_tokenizer, monkeypatch):
    gpt2 = SimpleNamespace(name="gpt2", eot_token=50256, n_vocab=50257, decode_single_token_bytes=lambda rank: b"a")
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": gpt2}.get)
    tokenizer = Tokenizer.from_pretrained(name)
    assert (tokenizer.encoding.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)


def test_without_the_network_the_error_says_what_is_missing(gpt2_without_tokenizer, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match="gpt2: no tokenizer there, and tiktoken could not fetch gpt2's: no network"):
        Tokenizer.from_pretrained("gpt2")
