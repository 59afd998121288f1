"""The text that minigpt/demo was pretrained on, from files of sentences.

A document is a run of sentences in one language; sentences with their translations, in either direction and many
layouts, where nothing says which language is which; or facts and a text that repeats them, which teaches copying.
No document has a sentence that split_of holds out, or a translation of one.
"""

import csv
import re

from prefix.data.splits import split_of

LAYOUTS = ["{}\n{}\n", "{}\n{}\n\n", "{} = {}\n", "{} - {}\n", "{} / {}\n", "{}\t{}\n", "{} ({})\n", '"{}" "{}"\n']
LAYOUTS += ["« {} » « {} »\n", "- {}\n- {}\n\n", "{} -> {}\n", "{} | {}\n", "{} : {}\n", "* {}\n  {}\n", "({}) {}\n"]
LABELS = "A B C D X Y Z a b x y 1 2 3 i ii P Q R K L M N T".split()  # arbitrary, and never the same language twice
TABLES = [(" : ", " | "), (": ", ", "), ("[", "], "), (" = ", "; "), (": ", "\t"), ("=", " & ")]
NAME = re.compile(r"\b[A-Z][a-z]{2,}\b|\b[0-9]+\b")


def read_sources(files):
    """-> [(rows, weight of them all)], a row being one sentence or a pair, and 400 held-out pairs of the first file."""
    tables, banned = [], set()
    for name, _, weight in (file.rpartition(":") for file in files):
        with open(name, encoding="utf-8", newline="") as file:
            plain = {"dialect": csv.excel_tab, "quoting": csv.QUOTE_NONE}  # tabs, and quotes that mean nothing
            rows = list(map(tuple, csv.reader(file, **{} if name.endswith(".csv") else plain)))
        tables.append((rows[name.endswith("sv") :], float(weight)))  # a table has a header, a list has none
        banned.update(text for row in rows if any(split_of(text) != "train" for text in row) for text in row)
    kept = [([row for row in rows if banned.isdisjoint(row)], weight) for rows, weight in tables]
    for name, (rows, _), (left, _) in zip(files, tables, kept):
        print(f"{name}: {len(left):,} of {len(rows):,} rows are neither held out nor translations of such", flush=True)
    held_out = [row for row in tables[0][0] if split_of(row[0]) == "validation"]
    return [(rows, weight * len(rows)) for rows, weight in kept], held_out[:400]


def draw_documents(sources, n, alone, facts, rng):
    """Yield n texts, of which the share `alone` are runs in one language, and `facts` are facts with a text."""
    pairs, lists = ([source for source in sources if len(source[0][0]) == n] for n in (2, 1))
    for _ in range(n):
        kind = rng.random()
        tables, weights = zip(*(lists if kind < alone else pairs))
        rows, direction = rng.choices(tables, weights)[0], rng.choice([1, -1])
        if kind < alone:
            yield rng.choice([" ", " ", "\n"]).join(text for (text,) in rng.choices(rows, k=rng.randint(1, 6)))
        else:
            chosen = rng.choices(rows, k=1 if rng.random() < 0.7 else rng.randint(2, 6))
            yield (tell_facts if kind > 1 - facts else lay_out)([row[::direction] for row in chosen], rng)


def lay_out(pairs, rng):
    """Pairs in one layout, most often on two lines; now and then without full stops, as people type, or renamed."""
    kind, layout = rng.random(), rng.choice(LAYOUTS)
    if kind < 0.4:
        layout = LAYOUTS[0]
    elif kind > 0.9:
        layout = "{}: {{}}\n{}: {{}}\n".format(*rng.sample(LABELS, 2))
    end = " .!?\u00a0\u202f" if rng.random() < 0.1 else "\n"
    pairs = [rename(a, b, rng) if rng.random() < 0.15 else (a, b) for a, b in pairs]
    text = "".join(layout.format(a.rstrip(end), b.rstrip(end)) for a, b in pairs)
    return text.strip() if rng.random() < 0.8 else text


def rename(a, b, rng):
    """The pair with the names and numbers that both sides share replaced by others."""
    for old in sorted(set(NAME.findall(a)) & set(NAME.findall(b))):
        new = str(rng.randrange(10 ** len(old))) if old.isdigit() else invent_name(rng)
        a, b = (re.sub(rf"\b{old}\b", new, text) for text in (a, b))
    return a, b


def tell_facts(pairs, rng):
    """Pieces of each first side as a list of facts, then that side, often with a name that can only be copied."""
    (equals, between), keys = rng.choice(TABLES), [invent_name(rng).lower() for _ in range(6)]
    examples = []
    for words in (a.split() for a, _ in pairs):
        if rng.random() < 0.7:
            words[rng.randrange(len(words))] = invent_name(rng)
        cuts = sorted(rng.sample(range(len(words) + 1), min(len(words) + 1, 2 * rng.randint(1, 6))))
        values = [" ".join(words[i:j]).strip(" .,!?") for i, j in zip(cuts[::2], cuts[1::2])]
        facts = between.join(key + equals + value for key, value in zip(keys, values) if value)
        examples.append(facts + "\n" + " ".join(words))
    return "\n\n".join(examples)


def invent_name(rng):
    """One or two capitalised words that mean nothing."""
    syllables = [rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))]
    syllables[-1] += rng.choice(["", "n", "s", "r", "lly", "zzi", "tt", "ll"])
    return ("".join(syllables[:2]) + " " * (len(syllables) == 4) + "".join(syllables[2:])).title()
