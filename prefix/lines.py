"""Standard input, line by line, as it comes.

A thread reads it. So lines that are there are answered while others are still to come, on systems too that cannot ask a
pipe whether it holds more.
"""

import codecs
import queue
import sys
import threading

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
    blocks, lines, more, at_most = queue.Queue(16), [], True, LINES_AT_A_TIME * batch_size
    threading.Thread(target=read_blocks, args=(blocks,), daemon=True).start()
    while more or lines:
        while more and len(lines) < at_most and not (lines and blocks.empty()):
            block = blocks.get()
            if isinstance(block, OSError):
                raise block
            more = block is not None
            lines += block or []
        if lines:
            yield lines[:at_most]
        lines = lines[at_most:]


def read_blocks(blocks):
    """Put lists of lines into the queue `blocks`; at the end None, or the OSError that ended it."""
    rest = b""  # a line that has not ended yet
    try:
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
            while block := file.read(1 << 20):
                *lines, rest = (rest + block).split(b"\n")
                blocks.put(lines)
        blocks.put([rest] if rest not in (b"", b"\0") else [])  # the second byte of UTF-16's newline is no line
        blocks.put(None)
    except OSError as error:
        blocks.put(error)
