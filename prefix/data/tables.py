"""Files of texts from strangers, read as a stream: the one door for them.

    file -> lines -> records: (line number, fields) of a table, or (line number, dict) of JSON lines

The first lines tell the format, more than the name does: the delimiter, whether quotes are quoting, JSON. A file of
another kind (an archive, a workbook, a web page, UTF-16) is a UserError that says what it is and what to do. A record
that cannot be read is counted by reason in `Skipped`; it stops nothing. Memory does not grow with the file.
"""

import codecs
import csv
import itertools
import json
import math
import re
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minigpt.files import UserError

MAX_FIELD = 100_000  # characters
MAX_RECORD, MAX_LINES = 1 << 20, 100  # bytes and lines of one record; a quote still open after them was never closed
HEAD_LINES = 100  # that tell the format
JSON_LINES, JSON_NAMES = "json", (".jsonl", ".ndjson", ".json")
TEXT = "text"  # aligned files, one for each column

OTHER_KINDS = {  # how they begin
    rb"PK\x03\x04": "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV",
    rb"\x1f\x8b": "a gzip archive: unpack it with gunzip",
    rb"(?s)BZh\d1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!\x1a|.{257}ustar": "a compressed file: unpack it",
    rb"PAR1|ARROW1|\x89HDF|Obj\x01": "a Parquet, Arrow, HDF5 or Avro file: save it as CSV or JSON lines",
    rb"SQLite format 3": "an SQLite database: export a table with `sqlite3 -csv -header`",
    rb"%PDF-|\{\\rtf|\xd0\xcf\x11\xe0": "a PDF, RTF or old Office document: save the table in it as CSV",
    rb"(?i)<(!doctype|!--|(html|head|body|meta|script)\b)": "a web page in place of the file: download the file itself",
    rb"(?i)<(\?xml|tmx|xliff)\b": "XML, perhaps TMX: save its sentences as CSV or TSV",
    rb"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    rb"\xff\xfe|\xfe\xff|[^\0\n]\0[^\0\n]\0|\0[^\0\n]\0[^\0\n]": "UTF-16 text: make it UTF-8 with "
    "`iconv -f UTF-16 -t UTF-8`",
    rb"[^\n]+\r[^\n]+\r[^\n]+\Z": "text with the line ends of old Macs: turn them by `tr '\\r' '\\n'`",
    rb"\x80[\x02-\x05]|\x93NUMPY": "a pickle or a NumPy array, which are not read: save it as CSV or JSON lines",
}


class Skipped:
    """Counts the rows that cannot be used: how many for each reason, and the line of the first."""

    def __init__(self):
        self.counts, self.notes = {}, []  # reason: [rows, first line]; what else there is to tell

    def add(self, reason, line):
        self.counts.setdefault(reason, [0, line])[0] += 1

    def report(self):
        """The notes, and one line for each reason."""
        told = "{:,} row{} skipped: {} (first at line {})"
        return self.notes + [told.format(n, "s" * (n != 1), why, line) for why, (n, line) in self.counts.items()]


class Dialect(NamedTuple):
    """How a table is written. Most .tsv files have no quoting: a quotation mark there is a character as any other."""

    delimiter: str
    quoting: bool = True


# Which format


def layout_of(paths):
    """-> (layout, the first lines of the first file). The layout is TEXT, JSON_LINES or a Dialect. Raises UserError
    where the files are none of these."""
    lines, *_ = map(_head, paths)  # which opens each of them
    suffixes = [Path(path).suffix.lower() for path in paths]
    where, known = " ".join(map(str, paths)), (".csv", ".tsv", *JSON_NAMES)
    if len(paths) > 1 and not set(suffixes) & set(known):
        return TEXT, lines
    first = next((line for _, line in lines if line and line.strip()), "")
    if len(paths) == 1:
        if suffixes[0] in JSON_NAMES and first.lstrip().startswith("["):
            fix = "python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]'"
            raise UserError(f"{where}: a JSON array; expected one object a line: `{fix} < array.json > lines.jsonl`")
        if suffixes[0] in JSON_NAMES or parsed(first) is not None:
            return JSON_LINES, lines
        if suffixes[0] in known or "\t" in first:
            return _dialect(lines, own="," if suffixes[0] == ".csv" else "\t"), lines
    raise UserError(f"{where}: expected one table, named {', '.join(known)}, or two or more text files, one per column")


def _dialect(lines, own):
    """The Dialect in which the most lines have as many fields as the first, at least two. own: the delimiter that the
    file's name stands for; it wins a tie."""
    text = "".join(line or "" for _, line in lines)
    tabs, others = [Dialect("\t", False), Dialect("\t")], list(map(Dialect, ",;|"))
    if text.startswith('"') or '""' in text:
        tabs.reverse()

    def agreement(dialect):
        skipped = Skipped()
        widths = [len(fields) for _, fields in records(lines, dialect, skipped)]
        if not widths or widths[0] < 2:
            return -math.inf
        return 2 * widths.count(widths[0]) - len(widths) - sum(n for n, _ in skipped.counts.values())

    return max(tabs + others if own == "\t" else others + tabs, key=agreement)


# Records


def records(lines, dialect, skipped):
    """Yield (line number, fields) of a table, its header first, without blank lines. lines: as `lines_of` gives."""
    if dialect.quoting:
        found = _quoted(lines, dialect.delimiter, skipped)
    else:
        found = ((number, _split(line)) for number, line in _short(lines, skipped))
    for line, fields in found:
        if len(fields) > 1 or "".join(fields).strip():
            yield line, fields


def _split(line):
    """The fields of a line without quoting. A field with doubled quotes inside quotes is quoted all the same."""
    fields = line.split("\t")
    if '""' in line:
        for i, field in enumerate(fields):
            inside = field[1:-1]
            if field[:1] == field[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', ""):
                fields[i] = inside.replace('""', '"')
    return fields


def _quoted(lines, delimiter, skipped):
    """A record takes as many lines as its quotes ask for. Where these do not match (text follows a closing quote, or
    none closes within MAX_LINES), only the record's first line is given up: the next record starts below it."""
    lines, again, taken = iter(lines), deque(), []
    while True:
        try:
            source = _take(lines, again, taken)
            for fields in csv.reader(source, delimiter=delimiter, skipinitialspace=True, strict=True):
                yield taken[0][0], fields
                taken.clear()
            return
        except csv.Error:
            texts = [line for _, line in taken]
            too_long = None in texts or sum(map(len, texts)) > MAX_FIELD
            fault = "field too long" if too_long else damage("".join(texts)) or "quotes do not match"
            skipped.add(fault, taken[0][0])
            again.extendleft(reversed(taken[1:]))
            taken.clear()


def _take(lines, again, taken):
    """Yield lines to csv.reader, those in `again` first. `taken` keeps those of the current record."""
    for number, line in iter(lambda: again.popleft() if again else next(lines, None), None):
        taken.append((number, line))
        if line is None or len(taken) > MAX_LINES or sum(len(text) for _, text in taken) > MAX_RECORD:
            raise csv.Error
        yield line.replace("\r", "\v") + "\n"  # to csv a lone \r ends a record; to rows.clean both are line breaks


def objects(lines, skipped):
    """Yield (line number, dict) of JSON lines."""
    for number, line in _short(lines, skipped):
        if line.strip():
            record = parsed(line)
            if record is None:
                skipped.add("not a JSON object", number)
            else:
                yield number, record


def parsed(line):
    """The dict in a line of JSON, or None. Of the hub's {"translation": {"en": ..., "fr": ...}} it is the inner one."""
    try:
        record = json.loads(line, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("translation"), dict):
        record = record["translation"]
    return record if isinstance(record, dict) else None


def aligned(paths, skipped):
    """Yield (line number, lines) of text files, one for each column. Raises UserError where their lengths differ: after
    a line that is missing in one of them, every pair would be wrong."""
    counts = [sum(1 for _ in lines_of(path)) for path in paths]
    if len(set(counts)) > 1:
        told = ", ".join(f"{path} has {n:,} line{'s' * (n != 1)}" for path, n in zip(paths, counts))
        raise UserError(f"{told}: line by line they must be translations of each other")
    for number, row in enumerate(zip(*map(lines_of, paths)), 1):
        lines = [line for _, line in row]
        if None in lines:
            skipped.add("field too long", number)
        else:
            yield number, lines


# Lines


def _head(path):
    """The first lines, as `lines_of` gives them."""
    found, size = [], 0
    for number, line in lines_of(path):
        found.append((number, line))
        size += len(line or "")
        if len(found) == HEAD_LINES or size > MAX_FIELD:
            break
    return found


def lines_of(path):
    """Yield (line number, line without its end). Only "\\n" ends a line, or files with other breaks inside their
    sentences would fall out of step. Bytes that are not UTF-8 become lone surrogates. A line of MAX_RECORD bytes or
    more is None, and never wholly in memory."""
    with open_bytes(path) as file:
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


def _short(lines, skipped):
    """The lines that are not None."""
    for number, line in lines:
        if line is None:
            skipped.add("field too long", number)
        else:
            yield number, line


def damage(text):
    """Why a text is no text; None if it is one."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode()
    except UnicodeEncodeError:  # lines_of made lone surrogates of the bytes that are not UTF-8
        return "not UTF-8"


@contextmanager
def open_bytes(path):
    """The file, open for reading bytes. Raises UserError where it is missing, cannot be opened, or read inside the
    block, or is of a kind that holds no plain text."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            start = file.read(512).removeprefix(codecs.BOM_UTF8).lstrip()
            for kind, what in OTHER_KINDS.items():
                if re.match(kind, start):
                    raise UserError(f"{path}: expected UTF-8 text; this is {what}")
            file.seek(0)
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
