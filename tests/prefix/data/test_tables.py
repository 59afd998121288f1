"""Any file is read as it was written, or told in one line; a record that cannot be read costs no other."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zipfile

import pytest

from minigpt import UserError
from prefix.data.rows import Skipped, read_rows, resolve_columns

PAIRS = [("one cat", "un chat"), ("two dogs", "deux chiens"), ("red", "rouge"), ("she said go", "elle dit va")]


def read(*paths, columns=None):
    """(rows, what was skipped) of whole files."""
    skipped = Skipped()
    return list(read_rows(paths, columns, skipped)), skipped.report()


def skips(n, reason, line):
    return [f"{n:,} row{'s' * (n != 1)} skipped: {reason} (first at line {line})"]


def peak_of(work):
    """The most memory, in bytes, that Python takes for work()."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def table_of(mark="\t", rows=(("en", "fr"), *PAIRS), **options):
    text = io.StringIO()
    csv.writer(text, delimiter=mark, lineterminator="\n", **options).writerows(rows)
    return text.getvalue()


def objects_of(make=lambda en, fr: {"en": en, "fr": fr}):
    return "".join(json.dumps(make(*pair)) + "\n" for pair in PAIRS)


# The formats


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", table_of(",")),
        ("a.CSV", table_of(",", quoting=csv.QUOTE_ALL).rstrip("\n")),
        ("a.csv", table_of(";")),
        ("a.csv", table_of("\t")),
        ("a.csv", table_of("|")),
        ("a.csv", "en, fr\n" + "".join(f'"{en}", "{fr}"\n' for en, fr in PAIRS)),
        ("a.tsv", table_of()),
        ("a.tsv", table_of(quoting=csv.QUOTE_ALL)),
        ("a.tsv", table_of(",")),
        ("fra.txt", table_of()),
        ("a.csv", "\ufeff" + table_of(",").replace("\n", "\r\n")),
        ("a.tsv", "\ufeff" + table_of().replace("\n", "\r\n")),
        ("a.csv", "\n \n" + table_of(",").replace("\n", "\n\n")),
        ("a.jsonl", objects_of()),
        ("a.ndjson", "\ufeff" + objects_of().replace("\n", "\r\n\r\n")),
        ("a.json", objects_of()),
        ("a.csv", objects_of()),
        ("a.jsonl", objects_of(lambda en, fr: {"translation": {"en": en, "fr": fr}})),
        ("a.jsonl", objects_of(lambda en, fr: {"id": en, "translation": {"en": en, "fr": fr}})),
    ],
)
def test_each_kind_of_table_gives_its_rows(write, name, content):
    rows, report = read(write(name, content))
    assert [texts for _, texts in rows] == PAIRS and report == []
    assert resolve_columns([write(name, content)]) == ("en", "fr")


def test_text_files_are_columns_side_by_side(write):
    english, french = write("a.en", "\ufeffzero\r\none\ntwo"), write("b.fr", "zéro\nun\ndeux\n")
    assert read(english, french) == ([(1, ("zero", "zéro")), (2, ("one", "un")), (3, ("two", "deux"))], [])
    assert resolve_columns([english, french]) == ("en", "fr")


def test_text_files_of_different_lengths_are_an_error_with_the_counts_even_behind_a_limit(write):
    paths = write("a.en", "one\ntwo\nthree\n"), write("b.fr", "un\ntrois\n")
    with pytest.raises(UserError, match=r"a.en has 3 lines, .*b.fr has 2 lines: line by line"):
        next(read_rows(paths, None, Skipped()))


def test_a_delimiter_inside_a_text_divides_nothing(write):
    rows = [("Hello, you", "Bonjour, toi"), ("Yes, no, why", "Oui"), ("No", "Non, non")]
    for name, content in (("a.csv", table_of(";", rows)), ("b.tsv", table_of("\t", rows))):
        assert [texts for _, texts in read(write(name, content), columns=["en", "fr"])[0]] == rows


def test_quotes_hold_commas_quotes_and_newlines(write):
    path = write("a.csv", 'en,fr\n"a, ""b""","c\n\nd"\n5" disk,"e"\n" one\r\n\r\ntwo ",x\n')
    assert read(path) == ([(2, ('a, "b"', "c d")), (5, ('5" disk', "e")), (6, ("one two", "x"))], [])


def test_a_tsv_has_no_quotes_but_doubled_ones(write):
    path = write("a.tsv", 'en\tfr\n"Go," he said.\t"Va !"\n"a ""b"" c"\t"""d"""\n"e\tf"\n')
    assert read(path)[0] == [(2, ('"Go," he said.', '"Va !"')), (3, ('a "b" c', '"d"')), (4, ('"e', 'f"'))]


@pytest.mark.parametrize("head", [[], [("x", "y")] * 150])
def test_doubled_quotes_of_a_tsv_are_undone_wherever_they_begin(write, head):
    rows = [*head, ('She said "go" now', "a"), ('"b"', "c")]
    assert [
        texts for _, texts in read(write("a.tsv", table_of(rows=[("en", "fr"), *rows])), columns=["en", "fr"])[0]
    ] == rows


def test_a_tsv_whose_quotes_hold_newlines_is_read_like_a_csv(write):
    assert read(write("a.tsv", 'en\tfr\none\t"a\nb"\ntwo\tc\n')) == ([(2, ("one", "a b")), (4, ("two", "c"))], [])


@pytest.mark.parametrize("mark", ["\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\r\u2028\v"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_every_other_line_break_is_a_space_and_ends_no_row(write, name, mark):
    row = {"csv": f'a{mark}b,"c"', "tsv": f"a{mark}b\tc", "jsonl": f'{{"en": "a{mark}b", "fr": "c"}}'}[name[2:]]
    header = {"csv": "en,fr", "tsv": "en\tfr", "jsonl": ""}[name[2:]]
    assert read(write(name, f"{header}\n{row}\n")) == ([(2, ("a b", "c"))], [])


# Files of other kinds


def zipped():
    with zipfile.ZipFile(content := io.BytesIO(), "w") as file:
        file.writestr("en-fr.csv", table_of(","))
    return content.getvalue()


def tarred():
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w") as file:
        file.addfile(tarfile.TarInfo("en-fr.csv"))
    return content.getvalue()


TABLE = table_of(",").encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (zipped(), "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV"),
        (gzip.compress(TABLE), "a gzip archive: unpack it with gunzip"),
        *(
            (content, "a compressed file: unpack it")
            for content in (bz2.compress(TABLE), lzma.compress(TABLE), tarred())
        ),
        (b"PAR1\x15\x04" + bytes(50), "a Parquet, .* file: save it as CSV or JSON lines"),
        (b"SQLite format 3\0", "an SQLite database: export a table"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF.*: save the table in it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ".*old Office document"),
        (b"\n <!DOCTYPE html>\n<html>", "a web page in place of the file: download the file itself"),
        (b"\xef\xbb\xbf<HTML lang=en>", "a web page"),
        (b'<?xml version="1.0"?>\n<tmx>', "XML, perhaps TMX"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a git LFS pointer.*git lfs pull"),
        *((TABLE.decode().encode(code), "UTF-16 text: .*iconv") for code in ("utf-16", "utf-16-le", "utf-16-be")),
        (b"\x80\x04\x95", "a pickle"),
        (TABLE.replace(b"\n", b"\r"), "text with the line ends of old Macs"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.gz"])
def test_a_file_of_another_kind_is_told_by_any_name(write, name, content, message):
    with pytest.raises(UserError, match=f"{name}: expected UTF-8 text; this is {message}"):
        read(write(name, content), columns=["en", "fr"])
    with pytest.raises(UserError, match=message):
        read(write("b.en", "Hello.\n"), write("b.fr", content))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '[{"en": "a", "fr": "b"}]', "a JSON array; expected one object a line: `python -c"),
        ("a.json", '{\n "en": "a"\n}\n', "expected JSON lines"),
        ("a.jsonl", "nothing\n", "expected JSON lines"),
        ("a.txt", "Hello, you.\n", "expected one table, named .csv, .tsv, .jsonl, .*, or two or more text files"),
        ("a", "", "expected one table"),
        ("a.csv", "", "line 1: expected a header.*the file is empty"),
        ("a.csv", '"en,fr\na,b\n', "line 1: expected a header.*quotes do not match"),
        ("a.csv", b"fran\xe7ais,en\na,b\n", "line 1: expected a header.*in UTF-8"),
        ("a.csv", "x" * 2_000_000, "line 1: expected a header.*field too long"),
    ],
)
def test_a_file_that_is_no_table_is_told_in_one_line(write, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(name, content), columns=["en", "fr"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_files_that_are_not_there_or_do_not_go_together_are_told(write, tmp_path):
    table = write("a.csv", "en,fr\na,b\n")
    for paths, message in [
        ([tmp_path / "no.csv"], "no.csv: no such file"),
        ([tmp_path], "not a regular file"),
        ([table, table], "expected one table"),
        ([table, write("b.fr", "b")], "expected one table"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve_columns(paths)


def test_a_file_that_may_not_be_read_is_told(write, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # root, who runs tests in containers, may read any file
    monkeypatch.setattr("prefix.data.tables.open", refuse, raising=False)
    with pytest.raises(UserError, match="a.csv: cannot be read: Permission denied"):
        resolve_columns([write("a.csv", "en,fr\na,b\n")])


# The records that cannot be read

BAD_ROWS = {
    "wrong number of fields": [b"one,un,1", b"one", b'"one,un"'],
    "empty side": [b"one,", b",un", b" ,un", b",", b'"\n",un'],
    "not UTF-8": [b"one,\xff", b"\xe9t\xe9,x", b"\xed\xa0\x80,x"],
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
    assert read(path, columns=["en", "fr"]) == (expected, skips(2, reason, 3))


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
        (b'{"en": "one", "fr": ["un"]}', "a list or object, not a text"),
        (b'{"en": "one", "fr": "\\u0000"}', "NUL byte"),
        (b'{"en": "one", "fr": "\0"}', "NUL byte"),
        (b'{"en": "one", "fr": "\\ud800"}', "not UTF-8"),
        (b'{"en": "one", "fr": "\xff"}', "not UTF-8"),
        (b'{"en": "one", "fr": "' + b"x" * 100_001 + b'"}', "field too long"),
        (b'{"en": "one", "fr": "' + b"x" * 3_000_000 + b'"}', "field too long"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_bad_line_of_json_is_counted_and_the_others_are_read(write, row, reason):
    path = write("a.jsonl", b"\n".join([b'{"en": "one", "fr": "un"}', row, b'{"en": "two", "fr": "deux"}']))
    assert read(path) == ([(1, ("one", "un")), (3, ("two", "deux"))], skips(1, reason, 2))


def test_a_bad_line_of_a_text_file_leaves_the_others_side_by_side(write):
    english = write("a.en", b"one\n\n\xff\n" + b"x" * 3_000_000 + b"\nfive\n")
    rows, report = read(english, write("a.fr", b"un\ndeux\ntrois\nquatre\ncinq\n"))
    assert rows == [(1, ("one", "un")), (5, ("five", "cinq"))]
    assert report == [*skips(1, "empty side", 2), *skips(1, "not UTF-8", 3), *skips(1, "field too long", 4)]


def test_a_quote_that_never_closes_costs_one_row(write):
    good = [f"good {i},bon {i}" for i in range(3000)]
    rows, report = read(write("a.csv", "\n".join(["en,fr", '"never,closed', *good, '"nor,this'])))
    assert [",".join(texts) for _, texts in rows] == good and rows[0][0] == 3
    assert report == skips(2, "quotes do not match", 2)


def test_rows_whose_outer_quotes_were_stripped_are_counted_one_by_one(write):
    path = write("a.csv", "en,fr\n" + 'one","un\n' * 999 + "one,un\n")  # each opens a quote that the next one closes
    assert read(path) == ([(1001, ("one", "un"))], skips(999, "quotes do not match", 2))


# Large files, and those that change

ROW = {"a.csv": "one {},un\n", "a.tsv": "one {}\tun\n", "a.jsonl": '{{"en": "one {}", "fr": "un"}}\n'}
HEADER = {"a.csv": "en,fr\n", "a.tsv": "en\tfr\n", "a.jsonl": "\n"}
COLUMNS = ["en", "fr"]


@pytest.mark.parametrize("name", ROW)
def test_a_field_of_200_megabytes_is_one_bad_row_and_never_in_memory(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.write((HEADER[name] + ROW[name].format(1)).encode())
        file.seek(200_000_000, os.SEEK_CUR)  # a hole in the file, which reads as zeros
        file.write(("\n" + ROW[name].format(2)).encode())
    results = []
    assert peak_of(lambda: results.append(read(tmp_path / name))) < 8_000_000
    assert results == [([(2, ("one 1", "un")), (4, ("one 2", "un"))], skips(1, "field too long", 3))]


@pytest.mark.parametrize("name", ROW)
def test_rows_go_through_one_by_one(write, name):
    path = write(name, HEADER[name] + "".join(ROW[name].format("x" * 10_000) for _ in range(3000)))
    count = lambda: [1 for _ in read_rows([path], COLUMNS, Skipped())]
    assert len(count()) == 3000 and peak_of(count) < 5_000_000 < path.stat().st_size / 5


def test_a_file_that_is_cut_while_it_is_read_has_fewer_rows_and_one_that_grows_has_more(write):
    path = write("a.csv", "en,fr\n" + "one,un\n" * 100_000)
    found = read_rows([path], COLUMNS, Skipped())
    next(found)
    os.truncate(path, 1000)
    assert 0 < len(list(found)) < 99_999
    path = write("b.csv", "en,fr\n" + "one,un\n" * 10)
    found = read_rows([path], COLUMNS, Skipped())
    next(found)
    with open(path, "a") as file:
        file.write("two,deux\n" * 5)
    assert [texts for _, texts in found] == [("one", "un")] * 9 + [("two", "deux")] * 5
