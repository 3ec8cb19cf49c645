"""Files written whole or not at all, files of whatever content read within bounds, and what an error in them means."""

import argparse
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import socket
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from runtime.options import UserError, first_line

PARTIAL = ".partial"  # suffix of a file being written
LOCK = ".lock"
LARGEST_JSON = 2**24  # characters; parsed it takes up to 25 times as much
LARGEST_LISTING = 2**24  # bytes of a zip archive's own list of its members, of about 100 each
LARGEST_NPY_HEADER = 2**14  # bytes
DEEPEST, MOST_VALUES, MOST_CHARACTERS = 64, 2**18, 2**26  # of values that a file nests; characters with those of names


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


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Context in which a file is read that may hold anything: whatever it makes a reader raise becomes a UserError.

    The line is <what> cannot be read (<reason>); <remedy>.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif not isinstance(error, ValueError | zipfile.BadZipFile):  # whose texts say all
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{what} cannot be read ({shortened(reason)}); {remedy}") from error


def shortened(text: str, limit: int = 300) -> str:
    """Text of at most so many characters: a hostile file's own can be as long as the file."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def read_json(path: Path, remedy: str = "remove it together with what it describes") -> dict:
    """A JSON object. Raises UserError, with the remedy, when the file is damaged or holds something else."""
    with reading(repr(str(path)), remedy):
        with open(path, encoding="utf-8") as file:
            values = parse_json(file.read(LARGEST_JSON + 1))
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(values).__name__}; expected an object")
    return values


def parse_json(text: str):
    """What a JSON text says. Raises ValueError, or what json does, for one that no file of ours has."""
    if len(text) > LARGEST_JSON:
        raise ValueError(f"its JSON has more than {LARGEST_JSON} characters")
    values = json.loads(text)
    for _ in leaves(values):
        pass
    return values


def sealed(values: dict) -> dict:
    """A JSON object with a checksum of the rest of it."""
    return values | {"sha256": _json_hash(values)}


def is_sealed(values: dict) -> bool:
    """Whether a JSON object is what it was when it was sealed."""
    return values.get("sha256") == _json_hash(values)


def _json_hash(values: dict) -> str:
    """Hash of a JSON object, in whatever way it is written, but for its entry "sha256"."""
    values = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def leaves(values, name: str = "", budget: list[int] | None = None, depth: int = 0) -> Iterator[tuple[str, object]]:
    """What nested dicts, lists, tuples, sets and namespaces hold, each with its keys joined by dots.

    Raises ValueError for what no file of ours holds and would keep its readers busy: values nested deeply or in
    themselves, lists in lists that multiply, keys that are neither text nor whole numbers.
    """
    budget = [MOST_VALUES, MOST_CHARACTERS] if budget is None else budget
    budget[0] -= 1
    budget[1] -= len(name) + (len(values) if isinstance(values, str | bytes) else 0)
    if depth > DEEPEST or min(budget) < 0:
        raise ValueError("its values are nested in themselves, too deeply, or too many times")
    if isinstance(values, dict):
        items = [*dict.items(values), *vars(values).items()] if hasattr(values, "__dict__") else dict.items(values)
    elif isinstance(values, argparse.Namespace):
        items = vars(values).items()
    elif isinstance(values, list | tuple | set):
        items = enumerate(values)
    else:
        yield name, values
        return
    for key, value in items:
        if not isinstance(key, str | int):
            raise ValueError(f"it has a key of type {type(key).__name__}; expected text or whole numbers")
        yield from leaves(value, f"{name}.{key}" if name else str(key), budget, depth + 1)


class _Listing(io.FileIO):
    """A file of which no read takes more than a listing may have, until bounded is False."""

    bounded = True

    def read(self, size: int = -1) -> bytes:
        if self.bounded and size > LARGEST_LISTING:
            raise ValueError(f"its list of members has {size} bytes; expected at most {LARGEST_LISTING}")
        return super().read(size)


@contextmanager
def open_zip(path: Path, compressed: bool) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose members can be read without unpacking much more than the file has bytes.

    Raises ValueError for members that are compressed where they may not be, or in other ways than NumPy writes them,
    that claim to be much larger than the file, or of which two share a name; and whatever zipfile does.
    """
    with _Listing(path) as file, zipfile.ZipFile(file) as archive:
        file.bounded, size = False, path.stat().st_size
        most = LARGEST_JSON + 200 * size if compressed else size
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, *([zipfile.ZIP_DEFLATED] if compressed else ())):
                raise ValueError(f"entry {member.filename!r} is compressed in a way that it may not be")
            if member.file_size > most:
                raise ValueError(f"entry {member.filename!r} is larger than the file")
        if len({name.lower() for name in archive.namelist()}) < len(archive.namelist()):
            raise ValueError("two of its entries share a name")
        yield archive


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, column-major order and dtype of the .npy that follows; file is at its data afterwards.

    Raises ValueError for no such header and for one that is too long.
    """
    begin = file.tell()
    head = io.BytesIO(file.read(LARGEST_NPY_HEADER))
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, column_major, dtype = read(head)
    except ValueError:
        raise
    except Exception as error:  # NumPy has Python parse a header, which raises many kinds
        raise ValueError(f"its header cannot be read ({first_line(error)})") from error
    if any(length < 0 for length in shape):
        raise ValueError(f"its header claims the shape {shape}")
    file.seek(begin + head.tell())
    return shape, column_major, dtype


def read_npy(path: Path, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """The array in an .npy, mapped from it. Raises ValueError unless it has this shape, type and length.

    kind is a dtype, byte order included, or "S" for bytes of any length.
    """
    with open(path, "rb") as file:
        try:
            found, column_major, dtype = npy_header(file)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if found != tuple(shape) or column_major or not (dtype.kind == kind or dtype == np.dtype(kind)):
        raise ValueError(f"{path.name} holds {dtype} {found}; expected {kind} {tuple(shape)}")
    if size - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes; expected {begin + math.prod(shape) * dtype.itemsize}")
    return np.memmap(path, dtype, "r", begin, tuple(shape))


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

    def take(self) -> str | None:
        """Lock the folder, made where it is missing, unless another process did: who that is. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            self._file = open(self.folder / LOCK, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return _told_by(self._file)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        os.fsync(self._file.fileno())  # for readers on other machines
        return None

    def close(self) -> None:
        """Give it back, if it was taken."""
        if self._file is not None:
            self._file.close()


def holder_of(folder: Path) -> str | None:
    """Who has the lock of a folder, by a look that neither takes it nor writes. Raises OSError."""
    try:
        file = open(folder / LOCK, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    # struct flock: type, whence, start, length and process; on macOS the first two come last.
    layout, kind = ("qqihh", 3) if sys.platform == "darwin" else ("hhqqi", 0)
    asked = [0] * 5
    asked[kind] = fcntl.F_WRLCK
    with file:
        found = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *asked)))
        return None if found[kind] == fcntl.F_UNLCK else _told_by(file)


def _told_by(file: TextIO) -> str:
    """Who has the lock, as its file says."""
    file.seek(0)
    return file.read(200).strip() or "another process"


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
