"""Rows of sentences: which columns there are, and which rows can be used.

    files -> tables.py -> rows: one text in each column

A column is what one bank stands for: a language, as a rule. The files are one table (CSV or TSV with a header, JSON
lines, whose keys are the columns) or two or more aligned text files, one for each column. Columns are never guessed:
without --columns no row number, constant or id is read as text, and no text as the name of a column.
"""

import json
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from minigpt.files import UserError
from prefix.banks import MAX_BANKS
from prefix.data import tables
from prefix.data.tables import MAX_FIELD, Skipped

FIRST_LINES = 1000  # of JSON: among them a column must turn up
MOST_KEYS = 100  # of JSON objects, besides those that were asked for
MISSING = {"nan", "na", "n/a", "null", "none"}
SAME = 3  # rows that make one value a constant

# ISO 639 codes, and names in English and their own; without those that mostly mean another thing: id, mt, cat, may.
LANGUAGES = set(
    """
    ar ara arabic العربية  bg bul bulgarian български  bn ben bengali বাংলা  ca catalan català  cs ces cze czech čeština
    da dan danish dansk  de deu ger german deutsch  el ell gre greek ελληνικά  en eng english  es spa spanish español
    et est estonian eesti  eu eus baq basque euskara  fa fas farsi persian فارسی  fi fin finnish suomi
    fr fra fre french français francais  ga gle irish gaeilge  gl glg galician galego  he heb hebrew עברית
    hi hin hindi हिन्दी  hr hrv croatian hrvatski  hu hun hungarian magyar  hy hye armenian  ind indonesian
    is isl ice icelandic íslenska  it ita italian italiano  ja jpn japanese 日本語
    ka kat georgian  ko kor korean 한국어  la lat latin  lt lit lithuanian lietuvių  lv lav latvian latviešu
    mk mkd macedonian  ms msa malay melayu  nl nld dut dutch nederlands  no nb nn nor nob nno norwegian norsk
    pl pol polish polski  pt por portuguese português portugues  ro ron rum romanian română  ru rus russian русский
    sk slk slovak slovenčina  sl slv slovenian slovenščina  sq sqi albanian shqip  sr srp serbian српски srpski
    sv swe swedish svenska  sw swa swahili kiswahili  ta tam tamil தமிழ்  te telugu తెలుగు  th tha thai ไทย
    tl fil tagalog  tr tur turkish türkçe  uk ukr ukrainian українська  ur urd urdu اردو  vi vie vietnamese
    zh zho chi cmn chinese 中文
    """.split()
)
REGION = "(?!id)[a-z]{2}|[0-9]{3}|latn|cyrl|arab|deva|hans|hant"  # en_US, es-419, zho_Hans
SENTENCE = re.compile(r"[!?…;,\"«»¿¡'’。！？，]|\.(\s|$)")  # marks that no name of a column has


class Contents(NamedTuple):
    """What the first lines of some files tell of their columns."""

    layout: object  # of tables.layout_of
    names: list  # of the columns of a table, or the texts in its first line
    samples: list  # of each column: its first texts that are not empty
    has_header: bool  # whether the names are names


# Columns: which there are, and which to read


def resolve_columns(paths, columns=None):
    """The columns to read from these files, as a tuple of names.

    columns: those asked for; of a table without a header, the names to give its columns. None: both columns of a
    table that has two, the first two languages of one that has more, the extensions of text files. Raises UserError
    where that does not say which, where they are not there, or where the files cannot be read."""
    there, where = inspect(paths, columns), " ".join(map(str, paths))
    if there.layout == tables.TEXT:
        columns = columns or [Path(path).suffix[1:] for path in paths]
        if len(columns) != len(paths):
            raise UserError(f"{where}: {len(paths)} text files, but {len(columns)} columns: name one for each file")
    elif columns:
        _places(where, there, columns)
    else:
        columns = _default_columns(where, there)
    if not 2 <= len(columns) <= MAX_BANKS:
        raise UserError(f"{where}: 2 to {MAX_BANKS} columns are needed, not {len(columns)}: {_listed(columns)}")
    for name in columns:
        if not name or tables.damage(name) or list(columns).count(name) > 1:
            raise UserError(f"{where}: columns need different names in UTF-8, not {_listed(columns)}: set --columns")
    return tuple(columns)


def columns_for(paths, names, columns=None, header=None):
    """Which of the `names` these files have -> (paths, columns), both in the order of `names`: a row's split goes by
    its first text, so that columns must stand as they stood in training. columns: some that must be there.

    Text files are called by `columns`, if there is one for each, else by their extensions or, where those are others,
    by `names`. A table without a header has the columns `header` (None: `columns`), in that order."""
    there, where = inspect(paths, names), " ".join(map(str, paths))
    if there.layout == tables.TEXT:
        suffixes = [Path(path).suffix[1:] for path in paths]
        named = columns and len(columns) == len(paths)
        found = resolve_columns(paths, columns if named else suffixes if set(suffixes) <= set(names) else names)
        _require(where, columns or [], found)
        pairs = sorted(zip(found, paths), key=lambda pair: names.index(pair[0]))
        return [path for _, path in pairs], [name for name, _ in pairs]
    if _lacks_header(there, names):
        return paths, list(resolve_columns(paths, header or columns))
    found = [name for name in names if name in there.names]
    _require(where, columns or (names if len(found) < 2 else found), there.names)
    return paths, found


def unused_columns(paths, columns):
    """The columns that a table has beside these."""
    return [name for name in inspect(paths, columns).names if name and name not in columns]


def inspect(paths, wanted):
    """The Contents of these files. wanted: keys of JSON objects that are looked for beyond the first lines."""
    layout, lines = tables.layout_of(paths)
    if layout == tables.TEXT:
        return Contents(layout, [], [], True)
    if layout == tables.JSON_LINES:
        return Contents(layout, *_keys(paths[0], lines, set(wanted or ())), True)
    skipped = Skipped()
    found = tables.records(lines, layout, skipped)
    names = [clean(name) for name in next(found, (0, []))[1]]
    fault = tables.damage("".join(names)) or (None if names else "the file is empty")
    if fault := next(iter(skipped.counts), fault):
        raise UserError(f"{paths[0]}: line 1: expected a header that names the columns, in UTF-8: {fault}")
    rows = [fields for _, fields in found if len(fields) == len(names)]
    samples = [list(filter(None, map(clean, column))) for column in zip(*rows)] or [[] for _ in names]
    return Contents(layout, names, samples, not _is_row(names, samples))


def _keys(path, lines, wanted):
    """(keys, samples) of the first JSON objects, and the wanted keys that are found in further ones. Of objects with
    ever new keys, no more than MOST_KEYS of those that nobody asked for. A list or object is "" in a sample."""
    keys = {}
    for _, record in tables.objects(lines, Skipped()):
        for key, value in record.items():
            if key in keys or key in wanted or len(keys) < MOST_KEYS:
                text = _as_text(value)
                keys.setdefault(key, []).extend([""] if text is None else filter(None, [clean(text)]))
    if wanted - keys.keys():
        for _, record in tables.objects(islice(tables.lines_of(path), FIRST_LINES), Skipped()):
            keys = {key: [] for key in record if key in wanted} | keys
    if not keys:
        example = '{"en": "...", "fr": "..."}'
        raise UserError(f"{path}: expected JSON lines, an object such as {example} on each; the first are none")
    return list(keys), list(keys.values())


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
    """Is this a code or name of a language, such as fr, fra, fr_FR, French or français?"""
    found = re.fullmatch(f"([^-_]+)([-_]({REGION}))*", name.casefold())
    return bool(found) and found[1] in LANGUAGES


def _no_text(name, sample):
    """Why a column holds no texts to train on, by its first ones; None if it may hold some."""
    found = [text for text in sample if text.casefold() not in MISSING]
    if not found:
        return None
    if not any(found):
        return "holds lists or objects"
    if not any(c.isalpha() for text in found for c in text):
        return f"holds only numbers ({found[0]} ...)"
    is_id = name.casefold().endswith("id")
    if not any(" " in text for text in found) and all(is_id or re.search(r"\d|://", text) for text in found):
        return f"holds only numbers, ids or addresses ({found[0]:.80} ...)"
    if len(found) >= SAME and len(set(found)) == 1:
        return f"is always {found[0]!r:.80}"


def _is_row(names, samples):
    """Does line 1 hold texts like those below? Not if two are languages. It does if one looks like a sentence or stands
    below again, or if all columns mostly hold single words, as line 1 then may too."""
    if sum(map(is_language, names)) > 1:
        return False
    if any(len(name.split()) > 3 or SENTENCE.search(name) for name in names):
        return True
    if any(name and name in sample for name, sample in zip(names, samples)):
        return True
    return all(sum(" " not in text for text in sample) > len(sample) / 2 for sample in samples)


def _lacks_header(there, columns):
    """Is line 1 a row of the table, so that `columns` name its columns?"""
    return not there.has_header and not set(columns) & set(there.names)


def _places(where, there, columns):
    """Where in a row of a table these columns stand. Of one without a header they are all, or the first with texts."""
    if not _lacks_header(there, columns):
        _require(where, columns, there.names)
        return list(map(there.names.index, columns))
    places = range(len(there.names))
    if len(columns) < len(places):
        places = [i for i in places if not _no_text("", there.samples[i])]
    if len(columns) > len(places):
        raise UserError(f"{where}: {len(columns)} columns, but line 1 has {len(places)} texts: {_listed(there.names)}")
    return places[: len(columns)]


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
    columns, there = resolve_columns(paths, columns), inspect(paths, columns)
    if there.layout == tables.TEXT:
        rows = tables.aligned(paths, skipped)
    else:
        rows = (_json_rows if there.layout == tables.JSON_LINES else _table_rows)(paths[0], columns, there, skipped)
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
    return tables.damage("".join(texts)) or ("empty side" if sum(map(bool, texts)) < 2 else None)


def _table_rows(path, columns, there, skipped):
    """Yield (line number, fields in the order of `columns`)."""
    rows, places = tables.records(tables.lines_of(path), there.layout, skipped), _places(path, there, columns)
    if _lacks_header(there, columns):
        skipped.notes.append(f"{path} is read as a table without a header: line 1 is a row, {_listed(there.names)}")
    else:
        next(rows)
    for line, fields in rows:
        if len(fields) == len(there.names):
            yield line, [fields[i] for i in places]
        else:
            skipped.add("wrong number of fields", line)


def _json_rows(path, columns, there, skipped):
    """Yield (line number, fields). A column that is missing or null is empty; a number is written as JSON."""
    for line, record in tables.objects(tables.lines_of(path), skipped):
        fields = [_as_text(record.get(name)) for name in columns]
        if None in fields:
            skipped.add("a list or object, not a text", line)
        else:
            yield line, fields


def _as_text(value):
    """A JSON value as text: null is "", a list or object has none (None)."""
    if isinstance(value, (list, dict)):
        return None
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
