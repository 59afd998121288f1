"""Which split a sentence belongs to: a pure function of its text.

The demo's pretraining and every later training or evaluation ask this function about a row's first text. So a text that
stands first is held out, or not, wherever it is met: in any file, within any limit.
"""

import hashlib

SPLITS = ("train", "validation", "test")
VALIDATION, TEST = 0.02, 0.04  # the share of all sentences


def split_of(text):
    """ "train", "validation" or "test". Case, spacing and punctuation do not count: "Go." and "go!" go together."""
    key = "".join(filter(str.isalnum, text.casefold())) or text
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < VALIDATION:
        return "validation"
    return "test" if share < VALIDATION + TEST else "train"
