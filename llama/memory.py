"""How much memory this process has held, and may still take: in bytes, where Linux tells."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def number(path: Path, name: str = "") -> int | None:
    """The number behind a name in one of the kernel's files; None where there is none."""
    try:
        found = re.search(rf"^{name}:?\s*(\d+)( kB)?", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and int(found[1]) * (1024 if found[2] else 1)


def available(root: Path = Path("/")) -> int | None:
    """What is left of the machine's memory, of the container's and of `ulimit -v`: the least."""
    left = [number(root / "proc/meminfo", "MemAvailable")]
    if limit := number(root / "proc/self/limits", "Max address space"):
        left.append(limit - (number(root / "proc/self/status", "VmSize") or 0))
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controller, path = line.split(":", 2)
        if controller in ("", "memory"):  # cgroups of version 2 and 1
            folder = root / "sys/fs/cgroup" / controller / path.lstrip("/")
            for group in (folder, *folder.parents):
                for limit, used in (("max", "anon"), ("limit_in_bytes", "total_rss")):
                    if limit := number(group / f"memory.{limit}"):
                        left.append(limit - (number(group / "memory.stat", used) or 0))
    return min((bytes for bytes in left if bytes is not None), default=None)


def peak() -> int | None:
    """The most that this process has held."""
    return number(Path("/proc/self/status"), "VmHWM")


@contextmanager
def without_holes() -> Iterator[None]:
    """Let freed memory go back at once, in blocks of a MB and more: each a mapping of its own.

    Else glibc keeps what is freed between blocks that stay. As a rule that is well, since a new
    mapping costs a page fault every 4 KB.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:  # what glibc itself comes to once it has seen large blocks
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
