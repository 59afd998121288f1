"""Files that are written whole or not at all, and files from strangers: read only as far as they keep to their format.

A safetensors file is a length (8 bytes), a JSON header of that length with the shape, type and place of every tensor,
and the tensors. The library checks that they lie one after another and fill the file; nothing in it is code.
"""

import json
import os
import stat
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minigpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".tmp"  # the end of the names of files that are being written
MAX_TEXT = 1 << 24  # bytes of a JSON file, a merge list or a safetensors header: sixteen times gpt2's vocabulary
FLOATS = ("F32", "F16", "BF16")  # as safetensors calls them
NOT_WEIGHTS = {
    b"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    b"<": "a web page in place of the file: download it again",
    b"PK": "a zip or a pickle of torch.save, which could run code: only safetensors are read",
    b"\x80": "a pickle, which could run code: only safetensors are read",
}


@contextmanager
def replacing(path):
    """Yield the path of a temporary file in the same folder; on a clean exit it is flushed to the disk and renamed to
    `path`, so that there is always the old file or the new one, whole, even if the machine dies in between.

    The new file has the permissions of the old one, or those that the umask leaves. On an error the temporary file is
    removed and whatever `path` was before stays as it was. A full disk, or a folder that cannot be written or is gone,
    is a UserError. Where `path` is what standard output or standard error goes to, the content goes there in its turn,
    as if printed."""
    if stream := _standard_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder, Path(path).name))
            stream.flush()
            stream.buffer.write(temporary.read_bytes())
            stream.flush()
        return
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        yield Path(path)  # a device or a pipe, such as /dev/fd/3; what that links to may not be a path
        return
    target = Path(os.path.realpath(path))  # of a symbolic link, so that it stays one
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{target.name}.", target.parent)
        os.close(handle)
        yield Path(temporary)
        flush(temporary)
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
        with suppress(OSError):  # not every system can flush a folder
            flush(target.parent)
    except BaseException as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error).rpartition("error: ")[2]  # safetensors says more
            raise UserError(f"{path}: cannot be written: {reason}") from error
        raise


def _standard_stream(path):
    """Standard output or standard error, if that is the file at `path`: /dev/stdout, or where the shell sends it."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        with suppress(OSError, ValueError):  # no such file yet; a stream that is closed
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream


def _mode(path):
    """The permissions of a file or, where there is none, those that a new one has."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(os.stat(path).st_mode)
    umask = os.umask(0o077)  # it cannot be read without being set
    os.umask(umask)
    return 0o666 & ~umask


def flush(path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder):
    """Remove the temporary files of programs that were killed inside `replacing`."""
    for path in Path(folder).glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Inside, no other process gets this lock: it is on a file, which is made where it is missing and stays. It ends
    with the process, however that ends. Raises UserError where another process has it."""
    with open(path, "ab") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is at work there: wait for its end, or stop it") from error
        except OSError:  # a file system without locks
            pass
        yield


def read_text(path):
    """The text of a small UTF-8 file."""
    with _regular(path) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise UserError(f"{path}: larger than {MAX_TEXT:,} bytes, which is no such file of a GPT-2")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}{_instead(content)}") from error


def read_object(path):
    """The dict in a small JSON file. Python's extensions to JSON and keys that stand twice are refused."""
    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}{_instead(text.encode())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {value!r:.40}")
    return value


def open_tensors(path):
    """safetensors' safe_open, for torch. Reads no more than the header, and that only if it may be one."""
    with _regular(path) as file:
        start, size = file.read(64), os.fstat(file.fileno()).st_size
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, MAX_TEXT):
        found = f"{size:,} bytes cannot hold a header of {length:,}" if size >= 8 else f"it has {size} bytes"
        raise UserError(f"{path}: not a safetensors file: {found}{_instead(start)}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


@contextmanager
def _regular(path):
    """An open file, but no pipe or device, on which reading may never end."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _instead(content):
    """What a file seems to be that is not what it should be, for the end of a message."""
    kinds = [kind for start, kind in NOT_WEIGHTS.items() if content.lstrip().startswith(start)]
    return f" ({kinds[0]})" if kinds else ""


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs):
    """The dict of an object's keys and values."""
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("an object has a key twice")
    return names
