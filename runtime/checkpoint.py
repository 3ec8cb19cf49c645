"""Checkpoints as files: written whole or not at all and beside training, read without running code, verified."""

import argparse
import concurrent.futures
import copy
import hashlib
import io
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from models import DiT
from runtime import files, memory
from runtime.options import UserError

METADATA = "spiral_rope_dit"  # key of a safetensors file under which export.py describes the weights, as JSON
INTERRUPTED = "interrupted"  # key, true, of a checkpoint that is there only because its run was interrupted
PIECE = 2**28  # bytes that are allocated at a time for the copy of a state
ALIGNMENT = 64  # bytes
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPCODES = frozenset(  # of the pickles that torch.save writes of plain values, tensors and argparse.Namespace
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "GLOBAL REDUCE NEWOBJ BUILD BINPERSID".split()
)
MOST_OPCODES = 10**6  # a checkpoint of DiT-XL/2 has about 60,000
LARGEST_PICKLE = 2**24  # bytes
MOST_TENSORS = 10**5  # of a safetensors file
ITEM_BYTES = {  # of the storage types that checkpoints name
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
}


class SaveError(Exception):
    """A checkpoint could not be written; what was there before is untouched."""


def save(path: Path, state: dict) -> None:
    """Write state to path so that a reader sees a whole file or none. Raises SaveError, leaving no partial file."""
    try:
        with files.whole_file(path, tensor_bytes(state)) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise SaveError(f"checkpoint {str(path)!r} could not be written: {error}") from error


class BackgroundWriter:
    """Writes checkpoints in a thread while training goes on, one at a time, from a copy of the state.

    Where the memory cannot hold a copy, training waits until the checkpoint is written.
    """

    def __init__(self, report: Callable[[str], None]):
        self._copy, self._thread = HostCopy(report), ThreadPoolExecutor(1, "checkpoint")
        self._path: Path | None = None
        self._writing: Future | None = None

    def begin(self, path: Path, state: dict) -> None:
        """Begin to write a state, which may change from then on. finished tells what became of it."""
        assert self._writing is None, "finished has not been asked about the one before"
        copied = self._copy.of(state)
        self._path, self._writing = path, self._thread.submit(save, path, state if copied is None else copied)
        if copied is None:
            concurrent.futures.wait([self._writing])

    def finished(self, wait: bool) -> Path | None:
        """The checkpoint that was written since this was last asked; None without any, and while it is being written.

        Raises SaveError, or whatever else the thread met.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        concurrent.futures.wait([self._writing])
        path, written = self._path, self._writing
        self._path = self._writing = None
        written.result()
        return path

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


class HostCopy:
    """Room in host memory for the copy of a state, kept from one to the next; pinned for a state on CUDA.

    That the memory cannot hold a copy is found out, and reported, with the first.
    """

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self._room: list[Tensor] | None = None  # empty: there is none

    def of(self, state: dict) -> dict | None:
        """A copy of nested dicts and lists of tensors, valid until the next one; None where memory cannot hold it."""
        tensors = tensors_in(state)
        if self._room is None:
            self._room = _room_for(tensors)
            if not self._room:
                size, free = tensor_bytes(state), max(memory.available(), 0)
                self._report(
                    f"training waits while checkpoints are written: a copy takes {files.format_bytes(size)} of memory, "
                    f"{files.format_bytes(free)} are free"
                )
        if not self._room:
            return None
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        torch._foreach_copy_(self._room, tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        room = iter(self._room)
        return _mapped(state, lambda _: next(room))


def _room_for(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors like these in host memory that are yet to be filled; none where the memory cannot hold them.

    They are cut from a few large pieces, since PyTorch rounds each pinned one up to a power of two. Each has a storage
    of its own, since torch.save writes storages.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    left, pinned = sum(sizes), any(tensor.is_cuda for tensor in tensors)
    if left > memory.available():
        return []
    room, piece, used = [], [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if used + size > len(piece):
            try:
                piece = torch.empty(max(size, min(left, PIECE)), dtype=torch.uint8, pin_memory=pinned).numpy()
            except RuntimeError:  # a limit of the process, or of what may be pinned
                return []
            used = 0
        room.append(torch.from_numpy(piece[used : used + tensor.nbytes]).view(tensor.dtype).view(tensor.shape))
        used, left = used + size, left - size
    return room


def _mapped(state, function: Callable[[Tensor], Tensor | None]):
    """Nested dicts and lists with a function applied to their tensors."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        found = copy.copy(state)  # with what PyTorch adds to a state dict, so that the file has it too
        found.update((key, _mapped(value, function)) for key, value in state.items())
        return found
    return type(state)(_mapped(value, function) for value in state) if isinstance(state, list | tuple) else state


def tensors_in(state) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    found = []
    _mapped(state, found.append)
    return found


def tensor_bytes(state) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(tensor.nbytes for tensor in tensors_in(state))


def step_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def training_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def latest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, None where there is none at all.

    Those that do not verify are reported and left alone. Raises UserError when they are all there is, since a fresh
    start would overwrite what may be days of work.
    """
    paths = training_checkpoints(folder)
    for path in reversed(paths):
        try:
            load(path, verify=True)
            return path
        except UserError as error:
            report(f"warning: skipped a checkpoint: {error}")
    if paths:
        raise UserError(f"no checkpoint in {str(folder)!r} can be read; restore one, or remove them to start afresh")
    return None


def prune(newest: Path, keep: int | None) -> None:
    """Delete all but keep checkpoints of a run, ending with newest, which was just written; None keeps all.

    Those of later steps were damaged when the run resumed. They count for nothing and are left for their owner.
    """
    if keep is not None:
        paths = training_checkpoints(newest.parent)
        for path in paths[: paths.index(newest) + 1][:-keep]:
            path.unlink()


def interruptions(folder: Path, every: int) -> list[Path]:
    """Checkpoints of a run that are there only because it was interrupted; none of those of every so many steps."""
    found = []
    for path in training_checkpoints(folder):
        if int(path.stem) % every:
            try:
                found += [path] if load(path).get(INTERRUPTED) is True else []
            except UserError:  # damaged: left for its owner
                continue
    return found


def load(path: str | Path, verify: bool = False) -> dict:
    """Read a checkpoint into a dict of plain types and CPU tensors, mapped from the file rather than copied.

    A file that holds anything else than torch.save makes of tensors, plain types and argparse.Namespace is refused
    before it is unpickled, and so is one that claims more than it holds. verify also checks every byte against the
    checksums in the file, where it has them. A name that ends in .safetensors is read as such a file. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint {str(path)!r} does not exist; expected a file such as checkpoints/0050000.pt, a folder, or "
            "hf://user/repo"
        )
    with files.reading(f"checkpoint {str(path)!r}", "it is truncated or not a checkpoint: copy it again"):
        if path.suffix == ".safetensors":
            state = _load_safetensors(path)
        else:
            is_zip = zipfile.is_zipfile(path)
            (_claims_of_archive if is_zip else _claims_of_stream)(path, verify)
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a pickle protocol: what matters is whether the file loads
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {str(path)!r} holds a {type(state).__name__}; expected a dict of weights")
    return state


class _Item:
    """Stands for what a pickle may name beside plain values: a type of storage, a storage, a tensor, by their bytes."""

    __slots__ = ("bytes", "stored")

    def __init__(self, bytes: int, stored: int = 0):
        self.bytes, self.stored = bytes, stored  # stored: bytes of a tensor's storage

    def __setstate__(self, state):
        raise ValueError("it sets the state of a tensor")


class _Claims(pickle.Unpickler):
    """What a pickle says that it holds: nothing is made but plain values, and an _Item for each tensor.

    held gives the bytes that the file has of a storage, by its key.
    """

    def __init__(self, contents: bytes, held: Callable[[str], int], path: Path):
        super().__init__(io.BytesIO(contents))
        self.held, self.path = held, path
        self.known = {  # made anew for every file, since a pickle can set attributes of what it names
            "collections.OrderedDict": OrderedDict,
            "argparse.Namespace": type("Namespace", (argparse.Namespace,), {}),
            "torch._utils._rebuild_tensor": lambda *arguments: self.tensor(*arguments),
            "torch._utils._rebuild_tensor_v2": lambda *arguments: self.tensor(*arguments),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": lambda lengths=(): tuple(lengths),
            **{f"torch.{name}": _Item(size) for name, size in ITEM_BYTES.items()},
        }

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in self.known:
            raise UserError(
                f"checkpoint {str(self.path)!r} is refused: it asks for {files.shortened(f'{module}.{name}', 80)}; "
                "only tensors and plain values load"
            )
        return self.known[f"{module}.{name}"]

    def persistent_load(self, reference: tuple) -> _Item:
        kind, item, key, _, length, *view = reference
        if kind != "storage" or not isinstance(length, int) or length < 0 or any(view):
            raise ValueError("it refers to a storage in another way than torch.save")
        if item.bytes * length > self.held(key):
            raise ValueError(f"storage {key!r} claims {item.bytes * length} bytes, more than the file holds of it")
        return _Item(item.bytes, item.bytes * length)

    def tensor(self, storage: _Item, offset: int, lengths: tuple, strides: tuple, *rest) -> _Item:
        """rest is whether it requires gradients, hooks, and metadata such as a negative bit."""
        numbers = (offset, *lengths, *strides)
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(numbers) > 20 or any(rest[2:]):
            raise ValueError("it rebuilds a tensor in another way than torch.save")
        return _Item(storage.bytes * math.prod(lengths), storage.stored)


def _claims_of_archive(path: Path, verify: bool) -> None:
    """Check what an archive of torch.save claims, against its entries. Raises UserError and whatever a reader does."""
    with files.open_zip(path, compressed=False) as archive:
        damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise UserError(f"checkpoint {str(path)!r} is damaged: checksum of {damaged!r} differs; copy it again")
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        if archive.getinfo(name).file_size > LARGEST_PICKLE:
            raise ValueError(f"entry {name!r} has more than {LARGEST_PICKLE} bytes")
        folder = name.removesuffix(".pkl")
        contents = _pickled(io.BytesIO(archive.read(name)))
        _check_claims(contents, lambda key: archive.getinfo(f"{folder}/{key}").file_size, path)


def _claims_of_stream(path: Path, verify: bool) -> None:
    """Check what a file of torch.save before its archives claims: five pickles, then the storages."""
    with open(path, "rb") as file:
        begin, size = io.BytesIO(file.read(LARGEST_PICKLE)), path.stat().st_size
    for _ in range(5):
        _check_claims(_pickled(begin), lambda key: size, path)


def _pickled(file: io.BytesIO) -> bytes:
    """The pickle that follows. Raises ValueError for one that has what torch.save does not write."""
    begin = file.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name not in OPCODES or number > MOST_OPCODES:
            raise ValueError(f"opcode {number} of its pickle is {opcode.name}, which torch.save does not write there")
        if opcode.name == "LONG_BINPUT" and argument > number:  # the unpickler's table would have so many places
            raise ValueError(f"opcode {number} of its pickle is stored in place {argument}")
    return file.getvalue()[begin : file.tell()]


def _check_claims(contents: bytes, held: Callable[[str], int], path: Path) -> None:
    """Raise UserError or ValueError unless a pickle holds plain values, and tensors of which every number is there."""
    totals, size = Counter(), path.stat().st_size
    for name, value in files.leaves(_Claims(contents, held, path).load()):
        if isinstance(value, _Item) and value.stored >= value.bytes:
            totals[name.split(".")[0]] += value.bytes
        elif isinstance(value, _Item):
            raise UserError(
                f"checkpoint {str(path)!r}: {name} claims {value.bytes} bytes, more than the file holds of it"
            )
        elif not (value is None or isinstance(value, str | int | float)):
            raise ValueError(f"{name} is a {type(value).__name__}; expected tensors and plain values")
    for name, total in totals.items():  # tensors that share their numbers
        if total > size + 2**29:
            raise ValueError(f"the tensors in {name} claim {total} bytes, much more than the file has")


def _load_safetensors(path: Path) -> dict:
    """The weights of a safetensors file: alone, or with what export.py says about them."""
    with safe_open(path, framework="pt") as file:
        if len(file.keys()) > MOST_TENSORS:
            raise ValueError(f"it names {len(file.keys())} tensors; expected at most {MOST_TENSORS}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return tensors
    about = files.parse_json(text)
    state = described(tensors, about, path)
    check_seal(about, path)
    return state


def save_safetensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write weights, and what export.py says about them, whole or not at all. Raises OSError."""
    metadata = {"format": "pt", METADATA: json.dumps(about)}
    with files.whole_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))  # its own save_file would keep others from reading


def check_seal(about: dict, path: Path) -> None:
    """Raise UserError unless what export.py says about weights is what it wrote; early versions sealed nothing."""
    if "sha256" in about and not files.is_sealed(about):
        raise UserError(f"checkpoint {str(path)!r} is damaged: its settings are not the exported ones; export it again")


def described(tensors: dict[str, Tensor], about: dict, path: Path) -> dict:
    """Weights under "ema" or "model", with what export.py says about them. Raises UserError unless it wrote that."""
    known = isinstance(about, dict) and about.get("weights") in ("ema", "model")
    if not (known and isinstance(about.get("config"), dict)):
        raise UserError(f"checkpoint {str(path)!r} has metadata that export.py does not write; export it again")
    return {about["weights"]: tensors, **{key: about.get(key) for key in ("config", "step", "weights_sha256")}}


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names and values of tensors, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_tensor(name: str, value: Tensor, path: Path) -> None:
    """Raise UserError unless a tensor holds floating-point numbers, all of them finite."""
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"checkpoint {str(path)!r}: {name} is of type {kind}; expected floating-point numbers")
    if not bool(torch.isfinite(value).all()):
        raise UserError(
            f"checkpoint {str(path)!r} has values in {name} that are not finite numbers; use an earlier one"
        )


def check_training_state(state: dict, model: DiT, path: Path) -> None:
    """Raise UserError unless weights, averages and optimizer moments are finite and of the model's shapes.

    A file in the run's folder need not be ours, and torch checks no shapes when it loads an optimizer.
    """
    if not (isinstance(state["step"], int) and state["step"] >= 0):
        raise UserError(f"checkpoint {str(path)!r} has a step that is no whole number >= 0; use another")
    for which in ("model", "ema"):
        for name, value in state[which].items():
            check_tensor(f"{which} {name}", value, path)
        check_weights(model.state_dict(), state[which], path)
    moments, parameters = state["opt"]["state"], list(model.named_parameters())
    if sorted(moments) != list(range(len(parameters))):
        raise UserError(f"checkpoint {str(path)!r} has optimizer states of {len(moments)} of {len(parameters)} weights")
    for index, (name, parameter) in enumerate(parameters):
        for key, shape in {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}.items():
            value = moments[index][key]
            check_tensor(f"optimizer {key} of {name}", value, path)
            if value.shape != shape:
                raise UserError(
                    f"checkpoint {str(path)!r}: optimizer {key} of {name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(shape)}"
                )


def check_weights(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless names and shapes are the expected ones."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if missing:
        raise UserError(f"checkpoint {str(path)!r} lacks {len(missing)} weights, such as {min(missing)}")
    if unexpected:
        raise UserError(f"checkpoint {str(path)!r} has {len(unexpected)} unknown weights, such as {min(unexpected)}")
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}, expected {tuple(expected[wrong[0]].shape)}"
        raise UserError(f"checkpoint {str(path)!r}: {wrong[0]} has shape {shapes}")
