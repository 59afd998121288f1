"""Rows of sentences, read from files as a stream: which columns there are, and which rows can be used.

    files -> lines -> records -> clean texts

A row has one text in each column, and a column is what one bank stands for: a language, as a rule. The files are one
table (.csv or .tsv with a header; .jsonl or .ndjson, whose keys are the columns) or two or more aligned text files, one
for each column. Rows go through one by one, so the files may be of any size. A row that cannot be used is counted by
reason in `Skipped`; it stops nothing.
"""

import csv
import itertools
import json
from collections import deque
from contextlib import contextmanager
from pathlib import Path

from minigpt.errors import UserError
from prefix.banks import MAX_BANKS

TABLES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}
MAX_FIELD = 100_000  # characters
MAX_RECORD, MAX_LINES = 1 << 20, 100  # bytes and lines of one row; a quote still open after them was never closed
FIRST_OBJECTS = 1000  # of JSON lines: among them a column must turn up
MOST_KEYS = 100  # of JSON objects, besides those that were asked for


class Skipped:
    """Counts the rows that cannot be used: how many for each reason, and the line of the first."""

    def __init__(self):
        self.counts = {}  # reason: [rows, first line]

    def add(self, reason, line):
        self.counts.setdefault(reason, [0, line])[0] += 1

    def report(self):
        """One line for each reason."""
        found = self.counts.items()
        return [f"{n:,} row{'s' * (n != 1)} skipped: {reason} (first at line {line})" for reason, (n, line) in found]


# Columns: which there are, and which to read


def resolve_columns(paths, columns=None):
    """The columns to read from these files, as a tuple of names: those given or, without any, the first two of a
    table, the extensions of text files. Raises UserError where the files do not have them, or cannot be read."""
    layout, where = _layout(paths), " ".join(map(str, paths))
    if layout == "text":
        columns = columns or [Path(path).suffix[1:] for path in paths]
        if len(columns) != len(paths):
            raise UserError(f"{where}: {len(paths)} text files, but {len(columns)} columns: name one for each file")
    else:
        there = _keys(paths[0], columns) if layout == "json" else _checked_header(paths[0])
        columns = columns or [name for name in there if name][:2]
        _require(paths[0], columns, there)
    if not 2 <= len(columns) <= MAX_BANKS:
        raise UserError(f"{where}: 2 to {MAX_BANKS} columns are needed, not {len(columns)}: {_listed(columns)}")
    for name in columns:
        if not name or _damage(name) or list(columns).count(name) > 1:
            raise UserError(f"{where}: columns need different names in UTF-8, not {_listed(columns)}: set --columns")
    return tuple(columns)


def columns_for(paths, names, columns=None):
    """Which of the `names` these files have -> (paths, columns), both in the order of `names`: a row's split goes by
    its first text, so that columns must stand as they stood in training. columns: some that must be there. Text files
    are called by these, if there is one for each, else by their extensions or, where those are others, by `names`."""
    if _layout(paths) == "text":
        suffixes = [Path(path).suffix[1:] for path in paths]
        named = columns and len(columns) == len(paths)
        there = resolve_columns(paths, columns if named else suffixes if set(suffixes) <= set(names) else names)
        _require(" ".join(map(str, paths)), columns or [], there)
        pairs = sorted(zip(there, paths), key=lambda pair: names.index(pair[0]))
        return [path for _, path in pairs], [name for name, _ in pairs]
    there = _keys(paths[0], names) if _layout(paths) == "json" else _checked_header(paths[0])
    found = [name for name in names if name in there]
    _require(paths[0], columns or (names if len(found) < 2 else found), there)
    return paths, found


def unused_columns(paths, columns):
    """The columns that a table has beside these."""
    layout = _layout(paths)
    there = [] if layout == "text" else _keys(paths[0], columns) if layout == "json" else _checked_header(paths[0])
    return [name for name in there if name and name not in columns]


def _layout(paths):
    """One of csv, tsv, json, text, by the extensions."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    tables = [TABLES.get(Path(path).suffix.lower()) for path in paths]
    if len(paths) == 1 and tables[0]:
        return tables[0]
    if len(paths) < 2 or any(tables):
        where, known = " ".join(map(str, paths)), ", ".join(TABLES)
        raise UserError(f"{where}: expected one {known} file, or two or more text files, one per column")
    return "text"


def _require(path, columns, there):
    for name in columns:
        if there.count(name) != 1:
            fault = f"has the column {name!r} twice" if name in there else f"has no column {name!r}"
            raise UserError(f"{path}: {fault}; its columns are {_listed(there)}")


def _listed(names):
    return (", ".join(map(repr, names)) or "none")[:300]


def _checked_header(path):
    skipped = Skipped()
    header = _header(_records(path, skipped))
    fault = next(iter(skipped.counts), None) or _damage("".join(header)) or (None if header else "the file is empty")
    if fault:
        raise UserError(f"{path}: line 1: expected a header that names the columns, in UTF-8: {fault}")
    return header


def _header(records):
    return [clean(name) for name in next(records, (0, []))[1]]


def _keys(path, wanted):
    """The keys of the first JSON objects, up to the one by which there are two, and all that are wanted. Of objects
    with ever new keys, no more than MOST_KEYS of those that nobody asked for."""
    keys, wanted = {}, set(wanted or ())
    for _, record in itertools.islice(_objects(path, Skipped()), FIRST_OBJECTS):
        for key in record:
            if len(keys) < MOST_KEYS or key in wanted:
                keys[key] = True
        if len(keys) > 1 and keys.keys() >= wanted:
            break
    return list(keys)


# Reading


def read_rows(paths, columns, skipped):
    """Yield (line number, texts) for each row that can be used: one str per column, two of them or more not empty.

    The line is the row's first, from 1. Rows that cannot be used are added to `skipped`."""
    columns, layout = resolve_columns(paths, columns), _layout(paths)
    if layout == "text":
        rows = _text_rows(paths, skipped)
    else:
        rows = (_json_rows if layout == "json" else _table_rows)(paths[0], columns, skipped)
    for line, fields in rows:
        texts = tuple(map(clean, fields))
        fault = _fault(texts)
        if fault:
            skipped.add(fault, line)
        else:
            yield line, texts


def clean(text):
    """A text on one line: a run of line breaks is one space, the ends are stripped."""
    return " ".join(filter(None, text.splitlines())).strip()


def _fault(texts):
    """Why these texts are not a row to use; None if they are."""
    if max(map(len, texts)) > MAX_FIELD:
        return "field too long"
    return _damage("".join(texts)) or ("empty side" if sum(map(bool, texts)) < 2 else None)


def _damage(text):
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode()
    except UnicodeEncodeError:  # _lines made lone surrogates of the bytes that were not UTF-8
        return "bad encoding"


def _table_rows(path, columns, skipped):
    """Yield (line number, fields in the order of `columns`)."""
    records = _records(path, skipped)
    header = _header(records)
    _require(path, columns, header)
    picks = [header.index(name) for name in columns]
    for line, fields in records:
        if len(fields) == len(header):
            yield line, [fields[i] for i in picks]
        else:
            skipped.add("wrong number of fields", line)


def _records(path, skipped):
    """Yield (line number, fields) of a table, its header first, without blank lines."""
    if _layout([path]) == "tsv":
        records = ((number, line.split("\t")) for number, line in _short_lines(path, skipped))
    else:
        records = _csv(path, skipped)
    for line, fields in records:
        if len(fields) > 1 or "".join(fields).strip():
            yield line, fields


def _csv(path, skipped):
    """Each record is read from as many lines as its quotes ask for. Where they lead nowhere (to a quote in the midst
    of a field, to too many lines, to the end), its first line alone is given up: the next record starts below it."""
    lines, again, taken = _lines(path), deque(), []
    while True:
        try:
            for fields in csv.reader(_take_lines(lines, again, taken), strict=True):
                yield taken[0][0], fields
                taken.clear()
            return
        except csv.Error:
            texts = [line for _, line in taken]
            too_long = None in texts or sum(map(len, texts)) > MAX_FIELD
            fault = "field too long" if too_long else _damage("".join(texts)) or "quotes do not match"
            skipped.add(fault, taken[0][0])
            again.extendleft(reversed(taken[1:]))
            taken.clear()


def _take_lines(lines, again, taken):
    """Yield lines to csv.reader, those in `again` first, and keep those of the record at hand in `taken`."""
    for number, line in iter(lambda: again.popleft() if again else next(lines, None), None):
        taken.append((number, line))
        if line is None or len(taken) > MAX_LINES or sum(len(text) for _, text in taken) > MAX_RECORD:
            raise csv.Error
        yield line.replace("\r", "\v") + "\n"  # to csv a lone \r ends a row; to `clean` the two are the same


def _json_rows(path, columns, skipped):
    """Yield (line number, fields). A column that is missing or null is empty; what is no string is written as JSON."""
    write = lambda value: "" if value is None else json.dumps(value, ensure_ascii=False)
    for line, record in _objects(path, skipped):
        values = [record.get(name) for name in columns]
        yield line, [value if isinstance(value, str) else write(value) for value in values]


def _objects(path, skipped):
    """Yield (line number, dict) of a JSON lines file."""
    for number, line in _short_lines(path, skipped):
        if line.strip():
            try:
                record = json.loads(line, strict=False)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield number, record
            else:
                skipped.add("not a JSON object", number)


def _text_rows(paths, skipped):
    """Yield (line number, lines) of aligned text files."""
    for number, row in enumerate(itertools.zip_longest(*map(_lines, paths)), 1):
        if None in row:
            skipped.add("line missing in another file", number)
        elif any(line is None for _, line in row):
            skipped.add("field too long", number)
        else:
            yield number, [line for _, line in row]


def _short_lines(path, skipped):
    """_lines without those that are None."""
    for number, line in _lines(path):
        if line is None:
            skipped.add("field too long", number)
        else:
            yield number, line


def _lines(path):
    """Yield (line number, line without its end). Only "\\n" ends a line, or files with other breaks inside their
    sentences would fall out of step. Bytes that are not UTF-8 become lone surrogates. A line of MAX_RECORD bytes or
    more is None, and never wholly in memory."""
    with opened(path) as file:
        for number in itertools.count(1):
            line = part = file.readline(MAX_RECORD)
            if not line:
                return
            while len(part) == MAX_RECORD:
                part, line = file.readline(MAX_RECORD) if not part.endswith(b"\n") else b"", None
            if line is not None:
                line = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
                line = line.removeprefix("\ufeff") if number == 1 else line
            yield number, line


@contextmanager
def opened(path):
    """The file, open for reading bytes. Raises UserError where it cannot be opened, or read inside the block."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
