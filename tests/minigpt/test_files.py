"""Files are written whole or not at all."""

import os

import pytest
from conftest import refusal
from safetensors import SafetensorError

from minigpt import UserError
from minigpt.files import locked, remove_leftovers, replacing


def replace(path, text="new", error=None):
    """Write `text` to a file, or fail in the middle of it."""
    with replacing(path) as temporary:
        temporary.write_text(text)
        if error:
            raise error


def test_a_new_file_is_on_the_disk_before_it_takes_the_place_of_the_old(write, tmp_path, monkeypatch):
    path, flags, flushed, os_open = write("a.txt", "old"), [], [], os.open
    monkeypatch.setattr(os, "open", lambda path, flag: flags.append(flag) or os_open(path, flag))
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(path.read_text()))
    replace(path)
    assert flushed == ["old", "new"]  # at the flush of the file, and of its folder
    assert flags == [os.O_RDWR, os.O_RDONLY]  # Windows does not flush through a handle that may only read
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_on_an_error_the_old_file_stays_and_no_temporary_is_left(error, write, tmp_path):
    path = write("a.txt", "old")
    for name in ("a.txt", "new.txt"):
        with pytest.raises(error):
            replace(tmp_path / name, error=error)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), SafetensorError(f"Error: I/O error: {FULL}")])
def test_a_full_disk_is_an_error_that_names_the_file_and_the_reason(error, tmp_path):
    path = tmp_path / "a.txt"
    assert refusal(replace, path, "half a n", error) == f"{path}: cannot be written: {FULL}"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    folder = tmp_path / "folder"
    told = f"{folder}/a.txt: cannot be written: No such file or directory"
    assert refusal(replace, folder / "a.txt") == told
    folder.mkdir()
    with pytest.raises(UserError, match=told), replacing(folder / "a.txt"):
        folder.rmdir()
    assert not folder.exists()


def test_a_pipe_or_a_device_is_written_to_and_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace(pipe)
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)


def test_what_a_killed_program_left_half_written_is_removed_and_nothing_else(write, tmp_path):
    kept = {write(name, "stays") for name in ("a.txt", ".hidden", "mine.tmp")}
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "in" / "a.txt"):
        with pytest.raises(SystemExit), replacing(path) as temporary:
            raise SystemExit
        temporary.write_text("half a n")  # as if it had not been removed
    remove_leftovers(tmp_path)
    assert set(tmp_path.rglob("*")) == kept | {tmp_path / "in"}


def test_a_lock_is_for_one_at_a_time_and_changes_nothing_in_its_file(write):
    path = write("a.txt", "text")
    for _ in range(2):
        with locked(path), pytest.raises(UserError, match="a.txt: another process is at work there"), locked(path):
            pass
    assert path.read_text() == "text"


def test_a_file_is_flushed_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to flush a read-only one."""
    flags, opened, flushed = [], os.open, []
    monkeypatch.setattr(os, "fsync", flushed.append)
    monkeypatch.setattr(os, "open", lambda path, flag: flags.append(flag) or opened(path, flag))
    with replacing(tmp_path / "a") as path:
        path.write_text("x")
    assert flags == [os.O_RDWR, os.O_RDONLY] and len(flushed) == 2  # the file, its folder
