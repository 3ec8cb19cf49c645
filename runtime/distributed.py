"""Processes of a run: group, device, precision, seeds, agreement between ranks, stopping on a signal.

One process without torchrun takes the same lines as many: collectives over one process return at once.
"""

import atexit
import datetime
import itertools
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import files, options
from runtime.options import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
KICK = signal.SIGURG  # by which a thread wakes the main one; ignored wherever nobody handles it
SAME_REQUEST = 2.0  # seconds: Ctrl-C reaches a process from the terminal, from run_all.sh and from torchrun
TIMEOUT = datetime.timedelta(minutes=30)  # of collectives: long enough to write the largest checkpoint
PATIENCE = 20.0  # seconds to wait for another process before saying so

_store: dist.Store | None = None  # what the processes of the group share, once they have met


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name}={text!r} is not a whole number; unset it or start with torchrun")
    return int(text)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def expected_processes() -> int:
    """Processes that torchrun says there are, before they have met."""
    return max(world_size(), _environment("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process writes the files and the log."""
    return rank() == 0


def setup(tf32: bool = True) -> torch.device:
    """Join the process group that torchrun describes, if any, and return this process's device.

    CUDA (one GPU per process), else MPS (a single process), else CPU. Raises UserError when there are more
    processes on a node than GPUs, or the others cannot be reached.
    """
    processes = _environment("WORLD_SIZE", 1)
    local_rank = _environment("LOCAL_RANK", 0)
    device = _device(local_rank, processes)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if processes > 1 and not dist.is_initialized():
        _join(device, processes)
    return device


def _join(device: torch.device, processes: int) -> None:
    global _store
    names = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    refusal, remedy = f"cannot join the {processes} processes of WORLD_SIZE", "start with torchrun, or unset WORLD_SIZE"
    if names:
        raise UserError(f"{refusal} ({names[0]} is not set); {remedy}")
    own_rank, address = _environment("RANK", 0), (os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0))
    if own_rank >= processes:
        raise UserError(f"{refusal} (RANK is {own_rank}); {remedy}")
    # torchrun keeps its store over restarts: under the old names, processes would look for those that died.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    hosts = own_rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = _open_store(address, hosts)
        _store = dist.PrefixStore(f"start-{start}", store)
        _meet(_store, own_rank, processes, "processes")
        with _interrupted_by_default():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_store,
                rank=own_rank,
                world_size=processes,
                timeout=TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{refusal} ({options.first_line(error)}); {remedy}") from error
    atexit.register(_leave)


def _open_store(address: tuple[str, int], hosts: bool) -> dist.Store:
    """The store at an address, which this process hosts or waits for. Raises UserError where nobody answers."""
    reason = ""

    def answers() -> bool:
        nonlocal reason
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            reason = str(error)
            return False
        return True

    host, port = address
    if not hosts:
        _wait(answers, lambda: f"number 0, at {host}:{port} ({reason})")
    return dist.TCPStore(host, port, is_master=hosts, timeout=TIMEOUT, wait_for_workers=False, multi_tenant=True)


def _meet(store: dist.Store, number: int, count: int, what: str) -> None:
    """Return when as many as count have called this with a number of their own. Raises UserError where some do not."""
    keys = [f"here-{other}" for other in range(count)]
    store.set(keys[number], "")

    def missing() -> str:
        away = [other for other, key in enumerate(keys) if not store.check([key])]
        listed = ", ".join(map(str, away[:10])) + (", ..." if len(away) > 10 else "")
        return f"{len(away)} of {count} {what}: number {listed}"

    if number == 0:
        _wait(lambda: store.check(keys), missing)
        store.set("all-here", "")
    else:
        _wait(lambda: store.check(["all-here"]), missing)


def _wait(ready: Callable[[], bool], whom: Callable[[], str]) -> None:
    """Return when ready() is true; a signal can interrupt that. Says for whom it waits; raises UserError at TIMEOUT."""
    begun, pause, told = time.monotonic(), 0.02, False
    while not ready():
        waited = time.monotonic() - begun
        if waited > TIMEOUT.total_seconds():
            raise UserError(
                f"waited {TIMEOUT.total_seconds() / 60:.0f} minutes in vain for {whom()}; start all of them"
            )
        if waited > PATIENCE and not told:
            told = True
            warnings.warn(f"waiting for {whom()}", stacklevel=2)
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


@contextmanager
def _interrupted_by_default() -> Iterator[None]:
    """Context in which Ctrl-C ends the process, for calls that wait in C++, where Python would not hear of it."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if previous is signal.default_int_handler:
            signal.signal(signal.SIGINT, previous)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int, processes: int) -> torch.device:
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank} of this node has no GPU: {gpus} present; start torchrun with "
                f"--nproc_per_node {gpus}"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available() and processes == 1:
        return torch.device("mps")
    return torch.device("cpu")


def hash_seed(*values: int | str) -> int:
    """A 63-bit seed for a stream named by values, such as (seed, "noise", index).

    Values are hashed, not added, so that neighbouring seeds share nothing.
    """
    entropy = [zlib.crc32(value.encode()) if isinstance(value, str) else value for value in values]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, step: int, micro_batch: int = 0) -> None:
    """Seed this process's generators for one step: random state never needs to be stored."""
    torch.manual_seed(hash_seed(seed, "step", rank(), step, micro_batch))


def autocast(device: torch.device, precision: str):
    """Context in which matrix products run in bfloat16 (bf16) or as they are (fp32)."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on this device: bf16 where the hardware multiplies it faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        # Without AMX, AVX512-BF16 was measured on a Xeon at half the rate of float32: docs/benchmark.md.
        fast = torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not is_intel())
    else:
        fast = False
    return "bf16" if fast else "fp32"


def is_intel() -> bool:
    """Whether the CPU is Intel's, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "GenuineIntel" in info.read_text()


def check_compiler(device: torch.device, remedy: str = "leave --compile out") -> None:
    """Raise UserError where a model cannot be compiled for this device, which else its first step would find out."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"compiling on the CPU needs the C++ compiler {compiler!r}; install it, or {remedy}")


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with gradients averaged over processes."""
    if world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool):
    """Context in which gradients only accumulate, for all micro-batches but the last."""
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def all_reduce(values: Tensor, op: str = "sum") -> Tensor:
    """Sum (or "max") of a tensor over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return values


def gather(value) -> list:
    """Every process's value of a plain Python object, by rank, on all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable, *args):
    """Call function on rank 0 and return its result on every rank; a UserError is raised on all of them."""
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def only_on_main(function: Callable, *args):
    """As on_main, for a result that cannot be sent: it stays on rank 0, and the other ranks get None."""
    kept = []
    on_main(lambda: kept.append(function(*args)))
    return kept[0] if kept else None


@contextmanager
def agreed_failure(what: str) -> Iterator[None]:
    """Context whose UserError on any process, or OSError about what, is one UserError on all of them."""
    failure = None
    try:
        yield
    except OSError as error:  # such as a full disk
        failure = f"{what} cannot be written ({error}); free space there and repeat the command to go on"
    except UserError as error:
        failure = str(error)
    failures = [text for text in gather(failure) if text is not None]
    if failures:
        raise UserError(failures[0])


@contextmanager
def hold(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Context in which no other command writes into a folder; it waits for one that does, and says for whom.

    Rank 0 has the lock. The others ask it every second, since one long wait would outlast the group's timeout.
    """
    lock, told = files.FolderLock(folder), None

    def take() -> str | None:
        with files.cannot_write(what):
            return lock.take()

    while (holder := on_main(take)) is not None:
        if holder != told:
            say(f"waiting for {holder}, which writes into {folder}")
            told = holder
        time.sleep(1)
    try:
        yield
    finally:
        lock.close()


class Interrupted(BaseException):
    """Ends a wait for data; no Exception, which a reader of images would take for a damaged file."""


class StopOnSignal:
    """Context that remembers a stop signal in place of dying from it: a run can end with its step.

    A wait for data (next_of) ends at once, on all processes of the group, whichever of them got the signal. A second
    signal, SAME_REQUEST after the first, ends the process at once, whatever it does. SIGHUP, of a terminal that is
    closed, stays ignored where it is: under nohup.
    """

    numbers = itertools.count()  # processes enter these contexts in the same order

    def __init__(self):
        self.received: signal.Signals | None = None
        self._waiting, self._elsewhere = False, None

    def __enter__(self) -> "StopOnSignal":
        ignored = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ()
        handled = [number for number in STOP_SIGNALS if number not in ignored]
        # A thread hears of signals through a pipe even while this one is in C++ or in a system call.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._previous_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._remember) for number in (*handled, KICK)}
        key = f"stop-{next(self.numbers)}"
        self._watcher = threading.Thread(target=self._watch, args=(reading, key), daemon=True)
        self._watcher.start()
        return self

    def next_of(self, iterator: Iterator):
        """Its next item. Raises StopIteration at its end, and where a signal came before the item."""
        try:
            self._waiting = True
            if not self.received:
                return next(iterator)
        except Interrupted:
            pass
        finally:
            self._waiting = False
        raise StopIteration

    def agreed(self) -> int:
        """The number of the signal that any process received, on all of them; 0 for none."""
        return int(all_reduce(torch.tensor(int(self.received or 0)), "max"))

    def _remember(self, number: int, frame) -> None:
        if number == KICK:
            number = self._elsewhere or self.received
        if number is not None:  # a KICK of somebody else means nothing
            self.received = self.received or signal.Signals(number)
        if self._waiting and self.received:
            self._waiting = False
            raise Interrupted

    def _watch(self, reading: int, key: str) -> None:
        """Tell the other processes of a signal, hear of theirs, end waits; at a second signal, end the process."""
        first = None
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while True:
                came = pipe.read(64) if select.select([pipe], [], [], 0.5)[0] else None
                if came == b"":
                    return
                for number in set(came or ()) & set(STOP_SIGNALS):
                    if first is None:
                        first = time.monotonic()
                        _tell(key, number)
                    elif time.monotonic() > first + SAME_REQUEST:
                        os._exit(128 + number)
                if came is None and self._waiting:
                    # Its own signal can have come between the last line of Python and the system call that waits.
                    self._elsewhere = None if self.received else _told(key)
                    if self.received or self._elsewhere:
                        signal.pthread_kill(threading.main_thread().ident, KICK)

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._writing)
        self._watcher.join(timeout=5)


def _tell(key: str, number: int) -> None:
    """Leave a signal's number for the other processes; where they are gone, nobody has to know."""
    if world_size() > 1:
        try:
            _store.set(key, str(number))
        except RuntimeError:
            pass


def _told(key: str) -> int | None:
    """The signal that another process left."""
    try:
        return int(_store.get(key)) if world_size() > 1 and _store.check([key]) else None
    except RuntimeError:  # whoever hosted the store is gone, which the next collective tells
        return None


def exit_stopped(number: int) -> None:
    """End this process as stopped by a signal: with status 128 + its number, as a shell would say.

    Under a torchrun that would start a stopped run again, with 0.
    """
    most, made = (_environment(f"TORCHELASTIC_{name}", 0) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    sys.exit(0 if made < most else 128 + number)


def begin_worker(worker: int) -> None:
    """For data workers: a signal to the whole group of processes is the main one's to answer; they end with that one.

    torch looks at the parent process, which a fork server is that does not end with it.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(process) -> None:
    process.join()
    os._exit(1)


@options.command
def main(argv: list[str] | None = None) -> None:
    """For run_all.sh: return when so many machines have called this, with a number each and the address of number 0."""
    parser = options.Parser(description=main.__doc__)
    parser.add_argument("machines", type=options.count)
    parser.add_argument("number", type=options.non_negative_int)
    parser.add_argument("address")
    parser.add_argument("port", type=options.count)
    args = parser.parse_args(argv)
    heard = [f"heard-{number}" for number in range(args.machines)]
    try:
        store = _open_store((args.address, args.port), args.number == 0)
        _meet(store, args.number, args.machines, "machines")
        store.set(heard[args.number], "")
        if args.number == 0:  # the store ends with this process
            store.wait(heard, datetime.timedelta(seconds=10))
    except RuntimeError as error:
        where = f"machine {args.number} cannot meet the others at {args.address}:{args.port}"
        raise UserError(f"{where} ({options.first_line(error)}); set another MASTER_PORT") from error


if __name__ == "__main__":
    main()
