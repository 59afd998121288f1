"""Which columns are read is said or plain; every row is read or counted, whatever is in the files."""

import csv
import itertools
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tables import peak_of, read, skips, table_of

from minigpt import UserError
from prefix.data import rows, tables
from prefix.data.rows import (
    Skipped,
    clean,
    columns_for,
    is_language,
    read_rows,
    resolve_columns,
    unused_columns,
)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

N = 12  # rows
COLUMN = {  # what a column may hold: of each kind, N values
    "text": [f"a sentence, {i}" for i in range(N)],
    "other": [f"une phrase {i}" for i in range(N)],
    "word": [f"{chr(97 + i)}word" for i in range(N)],
    "label": ["good", "bad", "so so"] * (N // 3),
    "number": [f"{i}" for i in range(N)],
    "score": [f"-{i}.5e3" for i in range(N)],
    "id": [f"doc-{i}" for i in range(N)],
    "hash": ["qwertz", "asdfgh", "yxcvbn"] * (N // 3),
    "url": ["https://a.org/b", "http://a.org/c", "www://b"] * (N // 3),
    "measured": ["0.5", "nan", "1"] * (N // 3),
    "constant": ["chat"] * N,
}
KINDS = ["csv", "jsonl"]


@pytest.fixture
def table(write):
    """A function: the kind of file, a name and a key of COLUMN for each column -> the file."""

    def table(kind, *columns):
        names, rows = [name for name, _ in columns], list(zip(*(COLUMN[held] for _, held in columns)))
        if kind == "csv":
            return write("a.csv", table_of(",", [names, *rows]))
        return write("a.jsonl", "".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))

    return table


# Which columns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "columns, expected",
    [
        ([("en", "text"), ("fr", "other")], ["en", "fr"]),
        ([("fr", "other"), ("en", "word")], ["fr", "en"]),
        ([("tweet", "text"), ("label", "label")], ["tweet", "label"]),
        ([("Unnamed: 0", "number"), ("en", "text"), ("fr", "other")], ["en", "fr"]),
        ([("id", "word"), ("English", "text"), ("Français", "other")], ["English", "Français"]),
        ([("note", "text"), ("fr_FR", "other"), ("x", "text"), ("eng", "text"), ("de", "word")], ["fr_FR", "eng"]),
        ([("no", "number"), ("is", "constant"), ("en", "text"), ("fr", "other")], ["en", "fr"]),
        ([("id", "number"), ("en", "text"), ("fr", "other"), ("score", "score")], ["en", "fr"]),
    ],
)
def test_columns_that_nobody_named_are_both_or_the_first_two_languages(table, kind, columns, expected):
    path = table(kind, *columns)
    assert resolve_columns([path]) == tuple(expected)
    assert unused_columns([path], expected) == [name for name, _ in columns if name not in expected]
    held = dict(columns)
    texts = list(zip(*(COLUMN[held[name]] for name in expected)))
    assert [texts for _, texts in read(path)[0]] == texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "columns, message",
    [
        ([("row", "number"), ("en", "text")], r"the column 'row' holds only numbers \(0 ...\): name .* --columns"),
        ([("tweet", "text"), ("score", "score")], "the column 'score' holds only numbers, ids or addresses"),
        ([("docid", "id"), ("en", "text")], "the column 'docid' holds only numbers, ids or addresses"),
        ([("en", "text"), ("sentence_id", "hash")], "the column 'sentence_id' holds only numbers, ids or addresses"),
        ([("url", "url"), ("fr", "other")], "the column 'url' holds only numbers, ids or addresses"),
        ([("en", "text"), ("score", "measured")], "the column 'score' holds only numbers"),
        ([("kind", "constant"), ("fr", "other")], "the column 'kind' is always 'chat'"),
        ([("doc_id", "id"), ("source", "text"), ("target", "other")], "which columns.* 'doc_id', 'source', 'target'"),
        ([("en", "text"), ("fr", "number"), ("x", "other")], "which columns.*--columns; there are 'en', 'fr', 'x'"),
        ([("id", "text"), ("mt", "other"), ("en", "text")], "which columns"),
        ([("text", "text")], "2 to 31 columns are needed, not 1: 'text'"),
    ],
)
def test_no_number_id_or_constant_is_trained_without_being_asked_for(table, kind, columns, message):
    path = table(kind, *columns)
    with pytest.raises(UserError, match=message):
        resolve_columns([path])
    names = [name for name, _ in columns][:2]
    if len(names) == 2:
        assert resolve_columns([path], names[::-1]) == tuple(names[::-1])
        assert [texts for _, texts in read(path, columns=names)[0]] == list(
            zip(*(COLUMN[held] for _, held in columns[:2]))
        )


def test_columns_without_a_name_are_never_the_default(write):
    assert resolve_columns([write("a.csv", ",text, summary \n0,one a,un\n1,two b,deux\n")]) == ("text", "summary")


@pytest.mark.parametrize("value", [["a"], {"a": "b"}])
def test_lists_and_objects_are_no_texts(write, value):
    path = write("a.jsonl", json.dumps({"text": "one a", "labels": value}) + "\n")
    with pytest.raises(UserError, match="the column 'labels' holds lists or objects"):
        resolve_columns([path])


def test_a_json_number_is_a_text_and_null_is_none(write):
    objects = ['{"tweet": "good", "label": 1}', '{"tweet": "bad", "label": null}', '{"tweet": "?", "label": false}']
    expected = [(1, ("good", "1")), (3, ("?", "false"))]
    assert read(write("a.jsonl", "\n".join(objects))) == (expected, skips(1, "empty side", 2))


def test_a_key_that_json_objects_have_later_is_found(write):
    path = write("a.jsonl", '{"en": "one", "fr": "un"}\n' * 500 + '{"de": "eins", "fr": "un"}\n')
    assert resolve_columns([path], ["de", "en"]) == ("de", "en") and resolve_columns([path], ["en", "fr"])


def test_objects_with_ever_new_keys_do_not_fill_memory(write):
    objects = ({f"{n}-{i}": 1 for i in range(100)} for n in range(1000))
    path = write("a.jsonl", "\n".join(map(json.dumps, objects)))

    def refused():
        with pytest.raises(UserError, match="has no column 'en'; its columns are '0-0', '0-1'"):
            resolve_columns([path], ["en", "fr"])

    assert peak_of(refused) < 1_000_000 < path.stat().st_size


@pytest.mark.parametrize(
    "name", "en EN eng English fr fr-FR fr_CA fra fre français German de_AT pt-BR zh_Hans es-419".split()
)
def test_languages_are_known_by_code_and_name(name):
    assert is_language(name)


@pytest.mark.parametrize("name", "id text source xx en_text english_id cat Unnamed -en".split() + ["", "Unnamed: 0"])
def test_other_names_are_no_languages(name):
    assert not is_language(name)


# Tables without a header

HEADERLESS = {
    "a.csv": [("I see.", "Je vois"), ("You see", "Tu vois"), ("We see", "Nous voyons")],
    "b.csv": [("Go", "Va"), ("Run", "Cours"), ("Wait", "Attends")],
    "c.csv": [("Go", "Va donc"), ("Go", "Bouge"), ("Wait a bit", "Attends donc")],
    "fra.tsv": [
        ("Go now", "Va donc", "CC-BY 2.0 (France) Attribution: me"),
        ("No, wait", "Attends un peu", "CC-BY 2.0"),
    ],
    "ids.tsv": [("Go now.", "12", "Va donc."), ("No, wait.", "7", "Attends un peu.")],
}


@pytest.mark.parametrize("name", HEADERLESS)
def test_a_table_without_a_header_is_told_and_read_when_its_columns_are_named(write, name):
    rows = HEADERLESS[name]
    path, pairs = (
        write(name, table_of("\t" if name.endswith("tsv") else ",", rows)),
        [(row[0], row[-1]) for row in rows],
    )
    if name == "fra.tsv":
        pairs = [row[:2] for row in rows]
    with pytest.raises(UserError, match=f"line 1 seems to hold texts.*{rows[0][1]!r}.*--columns en fr"):
        resolve_columns([path])
    found, (note,) = read(path, columns=["en", "fr"])
    assert found == list(enumerate(pairs, 1)) and "without a header: line 1 is a row" in note
    assert read(path, columns=pairs[0]) == (found[1:], [])  # line 1 is the header to whoever says so
    with pytest.raises(UserError, match="4 columns, but line 1 has [23] texts"):
        resolve_columns([path], ["en", "fr", "de", "it"])


def test_a_header_with_two_languages_is_one_whatever_else_it_holds(write):
    path = write("a.csv", 'en,fr,"Who said so, and when?"\nGo,Va,me\nRun,Cours,you\n')
    assert resolve_columns([path]) == ("en", "fr") and read(path)[0][0] == (2, ("Go", "Va"))


def test_a_table_without_a_header_has_the_columns_of_its_training(write):
    path = write("a.csv", table_of(",", [("Je vois.", "I see"), ("Tu vois.", "You see")]))
    assert columns_for([path], ["en", "fr"], header=["fr", "en"]) == ([path], ["fr", "en"])
    assert columns_for([path], ["en", "fr"], ["fr", "en"]) == ([path], ["fr", "en"])
    with pytest.raises(UserError, match="line 1 seems to hold texts"):
        columns_for([path], ["en", "fr"])


# Mistakes


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        ("a.csv", "en,fr\na,b\n", ["en", "de"], "a.csv: has no column 'de'; its columns are 'en', 'fr'"),
        ("a.csv", "en,fr\na,b\n", ["english", "french"], "a.csv: has no column 'english'; its columns are 'en', 'fr'"),
        ("a.tsv", "en\tfr\na\tb\n", ["xx", "fr"], "a.tsv: has no column 'xx'; its columns are 'en', 'fr'"),
        ("a.jsonl", '{"en": 1, "fr": 2}', ["en", "de"], "a.jsonl: has no column 'de'; its columns are 'en', 'fr'"),
        ("a.csv", "en,en,fr\na,b,c\n", ["en", "fr"], "a.csv: has the column 'en' twice"),
        ("a.csv", "en,en,fr\na,b,c\n", None, "a.csv: has the column 'en' twice"),
        ("a.csv", "en,fr\na,b\n", ["en", "en"], "different names"),
        ("a.csv", "en,fr\na,b\n", ["en"], "2 to 31 columns are needed, not 1: 'en'"),
        ("a.csv", ",".join(map(str, range(40))), list(map(str, range(32))), "2 to 31 columns are needed, not 32"),
        ("a.jsonl", r'{"\ud800": "a", "b": "c"}', None, "different names in UTF-8"),
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


# What holds for any file


def test_with_three_columns_a_row_may_lack_one(write):
    path = write("a.csv", "en,fr,de\none,un,eins\ntwo,,zwei\nthree,,\n,quatre,vier\n")
    rows, report = read(path, columns=["en", "fr", "de"])
    assert [texts for _, texts in rows] == [("one", "un", "eins"), ("two", "", "zwei"), ("", "quatre", "vier")]
    assert report == skips(1, "empty side", 4)


def test_other_spaces_than_line_breaks_stay(write):
    assert read(write("a.csv", "en,fr\n« a\u00a0»  b,c\u202f!\n"))[0] == [(2, ("« a\u00a0»  b", "c\u202f!"))]


LINE_BREAKS = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" + LINE_BREAKS))
sides = words.map(str.strip).filter(bool)


@quick
@given(pairs=st.lists(st.tuples(sides, sides), max_size=8), mark=st.sampled_from(",;|"))
def test_any_pairs_that_csv_writes_are_read_back(pairs, mark, tmp_path):
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([("en", "fr"), *pairs])
    found, report = read(tmp_path / "a.csv", columns=["en", "fr"])
    assert [texts for _, texts in found] == pairs and report == []


PIECES = [
    *(b'"', b'""', b",", b"\t", b"\n", b"\n\n", b"\r", b"\r\n", b" ", b"a", b"word", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"x" * 30),
    *(b"one,un\n", b'"a,b"', b'"a\nb",c\n', b"one\tun\n", b'{"a":"b","c":"d"}\n', b'{"a":1e999,"c":[null]}\n'),
    *(b'{"a":"\\ud800","c":"\\u0000"}\n', b"{", b"}", b'{"a":', b"[" * 2000, b"9" * 5000, b"null", b"\\"),
]
heads = st.sampled_from([b"", b"en,fr\n", b"en\tfr\n", b"\xef\xbb\xbfx,en,fr\r\n", b'{"en": "b", "fr": 1}\n'])
tails = st.binary() | st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
contents = st.builds(bytes.__add__, heads, tails)
SMALL = {"MAX_FIELD": 20, "MAX_RECORD": 60, "MAX_LINES": 3, "FIRST_LINES": 3, "MOST_KEYS": 2, "HEAD_LINES": 4}
limits = st.sampled_from([SMALL, {}])


def assert_read_or_refused(paths, columns, limits):
    """Whatever these files hold: rows as they are promised, all other lines counted, or a UserError."""
    skipped = Skipped()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in itertools.product((rows, tables), limits):
            patch.setattr(module, name, limits[name], raising=False)
        try:
            found, (layout, _) = list(read_rows(paths, columns, skipped)), tables.layout_of(paths)
        except UserError:
            return
    for _, texts in found:
        assert len(texts) == 2 and all(texts) and max(map(len, texts)) <= limits.get("MAX_FIELD", tables.MAX_FIELD)
        assert all(text == clean(text) and len(text.splitlines()) == 1 and "\0" not in text for text in texts)
        assert "".join(texts).encode().decode() == "".join(texts)
    files = [re.findall("[^\n]*\n|[^\n]+", path.read_bytes().decode("utf-8", "replace")) for path in paths]
    starts, n_lines = [line for line, _ in found], max(map(len, files))
    assert starts == sorted(set(starts)) and all(0 < line <= n_lines for line in starts)
    if len(paths) == 2:
        assert len(found) + counted(skipped) == n_lines == min(map(len, files))
    elif layout == tables.JSON_LINES or not layout.quoting or b'"' not in paths[0].read_bytes():
        mark = "{" if layout == tables.JSON_LINES else layout.delimiter  # quotes make one row of several lines
        first = "\ufeff" if paths[0].read_bytes().startswith(b"\xef\xbb\xbf") else ""
        shown = [line.removeprefix(first) if i == 0 else line for i, line in enumerate(files[0])]
        long = [len(line.encode()) >= limits.get("MAX_RECORD", math.inf) for line in files[0]]
        lines = [line for line, too_long in zip(shown, long) if line.strip() or mark in line or too_long]
        assert len(lines) - (mark != "{") <= len(found) + counted(skipped) <= len(lines)  # without a header, or with


def counted(skipped):
    return sum(n for n, _ in skipped.counts.values())


@quick
@given(content=contents, columns=st.sampled_from([None, ["en", "fr"]]), limits=limits)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_bytes_of_any_kind_are_read_or_told(name, content, columns, limits, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_read_or_refused([tmp_path / name], columns, limits)


sides_of_lines = [tails.map(lambda content: content.replace(b"\n", b""))] * 2


@quick
@given(lines=st.lists(st.tuples(*sides_of_lines), min_size=1, max_size=20), limits=limits)
def test_text_files_of_any_kind_are_read_or_told(lines, limits, tmp_path):
    paths = [tmp_path / "a.en", tmp_path / "a.fr"]
    for path, side in zip(paths, zip(*lines)):
        path.write_bytes(b"".join(line + b"\n" for line in side))
    assert_read_or_refused(paths, None, limits)
