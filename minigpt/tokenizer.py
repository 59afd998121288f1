"""GPT-2's byte-level BPE, as a tiktoken Encoding built from a checkpoint's own files, with the ids of transformers 5.

Those files spell bytes as printable characters (a space is "Ġ", a newline "Ċ"). Turned back into bytes, the merge
list is all that BPE needs: text is cut into words by a pattern, each word into bytes, and the pair of neighbours
that stands first in the list is joined, again and again, until no pair is left in it.

    >>> tokenizer.encode("Où ça ?")        # with gpt2's vocabulary
    [46, 127, 117, 6184, 100, 64, 5633]

Text is text: nothing in it encodes to a special token, as in transformers with split_special_tokens=True. Added tokens
that are not special are found in text before BPE. What changes ids and is not implemented is refused by name.
"""

import hashlib
import os
import re
import unicodedata

import tiktoken

from minigpt import checkpoint
from minigpt.files import UserError, read_object, read_text, reading

END_OF_TEXT = "<|endoftext|>"
# Contractions, runs of letters, of digits, of anything else, each with the space before it (Radford et al. 2019, 2.2).
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONGEST_BLANK = 100_000  # characters; at a million tiktoken panics
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # what \s is in Rust
FROM_JSON = ["TokenizersBackend", "PreTrainedTokenizerFast"]  # classes that read add_prefix_space in tokenizer.json
# Settings that would change ids, with the values that do not.
ONLY_TOKENIZER = {
    "normalizer": [None],
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.use_regex": [None, True],
    "post_processor.type": [None, "ByteLevel", "TemplateProcessing"],
    "post_processor.special_tokens": [None, {}],
    "model.type": [None, "BPE"],
    "model.dropout": [None, 0],
    "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""],
    "model.byte_fallback": [None, False],
    "model.ignore_merges": [None, False],
}
ONLY_CONFIG = {
    "tokenizer_class": [None, "GPT2Tokenizer", "GPT2TokenizerFast", *FROM_JSON],
    "add_prefix_space": [None, False, True],
    "add_bos_token": [None, False],
    "add_eos_token": [None, False],
    "auto_map": [None],
    "fast_tokenizer_files": [None],
}
FLAGS = {"special": False, "normalized": True, "single_word": False, "lstrip": False, "rstrip": False}


class Tokenizer:
    """Text to token ids and back.

    eot: the id of the token that ends a text (eos_token, else <|endoftext|>), which no text encodes to.
    n_vocab: one more than the largest id of a text, eot included. A special token may have a larger one."""

    def __init__(self, encoding, ids, others=None, added=(), prefix_space=False):
        """encoding: tiktoken's, whose ids are merge ranks; ids[rank] is the checkpoint's own id. others: {id: bytes} of
        tokens that no merge makes. added: dicts with content, id and FLAGS. prefix_space: each text begins with one."""
        self.encoding, self.ids, self.added, self.prefix_space = encoding, ids, added, prefix_space
        self.bytes = {i: encoding.decode_single_token_bytes(rank) for rank, i in enumerate(ids)} | (others or {})
        self.eot = ids[encoding.eot_token]
        self.n_vocab = 1 + max([*ids, *(token["id"] for token in added if not token["special"])])
        self.passes = []
        for normalized in (False, True):
            tokens = {t["content"]: t for t in added if t["normalized"] == normalized and t["content"]}
            if not all(token["special"] for token in tokens.values()):
                longest_first = sorted(tokens, key=len, reverse=True)
                self.passes.append((re.compile("|".join(map(re.escape, longest_first))), tokens))

    @classmethod
    def from_pretrained(cls, name):
        """The tokenizer of the checkpoint called `name` (a directory, "demo" or a published name)."""
        directory = checkpoint.find(name)
        if any((directory / file).exists() for file in ("tokenizer.json", "vocab.json", "merges.txt")):
            return cls(*_read_directory(directory))
        if os.path.isdir(name):
            raise UserError(f"{directory}: no tokenizer: there is no tokenizer.json, nor vocab.json and merges.txt")
        try:
            encoding = tiktoken.get_encoding("gpt2")  # from tiktoken's cache, or downloaded into it
        except (OSError, ValueError) as error:
            raise UserError(f"{directory}: no tokenizer there, and tiktoken could not fetch gpt2's: {error}") from error
        return cls(encoding, list(range(encoding.n_vocab)))

    @property
    def fingerprint(self):
        """16 hex digits: other tokenizers, which may give other ids, have others."""
        content = self.ids, sorted(self.bytes.items()), self.added, self.prefix_space
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, which UTF-8 does not have, is U+FFFD. Raises UserError for a run of
        white space that tiktoken's pattern cannot match."""
        if len(text) > LONGEST_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_BLANK:
            raise UserError(f"a text has more than {LONGEST_BLANK:,} spaces in a row")
        parts = [text] * bool(text)  # of texts and ids
        for pattern, tokens in self.passes:
            parts = [new for part in parts for new in _find_added(part, pattern, tokens)]
        return [i for part in parts for i in self._encode_part(part)]

    def _encode_part(self, part):
        if isinstance(part, int):
            return [part]
        space = " " * (self.prefix_space and not part.startswith(" "))
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(space + part)]

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD, ids of no token (a padded model has some) nothing."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")


def _find_added(text, pattern, tokens):
    """Yield the ids of the added tokens in a text and the texts between them, as tokenizers' AddedVocabulary does."""
    if isinstance(text, int):  # found before
        yield text
        return
    start = 0
    for match in pattern.finditer(text):
        token, (first, end) = tokens[match[0]], match.span()
        inside = _is_word(text[first - 1 : first]) or _is_word(text[end : end + 1])
        if token["special"] or (token["single_word"] and inside):
            continue
        if token["lstrip"]:
            first = max(start, len(text[:first].rstrip(BLANKS)))
        if token["rstrip"]:
            end = len(text) - len(text[end:].lstrip(BLANKS))
        if start < first:
            yield text[start:first]
        if first < end:
            yield token["id"]
        start = end
    if start < len(text):
        yield text[start:]


def _is_word(char):
    r"""Whether \w matches it in Rust: letters, marks, digits, connectors, joiners and letters in circles."""
    kind = unicodedata.category(char) if char else "none"
    return kind in ("Nd", "Nl", "Pc") or kind[0] in "LM" or bool(re.match("[\u200c\u200dⒶ-ⓩ🄰-🅉🅐-🅩🅰-🆉]", char))


def _read_directory(directory):
    """A checkpoint directory with a tokenizer -> the arguments of Tokenizer."""
    config, named, added = _read_config(directory)
    prefix_space = bool(config.get("add_prefix_space"))
    if (path := directory / "tokenizer.json").exists():
        content = read_object(path)
        _check(path, content, ONLY_TOKENIZER)
        with reading(path, "a byte-level BPE"):
            vocab, merges = content["model"]["vocab"], content["model"]["merges"]
            asked = bool(content["pre_tokenizer"].get("add_prefix_space"))
            here = sorted((FLAGS | token for token in content.get("added_tokens", [])), key=lambda token: token["id"])
        if config["tokenizer_class"] in FROM_JSON and "add_prefix_space" not in config:
            prefix_space = asked
        if prefix_space != asked:
            raise UserError(f"{path}: add_prefix_space is {asked}, but {prefix_space} for tokenizer_config.json")
        if "added_tokens_decoder" in config and [_seen(token) for token in added] != [_seen(token) for token in here]:
            raise UserError(f"{path}: the added tokens are not those of tokenizer_config.json")
        added = here
    else:
        vocab, lines = read_object(directory / "vocab.json"), read_text(path := directory / "merges.txt").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    with reading(path, "a byte-level BPE"):
        added = [token | {"special": token["special"] or token["content"] in named.values()} for token in added]
        return *_build(vocab, merges, added, named.get("eos_token") or END_OF_TEXT), prefix_space


def _read_config(directory):
    """tokenizer_config.json and the small files beside it -> (its settings, {role: special token}, added tokens)."""
    names = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    model, config, roles, more = (read_object(path) if (path := directory / n).exists() else {} for n in names)
    config["tokenizer_class"] = config.get("tokenizer_class") or model.get("tokenizer_class")
    path = directory / (names[1] if (directory / names[1]).exists() else names[0])
    _check(path, config, ONLY_CONFIG)
    with reading(path, "a tokenizer_config.json"):
        if "added_tokens_decoder" in config:
            added, roles = config["added_tokens_decoder"], config
        else:
            added, roles = {i: {"content": token} for token, i in more.items()}, config | roles
        named = {role: value for role, value in roles.items() if role.endswith("_token")}
        named = {role: value["content"] if isinstance(value, dict) else value for role, value in named.items()}
        added = [FLAGS | token | {"id": int(i)} for i, token in added.items()]
    return config, named, sorted(added, key=lambda token: token["id"])


def _seen(token):
    """What makes a difference of an added token: no text encodes to a special one."""
    return (token["id"], token["content"]) if token["special"] else token


def _check(path, content, only):
    """Refuse by name the settings that `only` does not have."""
    for name, values in only.items():
        section, _, key = name.rpartition(".")
        holder = (content.get(section) or {}) if section else content
        if (value := holder.get(key) if isinstance(holder, dict) else holder) not in values:
            raise UserError(f"{path}: {name} = {value!r:.60} is not implemented")


def _build(vocab, merges, added, eos):
    """-> (tiktoken's Encoding, ids, others, added): see Tokenizer. Raises ValueError."""
    ranks = _rank(merges)
    if missing := [token for token in ranks if token not in vocab]:
        raise ValueError(f"its vocabulary lacks {len(missing)} bytes or merged tokens, the first {missing[0]!r}")
    tokens, free = dict(vocab), len(vocab)
    for token in added:  # transformers gives them the next free ids
        if tokens.setdefault(token["content"], free) != token["id"]:
            raise ValueError(f"added token {token['content']!r} has id {token['id']}, not {tokens[token['content']]}")
        free = max(free, token["id"] + 1)
    if any(type(i) is not int or i < 0 for i in tokens.values()) or len(set(tokens.values())) < len(tokens):
        raise ValueError("its ids are not whole numbers, each of one token")
    if eos not in tokens or eos in ranks:
        raise ValueError(f"its end-of-text token {eos!r} is {'made by merges' if eos in ranks else 'not in it'}")

    ranked = {_spelled(token): rank for token, rank in ranks.items()}
    special = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranked, special_tokens=special)
    others = {i: _spelled(token) for token, i in tokens.items() if token not in ranks}
    return encoding, [tokens[token] for token in [*ranks, eos]], others, added


def _rank(merges):
    """{token: rank}: the 256 bytes, then what each merge makes of two tokens that are there before it."""
    ranks, halves = {char: byte for byte, char in sorted(byte_characters().items())}, {}
    for number, merge in enumerate(merges, 1):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(pair) != 2 or not all(token in ranks for token in pair):
            raise ValueError(f"merge {number}: {merge!r:.60} is not two tokens that are there before it")
        if "".join(pair) in ranks or _crossed(*pair, ranks, halves):
            raise ValueError(f"merge {number}: {merge!r:.60} makes a token that other merges make")
        ranks["".join(pair)] = len(ranks)
        halves["".join(pair)] = pair
    return ranks


def _crossed(left, right, ranks, halves):
    """Whether BPE joins parts of left and right before both are whole, so that it never joins these two. (tiktoken
    would: it takes a word that is a token as it is.) The later one is taken apart until one byte of each is left."""
    while left in halves or right in halves:
        if right not in halves or (left in halves and ranks[left] > ranks[right]):
            limit, left = ranks[left], halves[left][1]
        else:
            limit, right = ranks[right] + 1, halves[right][0]
        if halves.get(left + right) == (left, right) and ranks[left + right] < limit:
            return True
    return False


def byte_characters():
    """byte -> the character that spells it: itself where it is printable, else the next free one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE = {char: byte for byte, char in byte_characters().items()}


def _spelled(token):
    """The bytes that a token of a file stands for; an added token may be plain text."""
    return bytes(map(BYTE.get, token)) if BYTE.keys() >= set(token) else token.encode("utf-8", "replace")
