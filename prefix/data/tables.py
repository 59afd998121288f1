"""Tables and texts from strangers, read as a stream: the one door for them.

    files -> lines -> records: (line number, values), one value for each column

The first lines tell the format, more than the name does. A file of another kind is a UserError that says what it is.
A record that cannot be read is a str, the reason, in place of its values. Memory does not grow with the file.
"""

import codecs
import csv
import itertools
import json
import os
import re
from collections import deque
from contextlib import contextmanager
from pathlib import Path

from minigpt.files import UserError, reading

MAX_FIELD = 100_000  # characters
MAX_LINE = 1 << 20  # bytes
TOO_LONG = b"x" * (MAX_FIELD + 1)  # stands for a longer line: too long a field in any format
MAX_LINES = 100  # of one record: a quote still open after them was never closed; as many tell the format
FIRST_LINES = 1000  # of JSON: among them a column must turn up
JSON_NAMES = (".jsonl", ".ndjson", ".json")
TABLE_NAMES = (".csv", ".tsv", *JSON_NAMES)

OTHER_KINDS = {  # how they begin
    rb"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV",
    rb"\x1f\x8b": "a gzip archive: unpack it with gunzip",
    rb"PAR1": "a Parquet file: save it as CSV or JSON lines",
    rb"(?i)<(!doctype|\?xml|!--|(html|head|body|meta|script|tmx)\b)": "a web page or XML: download or save the table",
    rb"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text: make it UTF-8 with `iconv -f UTF-16 -t UTF-8`",
    rb"[^\n]*\0": "no text: there are NUL bytes in its first line",
    rb"\[\s*\{": "a JSON array: write one object a line, as `jq -c '.[]'` does",
}


def records(paths):
    """Yield (line number, values) for each record of a table, of JSON lines or of aligned text files.

    The first is (line number, names of the columns): line 1 of a table, or 0 where no line holds them. The values are
    str, or what JSON has. Of a record that cannot be read they are a str that says why."""
    heads = [list(itertools.islice(lines_of(path), MAX_LINES)) for path in paths]  # opens each of them
    first = next((line for _, line in heads[0] if line.strip()), "")
    suffixes = [Path(path).suffix.lower() for path in paths]
    if len(paths) > 1 and not set(suffixes) & set(TABLE_NAMES):
        return _aligned(paths)
    if len(paths) == 1 and (suffixes[0] in JSON_NAMES or _object(first)):
        return _objects(paths[0])
    if len(paths) == 1 and (suffixes[0] in TABLE_NAMES or "\t" in first):
        return _fields(lines_of(paths[0]), *_dialect(heads[0], comma=suffixes[0] == ".csv"))
    expected = f"expected one table, named {', '.join(TABLE_NAMES)}, or two or more text files, one per column"
    raise UserError(f"{' '.join(map(str, paths))}: {expected}")


def _aligned(paths):
    """After a line that is missing in one of the files every pair would be wrong: the lines are counted first."""
    yield 0, [Path(path).suffix[1:] for path in paths]
    counts = [sum(1 for _ in lines_of(path)) for path in paths]
    if len(set(counts)) > 1:
        told = ", ".join(f"{path} has {n:,} line{'s' * (n != 1)}" for path, n in zip(paths, counts))
        raise UserError(f"{told}: line by line they must be translations of each other")
    for row in zip(*map(lines_of, paths)):
        yield row[0][0], [line for _, line in row]


def _objects(path):
    """Yield the records of JSON lines. The columns are all keys in the first lines."""
    lines = itertools.islice(lines_of(path), FIRST_LINES)
    names = list(dict.fromkeys(key for _, line in lines for key in _object(line) or ()))
    if not names:
        example = '{"en": "...", "fr": "..."}'
        raise UserError(f"{path}: expected JSON lines, an object such as {example} on each; the first are none")
    yield 0, names
    for number, line in lines_of(path):
        if (found := _object(line)) is not None:
            yield number, [found.get(name) for name in names]
        elif line.strip():
            yield number, "field too long" if len(line) > MAX_FIELD else "not a JSON object"


def _object(line):
    """The dict in a line of JSON, or None. Of the hub's {"translation": {"en": ..., "fr": ...}} it is the inner one."""
    try:
        found = json.loads(line, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("translation"), dict):
        found = found["translation"]
    return found if isinstance(found, dict) else None


def _dialect(lines, comma):
    """(delimiter, whether quotes are quoting): so that the most records have as many fields as the first, at least two.

    A tie goes to the delimiter of the file's name. Most .tsv files have no quoting: a quote is a character there."""
    tabs, others = [("\t", False), ("\t", True)], [(mark, True) for mark in ",;|"]
    if lines and lines[0][1].startswith('"'):
        tabs.reverse()

    def agreement(dialect):
        found = [fields for _, fields in _fields(lines, *dialect)]
        widths = [0 if isinstance(fields, str) else len(fields) for fields in found]
        return widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0

    return max(others + tabs if comma else tabs + others, key=agreement)


def _fields(lines, delimiter, quoting):
    """Yield the records of a table, without blank lines."""
    if quoting:
        found = _quoted(lines, delimiter)
    else:
        found = ((number, list(map(_undoubled, line.split(delimiter)))) for number, line in lines)
    for number, fields in found:
        if len(fields) > 1 or "".join(fields).strip():
            yield number, fields


def _undoubled(field):
    """A field of a table without quoting. One with doubled quotes inside quotes was quoted all the same."""
    inside = field[1:-1]
    if '""' in inside and field[0] == field[-1] == '"' and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return field


def _quoted(lines, delimiter):
    """Yield records of as many lines as their quotes ask for. Where these do not match (text follows a closing quote,
    or none closes in MAX_LINES), only the first line is given up: the next record starts below it."""
    lines = iter(lines)
    ahead = deque(itertools.islice(lines, MAX_LINES))
    while ahead:
        # To csv a lone \r ends a record; to rows.clean both are line breaks.
        texts = (line.replace("\r", "\v") + "\n" for _, line in ahead)
        reader, n_lines = csv.reader(texts, delimiter=delimiter, skipinitialspace=True, strict=True), 1
        try:
            fields = next(reader)
            n_lines = reader.line_num
        except csv.Error as error:
            fields = "field too long" if "limit" in str(error) else "quotes do not match"
        yield ahead[0][0], fields
        for _ in range(n_lines):
            ahead.popleft()
        ahead.extend(itertools.islice(lines, n_lines))


def lines_of(path):
    """Yield (line number, line without its end). Only "\\n" ends a line, or files with other breaks inside their
    sentences would fall out of step. Bytes that are not UTF-8 become lone surrogates."""
    with open_bytes(path) as file:
        for number in itertools.count(1):
            line = part = file.readline(MAX_LINE)
            if not line:
                return
            while len(part) == MAX_LINE and not part.endswith(b"\n"):
                line, part = TOO_LONG, file.readline(MAX_LINE)
            yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


@contextmanager
def open_bytes(path):
    """The file, open for reading bytes, behind a byte-order mark. Raises UserError where that fails, or where it is of
    a kind that holds no plain text."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    with reading(path, "UTF-8 text"), open(path, "rb") as file:
        start = file.read(512)
        text = start.removeprefix(codecs.BOM_UTF8)
        for kind, what in OTHER_KINDS.items():
            if re.match(kind, text.lstrip()):
                raise UserError(f"{path}: expected UTF-8 text; this is {what}")
        file.seek(len(codecs.BOM_UTF8) if text != start else 0)
        yield file
