"""GPT-2's byte-level BPE, as a tiktoken Encoding built from a checkpoint's own vocab.json and merges.txt.

Those files spell bytes as printable characters (a space is "Ġ", a newline "Ċ"). Turned back into bytes, the merge
list is all that BPE needs: text is cut into words by a pattern, each word into bytes, and the pair of neighbours
that stands first in the list is joined, again and again, until no pair is left in it.

    >>> tokenizer.encode("Où ça ?")        # with gpt2's vocabulary
    [46, 127, 117, 6184, 100, 64, 5633]
"""

import json
from pathlib import Path

import tiktoken

from minigpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Contractions, runs of letters, of digits, of anything else, each with the space before it (Radford et al. 2019, 2.2).
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


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
        from minigpt import checkpoint, config

        directory = checkpoint.find(name)
        if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
            return cls.from_files(directory / "vocab.json", directory / "merges.txt")
        vocab_size = config.GPTConfig.from_file(directory / "config.json").vocab_size
        if vocab_size != 50257:
            raise UserError(f"{directory}: vocab.json and merges.txt are missing, and {vocab_size} entries is not gpt2's vocabulary")
        return cls(tiktoken.get_encoding("gpt2"), list(range(50257)))

    @classmethod
    def from_files(cls, vocab_file, merges_file):
        """Read the two files of a checkpoint. Raises UserError where they do not fit each other."""
        vocab = _read_vocab(vocab_file)
        byte_of = {char: byte for byte, char in byte_characters().items()}
        ranks = {bytes([byte]): byte for byte in range(256)}
        for number, left, right in _read_merges(merges_file):
            try:
                token = bytes(byte_of[c] for c in left + right)
            except KeyError as error:
                raise UserError(f"{merges_file}: line {number}: {error} stands for no byte") from error
            if left + right not in vocab:
                raise UserError(f"{merges_file}: line {number}: {left + right!r} is not in {Path(vocab_file).name}")
            ranks.setdefault(token, len(ranks))
        char_of = byte_characters()
        tokens = ["".join(char_of[byte] for byte in token) for token in ranks] + [END_OF_TEXT]
        missing = [token for token in tokens if token not in vocab]
        if missing or len(vocab) != len(tokens):
            extra = sorted(set(vocab) - set(tokens))
            raise UserError(
                f"{vocab_file}: does not agree with {Path(merges_file).name}: "
                f"{len(missing)} entries missing {missing[:3]}, {len(extra)} that no merge makes {extra[:3]}"
            )
        encoding = tiktoken.Encoding(
            "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )
        return cls(encoding, [vocab[token] for token in tokens])

    def encode(self, text):
        """Text -> list of ids. Text is text: "<|endoftext|>" in it is ordinary characters."""
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def encode_batch(self, texts):
        """List of texts -> list of lists of ids."""
        return [[self.ids[rank] for rank in ranks] for ranks in self.encoding.encode_ordinary_batch(texts)]

    def decode(self, ids):
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode([self.rank[int(i)] for i in ids], errors="replace")


def byte_characters():
    """byte -> the character that spells it: itself where it is printable, else the next free one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _read_vocab(path):
    try:
        vocab = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON vocabulary: {error}") from error
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path}: expected a JSON object of token: id")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{path}: the ids are not 0 .. {len(vocab) - 1}, each once")
    return vocab


def _read_merges(path):
    """Yield (line number, left, right) for each merge, in order."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{path}: line {number}: expected two tokens, found {line[:40]!r}")
        yield number, *parts
