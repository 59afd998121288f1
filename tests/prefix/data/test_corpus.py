"""The token cache holds what the files say, is made anew where anything changed, and tells what it left out."""

import os
import time
import tracemalloc

import numpy as np
import pytest
from test_tables import skips

from minigpt import Tokenizer, UserError
from minigpt.tokenizer import BYTE, END_OF_TEXT
from prefix.data import corpus as data
from prefix.data import tables
from prefix.data.splits import split_of

TOKENS = [*BYTE, END_OF_TEXT]


@pytest.fixture(scope="session")
def tokenizer():
    """Each byte is a token."""
    return Tokenizer({token: i for i, token in enumerate(TOKENS)}, merges=[])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the caches of this test lie."""
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tokens"


@pytest.fixture
def load(folder, tokenizer):
    """data.load with the byte tokenizer."""
    return lambda paths, columns=None, tokenizer=tokenizer, **options: data.load(paths, columns, tokenizer, **options)


@pytest.fixture
def encoded(tokenizer, monkeypatch):
    """The texts that the tokenizer was given."""
    texts, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: texts.append(text) or encode(text))
    return texts


def texts_of(corpus):
    return [tuple(corpus.text(row, c) for c in range(len(corpus.columns))) for row in range(len(corpus))]


# A corpus

TABLE = "en,fr\n" + "".join(f"sentence {i},phrase {i}\n" for i in range(300))


def test_a_corpus_holds_the_texts_and_their_tokens(write, load, tokenizer):
    corpus = load([write("a.csv", f"en,fr\nOù ça ?,\u00e9t\u00e9\n,x\n two ,{END_OF_TEXT}\n")])
    assert texts_of(corpus) == [("Où ça ?", "été"), ("two", END_OF_TEXT)] and corpus.columns == ("en", "fr")
    assert corpus.report == skips(1, "empty side", 3)
    for row, texts in enumerate(texts_of(corpus)):
        assert [corpus.ids(row, column).tolist() for column in (0, 1)] == list(map(tokenizer.encode, texts))
    assert corpus.ids(0, 0).dtype == np.int64 and tokenizer.eot not in corpus.ids(1, 1)
    large = Tokenizer({token: 70_000 + i for i, token in enumerate(TOKENS)}, merges=[])  # of ids beyond 16 bits
    (id_,) = load([write("b.csv", "en,fr\nA,b\n")], tokenizer=large).ids(0, 0).tolist()
    assert [id_] == large.encode("A") and id_ > 70_000


def test_examples_are_all_directions_in_the_order_of_the_file(write, load):
    corpus = load([write("a.csv", "en,fr,de\n" + "one,un,eins\ntwo,,zwei\n" * 50)], ["en", "fr", "de"])
    rows = list(corpus.rows("train"))
    sides = [[(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], [(0, 2), (2, 0)]]  # of the two rows, again and again
    assert corpus.examples("train").tolist() == [[row, s, t] for row in rows for s, t in sides[row % 2]]
    assert corpus.examples("train").dtype == np.int32 and len(rows) >= 50
    assert len(corpus.ids(1, 1)) == 0 and corpus.text(1, 1) == ""


def test_a_row_is_split_by_its_first_text_whatever_the_limit(write, load):
    path = write("a.csv", TABLE)
    whole, limited = load([path]), load([path], limit=100)
    for split in data.SPLITS:
        texts, fewer = ({corpus.text(row, 0) for row in corpus.rows(split)} for corpus in (whole, limited))
        assert texts == {text for text, _ in texts_of(whole) if split_of(text) == split} != set()
        assert fewer == texts & {f"sentence {i}" for i in range(100)}
    single = load([write("c.csv", "en,fr\none,un\n")])
    empty = next(split for split in data.SPLITS if split != split_of("one"))
    assert list(single.rows(empty)) == [] and single.examples(empty).shape == (0, 3)


# What is told


def test_a_pair_too_long_for_the_model_is_skipped(write, load):
    path = write("a.csv", "en,fr,de\n123,4567,\n123,45678,\n12345,,678\n1234567,8,\n")
    corpus = load([path], ["en", "fr", "de"], max_tokens=8)
    assert texts_of(corpus) == [("123", "4567", "")]
    assert corpus.report == ["Warning: 3 of 4 rows are not used", *skips(3, "too long (over 8 tokens)", 3)]


def test_a_file_without_usable_rows_is_an_error_that_lists_the_reasons(write, load, folder):
    with pytest.raises(UserError, match=r"2 rows skipped: empty side \(first at line 2\); 1 row skipped: NUL byte"):
        load([write("a.csv", "en,fr\n,x\ny,\n" + "\0,z\n")])
    with pytest.raises(UserError, match="a.csv: no row that can be used: there is none at all"):
        load([write("a.csv", "en,fr\n")])
    assert list(folder.iterdir()) == []


def test_a_file_in_latin_1_is_refused_and_damaged_rows_of_one_in_utf_8_are_counted(write, load, folder):
    def file(n, one_sided=0):
        french = [f"été {i}".encode("latin-1" if i < n else "utf-8") for i in range(100)]
        rows = [b"summer %d,%b" % both for both in enumerate(french)] + [b"alone,"] * one_sided
        return write("a.csv", b"en,fr\n" + b"\n".join(rows))

    told = r": 11 of [19]00 rows are not UTF-8 \(first at line 2\): .* iconv -f LATIN1 -t UTF-8"
    for one_sided in (0, 800):
        with pytest.raises(UserError, match=told):
            load([file(11, one_sided)])
    assert list(folder.iterdir()) == []
    corpus = load([file(10)])
    assert len(corpus) == 90 and corpus.report == skips(10, "not UTF-8", 2)


def test_a_limit_counts_usable_rows_and_reads_little_further_than_it_needs(write, load, monkeypatch):
    numbers, lines = [], tables.lines_of
    monkeypatch.setattr(tables, "lines_of", lambda path: (numbers.append(line[0]) or line for line in lines(path)))
    path = write("a.csv", "en,fr\n123456789,x\n" + "one,un\n,\n" * 5000)
    corpus = load([path], ["en", "fr"], limit=1500, max_tokens=9)
    assert texts_of(corpus) == [("one", "un")] * 1500 and max(numbers) <= 2 + 2 * 1500 + tables.MAX_LINES
    assert corpus.report == [*skips(1, "too long (over 9 tokens)", 2), *skips(1499, "empty side", 4)]


# The cache on disk


ROWS = {"csv": ("en,fr\n", "%0100d,x\n"), "tsv": ("en\tfr\n", "%0100d\tx\n"), "jsonl": ("", '{"en": "%0100d", "fr": "x"}\n')}


@pytest.mark.parametrize("name", ROWS)
def test_memory_does_not_grow_with_the_file(write, load, name):
    def peak(n):
        """The most memory that Python takes to make a cache of n rows and to open it again."""
        header, row = ROWS[name]
        path = write(f"{n}.{name}", header + "".join(row % i for i in range(n)))
        tracemalloc.start()
        assert len(load([path], ["en", "fr"])) == len(load([path], ["en", "fr"])) == n
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    assert peak(5000) < peak(300) + 700_000


def test_whatever_changes_the_result_makes_a_new_cache_and_nothing_else_does(write, load, encoded):
    path = write("a.csv", "en,fr,de\none,un,eins\ntwo,deux,zwei\n,,\n")
    swapped = Tokenizer({token: i for i, token in enumerate(TOKENS[::-1])}, merges=[])
    variants = [{}, {"columns": ["fr", "en"]}, {"columns": ["en", "de"]}, {"limit": 1}, {"max_tokens": 9}]
    variants.append({"tokenizer": swapped})
    made, again = ([load([path], **variant) for variant in variants] for _ in range(2))
    for first, second in zip(made, again):
        assert texts_of(first) == texts_of(second) and first.report == second.report
        assert first.examples("train").tolist() == second.examples("train").tolist()
    assert len(encoded) == 4 + 4 + 4 + 2 + 4
    assert made[-1].ids(0, 0).tolist() != made[0].ids(0, 0).tolist()
    write("a.csv", "en,fr,de\none,un,eins\nsix,deux,zwei\n,,\n")  # of the same length
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert load([path]).text(1, 0) == "six"
    paths = [write("a.en", "one\ntwo\n"), write("a.fr", "un\ndeux\n")]
    assert load(paths).text(1, 1) == "deux"
    write("a.fr", "un\ndoux\n")
    os.utime(paths[1], ns=(1, paths[1].stat().st_mtime_ns + 1))
    assert load(paths).text(1, 1) == "doux"


def test_what_killed_programs_left_of_a_cache_is_removed_after_a_week(write, load, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, days in ((".building-old", 8), (".building-new", 1)):
        (folder / name).mkdir()
        os.utime(folder / name, (then := time.time() - days * 86_400, then))
    load([write("a.csv", TABLE)])
    assert not (folder / ".building-old").exists() and (folder / ".building-new").exists()


@pytest.mark.parametrize("name", ["tokens.bin", "index.bin", "train.bin", "meta.json"])
def test_a_damaged_cache_is_made_anew(write, load, folder, encoded, name):
    path = write("a.csv", TABLE + "empty,\n")
    before = load([path])
    texts, examples = texts_of(before), before.examples("train").tolist()
    (cache,) = folder.iterdir()
    if name == "tokens.bin":
        (cache / name).unlink()
    else:
        os.truncate(cache / name, (cache / name).stat().st_size - 24)  # whole numbers of any of its types
    after = load([path])
    assert len(encoded) == 1200 and (texts_of(after), after.examples("train").tolist()) == (texts, examples)
    assert after.report == skips(1, "empty side", 302) and after.fingerprint() == before.fingerprint()
    assert list(folder.iterdir()) == [cache]


def test_a_home_that_cannot_be_written_is_told(write, load, folder):
    folder.parent.write_text("a file, not a folder")
    with pytest.raises(UserError, match="tokens: the token cache cannot be written: Not a directory; .*MINIGPT_HOME"):
        load([write("a.csv", TABLE)])


def test_the_fingerprint_is_of_the_rows_and_nothing_else(write, load):
    clean, dirty = load([write("a.csv", TABLE)]), load([write("b.csv", TABLE + "empty,\n")])
    assert clean.report != dirty.report and clean.fingerprint() == dirty.fingerprint()
    others = [load([write("c.csv", TABLE + "one,un\n")]), load([write("a.csv", TABLE)], ["fr", "en"])]
    assert len({corpus.fingerprint() for corpus in [clean, *others]}) == 3


def test_of_two_builders_the_first_wins_and_both_get_its_cache(write, load, folder, monkeypatch):
    path, build = write("a.csv", TABLE), data._build

    def slow(*arguments):
        monkeypatch.setattr(data, "_build", build)
        load([path])  # another process, done before this one
        (cache,) = folder.glob("[0-9a-f]*")
        (cache / "first").touch()
        return build(*arguments)

    monkeypatch.setattr(data, "_build", slow)
    assert len(load([path])) == 300
    (cache,) = folder.iterdir()
    assert (cache / "first").exists()
