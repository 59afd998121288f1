"""Rows of sentences: which columns there are, and which rows can be used.

    files -> tables.records -> rows: one text in each column

A column is what one bank stands for: a language, as a rule. The files are one table (CSV or TSV with a header, JSON
lines, whose keys are the columns) or two or more aligned text files, one for each column. Columns are never guessed:
without --columns no row number, constant or id is read as text, and no text as the name of a column.
"""

import json
import re
from itertools import chain, islice
from typing import NamedTuple

from minigpt.files import UserError
from prefix.banks import MAX_BANKS
from prefix.data import tables
from prefix.data.tables import MAX_FIELD

FIRST_ROWS = 100  # which tell what a column holds
SAME = 3  # rows that make one value a constant
NOT_UTF8, TO_UTF8 = "not UTF-8", "make it UTF-8, for example with iconv -f LATIN1 -t UTF-8"

# ISO 639 codes and English names, without those that mostly mean another thing: id, mt, cat, may.
LANGUAGES = set(
    """
    ar bg bn ca cs da de el en es et eu fa fi fr ga gl he hi hr hu hy is it ja ka ko la lt lv mk ms nb nl nn no pl pt
    ro ru sk sl sq sr sv sw ta te th tl tr uk ur vi zh
    ara bul ben ces dan deu ell eng spa est eus fas fin fra gle glg heb hin hrv hun hye ind isl ita jpn kat kor lat lit
    lav mkd msa nld nor nob nno pol por ron rus slk slv sqi srp swe swa tam tha tur ukr urd vie zho cmn
    arabic bulgarian bengali catalan czech danish german greek english spanish estonian basque persian finnish french
    irish galician hebrew hindi croatian hungarian armenian icelandic indonesian italian japanese georgian korean latin
    lithuanian latvian macedonian malay dutch norwegian polish portuguese romanian russian slovak slovenian albanian
    serbian swedish swahili tamil thai turkish ukrainian urdu vietnamese chinese
    """.split()
)
REGION = "(?!id)[a-z]{2}|[0-9]{3}|latn|cyrl|arab|deva|hans|hant"  # en_US, es-419, zho_Hans
SENTENCE = re.compile(r"[!?…;,\"«»¿¡'’。！？，]|\.(\s|$)")  # marks that no name of a column has
NO_TEXT = re.compile(r"[\W\d_]+|(?=\S*(\d|://))\S+|(?i:nan|n/?a|null|none)")  # numbers, ids, addresses, missing values


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


# Columns: which there are, and which to read


class Contents(NamedTuple):
    """What the beginning of some files tells of their columns."""

    names: list  # of the columns, or the texts in line 1
    samples: list  # of each column: its first texts that are not empty
    has_header: bool  # False: line 1 is a row


def inspect(paths, columns=None):
    """The Contents of these files. columns: names for text files, or for the columns of a table without a header."""
    found, where = tables.records(paths), " ".join(map(str, paths))
    line, names = next(found, (1, "the file is empty"))
    if fault := names if isinstance(names, str) else damage(names):
        _, start = next(tables.lines_of(paths[0]), (1, ""))
        told = fault + (f"; it begins {start!r:.60}" if start else "") + f": {TO_UTF8}" * (fault == NOT_UTF8)
        raise UserError(f"{where}: no table: expected names of columns, in UTF-8: {told}")
    if len(paths) > 1:
        if len(columns or names) != len(paths):
            raise UserError(f"{where}: {len(paths)} text files, but {len(columns)} columns: name one for each file")
        return Contents(list(columns or names), [], True)
    names = list(map(clean, names))
    rows = [values for _, values in islice(found, FIRST_ROWS) if len(values) == len(names) and type(values) is list]
    samples = [list(filter(None, map(_text, column))) for column in zip(*rows)] or [[] for _ in names]
    has_header = line == 0 or not _is_row(names)
    if columns and not has_header and not set(columns) & set(names):
        every = len(columns) == len(names)  # else the first that hold texts
        places = [place for place, sample in enumerate(samples) if every or not _no_text("", sample)]
        if len(columns) > len(places):
            raise UserError(f"{where}: {len(columns)} columns, but line 1 has {len(places)} texts: {_listed(names)}")
        named = dict(zip(places, columns))
        names = [named.get(place, "") for place in range(len(names))]
    return Contents(names, samples, has_header)


def resolve_columns(paths, columns=None):
    """The columns to read from these files, as a tuple of names.

    columns: those asked for; of a table without a header, the names to give its columns. None: both columns of a
    table that has two, the first two languages of one that has more, the extensions of text files. Raises UserError
    where that does not say which, where they are not there, or where the files cannot be read."""
    there, where = inspect(paths, columns), " ".join(map(str, paths))
    columns = columns or (there.names if len(paths) > 1 else _default_columns(where, there))
    if not 2 <= len(columns) <= MAX_BANKS:
        raise UserError(f"{where}: 2 to {MAX_BANKS} columns are needed, not {len(columns)}: {_listed(columns)}")
    if not all(columns) or len(set(columns)) < len(columns) or damage(columns):
        raise UserError(f"{where}: columns need different names in UTF-8, not {_listed(columns)}: set --columns")
    _require(where, columns, there.names)
    return tuple(columns)


def columns_for(paths, names, columns=None):
    """Which of the `names` these files have -> (paths, columns), both in the order of `names`: a row's split goes by
    its first text, so that columns must stand as they stood in training. columns: some that must be there.

    Text files are called by `columns`, if there is one for each, else by their extensions or, where those are others,
    by `names`. A table without a header has the columns `columns`, in that order."""
    there, where = inspect(paths), " ".join(map(str, paths))
    if len(paths) > 1:
        named = columns if len(columns or ()) == len(paths) else None
        found = resolve_columns(paths, named or (there.names if set(there.names) <= set(names) else names))
        _require(where, columns or [], found)
        pairs = sorted(zip(found, paths), key=lambda pair: names.index(pair[0]))
        return [path for _, path in pairs], [name for name, _ in pairs]
    if not there.has_header and not set(names) & set(there.names):
        return paths, list(resolve_columns(paths, columns))
    found = [name for name in names if name in there.names]
    _require(where, columns or (names if len(found) < 2 else found), there.names)
    return paths, found


def unused_columns(paths, columns):
    """The columns that a table has beside these."""
    return [name for name in inspect(paths).names if name and name not in columns and len(paths) == 1]


def unclear_header(paths, columns):
    """The number of the line in a table that named these columns, if they are not all languages, else 0."""
    return len(paths) == 1 and not all(map(is_language, columns)) and next(tables.records(paths))[0]


def _default_columns(where, there):
    """The columns to read where nobody named them."""
    columns = {name: sample for name, sample in zip(there.names, there.samples) if name}
    if len(columns) > 1 and not there.has_header:
        raise UserError(
            f"{where}: line 1 seems to hold texts, not the names of columns: {_listed(there.names)}; --columns en fr "
            "names the columns, in their order, and reads line 1 as a row; if it is a header, --columns takes its names"
        )
    faults = {name: fault for name, sample in columns.items() if (fault := _no_text(name, sample))}
    if len(columns) > 2:
        columns = [name for name in columns if is_language(name) and name not in faults][:2]
        if len(columns) < 2:
            raise UserError(f"{where}: which columns? Name two or more by --columns; there are {_listed(there.names)}")
    elif faults:
        told = " and ".join(f"{name!r} {fault}" for name, fault in faults.items())
        raise UserError(f"{where}: the column {told}: name the columns to read by --columns, it too if it is meant")
    _require(where, columns, there.names)
    return list(columns)


def is_language(name):
    """Is this a code or name of a language, such as fr, fra, fr_FR or French?"""
    found = re.fullmatch(f"([^-_]+)([-_]({REGION}))*", name.casefold())
    return bool(found) and found[1] in LANGUAGES


def _no_text(name, sample):
    """Why a column holds no texts to train on, by its first ones; None if it may hold some."""
    is_id = name.casefold().endswith("id")
    if sample and all(NO_TEXT.fullmatch(text) or is_id and " " not in text for text in sample):
        return f"holds only numbers, ids or addresses ({sample[0]:.80} ...)"
    if len(sample) >= SAME and len(set(sample)) == 1:
        return f"is always {sample[0]!r:.80}"


def _is_row(names):
    """Does line 1 hold texts? Not if two are languages; else if one looks like a sentence."""
    return sum(map(is_language, names)) < 2 and any(len(n.split()) > 3 or SENTENCE.search(n) for n in names)


def _require(where, columns, there):
    for name in columns:
        if there.count(name) != 1:
            fault = f"has the column {name!r} twice" if name in there else f"has no column {name!r}"
            raise UserError(f"{where}: {fault}; its columns are {_listed(there)}")


def _listed(names):
    return (", ".join(map(repr, names)) or "none")[:300]


# Rows


def read_rows(paths, columns, skipped):
    """Yield (line number, texts) for each row that can be used: one str per column, two of them or more not empty.

    The line is the row's first, from 1. Rows that cannot be used are added to `skipped`, a Skipped."""
    columns, found = resolve_columns(paths, columns), tables.records(paths)
    names, (line, first) = inspect(paths, columns).names, next(found)
    places = list(map(names.index, columns))
    if line and names != list(map(clean, first)):
        skipped.notes.append(f"{paths[0]} is read as a table without a header: line 1 is a row, {_listed(first)}")
        found = chain([(line, first)], found)
    for line, values in found:
        texts = values if isinstance(values, str) else _row(values, places, len(names))
        if isinstance(texts, str):
            skipped.add(texts, line)
        else:
            yield line, texts


def _row(values, places, width):
    """The texts in these places of a record, or a str that says why they are no row to use."""
    if len(values) != width:
        return damage(values) or "wrong number of fields"
    texts = tuple(_text(values[place]) for place in places)
    if None in texts:
        return "a list or object, not a text"
    return damage(texts) or ("empty side" if sum(map(bool, texts)) < 2 else texts)


def _text(value):
    """A value of a table or of JSON as text: null is "", a number is written as JSON, a list or object is None."""
    if isinstance(value, (list, dict)):
        return None
    return clean(value) if isinstance(value, str) else "" if value is None else json.dumps(value)


def clean(text):
    """A text on one line: a run of line breaks is one space, the ends are stripped."""
    return " ".join(filter(None, text.splitlines())).strip()


def damage(texts):
    """Why one of these is no text; None if all are."""
    if max(map(len, texts)) > MAX_FIELD:
        return "field too long"
    if "\0" in "".join(texts):
        return "NUL byte"
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # of the bytes that are not UTF-8, tables.py made lone surrogates
        return NOT_UTF8
