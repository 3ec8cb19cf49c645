"""Files written whole or not at all, JSON, and what an OSError means to the user."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runtime.options import UserError

PARTIAL = ".partial"  # suffix of a file being written
LOCK = ".lock"


@contextmanager
def whole_file(path: Path, needed: int = 0, durable: bool = True) -> Iterator[BinaryIO]:
    """A file under a temporary name beside path, which becomes path when the block ends without an error.

    needed is how many bytes it will take, where that is known. durable waits for the disk, so that the file is whole
    even after a power failure; pictures, which can be made again, do without. Raises OSError, before anything is
    written where needed bytes are not free; whatever is raised, no partial file is left.
    """
    check_space(path.parent, needed)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do that for folders
            raise
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError unless the disk of an existing folder has so many bytes free."""
    free = shutil.disk_usage(folder).free if needed else needed
    if free < needed:
        text = f"it needs {format_bytes(needed)} and {format_bytes(free)} are free on the disk"
        raise OSError(errno.ENOSPC, text)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))  # names of files can be any bytes


def write_json(path: Path, values: dict) -> None:
    """Write a JSON object whole or not at all. Raises OSError."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError when the file is damaged or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); remove it together with what it describes") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(values).__name__}; expected an object")
    return values


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()


class FolderLock:
    """The lock of a folder into which one process writes at a time; readers need none.

    lockf and not flock: a record lock dies with its process even when a data worker outlives it, and reaches over NFS.
    A process loses it with the first of its handles that is closed, so nothing else opens the file.
    """

    def __init__(self, folder: Path):
        self.folder, self._file = folder, None

    def holder(self) -> str | None:
        """Lock the folder, unless another process did: who that is. Raises OSError."""
        if self._file is None:
            self._file = open(self.folder / LOCK, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            return self._file.read(200).strip() or "another process"
        return None

    def take(self) -> str | None:
        """As holder, in a folder that is made where it is missing; the lock then tells of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        holder = self.holder()
        if holder is None:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
            os.fsync(self._file.fileno())  # for readers on other machines
        return holder

    def close(self) -> None:
        """Give it back, if it was taken."""
        if self._file is not None:
            self._file.close()


@contextmanager
def cannot_write(what: str, remedy: str = "choose another") -> Iterator[None]:
    """Context whose OSError becomes a UserError: <what> cannot be written (<reason>); <remedy>."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror or error}); {remedy}") from error


def check_folder(path: Path, option: str, needed: int = 0) -> None:
    """Raise UserError unless path is, or could be made, a folder in which the user may write needed bytes."""
    existing = path.absolute()
    while not os.path.exists(existing):  # Path.exists raises where a folder above may not be looked into
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option} {str(path)!r} cannot be written ({str(existing)!r} is a file); choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission in {str(existing)!r}"
        raise UserError(f"{option} {str(path)!r} cannot be written ({reason}); choose another")
    with cannot_write(f"{option} {str(path)!r}", "free space, or choose another"):
        check_space(existing, needed)


def check_output(path: Path, suffixes: tuple[str, ...], option: str = "--out") -> None:
    """Raise UserError where a file with one of these suffixes cannot be written at path. No suffixes: any will do."""
    name = f"{option} {str(path)!r}"
    if suffixes and path.suffix not in suffixes:
        formats = f"one of {', '.join(suffixes)}" if len(suffixes) > 1 else suffixes[0]
        raise UserError(f"{name} has the wrong ending; end it in {formats}")
    if not path.parent.is_dir():
        raise UserError(f"{name} is in a folder that does not exist; make the folder first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        reason = os.strerror(errno.EISDIR if path.is_dir() else errno.EACCES)
        raise UserError(f"{name} cannot be written ({reason}); choose another")


def format_bytes(size: float) -> str:
    """1.5 GB: decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
