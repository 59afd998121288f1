"""The token cache: the rows of some files, encoded once and memory-mapped from then on.

    files -> rows.read_rows -> tokenizer -> <home>/tokens/<key>/ -> Corpus

The key is a hash of all that decides what a cache holds: the files (path, size, time), the tokenizer and the
options. A cache is written under another name and then renamed. On opening, the sizes of its files are checked.

The cache of R rows in C columns, whose cell number row * C + column is the text of that row in that column:

    tokens.bin    the ids of all cells, one after another: uint16, or int32 where there are more than 65,536 ids
    index.bin     (R * C + 1,) int64: where each cell begins in tokens.bin
    <split>.bin   (n, 3) int32 for each of splits.SPLITS: its examples, see Corpus.examples
    meta.json     columns, what there is to report, sizes and a checksum of the files above

The ids spell their texts exactly, so the texts themselves are not kept.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt import checkpoint
from minigpt.files import UserError
from prefix.data.rows import NOT_UTF8, TO_UTF8, Skipped, Table, read_rows
from prefix.data.splits import SPLITS, split_of

CACHE_FORMAT = 7
BUILDING, A_WEEK = ".building-", 7 * 86_400  # the names of unfinished caches begin so; seconds
FILES = ("tokens.bin", "index.bin", *(f"{split}.bin" for split in SPLITS))


def load(paths, columns, tokenizer, limit=None, max_tokens=384, home=None):
    """The Corpus of these files: from the cache if it was made before, else read, encoded and cached now.

    limit: usable rows at most; no row is used beyond them. max_tokens: of the longest pair, with its separator.
    home: by default the checkpoints' own. Raises UserError where the files cannot be read or hold no usable row."""
    columns, sources = list(Table(paths).places(columns)), list(map(signature, paths))
    key = json.dumps([CACHE_FORMAT, sources, columns, tokenizer.fingerprint, limit, max_tokens])
    folder = Path(home or checkpoint.home()) / "tokens"
    cache = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is not there, or damaged
        return Corpus(cache, tokenizer)
    shutil.rmtree(cache, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{BUILDING}*"):  # of a program that was killed
            if time.time() - old.stat().st_mtime > A_WEEK:
                shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder) as temporary:
            built = Path(temporary) / "built"
            built.mkdir()
            report = _build(built, paths, columns, tokenizer, limit, max_tokens)
            meta = {"columns": columns, "report": report, "sizes": _sizes(built), "checksum": _checksum(built, columns)}
            (built / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            with suppress(OSError):  # another process was first: both built the same
                built.rename(cache)
        return Corpus(cache, tokenizer)
    except OSError as error:
        remedy = "make room there, or let MINIGPT_HOME name another folder"
        raise UserError(f"{folder}: the token cache cannot be written: {error.strerror}; {remedy}") from error


def signature(path):
    """What tells one state of a file from another without reading it."""
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


def _sizes(directory):
    return [(directory / name).stat().st_size for name in FILES]


def _checksum(directory, columns):
    """A hash of the columns and of all rows."""
    checksum = hashlib.sha256(json.dumps(columns).encode())
    for name in FILES:
        checksum.update(_mapped(directory / name, np.uint8))
    return checksum.hexdigest()[:16]


def _build(directory, paths, columns, tokenizer, limit, max_tokens):
    """Write a cache's files, row by row. Returns a list: a line for each thing that there is to report."""
    skipped, n_rows, n_tokens = Skipped(), 0, 0
    directions, kind = list(itertools.permutations(range(len(columns)), 2)), _dtype(tokenizer).char
    bar = tqdm(total=limit, unit=" rows", desc="encoding", disable=not sys.stderr.isatty(), file=sys.stderr)
    with ExitStack() as stack, bar:
        tokens, index, *splits = (stack.enter_context(open(directory / name, "wb")) for name in FILES)
        index.write(array("q", [0]))
        for line, texts in read_rows(paths, columns, skipped):
            ids = [tokenizer.encode(text) for text in texts]
            if sum(sorted(map(len, ids))[-2:]) + 1 > max_tokens:  # the row's longest pair, with its separator
                skipped.add(f"too long (over {max_tokens} tokens)", line)
                continue
            for cell in ids:
                n_tokens += len(cell)
                tokens.write(array(kind, cell))
                index.write(array("q", [n_tokens]))
            examples = [(n_rows, source, target) for source, target in directions if ids[source] and ids[target]]
            split = split_of(next(filter(None, texts)))
            splits[SPLITS.index(split)].write(array("i", itertools.chain(*examples)))
            n_rows += 1
            bar.update()
            if n_rows == limit:
                break
    return _report(" ".join(map(str, paths)), skipped, n_rows)


def _report(where, skipped, n_rows):
    """What there is to report of so many usable rows. Raises UserError where there are none, or the file is in another
    encoding: of it only the rows without a mark can be read."""
    n_skipped, (n_damaged, line) = sum(n for n, _ in skipped.counts.values()), skipped.counts.get(NOT_UTF8, (0, 0))
    n = n_rows + n_skipped
    if n_damaged > 0.1 * (n_rows + n_damaged):
        raise UserError(f"{where}: {n_damaged:,} of {n:,} rows are not UTF-8 (first at line {line}): {TO_UTF8}")
    if not n_rows:
        raise UserError(f"{where}: no row that can be used: {'; '.join(skipped.report()) or 'there is none at all'}")
    return [f"Warning: {n_skipped:,} of {n:,} rows are not used"] * (n_skipped > n_rows) + skipped.report()


def _dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.int32)


class Corpus:
    """The usable rows of some files, encoded: a view of a cache on disk.

    columns: their names. report: a line for each reason for which rows were left out, and for what else was odd. Rows
    are in the order of the files, numbered from 0 without those left out."""

    def __init__(self, directory, tokenizer):
        """Raises OSError, ValueError, KeyError or TypeError where `directory` holds no whole cache."""
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.columns, self.report = tuple(meta["columns"]), meta["report"]
        self._checksum, self._tokenizer = meta["checksum"], tokenizer
        if meta["sizes"] != _sizes(directory):
            raise ValueError(f"{directory}: a file is not as long as it was written")
        dtypes = (_dtype(tokenizer), np.int64, *[np.int32] * len(SPLITS))
        self._tokens, self._index, *examples = (_mapped(directory / name, d) for name, d in zip(FILES, dtypes))
        self._examples = {split: part.reshape(-1, 3) for split, part in zip(SPLITS, examples)}

    def __len__(self):
        return len(self._index) // len(self.columns)

    def fingerprint(self):
        """A short name for all rows that are in here: the same wherever the files lie, and whatever else is in them."""
        return self._checksum

    def rows(self, split):
        """Yield the numbers of the rows of "train", "validation" or "test", in order."""
        for row, _ in itertools.groupby(self.examples(split)[:, 0]):
            yield int(row)

    def ids(self, row, column):
        """The tokens of a row in the column of that number: (T,) int64, T = 0 where that side is empty."""
        cell = int(row) * len(self.columns) + int(column)
        return self._tokens[self._index[cell] : self._index[cell + 1]].astype(np.int64)

    def text(self, row, column):
        """The text of a row in the column of that number, cleaned, "" where that side is empty."""
        return self._tokenizer.decode(self.ids(row, column))

    def examples(self, split):
        """All pairs of sides that are not empty, each both ways round: (n, 3) int32 of row, source column and target
        column, in the order of the rows. They stay on disk until they are looked at."""
        return self._examples[split]


def _mapped(path, dtype):
    """The numbers in a file, memory-mapped. A plain array: those slice faster than np.memmap's."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def sample_rows(rows, n):
    """n rows of an array, drawn from all of it and always the same, in order; all if there are no more than n."""
    if len(rows) <= n:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), size=n, replace=False))]
