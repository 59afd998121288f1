"""Standard input, line by line, as it comes: lines that are there are answered while others are still to come."""

import codecs
import sys

from prefix.distributed import log_once

LINES_AT_A_TIME = 32  # batches, at most, that are read before the first of them is answered


def decode_line(line):
    """The bytes of a line -> (text, why there is none or None)."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * line.count(0) > len(line) > 2:
        log_once("This seems to be UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8")
    if b"\0" in line:
        return "", "it holds a NUL byte"
    try:
        return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\r").decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{line[error.start]:02x} at its place {error.start + 1}"


def lines_as_they_come(batch_size):
    """Yield the lines of standard input, as bytes, in lists: those that are there by now, at least one and at most
    LINES_AT_A_TIME batches."""
    rest, at_most = b"", LINES_AT_A_TIME * batch_size  # rest: a line that has not ended yet
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
        while block := file.read(1 << 20):  # waits for the first byte only
            *lines, rest = (rest + block).split(b"\n")
            for start in range(0, len(lines), at_most):
                yield lines[start : start + at_most]
    if rest not in (b"", b"\0"):  # the second byte of UTF-16's newline is no line
        yield [rest]
