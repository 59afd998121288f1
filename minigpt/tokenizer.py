"""GPT-2's byte-level BPE, from a checkpoint's own files, with the ids of transformers 5.

A pattern cuts text into words. A word starts as its bytes; of all neighbours, the two that stand first in the list of
merges are joined, again and again: `bpe`, which tiktoken runs fast. Files spell bytes as printable characters.

    >>> tokenizer.encode("Où ça ?")        # with gpt2's vocabulary
    [46, 127, 117, 6184, 100, 64, 5633]

Text is text: none encodes to a special token, as in transformers with split_special_tokens=True. Other added tokens
are found in it before BPE. What changes ids and is not implemented is refused by name.
"""

import hashlib
import os
import re
from collections import namedtuple

import tiktoken

from minigpt import checkpoint
from minigpt.files import UserError, read_object, read_text, reading

END_OF_TEXT = "<|endoftext|>"
# Contractions, runs of letters, of digits, of anything else, each with the space before it (Radford et al. 2019, 2.2).
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONGEST_BLANK = 100_000  # characters; at a million tiktoken panics
LONGEST_TOKEN = 1_000  # characters; `bpe` takes quadratic time
FROM_JSON = ["TokenizersBackend", "PreTrainedTokenizerFast"]  # classes that read add_prefix_space in tokenizer.json
# Settings that change ids, with the values that are implemented: off, mostly.
OFF = [None, False, "", {}]
ONLY_CONFIG = dict.fromkeys(["add_bos_token", "add_eos_token", "auto_map", "fast_tokenizer_files"], OFF)
ONLY_CONFIG["tokenizer_class"] = [None, "GPT2Tokenizer", "GPT2TokenizerFast", *FROM_JSON]
ONLY_TOKENIZER = {
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.use_regex": [None, True],
    "post_processor.type": [None, "ByteLevel", "TemplateProcessing"],
    "model.type": [None, "BPE"],
    **dict.fromkeys(["normalizer", "post_processor.special_tokens", "model.dropout", "model.byte_fallback"], OFF),
    **dict.fromkeys(["model.ignore_merges", "model.continuing_subword_prefix", "model.end_of_word_suffix"], OFF),
}
Added = namedtuple("Added", "id content special normalized")  # a token beside those of BPE


class Tokenizer:
    """Text to token ids and back.

    eot: the id of the token that ends a text (eos_token, else <|endoftext|>), which no text encodes to.
    n_vocab: one more than the largest id of a text, eot included. A special token may have a larger one."""

    def __init__(self, encoding, ids, others=None, added=(), prefix_space=False):
        """encoding: tiktoken's, whose ids are merge ranks; ids[rank] is the checkpoint's own id. others: {id: bytes} of
        tokens that no merge makes. added: a list of Added. prefix_space: each text begins with a space."""
        self.encoding, self.ids, self.added, self.prefix_space = encoding, ids, added, prefix_space
        self.bytes = {i: encoding.decode_single_token_bytes(rank) for rank, i in enumerate(ids)} | (others or {})
        self.eot = ids[encoding.eot_token]
        self.n_vocab = 1 + max([*ids, *(token.id for token in added if not token.special)])
        self.passes = []  # transformers seeks tokens that are not normalized first
        for normalized in (False, True):
            tokens = {token.content: token for token in added if token.normalized == normalized and token.content}
            longest_first = map(re.escape, sorted(tokens, key=len, reverse=True))
            self.passes += [(re.compile("|".join(longest_first)), tokens)] if tokens else []

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
        return self._encode(text, self.passes)

    def _encode(self, text, passes):
        """passes: those that still seek added tokens in this text."""
        if not passes:
            space = " " * (self.prefix_space and text[:1] not in ("", " "))
            return [self.ids[rank] for rank in self.encoding.encode_ordinary(space + text)]
        (pattern, tokens), *others = passes
        ids, start = [], 0
        for match in pattern.finditer(text):
            if not (token := tokens[match[0]]).special:
                ids += [*self._encode(text[start : match.start()], others), token.id]
                start = match.end()
        return ids + self._encode(text[start:], others)

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD, ids of no token (a padded model has some) nothing."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")


def bpe(word, ranks):
    """A word -> its tokens: the neighbours that make the token of the lowest rank are joined, until none make one."""
    tokens, none = list(word), len(ranks)
    while (made := [ranks.get(left + right, none) for left, right in zip(tokens, tokens[1:])]) and min(made) < none:
        i = made.index(min(made))
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def byte_characters():
    """byte -> the character that spells it: itself where it is printable, else the next one from U+0100 on."""
    others = iter(range(256, 512))
    return {b: chr(b if chr(b).isprintable() and b != ord(" ") else next(others)) for b in range(256)}


BYTE = {char: byte for byte, char in byte_characters().items()}


# The files: both forms of a vocabulary give {token: id}, pairs, a list of Added and prefix_space.


def _read_directory(directory):
    """A checkpoint directory with a tokenizer -> the arguments of Tokenizer."""
    config, roles, added = _read_config(directory)
    if (path := directory / "tokenizer.json").exists():
        vocab, merges, tokens, prefix_space = _read_json(path, roles)
        seen = lambda added: [token[: 3 if token.special else 4] for token in added]
        same = seen(added) == seen(tokens) or "added_tokens_decoder" not in config
        from_json = prefix_space and config["tokenizer_class"] in FROM_JSON
        if not same or bool(config.get("add_prefix_space", from_json)) != prefix_space:
            raise UserError(f"{path} and tokenizer_config.json differ in add_prefix_space or in their added tokens")
        added = tokens
    else:
        vocab, lines = read_object(directory / "vocab.json"), read_text(path := directory / "merges.txt").splitlines()
        merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        prefix_space = bool(config.get("add_prefix_space"))
    with reading(path, "a byte-level BPE"):
        return *_build(vocab, merges, added, roles.get("eos_token") or END_OF_TEXT), added, prefix_space


def _read_config(directory):
    """tokenizer_config.json and the small files beside it -> (its settings, {role: token}, list of Added)."""
    names = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    model, config, more, ids = (read_object(path) if (path := directory / n).exists() else {} for n in names)
    config["tokenizer_class"] = config.get("tokenizer_class") or model.get("tokenizer_class")
    _check(path := directory / "tokenizer_config.json", config, ONLY_CONFIG)
    with reading(path, "a tokenizer_config.json"):
        tokens = [{"id": i, "content": content} for content, i in ids.items()]
        if "added_tokens_decoder" in config:  # then transformers does not read the other two
            tokens, more = [token | {"id": int(i)} for i, token in config["added_tokens_decoder"].items()], {}
        roles = {role: token for role, token in (config | more).items() if role.endswith("_token")}
        roles = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()}
        return config, roles, _added(path, tokens, roles)


def _read_json(path, roles):
    """tokenizer.json, which is all that transformers 5 saves -> (vocab, merges, list of Added, prefix_space)."""
    content = read_object(path)
    _check(path, content, ONLY_TOKENIZER)
    with reading(path, "a byte-level BPE"):
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
        prefix_space = bool(content["pre_tokenizer"].get("add_prefix_space"))
        return content["model"]["vocab"], merges, _added(path, content.get("added_tokens", []), roles), prefix_space


def _check(path, content, only):
    """Refuse by name the settings that `only` does not have."""
    for name, values in only.items():
        section, _, key = name.rpartition(".")
        holder = (content.get(section) or {}) if section else content
        if (value := holder.get(key) if isinstance(holder, dict) else holder) not in values:
            raise UserError(f"{path}: {name} = {value!r:.60} is not implemented")


def _added(path, tokens, roles):
    """The dicts in a file -> a list of Added, by id. A token that has a role is special."""
    added = []
    for token in tokens:
        special = bool(token.get("special")) or token["content"] in roles.values()
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag) and not special:
                raise UserError(f"{path}: {flag} of the added token {token['content']!r:.60} is not implemented")
        added.append(Added(token["id"], token["content"], special, bool(token.get("normalized", True))))
    return sorted(added)


def _build(vocab, merges, added, eos):
    """-> (tiktoken's Encoding, ids, others): see Tokenizer. Raises ValueError, or KeyError for what vocab lacks."""
    ranks, tokens, free = _rank(merges), dict(vocab), len(vocab)
    for token in added:  # transformers gives them the next free ids
        if tokens.setdefault(token.content, free) != token.id:
            raise ValueError(f"added token {token.content!r} has id {token.id}, not {tokens[token.content]}")
        free = max(free, token.id + 1)
    if any(type(i) is not int or i < 0 for i in tokens.values()) or len(set(tokens.values())) < len(tokens):
        raise ValueError("its ids are not whole numbers, each of one token")
    if eos in ranks:
        raise ValueError(f"merges make its end-of-text token {eos!r}")
    ranked, end = {_spelled(token): rank for token, rank in ranks.items()}, {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranked, special_tokens=end)
    others = {i: _spelled(token) for token, i in tokens.items() if token not in ranks}
    return encoding, [vocab[token] for token in ranks] + [tokens[eos]], others


def _rank(merges):
    """{token: rank}: the 256 bytes, then what each merge makes. tiktoken knows no pairs and joins whatever makes a
    token; so of each token, the merges before it must leave exactly its pair."""
    ranks = dict(BYTE)
    for number, pair in enumerate(merges, 1):
        token = "".join(pair)
        known = len(pair) == 2 and len(token) <= LONGEST_TOKEN and BYTE.keys() >= set(token)
        if not known or bpe(token, ranks) != list(pair):
            raise ValueError(f"merge {number}: {' '.join(pair)!r:.60} is not a pair that the merges before it leave")
        ranks[token] = len(ranks)
    return ranks


def _spelled(token):
    """The bytes that a token of a file stands for; an added token may be plain text."""
    return bytes(map(BYTE.get, token)) if BYTE.keys() >= set(token) else token.encode("utf-8", "replace")
