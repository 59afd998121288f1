"""Files are written whole or not at all."""

import os
import sys

import pytest
from safetensors import SafetensorError

from minigpt import UserError
from minigpt.files import locked, remove_leftovers, replacing


def test_on_a_clean_exit_the_new_file_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_on_an_error_the_old_file_stays_and_no_temporary_is_left(error, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half a n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_on_an_error_no_new_file_appears(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half a n")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("Error: I/O error: No space left on device")]
)
def test_a_full_disk_is_an_error_that_names_the_file_and_the_reason(error, tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError) as raised, replacing(path) as temporary:
        temporary.write_text("half a n")
        raise error
    assert str(raised.value) == f"{path}: cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_an_error_that_names_the_file(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(UserError, match="folder/a.txt: cannot be written: No such file"), replacing(folder / "a.txt"):
        pass
    folder.mkdir()
    with (
        pytest.raises(UserError, match="folder/a.txt: cannot be written: No such file"),
        replacing(folder / "a.txt") as t,
    ):
        t.unlink()
        folder.rmdir()
    assert not folder.exists()


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").symlink_to("elsewhere/b.txt")
    for text in ("first", "second"):
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "elsewhere" / "b.txt").read_text() == text


def test_a_pipe_or_a_device_is_written_to_and_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as path:
        path.write_text("new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)


def test_a_pipe_that_has_no_name_of_its_own_is_written_to():
    reader, writer = os.pipe()  # as in `evaluate.py --json /dev/stdout | cat`
    with replacing(f"/dev/fd/{writer}") as path:
        path.write_text("new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("name, stream", [("/dev/stdout", sys.__stdout__), ("/dev/stderr", sys.__stderr__)])
def test_standard_output_is_written_to_in_its_turn_also_where_it_is_a_file(name, stream, capfd):
    print("before", file=stream)
    with replacing(name) as path:
        path.write_text("new\n")
    print("after", file=stream, flush=True)
    assert "".join(capfd.readouterr()) == "before\nnew\nafter\n"


@pytest.fixture
def umask():
    """A function that sets the umask, until the end of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, mask, mode):
    umask(mask)
    with replacing(tmp_path / "a.txt") as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
    assert umask(mask) == mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, umask, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"


def test_what_a_killed_program_left_half_written_is_removed_and_nothing_else(tmp_path):
    for name in ("a.txt", ".hidden", "mine.tmp"):
        (tmp_path / name).write_text("stays")
    with pytest.raises(SystemExit), replacing(tmp_path / "a.txt") as temporary:
        left = tmp_path / temporary.name
        content = temporary.read_bytes()
        raise SystemExit
    left.write_bytes(content)  # as if it had not been removed
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".hidden", "mine.tmp"}


def test_a_lock_is_for_one_at_a_time_and_changes_nothing_in_its_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for _ in range(2):
        with locked(path):
            with pytest.raises(UserError, match="a.txt: another process is at work there"), locked(path):
                pass
    assert path.read_text() == "text"
