"""The token cache: the rows of some files, encoded once and memory-mapped from then on.

    files -> rows.read_rows -> tokenizer -> <home>/tokens/<key>/ -> Corpus

The key is a hash of all that decides what a cache holds: the files (path, size, time, head), the tokenizer and the
options. Where any of them changes, another cache is made. One is written under another name and then renamed; whoever
opens it reads it through once, and makes it anew where its hash is not the one written down.

The cache of R rows in C columns, whose cell number row * C + column is the text of that row in that column:

    tokens.bin    the ids of all cells, one after another: uint16, or int32 where there are more than 65,536 ids
    index.bin     (R * C + 1,) int64: where each cell begins in tokens.bin
    <split>.bin   (n, 3) int32 for each of prefix.data.splits.SPLITS: its examples, see Corpus.examples
    meta.json     the columns, what there is to report of the files, and the hashes of all that; written last

The ids spell their texts exactly, so the texts themselves are not kept.
"""

import atexit
import hashlib
import itertools
import json
import math
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
from minigpt.errors import UserError
from minigpt.files import read_object
from prefix.data.rows import Skipped, opened, read_rows, resolve_columns
from prefix.data.splits import SPLITS, split_of
from prefix.distributed import log

CACHE_FORMAT = 3
FILES = ("tokens.bin", "index.bin", *(f"{split}.bin" for split in SPLITS))
DAY = 24 * 60 * 60  # seconds
LEFT_BEHIND, UNUSED = 1 * DAY, 30 * DAY  # the age at which the files of a killed build and a cache are removed
SHARE = 1 << 21  # rows among which repetitions are sought at a time


def load(paths, columns, tokenizer, limit=None, max_tokens=384, home=None):
    """The Corpus of these files: from the cache if it was made before, else read, encoded and cached now.

    limit: usable rows at most; nothing is read beyond them. max_tokens: of the longest pair, with its separator.
    home: by default the checkpoints' own. Raises UserError where the files cannot be read or hold no usable row."""
    columns, stamps = resolve_columns(paths, columns), [_stamp(path) for path in paths]
    folder, key = Path(home or checkpoint.home()) / "tokens", _key(stamps, columns, tokenizer, limit, max_tokens)
    corpus = _whole(folder / key, tokenizer)
    if corpus is not None:
        with suppress(OSError):
            os.utime(folder / key)  # for _tidy: it is in use
        return corpus
    folder = _writable(folder)
    _tidy(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
            built = Path(temporary) / "built"
            built.mkdir()
            report, line = _build(built, paths, columns, tokenizer, limit, max_tokens)
            changed = [path for path, stamp in zip(paths, stamps) if not _still(path, stamp)]
            report += [f"{path} changed while it was read, up to line {line}: rows may be missing" for path in changed]
            meta = {"columns": columns, "report": report, "digest": _digest(built, columns)}
            meta["report_digest"] = _hash(report).hexdigest()
            (built / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            _publish(built, folder / key, tokenizer)
        return Corpus(folder / key, tokenizer)
    except OSError as error:
        fault = f"{folder}: the token cache cannot be written: {error.strerror}"
        raise UserError(f"{fault}; make room there, or let MINIGPT_HOME name another folder") from error


def _stamp(path):
    """What tells one state of a file from another without reading it all."""
    with opened(path) as file:
        stat, head = os.fstat(file.fileno()), hashlib.sha256(file.read(1 << 16)).hexdigest()
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, head]


def _still(path, stamp):
    """Is the file what it was?"""
    try:
        return _stamp(path) == stamp
    except UserError:  # it is gone
        return False


def _key(stamps, columns, tokenizer, limit, max_tokens):
    """A name for everything that decides what a cache holds."""
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, stamps, columns, limit, max_tokens]).encode())
    for rank, i in enumerate(tokenizer.ids):
        key.update(f"{i} {tokenizer.encoding.decode_single_token_bytes(rank)}\n".encode())
    return key.hexdigest()[:32]


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode())


def _digest(directory, columns):
    """A hash of all rows that a cache holds. Reads it through, a megabyte at a time."""
    digest = _hash(columns)
    for name in FILES:
        with open(directory / name, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]


def _whole(directory, tokenizer):
    """The Corpus in `directory`, or None where there is none or it is damaged."""
    try:
        corpus = Corpus(directory, tokenizer)
        return corpus if _digest(directory, corpus.columns) == corpus.fingerprint() else None
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
        log(f"{folder} cannot be written ({error.strerror}): caching tokens in {temporary} for now")
        return Path(temporary)


def _tidy(folder):
    """Remove what killed builds left behind, and caches that were neither made nor opened for long."""
    for pattern, age in ((".building-*", LEFT_BEHIND), ("[0-9a-f]" * 32, UNUSED)):
        for directory in folder.glob(pattern):
            with suppress(OSError):  # another process may be tidying too
                newest = max(path.stat().st_mtime for path in [directory, *directory.rglob("*")])
                if time.time() - newest > age:
                    shutil.rmtree(directory, ignore_errors=True)


def _publish(built, directory, tokenizer):
    """Rename a finished cache into its place. If there is a whole one, another process was first, and it is the same; a
    damaged one makes room."""
    for last in (False, True):
        try:
            built.rename(directory)
            return
        except OSError:
            if _whole(directory, tokenizer) is not None:
                return
            if last:
                raise
        with suppress(OSError):  # another process may be mending it too
            directory.rename(built.with_name("damaged"))  # to go with the temporary folder


def _build(directory, paths, columns, tokenizer, limit, max_tokens):
    """Write a cache's files, row by row. Returns (what there is to report, the line of the last row that is used)."""
    skipped, n_rows, n_tokens, line = Skipped(), 0, 0, 0
    directions, kind = list(itertools.permutations(range(len(columns)), 2)), _dtype(tokenizer).char
    bar = tqdm(total=limit, unit=" rows", desc="encoding", disable=not sys.stderr.isatty(), file=sys.stderr)
    with ExitStack() as stack, bar:
        tokens, index, *splits = (stack.enter_context(open(directory / name, "wb")) for name in FILES)
        hashes = stack.enter_context(tempfile.TemporaryFile(dir=directory))
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
            hashes.write(array("q", [hash(texts), line]))
            n_rows += 1
            bar.update()
            if n_rows == limit:
                break
        repeated = _repeated(hashes, n_rows)
    if not n_rows:
        faults = "; ".join(skipped.report()) or "there is none at all"
        raise UserError(f"{' '.join(map(str, paths))}: no row that can be used: {faults}")
    return skipped.report() + repeated, line


def _repeated(file, n_rows):
    """The line to report, if any, of rows whose texts are those of an earlier row. They are used all the same.

    file: (hash, line) of each row, int64. They are compared by shares of all hashes, one share in memory at a time."""
    n, first, shares = 0, math.inf, n_rows // SHARE + 1
    for share in range(shares):
        file.seek(0)
        parts = [np.empty((0, 2), np.int64)]
        while len(part := np.frombuffer(file.read(1 << 20), np.int64).reshape(-1, 2)):
            parts.append(part[part[:, 0] % shares == share])
        hashes, lines = np.concatenate(parts).T
        again = np.delete(lines, np.unique(hashes, return_index=True)[1])
        n, first = n + len(again), min([first, *again[:1]])
    return [f"{n:,} row{'s' * (n > 1)} repeat{'s' * (n == 1)} an earlier one (first at line {first})"] if n else []


def _dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.int32)


class Corpus:
    """The usable rows of some files, encoded: a view of a cache on disk.

    columns: their names. report: a line for each reason for which rows were left out, and for what else was odd. Rows
    are in the order of the files, numbered from 0 without those left out."""

    def __init__(self, directory, tokenizer):
        """Raises OSError, ValueError, KeyError or TypeError where `directory` is not a cache."""
        meta = read_object(directory / "meta.json")
        self.columns, self.report = tuple(meta["columns"]), list(meta["report"])
        self._digest, self._tokenizer = meta["digest"], tokenizer
        if meta["report_digest"] != _hash(self.report).hexdigest():
            raise ValueError(f"{directory}: the report is not the one that was written")
        dtypes = (_dtype(tokenizer), np.int64, *[np.int32] * len(SPLITS))
        self._tokens, self._index, *examples = (_mapped(directory / name, d) for name, d in zip(FILES, dtypes))
        self._examples = {split: part.reshape(-1, 3) for split, part in zip(SPLITS, examples)}

    def __len__(self):
        return len(self._index) // len(self.columns)

    def fingerprint(self):
        """A short name for all rows that are in here: the same wherever the files lie, and whatever else is in them."""
        return self._digest

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
