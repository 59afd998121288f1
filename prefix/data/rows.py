"""Rows of sentences: which columns there are, and which rows can be used.

    files -> tables.records -> Table: which columns to read -> read_rows: one text in each of them

A column is what one bank stands for: a language, as a rule. The files are one table (CSV or TSV with a header, JSON
lines, whose keys are the columns) or two or more aligned text files, one for each column. Columns are never guessed:
without --columns no row number, constant or id is read as text, and no text as the name of a column.
"""

import json
import re
from itertools import chain, islice

from minigpt.files import UserError
from prefix.banks import MAX_BANKS
from prefix.data import tables

MAX_FIELD = 100_000  # characters
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


class Table:
    """Some files as one table, known by its beginning. Raises UserError where they are none.

    names: of the columns, as line 1, JSON's keys or the ends of text files have them. line: the number of the line that
    holds them, 0 where none does. has_header: False for text files, and where line 1 seems to hold texts."""

    def __init__(self, paths):
        self.paths = paths
        self.line, names = next(tables.records(paths), (1, "the file is empty"))
        if fault := names if isinstance(names, str) else damage(names):
            _, start = next(tables.lines_of(paths[0]), (1, ""))
            told = fault + (f"; it begins {start!r:.60}" if start else "") + f": {TO_UTF8}" * (fault == NOT_UTF8)
            raise self._error(f"no table: expected names of columns, in UTF-8: {told}")
        self.names = list(map(clean, names))
        self.has_header = len(paths) == 1 and (self.line == 0 or not _is_row(self.names))

    def places(self, columns=None):
        """{column: its place in a record}, of the columns to read, in their order.

        columns: those asked for. Where no header has any of them, they are new names for what is there. None: all text files,
        both columns of a table that has two, the first two languages of one that has more. Raises UserError where that
        does not say which, or where they are not there."""
        names = self.names
        if columns and not self.has_header and set(columns).isdisjoint(names):
            names = self._renamed(columns)
        columns = columns or self._default()
        if not 2 <= len(set(columns)) == len(columns) <= MAX_BANKS or not all(columns) or damage(columns):
            raise self._error(f"2 to {MAX_BANKS} columns of different names in UTF-8 are needed, not {_listed(columns)}")
        self.require(columns, names)
        return {name: names.index(name) for name in columns}

    def require(self, columns, names=None):
        """Raises UserError where one of these columns is not there, or there twice."""
        names = names or self.names
        for name in columns:
            if names.count(name) != 1:
                fault = f"has the column {name!r} twice" if name in names else f"has no column {name!r}"
                remedy = "" if self.has_header else "; --columns names them anew, all of them in order"
                raise self._error(f"{fault}; its columns are {_listed(names)}{remedy}")

    def _error(self, fault):
        return UserError(f"{' '.join(map(str, self.paths))}: {fault}")

    def _renamed(self, columns):
        """`columns` as names for all that is there, or for a table's first columns that hold texts; "" for the others."""
        places = range(len(self.names))
        if len(columns) < len(places) and len(self.paths) == 1:
            places = [place for place, fault in enumerate(self._no_texts()) if not fault][: len(columns)]
        if len(columns) != len(places):
            raise self._error(f"{len(columns)} columns, but {len(places)} texts: {_listed(self.names)}")
        named = dict(zip(places, columns))
        return [named.get(place, "") for place in range(len(self.names))]

    def _default(self):
        """The columns to read where nobody named them."""
        if len(self.paths) > 1:
            return self.names
        if not self.has_header:
            told = "--columns en fr names them, in order, and reads line 1 as a row; if that is a header, name its columns"
            raise self._error(f"line 1 seems to hold texts, not the names of columns: {_listed(self.names)}; {told}")
        faults = {name: fault for name, fault in zip(self.names, self._no_texts()) if name}
        if len(faults) > 2:
            names = [name for name, fault in faults.items() if is_language(name) and not fault][:2]
            if len(names) < 2:
                raise self._error(f"which columns? Name two or more by --columns; there are {_listed(self.names)}")
            return names
        if told := " and ".join(f"{name!r} {fault}" for name, fault in faults.items() if fault):
            raise self._error(f"the column {told}: name the columns to read by --columns, it too if it is meant")
        return list(faults)

    def _no_texts(self):
        """Why each column of a table holds no texts to train on, by its first rows; None if it may hold some."""
        n, first = len(self.names), islice(tables.records(self.paths), 1, 1 + FIRST_ROWS)
        rows = [values for _, values in first if isinstance(values, list) and len(values) == n]
        samples = [list(filter(None, map(_text, column))) for column in zip(*rows)] or [[]] * n
        return list(map(_no_text, self.names if self.has_header else [""] * n, samples))


def columns_for(paths, names, columns=None):
    """Those of the `names` that these files have, in that order: a row's split goes by its first text, so that columns
    must stand as they stood in training. columns: some that must be there, or new names, as of Table.places."""
    table = Table(paths)
    found = [name for name in names if name in table.names]
    if not found and not table.has_header and (columns or len(paths) == 1):
        return list(table.places(columns))
    table.require(columns or (found if len(found) > 1 else names))
    return found


def is_language(name):
    """Is this a code or name of a language, such as fr, fra, fr_FR or French?"""
    found = re.fullmatch(f"([^-_]+)([-_]({REGION}))*", name.casefold())
    return bool(found) and found[1] in LANGUAGES


def _no_text(name, sample):
    """Why a column whose first texts are these, but for empty ones, is none to train on; None if it may be one."""
    is_id = name.casefold().endswith("id")
    if sample and all(NO_TEXT.fullmatch(text) or is_id and " " not in text for text in sample):
        return f"holds only numbers, ids or addresses ({sample[0]:.80} ...)"
    if len(sample) >= SAME and len(set(sample)) == 1:
        return f"is always {sample[0]!r:.80}"


def _is_row(names):
    """Does line 1 hold texts? Not if two are languages; else if one looks like a sentence."""
    return sum(map(is_language, names)) < 2 and any(len(n.split()) > 3 or SENTENCE.search(n) for n in names)


def _listed(names):
    return (", ".join(map(repr, names)) or "none")[:300]


def read_rows(paths, columns, skipped):
    """Yield (line number, texts) for each row that can be used: one str per column, two of them or more not empty.

    columns: as of Table.places. The line is the row's first, from 1. Rows that cannot be used are added to `skipped`, a
    Skipped."""
    table = Table(paths)
    places, found = table.places(columns), tables.records(paths)
    line, first = next(found)
    if line and not set(places) <= set(table.names):
        skipped.notes.append(f"{paths[0]} is read as a table without a header: line 1 is a row, {_listed(first)}")
        found = chain([(line, first)], found)
    for line, values in found:
        texts = values if isinstance(values, str) else _row(values, places.values(), len(table.names))
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
