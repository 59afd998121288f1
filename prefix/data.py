"""Sentence pairs: read from files as a stream, encoded once, and kept in a memory-mapped cache on disk.

    files -> read_rows -> clean texts -> tokenizer -> <home>/tokens/<key>/ -> Corpus

A row has one text in each column, and a column is what one bank stands for: a language, as a rule. The files are one
table (.csv or .tsv with a header; .jsonl or .ndjson, whose keys are the columns) or two or more aligned text files, one
for each column. Rows go through one by one, so the files may be of any size. A row that cannot be used is counted by
reason in `Skipped`; it stops nothing.

The cache of R rows in C columns, whose cell number row * C + column is the text of that row in that column:

    tokens.bin, text.bin   the ids and the UTF-8 bytes of all cells, one after another
    index.bin              (R * C + 1, 2) int64: where each cell begins in tokens.bin (in ids) and text.bin (in bytes)
    split.bin              (R,) uint8: each row's number in minigpt.splits.SPLITS
    meta.json              the columns, what was skipped, and the files' sizes; written last
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
from array import array
from collections import deque
from contextlib import ExitStack, contextmanager
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
FIRST_OBJECTS = 1000  # of JSON lines: among them a column must turn up
CACHE_FORMAT = 1
FILES = ("tokens.bin", "text.bin", "index.bin", "split.bin")


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
    return LINE_BREAKS.sub(" ", text).strip()


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
    lines, again = _lines(path), deque()
    while True:
        taken = []
        try:
            fields = next(csv.reader(_take_lines(lines, again, taken), strict=True), None)
        except csv.Error:
            texts = [line for _, line in taken]
            too_long = None in texts or sum(map(len, texts)) > MAX_FIELD
            fault = "field too long" if too_long else _damage("".join(texts)) or "quotes do not match"
            skipped.add(fault, taken[0][0])
            again.extendleft(reversed(taken[1:]))
            continue
        if fields is None:
            return
        yield taken[0][0], fields


def _take_lines(lines, again, taken):
    """Yield the lines of one record to csv.reader, those in `again` first, and keep them in `taken`."""
    size = 0
    for number, line in iter(lambda: again.popleft() if again else next(lines, None), None):
        taken.append((number, line))
        size += MAX_RECORD if line is None else len(line)
        if size >= MAX_RECORD or len(taken) > MAX_LINES:
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
    with _opened(path) as file:
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
def _opened(path):
    try:
        with open(path, "rb") as file:
            yield file
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
        with _opened(path) as file:
            stat, start = os.fstat(file.fileno()), hashlib.sha256(file.read(1 << 16)).hexdigest()
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
    """Write the files of a cache, row by row."""
    skipped, n_rows, n_tokens, n_bytes = Skipped(), 0, 0, 0
    small = tokenizer.n_vocab <= 1 << 16
    bar = tqdm(total=limit, unit=" rows", desc="encoding", disable=not sys.stderr.isatty(), file=sys.stderr)
    with ExitStack() as stack, bar:
        tokens, text, index, split = (stack.enter_context(open(directory / name, "wb")) for name in FILES)
        index.write(array("q", [0, 0]))
        for line, texts in read_rows(paths, columns, skipped):
            ids = [tokenizer.encode(cell) for cell in texts]
            if sum(sorted(map(len, ids))[-2:]) + 1 > max_tokens:  # the row's longest pair, with its separator
                skipped.add(f"too long (over {max_tokens} tokens)", line)
                continue
            for cell_ids, cell in zip(ids, map(str.encode, texts)):
                tokens.write(array("H" if small else "i", cell_ids))
                text.write(cell)
                n_tokens, n_bytes = n_tokens + len(cell_ids), n_bytes + len(cell)
                index.write(array("q", [n_tokens, n_bytes]))
            split.write(bytes([SPLITS.index(split_of(next(filter(None, texts))))]))
            n_rows += 1
            bar.update()
            if n_rows == limit:
                break
    if not n_rows:
        faults = "; ".join(skipped.report()) or "there is none at all"
        raise UserError(f"{' '.join(map(str, paths))}: no row that can be used: {faults}")
    sizes = {name: (directory / name).stat().st_size for name in FILES}
    meta = {"columns": columns, "skipped": skipped.report(), "dtype": "uint16" if small else "int32", "sizes": sizes}
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


class Corpus:
    """The usable rows of some files, encoded: a view of a cache on disk.

    columns: their names. skipped: a line for each reason for which rows were left out. Rows are in the order of the
    files, numbered from 0 without the skipped ones."""

    def __init__(self, directory):
        """Raises OSError, ValueError, KeyError or TypeError where `directory` is not a whole cache."""
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (directory / name).stat().st_size != meta["sizes"][name]:
                raise ValueError(f"{directory / name} is damaged")
        self.columns, self.skipped = tuple(meta["columns"]), list(meta["skipped"])
        dtypes = (meta["dtype"], np.uint8, np.int64, np.uint8)
        maps = [np.memmap(directory / name, dtype, mode="r") for name, dtype in zip(FILES, dtypes)]
        self._tokens, self._text, self._index, self._split = map(np.asarray, maps)  # plain arrays slice faster
        self._index = self._index.reshape(-1, 2)

    def __len__(self):
        return len(self._split)

    def fingerprint(self):
        """A short name for all that is in here: the same wherever the files lie."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self._tokens, self._text, self._index, self._split):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def rows(self, split):
        """The numbers of the rows of "train", "validation" or "test", in order: (n,) int64."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def ids(self, row, column):
        """The tokens of a row in the column of that number: (T,) int64, T = 0 where that side is empty."""
        cell = int(row) * len(self.columns) + int(column)
        return self._tokens[self._index[cell, 0] : self._index[cell + 1, 0]].astype(np.int64)

    def text(self, row, column):
        """The text of a row in the column of that number, cleaned, "" where that side is empty."""
        cell = int(row) * len(self.columns) + int(column)
        return self._text[self._index[cell, 1] : self._index[cell + 1, 1]].tobytes().decode()

    def examples(self, split):
        """All pairs of sides that are not empty, each both ways round: (n, 3) int32 of row, source column and target
        column, in the order of the rows."""
        C, rows, ends = len(self.columns), self.rows(split), self._index[:, 1]
        filled = [ends[rows * C + c] < ends[rows * C + c + 1] for c in range(C)]
        pairs = np.array(list(itertools.permutations(range(C), 2)))  # (C * (C - 1), 2)
        at, pair = np.nonzero(np.stack([filled[s] & filled[t] for s, t in pairs], axis=1))  # row by row
        examples = np.empty((len(at), 3), np.int32)
        examples[:, 0], examples[:, 1:] = rows[at], pairs[pair]
        return examples


def sample_rows(rows, n):
    """n rows of an array, drawn from all of it and always the same, in order; all if there are no more than n."""
    if len(rows) <= n:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), size=n, replace=False))]
