"""Processes of a run: group, device, precision, seeds, agreement between ranks, stopping on a signal.

One process without torchrun takes the same lines as many: collectives over one process return at once.
"""

import atexit
import datetime
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.options import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)  # long enough to write the largest checkpoint
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store over restarts: under the old names, processes would look for those that died.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"start-{start}", store),
            rank=own_rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the {processes} processes of WORLD_SIZE ({error}); start with torchrun, or unset WORLD_SIZE"
        ) from error
    atexit.register(_leave)


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


class StopOnSignal:
    """Context that remembers a stop signal in place of dying from it: a run can end with its step.

    SIGHUP, of a terminal that is closed, stays ignored where it is: under nohup.
    """

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> "StopOnSignal":
        ignored = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ()
        handled = [number for number in STOP_SIGNALS if number not in ignored]
        self._previous = {number: signal.signal(number, self._remember) for number in handled}
        return self

    def _remember(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_stop_signals(worker: int) -> None:
    """For data workers: a signal to the whole process group is the main process's to answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
