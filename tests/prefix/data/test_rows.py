"""Which columns are read is said or plain; every row is read or counted, whatever is in the files."""

import re

import pytest
from conftest import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tables import read, table_of

from minigpt import UserError
from prefix.data import rows, tables
from prefix.data.rows import Skipped, Table, clean, columns_for, is_language, read_rows

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
    "measured": ["0.5", "nan", "1 000"] * (N // 3),
    "constant": ["chat"] * N,
}


@pytest.fixture
def table(write):
    """A function: a name and a key of COLUMN for each column -> a file."""

    def table(*columns):
        names, held = zip(*columns)
        return write("a.csv", table_of(",", [names, *zip(*map(COLUMN.get, held))]))

    return table


# Which columns


@pytest.mark.parametrize("columns, expected", [
    ([("en", "text"), ("fr", "other")], ["en", "fr"]),
    ([("tweet", "text"), ("label", "label")], ["tweet", "label"]),
    ([("Unnamed: 0", "number"), ("en", "text"), ("fr", "other")], ["en", "fr"]),
    ([("id", "word"), ("English", "text"), ("French", "other")], ["English", "French"]),
    ([("note", "text"), ("fr_FR", "other"), ("x", "text"), ("eng", "text"), ("de", "word")], ["fr_FR", "eng"]),
    ([("no", "number"), ("is", "constant"), ("fr", "text"), ("en", "other")], ["fr", "en"]),
    ([("en", "text"), ("fr", "other"), ("Who said so, and when?", "word")], ["en", "fr"]),
    ([("", "number"), ("text", "text"), (" summary ", "other")], ["text", "summary"]),
])  # fmt: skip
def test_columns_that_nobody_named_are_both_or_the_first_two_languages(table, columns, expected):
    path, held = table(*columns), {clean(name): held for name, held in columns}
    assert [*Table([path]).places()] == expected
    assert [texts for _, texts in read(path)[0]] == list(zip(*(COLUMN[held[name]] for name in expected)))


@pytest.mark.parametrize("columns, message", [
    *(([(name, held), ("fr", "other")], f"the column '{name}' holds only numbers, ids or addresses") for name, held in
      [("row", "number"), ("score", "score"), ("docid", "id"), ("word_id", "hash"), ("url", "url"), ("x", "measured")]),
    ([("kind", "constant"), ("fr", "other")], "the column 'kind' is always 'chat'"),
    ([("en", "text"), ("fr", "number"), ("x", "other")], "which columns.*--columns; there are 'en', 'fr', 'x'"),
    ([("id", "text"), ("mt", "other"), ("en", "text")], "which columns"),
    ([("text", "text")], "2 to 31 columns of different names in UTF-8 are needed, not 'text'"),
])  # fmt: skip
def test_no_number_id_or_constant_is_trained_without_being_asked_for(table, columns, message):
    path = table(*columns)
    assert re.search(message, refusal(Table([path]).places))
    if len(columns) > 1:
        (first, a), (second, b), *_ = columns
        assert [texts for _, texts in read(path, columns=[second, first])[0]] == list(zip(COLUMN[b], COLUMN[a]))


def test_a_key_that_json_objects_have_later_is_found(write):
    path = write("a.jsonl", '{"en": "one", "fr": "un"}\n' * 500 + '{"de": "eins", "fr": "un"}\n')
    assert Table([path]).places(["de", "en"]) == {"de": 2, "en": 0}


def test_languages_are_known_by_code_and_name_and_other_names_are_none():
    assert all(map(is_language, "en EN eng English fr_CA German pt-BR zh_Hans es-419".split()))
    others = ["", "Unnamed: 0", *"id text xx en_text en_id english_id cat Unnamed -en".split()]
    assert not any(map(is_language, others))


# Tables without a header

HEADERLESS = {
    "a.csv": [("I see.", "Je vois"), ("You see", "Tu vois"), ("We see", "Nous voyons")],
    "labels.csv": [("Good, that.", "1"), ("Oh no.", "0")],
    "fra.tsv": [("Go now", "Va donc", "CC-BY 2.0 (France): me"), ("No, wait", "Attends un peu", "CC-BY 2.0")],
    "ids.tsv": [("Go now.", "12", "Va donc."), ("No, wait.", "7", "Attends un peu.")],
}


@pytest.mark.parametrize("name", HEADERLESS)
def test_a_table_without_a_header_is_told_and_read_when_its_columns_are_named(write, name):
    lines = HEADERLESS[name]
    path = write(name, table_of("\t" if name.endswith("tsv") else ",", lines))
    pairs = [(line[0], line[2 if name == "ids.tsv" else 1]) for line in lines]
    told = f"line 1 seems to hold texts.*{lines[0][1]!r}.*--columns en fr"
    assert re.search(told, refusal(Table([path]).places))
    found, (note,) = read(path, columns=["en", "fr"])
    assert found == list(enumerate(pairs, 1)) and "without a header: line 1 is a row" in note
    assert read(path, columns=pairs[0]) == (found[1:], [])  # line 1 is the header to whoever says so
    assert re.search("4 columns, but [123] texts", refusal(Table([path]).places, ["en", "fr", "de", "it"]))
    assert columns_for([path], ["en", "fr"], ["fr", "en"]) == ["fr", "en"]
    assert re.search(told, refusal(columns_for, [path], ["en", "fr"]))


# Mistakes


@pytest.mark.parametrize("names, content, columns, message", [
    ("a.txt b.txt", "a", None, "different names"),
    ("a.txt b.txt", "a", ["en", "fr", "de"], "3 columns, but 2 texts"),
    ("a.eng b.fr c.de", "a", ["en", "it"], "2 columns, but 3 texts"),
    ("a.fr b.eng", "a", ["en", "fr"], "has no column 'en'; its columns are 'fr', 'eng'; --columns names them anew"),
    ("a.csv", "Question?,Answer\na,b\n", ["Question?", "Answr"], "has no column 'Answr'; its columns are 'Question"),
    ("a.csv b.fr", "en,fr\na,b\n", None, "expected one table"),
    ("a.csv", "en,fr\na,b\n", ["en", "de"], "a.csv: has no column 'de'; its columns are 'en', 'fr'"),
    ("a.jsonl", '{"en": 1, "fr": 2}', ["en", "de"], "a.jsonl: has no column 'de'; its columns are 'en', 'fr'"),
    ("a.csv", "en,en,fr\na,b,c\n", ["en", "fr"], "a.csv: has the column 'en' twice"),
    ("a.csv", "en,fr\na,b\n", ["en", "en"], "different names"),
    ("a.csv", ",".join(map(str, range(40))), list(map(str, range(32))), "2 to 31 columns"),
])  # fmt: skip
def test_a_mistake_about_columns_is_told_in_one_line(write, names, content, columns, message):
    paths = [write(name, content) for name in names.split()]
    assert re.search(message, refusal(lambda: Table(paths).places(columns)))


# What holds for any file


PIECES = [
    *(b'"', b'""', b",", b"\t", b"\n", b"\n\n", b"\r", b"\r\n", b" ", b"a", b"word", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"\xef\xbb\xbf", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"x" * 30, b"one,un\n", b'"a\nb",c\n'),
    *(b"one\tun\n", b'{"a":"b","c":"d"}\n', b'{"a":1e999,"c":[null]}\n', b'{"a":"\\ud800","c":"\\u0000"}\n'),
    *(b"{", b"}", b'{"a":', b"[" * 2000, b"9" * 5000, b"null", b"\\"),
]
heads = st.sampled_from([b"", b"en,fr\n", b"en\tfr\n", b"\xef\xbb\xbfx,en,fr\r\n", b'{"en": "b", "fr": 1}\n'])
tails = st.binary() | st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
contents = st.builds(bytes.__add__, heads, tails)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents, other=tails, columns=st.sampled_from([None, ["en", "fr"]]), small=st.booleans())
@pytest.mark.parametrize("names", ["a.csv", "a.tsv", "a.jsonl", "a.en b.fr"])
def test_bytes_of_any_kind_are_read_or_told(names, content, other, columns, small, tmp_path):
    paths, skipped = [tmp_path / name for name in names.split()], Skipped()
    lines = re.findall(b"[^\n]*\n|[^\n]+", content)
    for path, written in zip(paths, (content, (other.replace(b"\n", b"") + b"\n") * len(lines))):
        path.write_bytes(written)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(rows, "MAX_FIELD", 20)
            patch.setattr(tables, "MAX_LINES", 3)
        try:
            found = list(read_rows(paths, columns, skipped))
        except UserError:
            return
    for _, texts in found:
        assert len(texts) == 2 and all(texts) and max(map(len, texts)) <= (20 if small else rows.MAX_FIELD)
        assert all(text == clean(text) and len(text.splitlines()) == 1 and "\0" not in text for text in texts)
        assert "".join(texts).encode().decode() == "".join(texts)
    starts = [line for line, _ in found]
    assert starts == sorted(set(starts)) and all(0 < line <= len(lines) for line in starts)
    n_counted = len(found) + sum(n for n, _ in skipped.counts.values())
    if len(paths) == 2:
        assert n_counted == len(lines)
    elif b'"' not in content or names == "a.jsonl":  # quotes make one row of several lines
        blank = sum(not line.decode("utf-8", "replace").strip().strip("\ufeff,;|") for line in lines)
        assert len(lines) - blank - (names != "a.jsonl") <= n_counted <= len(lines)
