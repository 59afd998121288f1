"""Files that are written whole or not at all, and the door for files from strangers.

A foreign file is read by the one function of its kind: read_text, read_object (JSON), open_tensors (safetensors).
Whatever goes wrong there becomes one UserError that names the file, what was expected and what it seems to be.
"""

import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".tmp"  # the end of the names of files that are being written
FLOATS = ("F32", "F16", "BF16")  # as safetensors calls them
SEEMS = {
    b"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    b"<": "a web page in place of the file: download it again",
    b"PK": "a zip or a pickle of torch.save, which could run code: only safetensors are read",
    b"\x80": "a pickle, which could run code: only safetensors are read",
}
# What moves the cursor, colours a screen, breaks a line or turns the direction of writing, and lone surrogates.
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_MESSAGE = 1000  # characters


class UserError(ValueError):
    """The user's to mend: commands print its message on one line, which says what is wrong, where and what to do, and
    exit with code 2. It may quote a stranger's file: control characters are spelled out, a long one is cut."""

    def __init__(self, message):
        text, half = escape_control(str(message)), MAX_MESSAGE // 2
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:half]} ... {text[-half:]}")


def escape_control(text, keep=""):
    r"""`text` with control characters spelled out, as \x1b or \u202e, but for those in `keep`."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


@contextmanager
def reading(path, expected):
    """Inside, every error becomes a UserError: "PATH: not EXPECTED: why (what it seems to be)"."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a read from a pipe may never end
            raise UserError(f"{path}: not a regular file")
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: not {expected}: {why}{_seems(path)}") from error


def _seems(path):
    """What a file is instead, for the end of a message, or an empty string."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # safetensors: its first bytes are a length, and may be anything
        return ""
    start = start.lstrip()
    return next((f" ({what})" for sign, what in SEEMS.items() if start.startswith(sign)), "")


def read_text(path):
    """The text of a UTF-8 file."""
    with reading(path, "UTF-8 text"):
        return Path(path).read_text(encoding="utf-8")


def read_object(path):
    """The dict in a JSON file."""
    with reading(path, "JSON"):
        value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {value!r:.40}")
    return value


def open_tensors(path):
    """safetensors' safe_open, for torch. It reads the header alone, and checks that the tensors fill the file."""
    with reading(path, "a safetensors file"):
        return safe_open(path, framework="pt")


@contextmanager
def replacing(path):
    """Yield the path of a temporary file to write. On a clean exit it is flushed to the disk and renamed to `path`:
    there is always the old file or the new one, whole. On an error `path` stays as it was; an error of the disk or the
    folder is a UserError. A device or a pipe is written to as it is."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        yield Path(path)
        return
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        with suppress(OSError):  # not every system can flush a folder
            flush(target.parent)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error).rpartition("error: ")[2]  # safetensors says more
            raise UserError(f"{path}: cannot be written: {reason}") from error
        raise


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)  # Windows flushes what can be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder):
    """Remove the temporary files, there and in the folders there, of programs that were killed inside `replacing`."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Hold the lock on a file, made if it is missing, until the end of the block or of the process. Raises UserError if
    another process holds it."""
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is at work there: wait for its end, or stop it") from error
        except OSError:  # a file system without locks
            pass
        yield
