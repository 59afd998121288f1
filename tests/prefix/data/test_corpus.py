"""The token cache is what the files say, is made anew where anything changed, and tells once what it left out."""

import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minigpt import Tokenizer, UserError
from minigpt.tokenizer import END_OF_TEXT, byte_characters
from prefix import distributed
from prefix.data import corpus as data
from prefix.data import rows as reading
from prefix.data.splits import split_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Each byte is a token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens = [*byte_characters().values(), END_OF_TEXT]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return Tokenizer.from_files(directory / "vocab.json", directory / "merges.txt")


@pytest.fixture
def load(tmp_path, tokenizer):
    """data.load with the byte tokenizer, and a cache of this test's own."""
    return lambda paths, columns=None, tokenizer=tokenizer, **options: data.load(
        paths, columns, tokenizer, home=tmp_path / "home", **options
    )


def texts_of(corpus):
    return [tuple(corpus.text(row, c) for c in range(len(corpus.columns))) for row in range(len(corpus))]


def skips(n, reason, line):
    return [f"{n} row{'s' * (n != 1)} skipped: {reason} (first at line {line})"]


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
    splits = {split: list(corpus.rows(split)) for split in ("train", "validation", "test")}
    assert sorted(sum(splits.values(), [])) == list(range(300)) and all(splits.values())
    assert all(split_of(corpus.text(row, 0)) == split for split, rows in splits.items() for row in rows)


def test_an_empty_split_has_no_rows_and_no_examples(write, load):
    corpus = load([write("a.csv", "en,fr\none,un\n")])
    empty = next(split for split in ("train", "test") if split != split_of("one"))
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


def test_a_limit_reads_no_further_than_it_needs(write, load, monkeypatch):
    numbers, lines = [], reading._lines
    monkeypatch.setattr(reading, "_lines", lambda path: (numbers.append(line[0]) or line for line in lines(path)))
    corpus = load([write("a.csv", "en,fr\n" + "one,un\n,\n" * 5000)], limit=1500)
    assert len(corpus) == 1500 and max(numbers) == 1 + 2 * 1500 - 1
    assert corpus.report[:1] == ["1,499 rows skipped: empty side (first at line 3)"]


def test_a_limit_counts_usable_rows(write, load):
    corpus = load([write("a.csv", "en,fr\n123456789,x\none,un\n,\ntwo,deux\nthree,trois\n")], limit=2, max_tokens=9)
    assert texts_of(corpus) == [("one", "un"), ("two", "deux")]


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
            *skips(1, "bad encoding", 12),
            *skips(1, "NUL byte", 13),
            *skips(2, "quotes do not match", 14),
            *skips(1, "field too long", 15),
            *skips(1, "too long (over 384 tokens)", 16),
            "1 row repeats an earlier one (first at line 17)",
        ]


@pytest.mark.parametrize("share", [data.SHARE, 7])
def test_rows_that_repeat_an_earlier_one_are_counted_and_kept(write, load, monkeypatch, share):
    monkeypatch.setattr(data, "SHARE", share)
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
    def peak_of(n):
        path = write(f"{n}.csv", "en,fr\n" + f"{'x' * 100},{'y' * 100}\n" * n)
        tracemalloc.start()
        for corpus in (load([path]), load([path])):  # made, and read again
            assert len(corpus) == n and sum(len(corpus.examples(split)) for split in data.SPLITS) == 2 * n
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_of(3000) < peak_of(10) + 500_000


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


def test_a_changed_file_is_encoded_anew(write, load):
    path = write("a.csv", "en,fr\none,un\n")
    load([path])
    later = path.stat().st_mtime_ns + 1_000_000_000
    path.write_text("en,fr\ntwo,le\n")
    os.utime(path, ns=(later, later))
    assert texts_of(load([path])) == [("two", "le")]


def damages():
    for name in (*data.FILES, "meta.json"):
        yield f"{name} is gone", lambda cache, name=name: (cache / name).unlink()
        yield f"{name} is cut", lambda cache, name=name: os.truncate(cache / name, 1)
        yield f"{name} is empty", lambda cache, name=name: os.truncate(cache / name, 0)
        yield f"{name} has another byte", lambda cache, name=name: overwrite(cache / name)
    for changes in ({"report": []}, {"report": ["2 rows skipped"]}, {"report": 2}, {"columns": 2}, {"columns": []}):
        yield f"meta.json has {changes}", lambda cache, changes=changes: edit(cache / "meta.json", changes)
    for content in ("null", "[]", "{}", "[" * 100_000):
        name = f"meta.json is {content:.20}"
        yield name, lambda cache, content=content: (cache / "meta.json").write_text(content)


def edit(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def overwrite(path):
    """Change a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [d for _, d in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_cache_is_made_anew(write, load, tmp_path, damage):
    path = write("a.csv", TABLE + "empty,\n")
    before = load([path])
    texts, examples = texts_of(before), before.examples("train").tolist()
    (cache,) = (tmp_path / "home" / "tokens").iterdir()
    damage(cache)
    after = load([path])
    assert (texts_of(after), after.examples("train").tolist()) == (texts, examples)
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


def test_a_second_builder_uses_the_cache_of_the_first(write, load, tmp_path, monkeypatch):
    path, build = write("a.csv", TABLE), data._build

    def build_twice(*arguments):
        result = build(*arguments)
        monkeypatch.setattr(data, "_build", build)
        load([path])  # another process, done before this one
        return result

    monkeypatch.setattr(data, "_build", build_twice)
    assert len(load([path])) == 300 and len(list((tmp_path / "home" / "tokens").iterdir())) == 1


@pytest.mark.parametrize("when", ["_tidy", "_build"])
def test_a_whole_cache_that_another_process_made_of_a_damaged_one_stays(write, load, tmp_path, monkeypatch, when):
    path, step = write("a.csv", TABLE), getattr(data, when)
    load([path])
    (cache,) = (tmp_path / "home" / "tokens").iterdir()
    overwrite(cache / "tokens.bin")

    def mend_first(*arguments):
        monkeypatch.setattr(data, when, step)
        load([path])  # another process, after this one found the damage
        (cache / "mended").touch()
        return step(*arguments)

    monkeypatch.setattr(data, when, mend_first)
    corpus = load([path])
    assert (cache / "mended").exists() and len(corpus) == 300
    assert list((tmp_path / "home" / "tokens").iterdir()) == [cache]


def test_what_there_is_to_report_is_no_part_of_the_fingerprint(write, load):
    clean, dirty = load([write("a.csv", TABLE)]), load([write("b.csv", TABLE + "empty,\n")])
    assert clean.report != dirty.report and clean.fingerprint() == dirty.fingerprint()


BUILDER = """
import sys
sys.path.insert(0, sys.argv[1])
from minigpt import Tokenizer
from prefix import distributed
from prefix.data import corpus as data

build = data._build

def build_and_wait(*arguments):
    result = build(*arguments)
    print("built", flush=True)
    sys.stdin.readline()
    return result

data._build = build_and_wait
corpus = data.load([sys.argv[2]], None, Tokenizer.from_pretrained("demo"), home=sys.argv[3])
print(len(corpus), corpus.fingerprint(), corpus.text(299, 1), flush=True)
"""


def test_two_processes_may_build_a_cache_at_once_even_where_one_was_damaged(write, tmp_path):
    path, home = write("a.csv", TABLE), tmp_path / "home"
    demo = Tokenizer.from_pretrained("demo")
    data.load([path], None, demo, home=home)
    overwrite(next((home / "tokens").iterdir()) / "tokens.bin")
    command = [sys.executable, "-c", BUILDER, str(ROOT), str(path), str(home)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["built\n"] * 2
    assert len(list((home / "tokens").glob(".building-*"))) == 2
    for process in both:  # now neither has published, and both are about to
        process.stdin.write("\n")
        process.stdin.flush()
    first, second = (process.communicate(timeout=60)[0] for process in both)
    assert first == second and first.startswith("300 ") and first.endswith(" phrase 299\n")
    assert len(list((home / "tokens").iterdir())) == 1
    assert data.load([path], None, demo, home=home).fingerprint() in first


def test_what_a_killed_build_left_behind_is_removed_when_it_is_a_day_old(write, load, tmp_path):
    folder = tmp_path / "home" / "tokens"
    old, fresh, at_work = (folder / f".building-{name}" for name in ("old", "fresh", "at-work"))
    for directory in (old, fresh, at_work):
        (directory / "built").mkdir(parents=True)
        (directory / "built" / "tokens.bin").write_bytes(b"1234")
    for path in (old / "built" / "tokens.bin", old / "built", old, at_work):  # one is old, but its file is written to
        age(path, days=1.1)
    load([write("a.csv", TABLE)])
    assert not old.exists() and fresh.exists() and at_work.exists()


def test_a_cache_that_nobody_opens_for_a_month_is_removed(write, load, tmp_path, encoded):
    folder = tmp_path / "home" / "tokens"
    unused, used = write("a.csv", TABLE), write("b.csv", TABLE)
    for path in (unused, used):
        load([path])
    for path in [*folder.iterdir(), *folder.glob("*/*")]:
        age(path, days=31)
    (folder / "another-folder").mkdir()
    age(folder / "another-folder", days=31)
    load([used])
    assert len(list(folder.iterdir())) == 3
    load([write("c.csv", TABLE)])
    assert len(list(folder.iterdir())) == 3 and (folder / "another-folder").exists()
    encoded.clear()
    load([used])
    assert encoded == []
    load([unused])
    assert len(encoded) == 600


def age(path, days):
    then = time.time() - days * 24 * 60 * 60
    os.utime(path, (then, then))


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
