"""Memory of the host: the most that this process has taken, and what it can have beside that."""

import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")  # limits of Slurm jobs and containers, which the machine's memory does not show


def peak() -> int:
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had when it started this process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available() -> int:
    """Bytes that this process can take for good, when what it takes at its peak is left free for the next time."""
    to_come = peak() - psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *_left_in_groups()]) - to_come


def _left_in_groups() -> Iterator[int]:
    """What the control groups of this process leave it, one after the other up to the outermost."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, usage, cache = CONTROL_GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            root, limit, usage = CONTROL_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
            try:
                most, taken = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                cached = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            except OSError:  # a container sees the names of groups that are outside it
                continue
            if most != "max":
                yield int(most) - taken + int(cached[1] if cached else 0)  # files that are read again when needed
