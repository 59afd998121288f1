"""Every usable row of a file is read as it was written, every other is counted, and the cache is what the file says."""

import csv
import json
import os
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt import Tokenizer, UserError
from minigpt.splits import split_of
from minigpt.tokenizer import END_OF_TEXT, byte_characters
from prefix import data
from prefix.data import Skipped, read_rows, resolve_columns

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Each byte is a token."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens = [*byte_characters().values(), END_OF_TEXT]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return Tokenizer.from_files(directory / "vocab.json", directory / "merges.txt")


@pytest.fixture
def write(tmp_path):
    """write(name, str or bytes) -> the path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def load(tmp_path, tokenizer):
    """data.load with the byte tokenizer, and a cache of this test's own."""
    return lambda paths, columns=None, tokenizer=tokenizer, **options: data.load(
        paths, columns, tokenizer, home=tmp_path / "home", **options
    )


def read(*paths, columns=None):
    """(rows, what was skipped) of whole files."""
    skipped = Skipped()
    return list(read_rows(paths, columns, skipped)), skipped.report()


def texts_of(corpus):
    return [tuple(corpus.text(row, c) for c in range(len(corpus.columns))) for row in range(len(corpus))]


def skips(n, reason, line):
    return [f"{n} row{'s' * (n != 1)} skipped: {reason} (first at line {line})"]


PAIRS = [(2, ("one", "un")), (3, ("two", "deux"))]

# The formats


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "en,fr\none,un\ntwo,deux\n"),
        ("a.CSV", '"en","fr"\n"one","un"\n"two","deux"'),
        ("a.tsv", "en\tfr\none\tun\ntwo\tdeux\n"),
        ("a.jsonl", '\n{"en": "one", "fr": "un"}\n{"fr": "deux", "en": "two"}\n'),
        ("a.ndjson", '\n{"en": "one", "fr": "un", "n": 1}\n{"en": "two", "fr": "deux"}\n'),
    ],
)
def test_each_kind_of_table_gives_its_rows_and_their_lines(write, name, content):
    assert read(write(name, content)) == (PAIRS, [])


def test_text_files_are_columns_side_by_side(write):
    english, french = write("a.en", "zero\none\ntwo"), write("b.fr", "zéro\nun\ndeux\n")
    assert read(english, french, columns=["x", "y"]) == ([(1, ("zero", "zéro")), *PAIRS], [])
    assert resolve_columns([english, french]) == ("en", "fr")


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_columns_may_stand_anywhere_in_the_header(write, name, mark):
    path = write(name, "id fr x en\n1 un ? one\n2 deux ? two\n".replace(" ", mark))
    assert read(path, columns=["en", "fr"]) == (PAIRS, [])
    assert resolve_columns([path]) == ("id", "fr")


def test_columns_without_a_name_are_never_the_default(write):
    assert resolve_columns([write("a.csv", ",en, fr ,de\n0,one,un,eins\n")]) == ("en", "fr")


def test_the_keys_of_json_objects_are_gathered_until_all_columns_are_there(write):
    path = write("a.jsonl", '{"en": "one"}\n{"fr": "un", "en": "one"}\n{"de": "eins", "fr": "un"}\n')
    assert resolve_columns([path]) == ("en", "fr")
    assert resolve_columns([path], ["de", "en"]) == ("de", "en")


def test_a_json_number_is_a_text_and_null_is_none(write):
    objects = ['{"tweet": "good", "label": 1}', '{"tweet": "bad", "label": null}', '{"tweet": "?", "label": false}']
    expected = [(1, ("good", "1")), (3, ("?", "false"))]
    assert read(write("a.jsonl", "\n".join(objects))) == (expected, skips(1, "empty side", 2))


def test_quotes_hold_commas_quotes_and_newlines(write):
    path = write("a.csv", 'en,fr\n"a, ""b""","c\n\nd"\n5" disk,"e"\n')
    assert read(path) == ([(2, ('a, "b"', "c d")), (5, ('5" disk', "e"))], [])


def test_a_tsv_has_no_quotes(write):
    assert read(write("a.tsv", 'en\tfr\n"one\tun"\n')) == ([(2, ('"one', 'un"'))], [])


def test_a_newline_inside_quotes_is_a_space(write):
    assert read(write("a.csv", 'en,fr\n" one\r\n\r\ntwo ",x\n'))[0] == [(2, ("one two", "x"))]


@pytest.mark.parametrize("mark", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\r\u2028\v"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_every_other_line_break_is_a_space_and_ends_no_row(write, name, mark):
    row = {"csv": f'a{mark}b,"c"', "tsv": f"a{mark}b\tc", "jsonl": f'{{"en": "a{mark}b", "fr": "c"}}'}[name[2:]]
    header = {"csv": "en,fr", "tsv": "en\tfr", "jsonl": ""}[name[2:]]
    assert read(write(name, f"{header}\n{row}\n")) == ([(2, ("a b", "c"))], [])


def test_other_spaces_stay(write):
    assert read(write("a.csv", "en,fr\n« a\u00a0»  b,c\u202f!\n"))[0] == [(2, ("« a\u00a0»  b", "c\u202f!"))]


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_byte_order_mark_and_windows_line_ends_do_not_count(write, name, mark):
    path = write(name, f"\ufeffen{mark}fr\r\none{mark}un\r\ntwo{mark}deux\r\n")
    assert read(path, columns=["en", "fr"]) == (PAIRS, [])


def test_text_files_and_json_lines_may_have_them_too(write):
    assert read(write("a.en", "\ufeffone\r\n"), write("a.fr", "un\n")) == ([(1, ("one", "un"))], [])
    assert read(write("a.jsonl", '\ufeff{"en": "one", "fr": "un"}\r\n')) == ([(1, ("one", "un"))], [])


@pytest.mark.parametrize("name, mark", [("a.csv", ","), ("a.tsv", "\t")])
def test_blank_lines_do_not_count(write, name, mark):
    assert read(write(name, f"\nen{mark}fr\n\n  \none{mark}un\n\n")) == ([(5, ("one", "un"))], [])


# The rows that cannot be used

BAD_ROWS = {
    "wrong number of fields": [b"one,un,1", b"one", b'"one,un"'],
    "empty side": [b"one,", b",un", b" ,un", b",", b'"\n",un'],
    "bad encoding": [b"one,\xff", b"\xe9t\xe9,x", b"\xed\xa0\x80,x"],
    "NUL byte": [b"one,\0", b'"\0one",un'],
    "quotes do not match": [b'"one,un', b'"one"x,un', b'one,"un', b'"one" ,un'],
    "field too long": [b"one," + b"x" * 100_001, b'one,"%b"' % (b"x" * 200_000), b"y" * 3_000_000, b'"' * 3_000_001],
}
bad_rows = [(reason, row) for reason, rows in BAD_ROWS.items() for row in rows]


@pytest.mark.parametrize("reason, row", bad_rows, ids=lambda value: str(value)[:24])
def test_a_bad_row_of_a_csv_is_counted_and_the_others_are_read(write, reason, row):
    if reason == "quotes do not match":  # what stands behind it has quotes too, or would be inside them
        path = write("a.csv", b'en,fr\none,un\n%b\n"two","deux"\n%b\n"two","deux"\n' % (row, row))
        expected = [(2, ("one", "un")), (4, ("two", "deux")), (6, ("two", "deux"))]
    else:
        path = write("a.csv", b"en,fr\none,un\n%b\ntwo,deux\n%b\n" % (row, row))
        expected = [(2, ("one", "un")), (4 + row.count(b"\n"), ("two", "deux"))]
    assert read(path) == (expected, skips(2, reason, 3))


@pytest.mark.parametrize("reason", [reason for reason in BAD_ROWS if reason != "quotes do not match"])
def test_a_bad_row_of_a_tsv_is_counted_and_the_others_are_read(write, reason):
    for row in [row for row in BAD_ROWS[reason] if b'"' not in row]:
        path = write("a.tsv", b"en,fr\none,un\n%b\ntwo,deux\n".replace(b",", b"\t") % row.replace(b",", b"\t"))
        assert read(path) == ([(2, ("one", "un")), (4, ("two", "deux"))], skips(1, reason, 3))


@pytest.mark.parametrize(
    "row, reason",
    [
        (b'{"en": "one"', "not a JSON object"),
        (b'["one", "un"]', "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"en": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (b'{"en": "one"}', "empty side"),
        (b'{"en": "one", "fr": "\\u0000"}', "NUL byte"),
        (b'{"en": "one", "fr": "\0"}', "NUL byte"),
        (b'{"en": "one", "fr": "\\ud800"}', "bad encoding"),
        (b'{"en": "one", "fr": "\xff"}', "bad encoding"),
        (b'{"en": "one", "fr": "' + b"x" * 100_001 + b'"}', "field too long"),
        (b'{"en": "one", "fr": "' + b"x" * 3_000_000 + b'"}', "field too long"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_bad_line_of_json_is_counted_and_the_others_are_read(write, row, reason):
    good = b'{"en": "one", "fr": "un"}'
    assert read(write("a.jsonl", b"\n".join([good, row, good]))) == (
        [(1, ("one", "un")), (3, ("one", "un"))],
        skips(1, reason, 2),
    )


def test_a_bad_line_of_a_text_file_leaves_the_others_side_by_side(write):
    english = write("a.en", b"one\n\n\xff\n" + b"x" * 3_000_000 + b"\nfive\nsix\nseven\n")
    french = write("a.fr", b"un\ndeux\ntrois\nquatre\ncinq\n")
    rows, report = read(english, french)
    assert rows == [(1, ("one", "un")), (5, ("five", "cinq"))]
    assert report == [
        *skips(1, "empty side", 2),
        *skips(1, "bad encoding", 3),
        *skips(1, "field too long", 4),
        *skips(2, "line missing in another file", 6),
    ]


def test_a_quote_that_never_closes_costs_one_row(write):
    good = [f"good {i},bon {i}" for i in range(3000)]
    path = write("a.csv", "\n".join(["en,fr", '"never,closed', *good, '"nor,this']))
    rows, report = read(path)
    assert [",".join(texts) for _, texts in rows] == good and rows[0][0] == 3
    assert report == skips(2, "quotes do not match", 2)


def test_rows_whose_outer_quotes_were_stripped_are_counted_one_by_one(write):
    path = write("a.csv", "en,fr\n" + 'one","un\n' * 999 + "one,un\n")  # each opens a quote that the next one closes
    assert read(path) == ([(1001, ("one", "un"))], skips(999, "quotes do not match", 2))


def test_with_three_columns_a_row_may_lack_one(write):
    path = write("a.csv", "en,fr,de\none,un,eins\ntwo,,zwei\nthree,,\n,quatre,vier\n")
    rows, report = read(path, columns=["en", "fr", "de"])
    assert [texts for _, texts in rows] == [("one", "un", "eins"), ("two", "", "zwei"), ("", "quatre", "vier")]
    assert report == skips(1, "empty side", 4)


def test_counts_are_written_with_separators():
    skipped = Skipped()
    for line in range(17, 12017):
        skipped.add("empty side", line)
    skipped.add("NUL byte", 3)
    assert skipped.report() == [
        "12,000 rows skipped: empty side (first at line 17)",
        "1 row skipped: NUL byte (first at line 3)",
    ]


# Mistakes


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        ("a.csv", "en,fr\na,b\n", ["en", "de"], "a.csv: has no column 'de'; its columns are 'en', 'fr'"),
        ("a.tsv", "en\tfr\na\tb\n", ["xx", "fr"], "a.tsv: has no column 'xx'; its columns are 'en', 'fr'"),
        ("a.jsonl", '{"en": 1, "fr": 2}', ["en", "de"], "a.jsonl: has no column 'de'; its columns are 'en', 'fr'"),
        ("a.csv", "en,en,fr\na,b,c\n", ["en", "fr"], "a.csv: has the column 'en' twice"),
        ("a.csv", "en,fr\na,b\n", ["en", "en"], "different names"),
        ("a.csv", "en,fr\na,b\n", ["en"], "2 to 31 columns are needed, not 1: 'en'"),
        ("a.csv", "text\na\n", None, "2 to 31 columns are needed, not 1: 'text'"),
        ("a.csv", ",".join(map(str, range(40))), list(map(str, range(32))), "2 to 31 columns are needed, not 32"),
        ("a.csv", "", None, "the file is empty"),
        ("a.csv", '"en,fr\na,b\n', None, "line 1: expected a header.*quotes do not match"),
        ("a.csv", "en,fr\na,b\n".encode("utf-16"), ["en", "fr"], "line 1: expected a header.*in UTF-8"),
        ("a.csv", "x" * 2_000_000, None, "line 1: expected a header.*field too long"),
        ("a.jsonl", "nothing\n", None, "2 to 31 columns are needed, not 0: none"),
        ("a.jsonl", r'{"\ud800": 1, "b": 2}', None, "different names in UTF-8"),
        ("a.txt", "a\n", None, "expected one .csv, .tsv, .jsonl, .ndjson file, or two or more text files"),
        ("a", "a\n", None, "expected one .csv"),
    ],
)
def test_a_mistake_about_columns_is_told_in_one_line(write, name, content, columns, message):
    path = write(name, content)
    for mistaken in (lambda: resolve_columns([path], columns), lambda: read(path, columns=columns)):
        with pytest.raises(UserError, match=message) as error:
            mistaken()
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_text_files_need_a_name_each(write):
    paths = [write("a.txt", "a"), write("b.txt", "b")]
    with pytest.raises(UserError, match="different names"):
        resolve_columns(paths)
    with pytest.raises(UserError, match="2 text files, but 3 columns"):
        resolve_columns(paths, ["en", "fr", "de"])
    assert resolve_columns(paths, ["en", "fr"]) == ("en", "fr")


def test_files_that_are_not_there_or_do_not_go_together_are_told(write, tmp_path):
    table = write("a.csv", "en,fr\na,b\n")
    for paths, message in [
        ([tmp_path / "no.csv"], "no.csv: no such file"),
        ([tmp_path], "not a regular file"),
        ([table, table], "expected one .csv"),
        ([table, write("b.fr", "b")], "expected one .csv"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve_columns(paths)


def test_a_file_that_may_not_be_read_is_told(write, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "open", refuse, raising=False)  # root, who runs tests in containers, may read any file
    with pytest.raises(UserError, match="a.csv: cannot be read: Permission denied"):
        resolve_columns([write("a.csv", "en,fr\na,b\n")])


# What holds for any file

LINE_BREAKS = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + LINE_BREAKS))
sides = words.map(str.strip).filter(bool)


@quick
@given(pairs=st.lists(st.tuples(sides, sides), max_size=8))
def test_any_pairs_that_csv_writes_are_read_back(pairs, tmp_path):
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("en", "fr"), *pairs])
    rows, report = read(tmp_path / "a.csv")
    assert [texts for _, texts in rows] == pairs and report == []


PIECES = [b'"', b'""', b",", b"\t", b"\n", b"\r", b"a", b"\xff", b"\0", b"{", b'{"a":"b","c":"d"}', b"\n\n", b" "]
heads = st.sampled_from([b"", b"en,fr\n", b"en\tfr\n", b'{"a": "b", "c": 1}\n'])
tails = st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join)


@quick
@given(head=heads, tail=tails)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_bytes_of_any_kind_are_read_or_told(name, head, tail, tmp_path):
    (tmp_path / name).write_bytes(head + tail)
    try:
        rows, _ = read(tmp_path / name)
    except UserError:
        return
    assert all(len(texts) == 2 and all(texts) for _, texts in rows)


def test_a_file_that_is_cut_while_it_is_read_has_fewer_rows(write):
    path = write("a.csv", "en,fr\n" + "one,un\n" * 100_000)
    rows = read_rows([path], None, Skipped())
    next(rows)
    os.truncate(path, 1000)
    assert 0 < len(list(rows)) < 99_999


# The cache

TABLE = "en,fr\n" + "".join(f"sentence {i},phrase {i}\n" for i in range(300))


def test_a_corpus_holds_the_texts_and_their_tokens(write, load, tokenizer):
    corpus = load([write("a.csv", "en,fr\nOù ça ?,\u00e9t\u00e9\n,x\n two ,deux\n")])
    assert texts_of(corpus) == [("Où ça ?", "été"), ("two", "deux")] and corpus.columns == ("en", "fr")
    assert corpus.skipped == skips(1, "empty side", 3)
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
    splits = {split: corpus.rows(split).tolist() for split in ("train", "validation", "test")}
    assert sorted(sum(splits.values(), [])) == list(range(300)) and all(splits.values())
    assert all(split_of(corpus.text(row, 0)) == split for split, rows in splits.items() for row in rows)


def test_an_empty_split_has_no_rows_and_no_examples(write, load):
    corpus = load([write("a.csv", "en,fr\none,un\n")])
    empty = next(split for split in ("train", "test") if split != split_of("one"))
    assert corpus.rows(empty).shape == (0,) and corpus.examples(empty).shape == (0, 3)


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
    assert corpus.skipped == skips(3, "too long (over 8 tokens)", 3)


def test_a_file_without_usable_rows_is_an_error_that_lists_the_reasons(write, load, tmp_path):
    with pytest.raises(UserError, match=r"2 rows skipped: empty side \(first at line 2\); 1 row skipped: NUL byte"):
        load([write("a.csv", "en,fr\n,x\ny,\n\0,z\n")])
    with pytest.raises(UserError, match="a.csv: no row that can be used: there is none at all"):
        load([write("a.csv", "en,fr\n")])
    assert list((tmp_path / "home" / "tokens").iterdir()) == []


def test_a_limit_reads_no_further_than_it_needs(write, load, monkeypatch):
    numbers, lines = [], data._lines
    monkeypatch.setattr(data, "_lines", lambda path: (numbers.append(line[0]) or line for line in lines(path)))
    corpus = load([write("a.csv", "en,fr\n" + "one,un\n,\n" * 5000)], limit=1500)
    assert len(corpus) == 1500 and max(numbers) == 1 + 2 * 1500 - 1
    assert corpus.skipped == ["1,499 rows skipped: empty side (first at line 3)"]


def test_a_limit_counts_usable_rows(write, load):
    corpus = load([write("a.csv", "en,fr\n123456789,x\none,un\n,\ntwo,deux\nthree,trois\n")], limit=2, max_tokens=9)
    assert texts_of(corpus) == [("one", "un"), ("two", "deux")]


@pytest.fixture
def encoded(tokenizer, monkeypatch):
    """The texts that the tokenizer was given, in order."""
    texts, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: texts.append(text) or encode(text))
    return texts


def test_a_file_is_encoded_once(write, load, encoded):
    path = write("a.csv", TABLE + ",\n")
    first, again = load([path]), load([path])
    assert len(encoded) == 600 and texts_of(first) == texts_of(again) and first.skipped == again.skipped != []
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
    for content in ("null", "[]", "{}", '{"sizes": 1}', '{"columns": ["en", "fr"], "sizes": {}}'):
        yield f"meta.json is {content}", lambda cache, content=content: (cache / "meta.json").write_text(content)


@pytest.mark.parametrize("damage", [d for _, d in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_cache_is_made_anew(write, load, tmp_path, damage):
    path = write("a.csv", TABLE)
    before = texts_of(load([path]))
    (cache,) = (tmp_path / "home" / "tokens").iterdir()
    damage(cache)
    assert texts_of(load([path])) == before
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
        build(*arguments)
        monkeypatch.setattr(data, "_build", build)
        load([path])  # another process, done before this one

    monkeypatch.setattr(data, "_build", build_twice)
    assert len(load([path])) == 300 and len(list((tmp_path / "home" / "tokens").iterdir())) == 1


def test_a_home_that_cannot_be_written_is_replaced_for_now(write, tmp_path, tokenizer, capsys):
    home = write("home", "a file, not a folder")
    corpus = data.load([write("a.csv", TABLE)], None, tokenizer, home=home)
    assert len(corpus) == 300
    assert f"{home / 'tokens'} cannot be written" in capsys.readouterr().err


def test_the_cache_lies_in_the_checkpoints_home(write, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path / "there"))
    data.load([write("a.csv", TABLE)], None, tokenizer)
    assert len(list((tmp_path / "there" / "tokens").iterdir())) == 1
