"""GPT-2's byte-level BPE, from a checkpoint's own files, with the ids of transformers 5.

A pattern cuts text into words. A word starts as its bytes; of all neighbours, the two that stand first in the list of
merges are joined, again and again: `bpe`, which tiktoken runs fast. Files spell bytes as printable characters.

    >>> tokenizer.encode("Où ça ?")        # with gpt2's vocabulary
    [46, 127, 117, 6184, 100, 64, 5633]

Text is text: none encodes to a special token, as in transformers with split_special_tokens=True. What would change ids
and is not implemented is refused by name.
"""

import hashlib

import tiktoken

from minigpt import checkpoint
from minigpt.files import UserError, read_object, read_text, reading

END_OF_TEXT = "<|endoftext|>"
# Contractions, runs of letters, of digits, of anything else, each with the space before it (Radford et al. 2019, 2.2).
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Settings that change ids, with the values that are implemented: off, mostly.
OFF = [None, False, "", {}]
CLASSES = [None, "GPT2Tokenizer", "GPT2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"]
ONLY_CONFIG = dict.fromkeys(["add_prefix_space", "add_bos_token", "add_eos_token", "auto_map"], OFF)
ONLY_CONFIG["tokenizer_class"] = CLASSES
ONLY_TOKENIZER = {
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.use_regex": [None, True],
    "pre_tokenizer.add_prefix_space": OFF,
    "post_processor.type": [None, "ByteLevel", "TemplateProcessing"],
    "model.type": [None, "BPE"],
    **dict.fromkeys(["normalizer", "post_processor.special_tokens", "model.dropout", "model.byte_fallback"], OFF),
    **dict.fromkeys(["model.ignore_merges", "model.continuing_subword_prefix", "model.end_of_word_suffix"], OFF),
}
# A byte's character is itself where it is printable, else the next one from U+0100 on.
OTHERS = iter(range(256, 512))
BYTE = {chr(b if chr(b).isprintable() and b != ord(" ") else next(OTHERS)): b for b in range(256)}


class Tokenizer:
    """Text to token ids and back.

    eot: the id of the token that ends a text, which no text encodes to.
    n_vocab: one more than the largest id of a text, eot included. A special token may have a larger one."""

    def __init__(self, vocab, merges, eos=END_OF_TEXT):
        """vocab: {token: id}; what is no byte and made by no merge is a special token. merges: pairs of tokens, the
        first to join first. Raises ValueError, or KeyError for what vocab lacks."""
        if any(type(i) is not int or i < 0 for i in vocab.values()) or len(set(vocab.values())) < len(vocab):
            raise ValueError("its ids are not whole numbers, each of one token")
        ranks = _rank(merges)
        if eos in ranks:
            raise ValueError(f"merges make its end-of-text token {eos!r}")
        by_bytes = {_spelled(token): rank for token, rank in ranks.items()}
        self.encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=by_bytes, special_tokens={})
        self.ids, self.eot = [vocab[token] for token in ranks], vocab[eos]  # tiktoken's ids are the ranks
        self.bytes = {i: _spelled(token) for token, i in vocab.items()}
        self.n_vocab = 1 + max(*self.ids, self.eot)

    @classmethod
    def from_pretrained(cls, name):
        """The tokenizer of the checkpoint called `name` (a directory, "demo" or a published name)."""
        directory = checkpoint.find(name)
        config = read_object(path) if (path := directory / "tokenizer_config.json").exists() else {}
        _check(path, config, ONLY_CONFIG)
        with reading(path, "a tokenizer_config.json"):
            added = [token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
            roles = {role: token for role, token in config.items() if role.endswith("_token")}
            roles = {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()}
        if (path := directory / "tokenizer.json").exists():
            _check(path, content := read_object(path), ONLY_TOKENIZER)
            with reading(path, "a byte-level BPE"):
                vocab, merges = content["model"]["vocab"], content["model"]["merges"]
                merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
                added += content.get("added_tokens", [])
        else:
            vocab = read_object(directory / "vocab.json")
            lines = read_text(path := directory / "merges.txt").splitlines()
            merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
            if (directory / "added_tokens.json").exists() and not added:
                raise UserError(f"{directory}/added_tokens.json is not read: save the tokenizer by transformers 5")
        with reading(path, "a byte-level BPE"):
            return cls(_with_added(vocab, added, roles.values()), merges, roles.get("eos_token") or END_OF_TEXT)

    @property
    def fingerprint(self):
        """16 hex digits: other tokenizers, which may give other ids, have others."""
        content = self.ids, self.eot, sorted(self.bytes.items())
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def encode(self, text):
        """Text -> list of ids. A lone surrogate, which UTF-8 does not have, is U+FFFD."""
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

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


def _check(path, content, only):
    """Refuse by name the settings that `only` does not have."""
    for name, values in only.items():
        section, _, key = name.rpartition(".")
        holder = (content.get(section) or {}) if section else content
        if (value := holder.get(key) if isinstance(holder, dict) else holder) not in values:
            raise UserError(f"{path}: {name} = {value!r:.60} is not implemented")


def _with_added(vocab, added, roles):
    """{token: id} with the special tokens that a file adds to it. One that has a role is special."""
    tokens, free = dict(vocab), len(vocab)
    for token in sorted(added, key=lambda token: token["id"]):
        content, i = token["content"], token["id"]
        if not token.get("special") and content not in roles:
            raise ValueError(f"text encodes to its added token {content!r:.60}, which is not implemented")
        if tokens.setdefault(content, free) != i:  # transformers gives them the next free ids
            raise ValueError(f"added token {content!r} has id {i}, not {tokens[content]}")
        free = max(free, i + 1)
    return tokens


def _rank(merges):
    """{token: rank}: the 256 bytes, then what each merge makes. tiktoken knows no pairs and joins whatever makes a
    token; so of each token, the merges before it must leave exactly its pair."""
    ranks = dict(BYTE)
    for number, pair in enumerate(merges, 1):
        token = "".join(pair)
        if len(pair) != 2 or not BYTE.keys() >= set(token) or bpe(token, ranks) != list(pair):
            raise ValueError(f"merge {number}: {' '.join(pair)!r:.60} is not a pair that the merges before it leave")
        ranks[token] = len(ranks)
    return ranks


def _spelled(token):
    """The bytes that a token of a file stands for; an added token may be plain text."""
    return bytes(map(BYTE.get, token)) if BYTE.keys() >= set(token) else token.encode("utf-8", "replace")
