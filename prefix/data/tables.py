"""Tables and texts from strangers, read as a stream: the one door for them.

    files -> lines -> records: (line number, values), one value for each column

The first line tells the format where the name does not. A file of another kind is a UserError that says what it is.
A record that cannot be read is a str, the reason, in place of its values.
"""

import codecs
import csv
import itertools
import json
import re
from collections import deque
from pathlib import Path

from minigpt.files import UserError, reading

MAX_LINES = 100  # of one record: a quote still open after them was never closed
FIRST_LINES = 1000  # of JSON: among them a column must turn up
JSON_NAMES = (".jsonl", ".ndjson", ".json")
TABLE_NAMES = (".csv", ".tsv", *JSON_NAMES)

OTHER_KINDS = {  # how they begin
    rb"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV",
    rb"\x1f\x8b": "a gzip archive: unpack it with gunzip",
    rb"PAR1": "a Parquet file: save it as CSV or JSON lines",
    rb"(?i)<(!doctype|\?xml|!--|(html|head|body|meta|script|tmx)\b)": "a web page or XML: download or save the table",
    rb"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32 text: make it UTF-8 with `iconv -f UTF-32 -t UTF-8`",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text: make it UTF-8 with `iconv -f UTF-16 -t UTF-8`",
    rb"[^\n]*\0": "no text: there are NUL bytes in its first line",
    rb"\[\s*\{": "a JSON array: write one object a line, as `jq -c '.[]'` does",
}


def records(paths):
    """Yield (line number, values) for each record of a table, of JSON lines or of aligned text files.

    The first is (line number, names of the columns): line 1 of a table, or 0 where no line holds them. The values are
    str, or what JSON has. Of a record that cannot be read they are a str that says why."""
    firsts = [next((line for _, line in lines_of(path) if line.strip()), "") for path in paths]  # opens each of them
    first, suffixes = firsts[0], [Path(path).suffix.lower() for path in paths]
    if len(paths) > 1 and not set(suffixes) & set(TABLE_NAMES):
        return _aligned(paths)
    if len(paths) == 1 and (suffixes[0] in JSON_NAMES or first.startswith("{")):
        return _objects(paths[0])
    if len(paths) == 1 and (suffixes[0] in TABLE_NAMES or "\t" in first):
        return _fields(paths[0], first, ",;\t|" if suffixes[0] == ".csv" else "\t,;|")
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
            yield number, "not a JSON object"


def _object(line):
    """The dict in a line of JSON, or None. Of the hub's {"translation": {"en": ..., "fr": ...}} it is the inner one."""
    try:
        found = json.loads(line, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("translation"), dict):
        found = found["translation"]
    return found if isinstance(found, dict) else None


def _fields(path, first, delimiters):
    """Yield the records of a table, without blank lines. The delimiter is the first of these that line 1 has.

    Most .tsv files have no quoting: a quote is a character there, unless line 1 is quoted throughout, or a field is
    quoted with doubled quotes inside, as csv writes it."""
    delimiter = next((mark for mark in delimiters if mark in first), delimiters[0])
    if delimiter != "\t" or first.startswith('"') and '"\t"' in first:
        found = _quoted(lines_of(path), delimiter)
    else:
        found = ((number, [*map(_undoubled, line.split(delimiter))]) for number, line in lines_of(path))
    for number, fields in found:
        if len(fields) > 1 or "".join(fields).strip():
            yield number, fields


def _undoubled(field):
    inside = field[1:-1]
    quoted = field[:1] == field[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else field


def _quoted(lines, delimiter):
    """Yield records of as many lines as their quotes ask for. Where these do not match (text follows a closing quote,
    or none closes in MAX_LINES), only the first line is given up: the next record starts below it."""
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
    """Yield (line number, line without its end), behind a byte-order mark. Only "\\n" ends a line, or files with other
    breaks inside their sentences would fall out of step. Bytes that are not UTF-8 become lone surrogates. Raises
    UserError where the file cannot be read, or is of a kind that holds no plain text."""
    with reading(path, "UTF-8 text"), open(path, "rb") as file:
        start = file.read(512)
        text = start.removeprefix(codecs.BOM_UTF8)
        for kind, what in OTHER_KINDS.items():
            if re.match(kind, text.lstrip()):
                raise UserError(f"{path}: expected UTF-8 text; this is {what}")
        file.seek(len(codecs.BOM_UTF8) if text != start else 0)
        for number, line in enumerate(file, 1):
            yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
