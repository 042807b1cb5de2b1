"""The memory and cores of this process, with the limits of a container."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")
PROCESS = psutil.Process()
PROCESS.cpu_percent()  # begins the first interval of `free_cores`
WORKING_MEMORY = 3 * 10**8  # bytes for activations and PyTorch itself


def read_number(path: Path, name: str = "") -> int | None:
    """The number after a name (a pattern) in one of the kernel's files; None if there is none."""
    try:
        found = re.search(rf"^{name}:?\s*(\d+)( kB)?", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and int(found[1]) * (1024 if found[2] else 1)


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the cgroups (version 2, or 1 with this controller) that limit this process."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            folder = root / "sys/fs/cgroup" / (controller if controllers else "") / path.lstrip("/")
            yield from (folder, *folder.parents)


def available_memory(root: Path = ROOT) -> int:
    """Bytes left to this process: the least of the machine's, the container's and `ulimit -v`'s."""
    left = [psutil.virtual_memory().available]
    if sys.platform == "linux":
        limit, _ = PROCESS.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            left.append(limit - PROCESS.memory_info().vms)
    for folder in cgroup_folders("memory", root):
        for limit, used in (("max", "anon"), ("limit_in_bytes", "total_rss")):
            if n_bytes := read_number(folder / f"memory.{limit}"):
                left.append(n_bytes - (read_number(folder / "memory.stat", used) or 0))
    return min(left) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's: ranks here


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    if sys.platform == "win32":
        return PROCESS.memory_info().peak_wset
    if sys.platform == "linux":
        return read_number(Path("/proc/self/status"), "VmHWM") or 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def affinity() -> set[int] | None:
    """The cores that this process may run on; None if the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def available_cpus(root: Path = ROOT) -> int:
    """Cores that this process may use: by its affinity and by the container's CPU quota."""
    cores = len(affinity() or ()) or psutil.cpu_count(logical=False) or 1
    for folder in cgroup_folders("cpu", root):
        both = folder / "cpu.max"  # "QUOTA PERIOD" or "max PERIOD"
        quota = read_number(both) or read_number(folder / "cpu.cfs_quota_us")
        period = read_number(both, r"\S+") or read_number(folder / "cpu.cfs_period_us")
        if quota and period:
            cores = min(cores, math.ceil(quota / period))
    return cores


def free_cores() -> int:
    """Of this process's cores, those that others have left since the last call; at least one.

    Programs of a lower priority (nice) do not count.
    """
    own = affinity()
    times = enumerate(psutil.cpu_times_percent(percpu=True))
    cores = [core for number, core in times if own is None or number in own]
    kinds = ["user", "system"]
    if PROCESS.nice() > 0:  # Linux counts this process's own time as nice, too
        kinds.append("nice")
    busy = -PROCESS.cpu_percent() / 100
    for core in cores:
        # In less than a second psutil's percentages do not add up to 100.
        busy += sum(getattr(core, kind, 0) for kind in kinds) / (sum(core) or 1)
    # Up to 0.35 of a core is noise. More is a program that wants a whole core: beside as many
    # threads as cores it gets half of one.
    return max(int(len(cores) - busy + 0.35), 1)
