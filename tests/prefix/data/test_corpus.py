"""The token cache holds what the files say, is made anew where anything changed, and tells what it left out."""

import json
import os
import random
import time

import numpy as np
import pytest
from test_tables import peak_of, skips

from minigpt import Tokenizer, UserError
from minigpt.tokenizer import END_OF_TEXT, byte_characters
from prefix import distributed
from prefix.data import corpus as data
from prefix.data import tables
from prefix.data.splits import split_of


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Each byte is a token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens = [*byte_characters().values(), END_OF_TEXT]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return Tokenizer.from_pretrained(directory)


@pytest.fixture
def load(tmp_path, tokenizer):
    """data.load with the byte tokenizer, and a cache of this test's own."""
    return lambda paths, columns=None, tokenizer=tokenizer, **options: data.load(
        paths, columns, tokenizer, home=tmp_path / "home", **options
    )


def texts_of(corpus):
    return [tuple(corpus.text(row, c) for c in range(len(corpus.columns))) for row in range(len(corpus))]


# A corpus

TABLE = "en,fr\n" + "".join(f"sentence {i},phrase {i}\n" for i in range(300))


def test_a_corpus_holds_the_texts_and_their_tokens(write, load, tokenizer):
    corpus = load([write("a.csv", "en,fr\nOù ça ?,\u00e9t\u00e9\n,x\n two ,deux\n")])
    assert texts_of(corpus) == [("Où ça ?", "été"), ("two", "deux")] and corpus.columns == ("en", "fr")
    assert corpus.report == skips(1, "empty side", 3)
    for row, texts in enumerate(texts_of(corpus)):
        for column, text in enumerate(texts):
            assert corpus.ids(row, column).tolist() == tokenizer.encode(text)
    assert corpus.ids(0, 0).dtype == np.int64


def test_special_tokens_in_a_text_are_text(write, load, tokenizer):
    corpus = load([write("a.csv", f"en,fr\n{END_OF_TEXT},x\n")])
    assert tokenizer.eot not in corpus.ids(0, 0) and len(corpus.ids(0, 0)) == len(END_OF_TEXT)


def test_a_large_vocabulary_is_kept_whole(write, load, tokenizer):
    large = Tokenizer(tokenizer.encoding, [70_000 + i for i in tokenizer.ids])
    large.n_vocab = 70_257
    corpus = load([write("a.csv", "en,fr\nA,b\n")], tokenizer=large)
    assert corpus.ids(0, 0).tolist() == large.encode("A") == [70_000 + tokenizer.encode("A")[0]]


def test_examples_are_all_directions_in_the_order_of_the_file(write, load):
    corpus = load([write("a.csv", "en,fr,de\n" + "one,un,eins\ntwo,,zwei\n,trois,drei\n" * 50)], ["en", "fr", "de"])
    expected = [
        (row, s, t)
        for row, texts in enumerate(texts_of(corpus))
        for s in range(3)
        for t in range(3)
        if s != t and texts[s] and texts[t] and row in corpus.rows("train")
    ]
    examples = corpus.examples("train")
    assert examples.tolist() == [list(example) for example in expected] and examples.dtype == np.int32
    assert len(corpus.ids(1, 1)) == 0 and corpus.text(1, 1) == ""


def test_rows_of_all_splits_are_all_rows_each_by_its_first_text(write, load):
    corpus = load([write("a.csv", TABLE)])
    splits = {split: list(corpus.rows(split)) for split in data.SPLITS}
    assert sorted(sum(splits.values(), [])) == list(range(300)) and all(splits.values())
    assert all(split_of(corpus.text(row, 0)) == split for split, rows in splits.items() for row in rows)
    corpus = load([write("b.csv", "en,fr\none,un\n")])
    empty = next(split for split in data.SPLITS if split != split_of("one"))
    assert list(corpus.rows(empty)) == [] and corpus.examples(empty).shape == (0, 3)


def test_the_split_depends_on_neither_order_nor_limit_nor_file(write, load):
    rows = TABLE.splitlines()[1:]
    shuffled = random.Random(0).sample(rows, len(rows))
    corpora = [
        load([write("a.csv", TABLE)]),
        load([write("a.csv", TABLE)], limit=100),
        load([write("b.tsv", "\n".join(["en\tfr", *shuffled]).replace(",", "\t"))]),
    ]
    tests = [{corpus.text(row, 0) for row in corpus.rows("test")} for corpus in corpora]
    assert tests[0] == tests[2] and tests[1] == tests[0] & {f"sentence {i}" for i in range(100)} and tests[1]


def test_a_sentence_with_several_translations_is_in_one_split(write, load):
    corpus = load([write("a.csv", "en,fr\n" + "".join(f"sentence {i % 100},phrase {i}\n" for i in range(300)))])
    sentences = [{corpus.text(row, 0) for row in corpus.rows(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, sentences)) == len(set.union(*sentences)) == 100


def test_a_pair_too_long_for_the_model_is_skipped(write, load):
    path = write("a.csv", "en,fr,de\n123,4567,\n123,45678,\n12345,,678\n1234567,8,\n")
    corpus = load([path], ["en", "fr", "de"], max_tokens=8)
    assert texts_of(corpus) == [("123", "4567", "")]
    assert corpus.report == skips(3, "too long (over 8 tokens)", 3)


def test_a_file_without_usable_rows_is_an_error_that_lists_the_reasons(write, load, tmp_path):
    with pytest.raises(UserError, match=r"2 rows skipped: empty side \(first at line 2\); 1 row skipped: NUL byte"):
        load([write("a.csv", "en,fr\n,x\ny,\n\0,z\n")])
    with pytest.raises(UserError, match="a.csv: no row that can be used: there is none at all"):
        load([write("a.csv", "en,fr\n")])
    assert list((tmp_path / "home" / "tokens").iterdir()) == []


def test_a_limit_counts_usable_rows_and_reads_no_further_than_it_needs(write, load, monkeypatch):
    numbers, lines = [], tables._lines
    monkeypatch.setattr(tables, "_lines", lambda path: (numbers.append(line[0]) or line for line in lines(path)))
    path = write("a.csv", "en,fr\n123456789,x\n" + "one,un\n,\n" * 5000)
    corpus = load([path], ["en", "fr"], limit=1500, max_tokens=9)
    assert texts_of(corpus) == [("one", "un")] * 1500 and max(numbers) == 2 + 2 * 1500 - 1
    assert corpus.report[:2] == [*skips(1, "too long (over 9 tokens)", 2), *skips(1499, "empty side", 4)]


@pytest.fixture
def encoded(tokenizer, monkeypatch):
    """The texts that the tokenizer was given, in order."""
    texts, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: texts.append(text) or encode(text))
    return texts


# What is told


def test_every_fault_of_a_file_is_told_once_with_its_first_line_and_the_rest_is_used(write, load):
    lines = [
        b"\xef\xbb\xbffr,id,en\r",  # 1, after a byte-order mark
        b"un,1,one\r",
        b'"deux\n\ntrois, \xc3\xa9t\xc3\xa9",2,"two\r\n\r\nthree, ""four"""\r',  # 3 to 7
        b"short,row",  # 8
        b"a,row,too,long",
        b",3,empty",  # 10
        b"empty,4, ",
        b"\xff,5,not UTF-8",  # 12
        b"nul,6,\0",  # 13
        b'"un" deux,7,"one"',  # 14
        b"x" * 1_100_000 + b",8,x",
        b"cinquante" * 50 + b",9,fifty",  # 16
        b"un,10,one",  # 17, as in line 2
        b'"never closed,11,x',
        b"last,12,line",
    ]
    path = write("a.csv", b"\n".join(lines))
    for _ in range(2):  # made, and read again
        corpus = load([path], ["en", "fr"])
        assert texts_of(corpus) == [
            ("one", "un"),
            ('two three, "four"', "deux trois, été"),
            ("one", "un"),
            ("line", "last"),
        ]
        assert corpus.report == [
            *skips(2, "wrong number of fields", 8),
            *skips(2, "empty side", 10),
            *skips(1, "not UTF-8", 12),
            *skips(1, "NUL byte", 13),
            *skips(2, "quotes do not match", 14),
            *skips(1, "field too long", 15),
            *skips(1, "too long (over 384 tokens)", 16),
            "1 row repeats an earlier one (first at line 17)",
        ]


def test_rows_that_repeat_an_earlier_one_are_counted_and_kept(write, load):
    pairs = [f"sentence {i},phrase {i}\n" for i in range(100)]
    corpus = load([write("a.csv", "en,fr\n" + "".join(pairs[:60] + pairs[50:60] + ["sentence 1,x\n"] + pairs[20:]))])
    assert len(corpus) == 60 + 10 + 1 + 80
    assert corpus.report == ["50 rows repeat an earlier one (first at line 62)"]


def append(path):
    with open(path, "a") as file:
        file.write("late,tard\n" * 5000)


@pytest.fixture
def while_read(tokenizer, monkeypatch):
    """A function: set what happens once, when the first text of a file is encoded."""

    def set_change(change):
        due, encode = [change], tokenizer.encode

        def encode_after(text):
            while due:
                due.pop()()
            return encode(text)

        monkeypatch.setattr(tokenizer, "encode", encode_after)

    return set_change


@pytest.mark.parametrize("change", [append, lambda path: os.truncate(path, 50_000), lambda path: path.unlink()])
def test_a_file_that_changes_while_it_is_read_is_told_and_what_was_read_is_used(write, load, while_read, change):
    path = write("a.csv", "en,fr\n" + "".join(f"one {i},un {i}\n" for i in range(5000)))
    while_read(lambda: change(path))
    corpus = load([path])
    assert texts_of(corpus)[:2] == [("one 0", "un 0"), ("one 1", "un 1")]
    told = f"{path} changed while it was read, up to line {1 + len(corpus)}: rows may be missing"
    assert [line for line in corpus.report if "changed" in line] == [told]


def test_a_file_that_changed_while_it_was_read_is_read_anew_the_next_time(write, load, while_read):
    path = write("a.csv", "en,fr\none,un\n")
    while_read(lambda: write("a.csv", "en,fr\ntwo,deux\nthree,trois\n"))
    assert len(load([path])) < 3
    corpus = load([path])
    assert texts_of(corpus) == [("two", "deux"), ("three", "trois")] and corpus.report == []


# The cache on disk


def test_memory_does_not_grow_with_the_file(write, load):
    def made_and_read_again(n):
        path = write(f"{n}.csv", "en,fr\n" + "".join(f"{i:0100},{i}\n" for i in range(n)))
        for corpus in (load([path], ["en", "fr"]), load([path], ["en", "fr"])):
            assert len(corpus) == n and sum(len(corpus.examples(split)) for split in data.SPLITS) == 2 * n

    assert peak_of(lambda: made_and_read_again(3000)) < peak_of(lambda: made_and_read_again(10)) + 700_000


def test_a_file_is_encoded_once(write, load, encoded):
    path = write("a.csv", TABLE + ",\n")
    first, again = load([path]), load([path])
    assert len(encoded) == 600 and texts_of(first) == texts_of(again) and first.report == again.report != []
    assert (first.examples("train") == again.examples("train")).all()


def test_whatever_changes_the_result_makes_a_new_cache(write, load, encoded, tokenizer):
    path = write("a.csv", "en,fr,de\none,un,eins\ntwo,deux,zwei\n")
    swapped = Tokenizer(tokenizer.encoding, tokenizer.ids[::-1])
    variants = [{}, {"columns": ["fr", "en"]}, {"columns": ["en", "de"]}, {"limit": 1}, {"max_tokens": 9}]
    variants.append({"tokenizer": swapped})
    for _ in range(2):
        for variant in variants:
            load([path], **variant)
    assert len(encoded) == 4 + 4 + 4 + 2 + 4
    assert load([path], tokenizer=swapped).ids(0, 0).tolist() != load([path]).ids(0, 0).tolist()


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" ]"),
}


@pytest.mark.parametrize("name", [*data.FILES, "meta.json"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_anew(write, load, tmp_path, encoded, name, damage):
    path = write("a.csv", TABLE + "empty,\n")
    before = load([path])
    texts, examples = texts_of(before), before.examples("train").tolist()
    (cache,) = (tmp_path / "home" / "tokens").iterdir()
    damage(cache / name)
    after = load([path])
    assert len(encoded) == 1200 and (texts_of(after), after.examples("train").tolist()) == (texts, examples)
    assert after.report == skips(1, "empty side", 302) and after.fingerprint() == before.fingerprint()
    assert list((tmp_path / "home" / "tokens").iterdir()) == [cache]


def test_a_build_that_fails_leaves_nothing(write, load, tmp_path, tokenizer, monkeypatch):
    def stop(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        load([write("a.csv", TABLE)])
    assert list((tmp_path / "home" / "tokens").iterdir()) == []


def test_a_full_disk_is_told(write, load, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "_build", full)
    with pytest.raises(UserError, match="tokens: the token cache cannot be written: No space left .*MINIGPT_HOME"):
        load([write("a.csv", TABLE)])


def test_the_fingerprint_is_of_the_rows_and_nothing_else(write, load):
    clean, dirty = load([write("a.csv", TABLE)]), load([write("b.csv", TABLE + "empty,\n")])
    assert clean.report != dirty.report and clean.fingerprint() == dirty.fingerprint()
    others = [load([write("c.csv", TABLE + "one,un\n")]), load([write("a.csv", TABLE)], ["fr", "en"])]
    assert len({corpus.fingerprint() for corpus in [clean, *others]}) == 3


def test_of_two_builders_the_first_wins_and_both_get_its_cache(write, load, tmp_path, monkeypatch):
    path, build = write("a.csv", TABLE), data._build

    def build_twice(*arguments):
        result = build(*arguments)
        monkeypatch.setattr(data, "_build", build)
        assert len(load([path])) == 300  # another process, done before this one
        (cache,) = (tmp_path / "home" / "tokens").glob("[0-9a-f]*")
        (cache / "first").touch()
        return result

    monkeypatch.setattr(data, "_build", build_twice)
    assert len(load([path])) == 300
    (cache,) = (tmp_path / "home" / "tokens").iterdir()
    assert (cache / "first").exists()


def age(path, days):
    then = time.time() - days * 24 * 60 * 60
    os.utime(path, (then, then))


def test_what_a_killed_build_left_goes_after_a_day_and_a_cache_that_nobody_opens_after_a_month(write, load, tmp_path):
    folder, (unused, used) = tmp_path / "home" / "tokens", (write("a.csv", TABLE), write("b.csv", TABLE))
    for path in (unused, used):
        load([path])
    for name in (".building-old", ".building-fresh", ".building-at-work", "of-another-program"):
        (folder / name / "built").mkdir(parents=True)
        (folder / name / "built" / "tokens.bin").write_bytes(b"1234")
    for path in [*folder.iterdir(), *folder.glob("*/*"), *folder.glob("*/*/*")]:
        at_work = path.match("*at-work/built/tokens.bin")  # one is old, but its file is written to
        age(path, days=0 if "fresh" in str(path) or at_work else 31)
    load([used])
    caches = set(folder.glob("[0-9a-f]*"))
    load([write("c.csv", TABLE)])
    names = {path.name for path in folder.iterdir()}
    assert names >= {".building-fresh", ".building-at-work", "of-another-program"} and ".building-old" not in names
    assert len(caches) == 2 and len(caches & set(folder.iterdir())) == 1 and len(names) == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_home_that_cannot_be_written_is_replaced_for_now_and_one_process_says_so(
    write, tmp_path, tokenizer, capsys, monkeypatch, rank
):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    home = write("home", "a file, not a folder")
    corpus = data.load([write("a.csv", TABLE)], None, tokenizer, home=home)
    assert len(corpus) == 300
    assert (f"{home / 'tokens'} cannot be written" in capsys.readouterr().err) == (rank == 0)


def test_the_cache_lies_in_the_checkpoints_home(write, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "there"))
    data.load([write("a.csv", TABLE)], None, tokenizer)
    assert len(list((tmp_path / "there" / "tokens").iterdir())) == 1
