"""Every usable row of a file is read as it was written; every other is counted, by reason, with the first one's line."""

import csv
import math
import os
import re
import tracemalloc
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt import UserError
from prefix.data.rows import MAX_FIELD, Skipped, clean, read_rows, resolve_columns

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(*paths, columns=None):
    """(rows, what was skipped) of whole files."""
    skipped = Skipped()
    return list(read_rows(paths, columns, skipped)), skipped.report()


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

    # root, who runs tests in containers, may read any file
    monkeypatch.setattr("prefix.data.rows.open", refuse, raising=False)
    with pytest.raises(UserError, match="a.csv: cannot be read: Permission denied"):
        resolve_columns([write("a.csv", "en,fr\na,b\n")])


# Large files, and those that change

ROW = {"a.csv": b"one,un\n", "a.tsv": b"one\tun\n", "a.jsonl": b'{"en": "one", "fr": "un"}\n'}
HEADER = {"a.csv": b"en,fr\n", "a.tsv": b"en\tfr\n", "a.jsonl": b"\n"}


def peak_of(work):
    """The most memory, in bytes, that Python takes for work()."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ROW)
def test_a_field_of_200_megabytes_is_one_bad_row_and_never_in_memory(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.write(HEADER[name] + ROW[name])
        file.seek(200_000_000, os.SEEK_CUR)  # a hole in the file, which reads as zeros
        file.write(b"\n" + ROW[name])
    results = []
    assert peak_of(lambda: results.append(read(tmp_path / name))) < 8_000_000
    assert results == [([(2, ("one", "un")), (4, ("one", "un"))], skips(1, "field too long", 3))]


@pytest.mark.parametrize("name", ROW)
def test_rows_go_through_one_by_one(write, name):
    path = write(name, HEADER[name] + ROW[name].replace(b"one", b"x" * 10_000) * 3000)
    count = lambda: [1 for _ in read_rows([path], None, Skipped())]
    assert len(count()) == 3000 and peak_of(count) < 5_000_000 < path.stat().st_size / 5


def test_objects_with_ever_new_keys_do_not_fill_memory(write):
    def keys(n):
        return ", ".join(f'"{n}-{i}": 1' for i in range(100))

    path = write("a.jsonl", "\n".join(f"{{{keys(n)}}}" for n in range(1000)))

    def refused():
        with pytest.raises(UserError, match="has no column 'en'; its columns are '0-0', '0-1'"):
            resolve_columns([path], ["en", "fr"])

    assert peak_of(refused) < 1_000_000 < path.stat().st_size


def test_a_file_that_is_cut_while_it_is_read_has_fewer_rows(write):
    path = write("a.csv", "en,fr\n" + "one,un\n" * 100_000)
    found = read_rows([path], None, Skipped())
    next(found)
    os.truncate(path, 1000)
    assert 0 < len(list(found)) < 99_999


def test_a_file_that_grows_while_it_is_read_has_more_rows(write):
    path = write("a.csv", "en,fr\n" + "one,un\n" * 10)
    found = read_rows([path], None, Skipped())
    next(found)
    with open(path, "a") as file:
        file.write("two,deux\n" * 5)
    assert [texts for _, texts in found] == [("one", "un")] * 9 + [("two", "deux")] * 5


# What holds for any file

LINE_BREAKS = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + LINE_BREAKS))
sides = words.map(str.strip).filter(bool)


@quick
@given(pairs=st.lists(st.tuples(sides, sides), max_size=8))
def test_any_pairs_that_csv_writes_are_read_back(pairs, tmp_path):
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("en", "fr"), *pairs])
    found, report = read(tmp_path / "a.csv")
    assert [texts for _, texts in found] == pairs and report == []


PIECES = [
    *(b'"', b'""', b",", b"\t", b"\n", b"\n\n", b"\r", b"\r\n", b" ", b"a", b"word", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"x" * 30),
    *(b"one,un\n", b'"a,b"', b'"a\nb",c\n', b"one\tun\n", b'{"a":"b","c":"d"}\n', b'{"a":1e999,"c":[null]}\n'),
    *(b'{"a":"\\ud800","c":"\\u0000"}\n', b"{", b"}", b'{"a":', b"[" * 2000, b"9" * 5000, b"null", b"\\"),
]
heads = st.sampled_from([b"", b"en,fr\n", b"en\tfr\n", b"\xef\xbb\xbfx,en,fr\r\n", b'{"a": "b", "c": 1}\n'])
tails = st.binary() | st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
contents = st.builds(bytes.__add__, heads, tails)
SMALL = {"MAX_FIELD": 20, "MAX_RECORD": 60, "MAX_LINES": 3, "FIRST_OBJECTS": 3, "MOST_KEYS": 2}
limits = st.sampled_from([SMALL, {"MAX_FIELD": MAX_FIELD}])


def assert_read_or_refused(paths, limits):
    """Whatever these files hold: rows as they are promised, all other lines counted, or a UserError."""
    skipped = Skipped()
    with mock.patch.multiple("prefix.data.rows", **limits):
        try:
            found = list(read_rows(paths, None, skipped))
        except UserError:
            return
    for _, texts in found:
        assert len(texts) == 2 and all(texts) and max(map(len, texts)) <= limits["MAX_FIELD"]
        assert all(text == clean(text) and len(text.splitlines()) == 1 and "\0" not in text for text in texts)
        assert "".join(texts).encode().decode() == "".join(texts)
    files = [re.findall("[^\n]*\n|[^\n]+", path.read_bytes().decode("utf-8", "replace")) for path in paths]
    starts, n_lines = [line for line, _ in found], max(map(len, files))
    assert starts == sorted(set(starts)) and all(0 < line <= n_lines for line in starts)
    kind, longest = paths[0].suffix, limits.get("MAX_RECORD", math.inf)
    if len(paths) == 2:
        assert len(found) + counted(skipped) == n_lines
    elif kind != ".csv" or b'"' not in paths[0].read_bytes():  # quotes make one row of several lines
        mark, header = {".csv": ",", ".tsv": "\t", ".jsonl": "{"}[kind], kind != ".jsonl"
        first = "\ufeff" if paths[0].read_bytes().startswith(b"\xef\xbb\xbf") else ""
        shown = [line.removeprefix(first) if i == 0 else line for i, line in enumerate(files[0])]
        long = [len(line.encode()) >= longest for line in files[0]]
        rows = [line for line, too_long in zip(shown, long) if line.strip() or mark in line or too_long]
        assert len(found) + counted(skipped) == len(rows) - header


def counted(skipped):
    return sum(n for n, _ in skipped.counts.values())


@quick
@given(content=contents, limits=limits)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_bytes_of_any_kind_are_read_or_told(name, content, limits, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_read_or_refused([tmp_path / name], limits)


@quick
@given(one=tails, other=tails, limits=limits)
def test_text_files_of_any_kind_are_read_or_told(one, other, limits, tmp_path):
    paths = [tmp_path / "a.en", tmp_path / "a.fr"]
    for path, content in zip(paths, (one, other)):
        path.write_bytes(content)
    assert_read_or_refused(paths, limits)
