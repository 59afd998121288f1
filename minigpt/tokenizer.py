"""GPT-2's byte-level BPE, as a tiktoken Encoding built from a checkpoint's own vocab.json and merges.txt.

Those files spell bytes as printable characters (a space is "Ġ", a newline "Ċ"). Turned back into bytes, the merge
list is all that BPE needs: text is cut into words by a pattern, each word into bytes, and the pair of neighbours
that stands first in the list is joined, again and again, until no pair is left in it.

    >>> tokenizer.encode("Où ça ?")        # with gpt2's vocabulary
    [46, 127, 117, 6184, 100, 64, 5633]
"""

import re
from pathlib import Path

import tiktoken

from minigpt import checkpoint
from minigpt.config import GPTConfig
from minigpt.errors import UserError
from minigpt.files import read_object, read_text

END_OF_TEXT = "<|endoftext|>"
# Contractions, runs of letters, of digits, of anything else, each with the space before it (Radford et al. 2019, 2.2).
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONGEST_BLANK = 100_000  # characters; at a million tiktoken panics


class Tokenizer:
    """Text to token ids and back. `eot` is the id of <|endoftext|>, which no text ever encodes to."""

    def __init__(self, encoding, ids):
        """encoding: tiktoken's, whose ids are merge ranks; ids[rank] is the checkpoint's own id."""
        self.encoding = encoding
        self.ids = ids
        self.rank = {token: rank for rank, token in enumerate(ids)}
        self.eot = ids[encoding.eot_token]
        self.n_vocab = len(ids)

    @classmethod
    def from_pretrained(cls, name):
        """The tokenizer of the checkpoint called `name` (a directory, "demo" or a published name)."""
        directory = checkpoint.find(name)
        if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
            return cls.from_files(directory / "vocab.json", directory / "merges.txt")
        lacking = f"{directory}: vocab.json or merges.txt is missing"
        vocab_size = GPTConfig.from_file(directory / "config.json").vocab_size
        if vocab_size != 50257:
            raise UserError(f"{lacking}, and a vocabulary of {vocab_size} is not gpt2's")
        try:
            encoding = tiktoken.get_encoding("gpt2")  # from tiktoken's cache, or downloaded into it
        except (OSError, ValueError) as error:
            raise UserError(f"{lacking}, and tiktoken could not fetch gpt2's") from error
        return cls(encoding, list(range(50257)))

    @classmethod
    def from_files(cls, vocab_file, merges_file):
        """Read the two files of a checkpoint. Raises UserError where they do not fit each other."""
        vocab = _read_vocab(vocab_file)
        ranks = _read_ranks(merges_file, vocab)
        tokens = [*ranks, END_OF_TEXT]
        missing, extra = [token for token in tokens if token not in vocab], sorted(set(vocab) - set(tokens))
        if missing or extra:
            raise UserError(
                f"{vocab_file}: does not agree with {Path(merges_file).name}: "
                f"{len(missing)} entries missing {missing[:3]}, {len(extra)} that no merge makes {extra[:3]}"
            )
        byte_of = {char: byte for byte, char in byte_characters().items()}
        encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=PATTERN,
            mergeable_ranks={bytes(byte_of[char] for char in token): rank for token, rank in ranks.items()},
            special_tokens={END_OF_TEXT: len(ranks)},
        )
        return cls(encoding, [vocab[token] for token in tokens])

    def encode(self, text):
        """Text -> list of ids. Text is text: "<|endoftext|>" in it is ordinary characters, and a lone surrogate, which
        UTF-8 cannot say, is U+FFFD. Raises UserError for a run of white space that tiktoken's pattern cannot match."""
        if len(text) > LONGEST_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_BLANK:
            raise UserError(f"a text has more than {LONGEST_BLANK:,} spaces in a row")
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD, ids of no token (a padded model has some) nothing."""
        return self.encoding.decode([self.rank[int(i)] for i in ids if int(i) in self.rank], errors="replace")


def byte_characters():
    """byte -> the character that spells it: itself where it is printable, else the next free one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _read_vocab(path):
    vocab = read_object(path)
    if not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path}: expected a JSON object of token: id")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{path}: the ids are not 0 .. {len(vocab) - 1}, each once")
    return vocab


def _read_ranks(path, vocab):
    """{token: rank}: the 256 bytes, then what each line of merges.txt makes of two tokens that are there before it."""
    ranks = {char: byte for byte, char in sorted(byte_characters().items())}
    for number, left, right in _read_merges(path):
        for token in (left, right):
            if token not in ranks:
                raise UserError(f"{path}: line {number}: {token!r} is neither a byte nor made by a line above")
        if left + right == END_OF_TEXT:
            raise UserError(f"{path}: line {number}: makes {END_OF_TEXT}, which no text may encode to")
        if left + right in ranks:
            raise UserError(f"{path}: line {number}: {left + right!r} is made by a line above, too")
        if left + right not in vocab:
            raise UserError(f"{path}: line {number}: {left + right!r} is not in the vocabulary")
        ranks[left + right] = len(ranks)
    return ranks


def _read_merges(path):
    """Yield (line number, left, right) for each merge, in order."""
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{path}: line {number}: expected two tokens, found {line[:40]!r}")
        yield number, *parts
