"""Any file is read as it was written, or told in one line; a record that cannot be read costs no other."""

import csv
import gzip
import io
import json
import zipfile

import pytest
from conftest import refusal

from prefix.data.rows import Skipped, Table, read_rows

PAIRS = [("one cat", "un chat"), ("two dogs", "deux chiens"), ("red", "rouge"), ("she said go", "elle dit va")]
COLUMNS = ["en", "fr"]


def read(*paths, columns=None):
    """(rows, what was skipped) of whole files."""
    skipped = Skipped()
    return list(read_rows(paths, columns, skipped)), skipped.report()


def skips(n, reason, line):
    return [f"{n:,} row{'s' * (n != 1)} skipped: {reason} (first at line {line})"]


def table_of(mark="\t", rows=(COLUMNS, *PAIRS), **options):
    text = io.StringIO()
    csv.writer(text, delimiter=mark, lineterminator="\n", **options).writerows(rows)
    return text.getvalue()


def objects_of(make=lambda en, fr: {"en": en, "fr": fr}):
    return "".join(json.dumps(make(*pair)) + "\n" for pair in PAIRS)


# The formats


@pytest.mark.parametrize("name, content", [
    *(("a.csv", table_of(mark)) for mark in ",;\t|"),
    ("a.CSV", table_of(",", quoting=csv.QUOTE_ALL).rstrip("\n")),
    ("a.csv", "en, fr\n" + "".join(f'"{en}", "{fr}"\n' for en, fr in PAIRS)),
    ("a.tsv", table_of(quoting=csv.QUOTE_ALL)),
    *((name, table_of()) for name in ("a.tsv", "fra.txt")),
    ("a.tsv", table_of(",")),
    ("a.csv", "\ufeff\n \n" + table_of(",").replace("\n", "\r\n\r\n")),
    ("a.tsv", "\ufeff" + table_of().replace("\n", "\r\n")),
    *((name, objects_of()) for name in ("a.jsonl", "a.json", "a.csv")),
    ("a.ndjson", "\ufeff" + objects_of().replace("\n", "\r\n\r\n")),
    ("a.jsonl", objects_of(lambda en, fr: {"translation": {"en": en, "fr": fr}})),
    ("a.jsonl", objects_of(lambda en, fr: {"id": en, "translation": {"en": en, "fr": fr}})),
])  # fmt: skip
def test_each_kind_of_table_gives_its_rows(write, name, content):
    path = write(name, content)
    rows, report = read(path)
    assert [texts for _, texts in rows] == PAIRS and report == [] and [*Table([path]).places()] == COLUMNS


MARKED = [("Hello, you", "Bonjour; toi"), ("Yes, no, why", "Oui"), ("No", "Non, non")]


@pytest.mark.parametrize("name, content, rows", [
    ("a.csv", 'en,fr\n"a, ""b""","c\n\nd"\n5" disk,"e"\n', [(2, ('a, "b"', "c d")), (5, ('5" disk', "e"))]),
    ("a.csv", 'en,fr\n" one\r\n\r\ntwo ",« a\u00a0»  b\n', [(2, ("one two", "« a\u00a0»  b"))]),
    ("a.tsv", 'en\tfr\n"Go," he said.\t"Va !"\n"e\tf"\n', [(2, ('"Go," he said.', '"Va !"')), (3, ('"e', 'f"'))]),
    ("a.tsv", 'en\tfr\n"a ""b"" c"\t"""d"""\n"a" ""b""\t""c""\n', [(2, ('a "b" c', '"d"')), (3, ('"a" ""b""', '""c""'))]),
    ("a.tsv", '"en"\t"fr"\n"a ""b"" c"\t"d\ne"\n', [(2, ('a "b" c', "d e"))]),
    *((name, table_of(mark, [COLUMNS, *MARKED]), [*enumerate(MARKED, 2)]) for name, mark in zip(("a.csv", "a.tsv"), ";\t")),
])  # fmt: skip
def test_quotes_delimiters_and_spaces_inside_a_text_are_what_was_meant(write, name, content, rows):
    assert read(write(name, content), columns=COLUMNS) == (rows, [])


@pytest.mark.parametrize("mark", ["\r", "\x85", "\u2028\v"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_every_other_line_break_is_a_space_and_ends_no_row(write, name, mark):
    row = {"csv": f'en,fr\na{mark}b,"c"', "tsv": f"en\tfr\na{mark}b\tc", "jsonl": f'\n{{"en": "a{mark}b", "fr": "c"}}'}
    assert read(write(name, row[name[2:]])) == ([(2, ("a b", "c"))], [])


def test_text_files_are_columns_side_by_side(write):
    english = write("a.en", b"\xef\xbb\xbfzero\r\none\n\n\xff\n" + b"x" * 300_000 + b"\nfive")
    french = write("b.fr", "zéro\nun\ndeux\ntrois\nquatre\ncinq\n")
    rows, report = read(english, french)
    assert rows == [(1, ("zero", "zéro")), (2, ("one", "un")), (6, ("five", "cinq"))]
    assert report == [*skips(1, "empty side", 3), *skips(1, "not UTF-8", 4), *skips(1, "field too long", 5)]
    files = Table([english, french])
    assert files.places() == {"en": 0, "fr": 1} and files.places(["de", "it"]) == {"de": 0, "it": 1}
    assert files.places(["fr", "en"]) == {"fr": 1, "en": 0}  # by their ends, in any order


def test_text_files_of_different_lengths_are_an_error_with_the_counts_even_behind_a_limit(write):
    paths = write("a.en", "one\ntwo\nthree\n"), write("b.fr", "un\ntrois\n")
    told = f"{paths[0]} has 3 lines, {paths[1]} has 2 lines: line by line"
    assert refusal(lambda: next(read_rows(paths, None, Skipped()))).startswith(told)


# Files of other kinds

TABLE = table_of(",").encode()
with zipfile.ZipFile(ZIP := io.BytesIO(), "w") as file:
    file.writestr("en-fr.csv", TABLE)


@pytest.mark.parametrize("content, message", [
    (ZIP.getvalue(), "a zip archive or an Excel workbook"),
    (gzip.compress(TABLE, mtime=0), "a gzip archive: unpack it"),
    (b"PAR1\x15\x04" + bytes(50), "a Parquet file: save it"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html>", "a web page or XML"),
    (b'<?xml version="1.0"?>\n<tmx>', "a web page or XML"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a git LFS pointer"),
    (TABLE.decode().encode("utf-16"), "UTF-16 text: make it UTF-8 with `iconv"),
    (TABLE.decode().encode("utf-32"), "UTF-32 text: make it UTF-8 with `iconv"),
    (b"SQLite format 3\0", "no text: there are NUL bytes"),
    (b'[\n {"en": "a", "fr": "b"}]', "a JSON array: write one object a line"),
])  # fmt: skip
def test_a_file_of_another_kind_is_told_by_any_name(write, content, message):
    for name in ("a.csv", "a.gz"):
        for paths in ([write(name, content)], [write("b.en", "Hello.\n"), write(name, content)]):
            assert f"{name}: expected UTF-8 text; this is {message}" in refusal(read, *paths)


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"BZh91AY&SY\xdc\xe1", "no table: expected names of columns, in UTF-8: not UTF-8; it begins 'BZh91AY&SY"),
    ("a.csv", b"%PDF-1.7\n%\xe2\xe3", "the column '%PDF-1.7' holds only numbers, ids or addresses"),
    ("a.csv", TABLE.replace(b"\n", b"\r"), "line 1 seems to hold texts, not the names of columns: 'en', 'fr one cat'"),
    *(("a.csv", text, "names of columns, in UTF-8: the file is empty") for text in ("", "\n\n")),
    ("a.csv", '"en,fr\na,b\n', "quotes do not match"),
    ("a.csv", "x" * 200_000, "field too long"),
    ("a.json", '{\n "en": "a"\n}\n', "expected JSON lines"),
    ("a.txt", "Hello, you.\n", "expected one table, named .csv, .tsv, .jsonl, .ndjson, .json, or two or more text"),
])  # fmt: skip
def test_a_file_that_is_no_table_is_told_in_one_line(write, name, content, message):
    told = refusal(read, write(name, content))
    assert message in told and "begins ''" not in told


# The records that cannot be read

BAD_ROWS = {
    "wrong number of fields": [b"one,un,1", b"one", b'"one,un"'],
    "empty side": [b"one,", b" ,un", b'"\n",un'],
    "not UTF-8": [b"one,\xff", b"\xed\xa0\x80,x"],
    "NUL byte": [b"one,\0"],
    "quotes do not match": [b'"one,un', b'"one"x,un', b'one,"un'],
    "field too long": [b"one," + b"x" * 100_001, b'one,"%b"' % (b"x" * 200_000), b"y" * 300_000],
}
BAD_LINES = {  # of JSON
    "not a JSON object": [b'{"en": "one"', b'["one", "un"]', b"[" * 100_000, b'{"en": ' + b"9" * 5000 + b"}"],
    "empty side": [b'{"en": "one"}', b'{"en": "one", "fr": null}'],
    "a list or object, not a text": [b'{"en": "one", "fr": ["un"]}'],
    "NUL byte": [b'{"en": "one", "fr": "\\u0000"}'],
    "not UTF-8": [b'{"en": "one", "fr": "\\ud800"}', b'{"en": "one", "fr": "\xff"}'],
    "field too long": [b'{"en": "one", "fr": "' + b"x" * 100_001 + b'"}'],
}
each_of = lambda table: [(reason, row) for reason, rows in table.items() for row in rows]


@pytest.mark.parametrize("reason, row", each_of(BAD_ROWS), ids=lambda value: str(value)[:24])
def test_a_bad_row_is_counted_and_the_others_are_read(write, reason, row):
    good = b'"two","deux"'  # has quotes, or what a bad row leaves open would be taken for more of it
    path = write("a.csv", b"\n".join([b"en,fr", b"one,un", row, good, row, good]))
    lines = [2, 4 + row.count(b"\n"), 6 + 2 * row.count(b"\n")]
    expected = list(zip(lines, [("one", "un"), ("two", "deux"), ("two", "deux")]))
    assert read(path, columns=COLUMNS) == (expected, skips(2, reason, 3))
    if b'"' not in row:
        path = write("a.tsv", b"en,fr\none,un\n%b\ntwo,deux\n".replace(b",", b"\t") % row.replace(b",", b"\t"))
        assert read(path) == ([(2, ("one", "un")), (4, ("two", "deux"))], skips(1, reason, 3))


@pytest.mark.parametrize("reason, row", each_of(BAD_LINES), ids=lambda x: str(x)[:30])
def test_a_bad_line_of_json_is_counted_and_the_others_are_read(write, reason, row):
    path = write("a.jsonl", b"\n".join([b'{"en": "one", "fr": "un"}', row, b'{"en": 2, "fr": false}']))
    assert read(path) == ([(1, ("one", "un")), (3, ("2", "false"))], skips(1, reason, 2))


def test_a_quote_that_never_closes_costs_one_row(write):
    good = [f"good {i},bon {i}" for i in range(300)]
    rows, report = read(write("a.csv", "\n".join(["en,fr", '"never,closed', *good, '"nor,this'])))
    assert [",".join(texts) for _, texts in rows] == good and rows[0][0] == 3
    assert report == skips(2, "quotes do not match", 2)
