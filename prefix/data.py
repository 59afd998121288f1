"""Sentence pairs: read from files as a stream, encoded once, and kept in a memory-mapped cache on disk.

    files -> read_rows -> clean texts -> tokenizer -> <home>/tokens/<key>/ -> Corpus

A row has one text in each column, and a column is what one bank stands for: a language, as a rule. The files are one
table (.csv, .tsv with a header; .jsonl or .ndjson, whose keys are the columns) or two or more aligned text files, one
for each column. Neither reading nor encoding ever holds more than a few thousand rows, so the files may be of any
size. A row that cannot be used is counted by reason in `Skipped`; it stops nothing.

The cache of C columns and R rows; the cell of a row and column is number row * C + column:

    tokens.bin, text.bin                  the ids and the UTF-8 texts of all cells, one after another
    tokens.offsets.bin, text.offsets.bin  (R * C + 1,) int64: where each cell begins, and where the last one ends
    split.bin                             (R,) uint8: each row's number in minigpt.splits.SPLITS
    meta.json                             the columns, what was skipped, and the files' sizes; written last
"""

import atexit
import csv
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections import deque
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt import checkpoint
from minigpt.errors import UserError
from minigpt.splits import SPLITS, split_of
from prefix.banks import MAX_BANKS

TABLES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json"}
LINE_BREAKS = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # those of str.splitlines

MAX_FIELD = 100_000  # characters
MAX_RECORD, MAX_LINES = 1 << 20, 100  # bytes and lines of one row; a quote still open after them was never closed
TOO_LONG, UNBALANCED = "field too long", "quotes do not match"
FIRST_OBJECTS = 1000  # of JSON lines: where a column must have turned up

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 1_000_000  # encoded at a time
CACHE_FORMAT = 1
FILES = ("tokens.bin", "tokens.offsets.bin", "text.bin", "text.offsets.bin", "split.bin")


class Skipped:
    """Counts the rows that cannot be used: how many for each reason, and the line of the first."""

    def __init__(self):
        self.counts = {}  # reason: [rows, first line]

    def add(self, reason, line):
        self.counts.setdefault(reason, [0, line])[0] += 1

    def report(self):
        return [
            f"{rows:,} row{'s' * (rows != 1)} skipped: {reason} (first at line {line})"
            for reason, (rows, line) in self.counts.items()
        ]


# Columns: which there are, and which to read


def resolve_columns(paths, columns=None):
    """The columns to read from these files, a tuple of names: those given or, without any, the first two of a table,
    the extensions of text files. Raises UserError where the files do not have them, or are not files to read."""
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
        if list(columns).count(name) > 1:
            raise UserError(f"{where}: two columns have the name {name!r}: give each its own with --columns")
        if not name or _damage(name):
            raise UserError(f"{where}: {name!r} is no name for a column: choose others with --columns")
    return tuple(columns)


def _layout(paths):
    """ "csv", "tsv", "json" or "text", going by the extensions."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    tables = [TABLES.get(Path(path).suffix.lower()) for path in paths]
    if len(paths) == 1 and tables[0]:
        return tables[0]
    if len(paths) > 1 and not any(tables):
        return "text"
    raise UserError(
        f"{' '.join(map(str, paths))}: expected one {', '.join(TABLES)} file, or two or more text files, one per column"
    )


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
    if not header:
        raise UserError(f"{path}: the file is empty: expected a header that names the columns")
    fault = next(iter(skipped.counts), None) or _damage("".join(header))
    if fault:
        raise UserError(f"{path}: line 1: expected a header that names the columns, in UTF-8: {fault}")
    return header


def _header(records):
    return [clean(name) for name in next(records, (0, []))[1]]


def _keys(path, wanted):
    """The keys of the first JSON objects, up to the one by which there are two, and all that are wanted."""
    keys = {}
    for _, record in itertools.islice(_objects(path, Skipped()), FIRST_OBJECTS):
        keys.update(dict.fromkeys(record))
        if len(keys) > 1 and keys.keys() >= set(wanted or ()):
            break
    return list(keys)


# Reading


def read_rows(paths, columns, skipped):
    """Yield (line number, texts) for each row that can be used: one str per column, two of them or more not empty.

    The line is the row's first, from 1. Rows that cannot be used are added to `skipped`."""
    columns = resolve_columns(paths, columns)
    layout = _layout(paths)
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
    """A text on one line: runs of line breaks are a space, the ends are stripped."""
    return LINE_BREAKS.sub(" ", text).strip()


def _fault(texts):
    """Why these texts are not a row to use; None if they are."""
    if max(map(len, texts)) > MAX_FIELD:
        return TOO_LONG
    return _damage("".join(texts)) or ("empty side" if sum(map(bool, texts)) < 2 else None)


def _damage(text):
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that were not UTF-8 are lone surrogates since _lines
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
    read = _csv_records if TABLES[Path(path).suffix.lower()] == "csv" else _tsv_records
    for line, fields in read(path, skipped):
        if len(fields) > 1 or "".join(fields).strip():
            yield line, fields


def _tsv_records(path, skipped):
    for number, line in _lines(path):
        if line is None:
            skipped.add(TOO_LONG, number)
        else:
            yield number, line.split("\t")


def _csv_records(path, skipped):
    """Each record is read from as many lines as its quotes ask for. Where they lead nowhere (to a quote in the midst
    of a field, to too many lines, to the end), its first line alone is given up: the next record starts below it."""
    lines, again = _lines(path), deque()
    while True:
        taken = []
        try:
            fields = next(csv.reader(_take_lines(lines, again, taken), strict=True), None)
        except csv.Error:
            skipped.add(_csv_fault(taken), taken[0][0])
            again.extendleft(reversed(taken[1:]))
            continue
        if fields is None:
            return
        yield taken[0][0], fields


def _take_lines(lines, again, taken):
    """Yield the lines of one record to csv.reader, those in `again` first, keeping them in `taken`."""
    size = 0
    while again or (following := next(lines, None)):
        number, line = taken_line = again.popleft() if again else following
        taken.append(taken_line)
        size += MAX_RECORD if line is None else len(line)
        if size >= MAX_RECORD or len(taken) > MAX_LINES:
            raise csv.Error
        yield line.replace("\r", "\v") + "\n"  # to csv a lone \r ends a row; to `clean` the two are the same


def _csv_fault(taken):
    lines = [line for _, line in taken]
    if None in lines or sum(map(len, lines)) > MAX_FIELD:
        return TOO_LONG
    return "NUL byte" if "\0" in "".join(lines) else UNBALANCED  # csv refuses NUL before Python 3.11


def _json_rows(path, columns, skipped):
    """Yield (line number, fields); a column that is missing or null is empty, a number or truth is as JSON writes it."""
    for line, record in _objects(path, skipped):
        values = [record.get(name) for name in columns]
        if any(isinstance(value, (list, dict)) for value in values):
            skipped.add("not a text", line)
        else:
            yield line, ["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]


def _objects(path, skipped):
    """Yield (line number, dict) of a JSON lines file."""
    for number, line in _lines(path):
        if line is None:
            skipped.add(TOO_LONG, number)
        elif line.strip():
            try:
                record = json.loads(line, strict=False)
            except (ValueError, RecursionError):
                skipped.add("invalid JSON", number)
                continue
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
            skipped.add(TOO_LONG, number)
        else:
            yield number, [line for _, line in row]


def _lines(path):
    """Yield (line number, line without its end). Only "\\n" ends a line, or files with other breaks inside their
    sentences would fall out of step. Bytes that are not UTF-8 become lone surrogates. A line of more than MAX_RECORD
    bytes is None, and never wholly in memory."""
    try:
        with open(path, "rb") as file:
            for number in itertools.count(1):
                line = part = file.readline(MAX_RECORD)
                if not line:
                    return
                while len(part) == MAX_RECORD and not part.endswith(b"\n"):
                    part, line = file.readline(MAX_RECORD), None
                if line is not None:
                    line = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
                    line = line.removeprefix("\ufeff") if number == 1 else line
                yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


# The cache


def load(paths, columns, tokenizer, limit=None, max_tokens=384, home=None):
    """The Corpus of these files: from the cache if it was made before, else read, encoded and cached now.

    limit: usable rows at most; nothing is read beyond them. max_tokens: of the longest pair, with its separator.
    home: by default the checkpoints' own. Raises UserError where the files cannot be read or hold no usable row."""
    columns = resolve_columns(paths, columns)
    folder, key = Path(home or checkpoint.home()) / "tokens", _key(paths, columns, tokenizer, limit, max_tokens)
    corpus = _whole(folder / key)
    if corpus is not None:
        return corpus
    folder = _writable(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
            built = Path(temporary) / "built"
            built.mkdir()
            _build(built, paths, columns, tokenizer, limit, max_tokens)
            _publish(built, folder / key)
        return Corpus(folder / key)
    except OSError as error:
        fault = f"{folder}: the token cache cannot be written: {error.strerror}"
        raise UserError(f"{fault}; make room there, or let MINIGPT_HOME name another folder") from error


def _key(paths, columns, tokenizer, limit, max_tokens):
    """A name for everything that decides what a cache holds."""
    files = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                stat, start = os.fstat(file.fileno()), hashlib.sha256(file.read(1 << 16)).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        files.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns, start])
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, files, columns, limit, max_tokens]).encode())
    for rank, i in enumerate(tokenizer.ids):
        key.update(f"{i} {tokenizer.encoding.decode_single_token_bytes(rank)}\n".encode())
    return key.hexdigest()[:32]


def _whole(directory):
    """The Corpus in `directory`, or None where there is none or it is damaged."""
    try:
        return Corpus(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _writable(folder):
    """`folder`, made where it is missing; where it cannot be written, a temporary one that goes with this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = tempfile.mkdtemp(prefix="minigpt-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        print(f"{folder} cannot be written ({error.strerror}): caching tokens in {temporary} for now", file=sys.stderr)
        return Path(temporary)


def _publish(built, directory):
    """Rename a finished cache into its place, unless another process was first: its cache is the same."""
    if directory.exists() and _whole(directory) is None:
        directory.rename(built.parent / "damaged")
    try:
        built.rename(directory)
    except OSError:
        if _whole(directory) is None:
            raise


def _build(directory, paths, columns, tokenizer, limit, max_tokens):
    """Write the files of a cache, chunk by chunk."""
    skipped, n_rows = Skipped(), 0
    rows = read_rows(paths, columns, skipped)
    dtype = np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.int32)
    bar = tqdm(total=limit, unit=" rows", desc="encoding", disable=not sys.stderr.isatty(), file=sys.stderr)
    with ExitStack() as stack, bar:
        tokens, texts = (_Cells(stack, directory, name) for name in ("tokens", "text"))
        split = stack.enter_context(open(directory / "split.bin", "wb"))
        while limit is None or n_rows < limit:
            chunk = _take_rows(rows, CHUNK_ROWS if limit is None else min(CHUNK_ROWS, limit - n_rows))
            if not chunk:
                break
            kept, ids = _encode(chunk, tokenizer, max_tokens, skipped)
            tokens.append(ids, np.array(list(itertools.chain.from_iterable(ids)), dtype).tobytes())
            encoded = [text.encode() for row in kept for text in row]
            texts.append(encoded, b"".join(encoded))
            split.write(bytes(SPLITS.index(split_of(next(filter(None, row)))) for row in kept))
            n_rows += len(kept)
            bar.update(len(kept))
    if not n_rows:
        faults = "; ".join(skipped.report()) or "there is none below the header"
        raise UserError(f"{' '.join(map(str, paths))}: no row that can be used: {faults}")
    sizes = {name: (directory / name).stat().st_size for name in FILES}
    meta = {"columns": columns, "skipped": skipped.report(), "dtype": dtype.name, "sizes": sizes}
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


class _Cells:
    """Writes cells of different lengths: all of them to <name>.bin, where each begins to <name>.offsets.bin."""

    def __init__(self, stack, directory, name):
        self.data = stack.enter_context(open(directory / f"{name}.bin", "wb"))
        self.offsets = stack.enter_context(open(directory / f"{name}.offsets.bin", "wb"))
        self.end = 0
        self.offsets.write(np.zeros(1, np.int64).tobytes())

    def append(self, cells, data):
        """data: the bytes of all `cells`; a cell's length counts in its own items."""
        ends = self.end + np.cumsum([len(cell) for cell in cells], dtype=np.int64)
        self.offsets.write(ends.tobytes())
        self.data.write(data)
        self.end = ends[-1] if len(ends) else self.end


def _take_rows(rows, n):
    """The next n rows, or fewer if they are long, as a list."""
    chunk, characters = [], 0
    for line, texts in rows:
        chunk.append((line, texts))
        characters += sum(map(len, texts))
        if len(chunk) == n or characters > CHUNK_CHARACTERS:
            break
    return chunk


def _encode(chunk, tokenizer, max_tokens, skipped):
    """Rows (line, texts) -> the texts of those that are short enough, and the ids of their cells."""
    cells = iter(tokenizer.encode_batch([text for _, texts in chunk for text in texts]))
    kept, kept_ids = [], []
    for line, texts in chunk:
        ids = list(itertools.islice(cells, len(texts)))
        longest = sum(sorted(map(len, ids))[-2:]) + 1  # the row's longest pair, with its separator
        if longest > max_tokens:
            skipped.add(f"too long (over {max_tokens} tokens)", line)
        else:
            kept.append(texts)
            kept_ids += ids
    return kept, kept_ids


class Corpus:
    """The usable rows of some files, encoded: a view of a cache on disk.

    columns: their names. skipped: a line for each reason for which rows were left out. Rows have the order of the
    files and are numbered from 0 without the skipped ones."""

    def __init__(self, directory):
        """Raises OSError, ValueError, KeyError or TypeError where `directory` is not a whole cache."""
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (directory / name).stat().st_size != meta["sizes"][name]:
                raise ValueError(f"{directory / name} is damaged")
        self.columns, self.skipped = tuple(meta["columns"]), list(meta["skipped"])
        dtypes = (meta["dtype"], np.int64, np.uint8, np.int64, np.uint8)
        maps = (np.memmap(directory / name, dtype, mode="r") for name, dtype in zip(FILES, dtypes))
        self._tokens, self._token_offsets, self._text, self._text_offsets, self._split = map(np.asarray, maps)

    def __len__(self):
        return len(self._split)

    def rows(self, split):
        """The numbers of the rows of "train", "validation" or "test", in order: (n,) int64."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def ids(self, row, column):
        """The tokens of a row in the column of that number: (T,) int64, T = 0 where that side is empty."""
        cell = int(row) * len(self.columns) + int(column)
        return self._tokens[self._token_offsets[cell] : self._token_offsets[cell + 1]].astype(np.int64)

    def text(self, row, column):
        cell = int(row) * len(self.columns) + int(column)
        return self._text[self._text_offsets[cell] : self._text_offsets[cell + 1]].tobytes().decode()

    def examples(self, split):
        """Each pair of different sides that are not empty, both ways round: (n, 3) int32 of row, source column and
        target column, in the order of the rows."""
        C, rows = len(self.columns), self.rows(split)
        filled = [self._text_offsets[rows * C + c] < self._text_offsets[rows * C + c + 1] for c in range(C)]
        pairs = np.array(list(itertools.permutations(range(C), 2)))  # (C * (C - 1), 2)
        at, pair = np.nonzero(np.stack([filled[s] & filled[t] for s, t in pairs], axis=1))  # row by row
        examples = np.empty((len(at), 3), np.int32)
        examples[:, 0], examples[:, 1:] = rows[at], pairs[pair]
        return examples
