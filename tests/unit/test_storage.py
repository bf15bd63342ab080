"""A file system that does not answer: asked again, then 66 with file and errno; what it does answer is believed."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from dist_cpt import storage
from dist_cpt.errors import EXIT_STORAGE, FINAL_CODES, StorageError
from dist_cpt.storage import NotRegularFile, is_there, open_regular, patiently, read_bytes


class Failing:
    """Raises what is listed, one error a call, then the last one for ever, or returns "read"."""

    def __init__(self, *errors: Exception, for_ever: bool = False) -> None:
        self.errors, self.for_ever, self.calls = list(errors), for_ever, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.for_ever or self.calls <= len(self.errors):
            raise self.errors[min(self.calls, len(self.errors)) - 1]
        return "read"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that only sleeping advances."""
    now = [0.0]
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + max(seconds, 1e-3)))
    return now


def oserror(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN])
def test_an_errno_that_passes_is_not_seen(code):
    read = Failing(oserror(code), oserror(code), oserror(code))
    assert patiently("f", read) == "read"
    assert read.calls == 4


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_after_a_minute_it_is_66_with_file_and_errno(code, clock):
    with pytest.raises(StorageError) as raised:
        patiently("/runs/a/run.json", Failing(oserror(code), for_ever=True))
    assert raised.value.exit_code == EXIT_STORAGE
    assert EXIT_STORAGE not in FINAL_CODES
    assert all(named in str(raised.value) for named in ("/runs/a/run.json", errno.errorcode[code]))
    assert 60 <= clock[0] < 61


def test_the_time_is_a_setting(monkeypatch, clock):
    monkeypatch.setenv(storage.VARIABLE, "7")
    with pytest.raises(StorageError):
        patiently("f", Failing(oserror(errno.EIO), for_ever=True))
    assert 7 <= clock[0] < 8


def test_an_answer_is_believed_at_once(clock):
    for code in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        with pytest.raises(OSError, match=os.strerror(code)):
            patiently("f", Failing(oserror(code), for_ever=True))
    assert clock[0] == 0


def test_a_name_that_should_be_there_is_looked_for_again(clock):
    assert patiently("f", Failing(*[oserror(errno.ENOENT)] * 3), expected=True) == "read"
    with pytest.raises(FileNotFoundError):
        patiently("f", Failing(oserror(errno.ENOENT), for_ever=True), expected=True)
    assert clock[0] < 10


def test_a_permission_is_not_waited_for(clock):
    with pytest.raises(StorageError, match="EACCES"):
        patiently("f", Failing(oserror(errno.EACCES), for_ever=True))
    assert clock[0] == 0


def test_an_errno_in_the_text_of_a_library_counts():
    assert patiently("f", Failing(RuntimeError("Input/output error (os error 5)"))) == "read"
    with pytest.raises(StorageError, match="EIO"):
        patiently("f", Failing(RuntimeError("Input/output error (os error 5)"), for_ever=True))
    with pytest.raises(ValueError, match="damaged"):
        patiently("f", Failing(ValueError("damaged")))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name in ("pipe", "socket", "."):
        with pytest.raises(NotRegularFile):
            open_regular(tmp_path / name)
        with pytest.raises(NotRegularFile):
            read_bytes(tmp_path / name)
    (tmp_path / "file").write_bytes(b"x")
    assert read_bytes(tmp_path / "file") == b"x"
    assert is_there(tmp_path / "pipe")
    assert not is_there(tmp_path / "none")
