"""What the system lets this process have: memory, threads, a container's limits."""

import itertools
import os
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import DEMO, PARAMS, TOKENIZER, load, python, random_weights

import llama
from llama.cli import set_threads
from llama.system import available_cpus, available_memory, free_cores

CpuTimes = namedtuple("CpuTimes", "user system nice idle")


@pytest.fixture
def tell(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Write a file of the kernel's, below another root. 100 KB and 64 cores are there."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 1024))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_memory_is_limited_by_cgroups(tmp_path, tell, monkeypatch):
    assert available_memory(tmp_path) == 100 * 1024
    tell("proc/self/cgroup", "0::/user/me\n")
    tell("sys/fs/cgroup/user/me/memory.max", "max\n")
    assert available_memory(tmp_path) == 100 * 1024
    tell("sys/fs/cgroup/user/memory.max", "30720\n")
    tell("sys/fs/cgroup/user/memory.stat", "anon 10240\nfile 20480\n")
    assert available_memory(tmp_path) == 20 * 1024  # the page cache can be dropped
    tell("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/1\n")  # version 1
    tell("sys/fs/cgroup/memory/memory.limit_in_bytes", "20480")
    tell("sys/fs/cgroup/memory/memory.stat", "rss 1\ntotal_rss 10240\n")
    assert available_memory(tmp_path) == 10 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # ranks on this machine
    assert available_memory(tmp_path) == 5 * 1024


def test_cores_are_limited_by_affinity_and_cgroups(tmp_path, tell):
    assert available_cpus(tmp_path) == 64
    tell("proc/self/cgroup", "0::/user/me\n")
    tell("sys/fs/cgroup/user/me/cpu.max", "max 100000\n")
    assert available_cpus(tmp_path) == 64
    tell("sys/fs/cgroup/user/cpu.max", "250000 100000\n")
    assert available_cpus(tmp_path) == 3
    tell("proc/self/cgroup", "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n")  # version 1
    tell("sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us", "100000")
    for quota, expected in (("-1", 64), ("400000", 4), ("50000", 1)):
        tell("sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us", quota)
        assert available_cpus(tmp_path) == expected


@pytest.mark.parametrize(
    ("n_cores", "n_bytes", "flag", "expected"),
    [(2, 2**30, None, 2), (1, 2**30, None, 1), (2, 10**6, None, 1), (2, 10**6, 3, 3)],
)
def test_number_of_threads(n_cores, n_bytes, flag, expected, tmp_path, monkeypatch):
    (tmp_path / "merged.pth").touch()
    os.truncate(tmp_path / "merged.pth", n_bytes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n_cores)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    assert set_threads(flag, tmp_path) == (None if flag else 2)
    assert found == [expected]


@pytest.mark.parametrize(
    ("user", "own", "niceness", "affinity", "expected"),
    [
        (60, 180, 0, 4, 3),
        (60, 300, 0, 4, 4),
        (85, 0, 0, 4, 1),
        (60, 180, 10, 4, 2),
        (60, 60, 0, 2, 1),
    ],
)
def test_cores_that_others_leave_are_free(user, own, niceness, affinity, expected, monkeypatch):
    times = CpuTimes(user=user / 2, system=7.5, nice=10.0, idle=32.5 - user / 2)  # of half a second
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda percpu: [times] * 4)
    monkeypatch.setattr(psutil.Process, "cpu_percent", lambda self: own)
    monkeypatch.setattr(psutil.Process, "nice", lambda self: niceness)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    assert free_cores() == expected


@pytest.mark.parametrize(("n_busy", "expected"), [(0, 3), (1, 2), (3, 1)])
def test_threads_leave_cores_to_other_programs(n_busy, expected, monkeypatch):
    model, found, seconds = load(DEMO), [], itertools.count(step=2)
    times = [CpuTimes(100, 0, 0, 0) if n < n_busy else CpuTimes(0, 0, 0, 100) for n in range(3)]
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda percpu: times)
    monkeypatch.setattr(psutil.Process, "cpu_percent", lambda self: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    model.generate("Once", max_gen_len=8)
    assert not found
    model.max_threads = 3
    model.generate("Once", max_gen_len=8)
    assert set(found) == {expected}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "20000 1"),
        ({"GOMP_SPINCOUNT": "7"}, "7 1"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None None"),
    ],
)
def test_threads_spin_for_a_bounded_time_unless_the_user_says_otherwise(given, expected):
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names} | given
    code = f"import os, llama; print(*map(os.environ.get, {names[:2]}))"
    assert python("-c", code, env=env, text=True).stdout == f"{expected}\n"


CACHE = 2 * PARAMS["n_layers"] * PARAMS["dim"] * 4  # bytes of a position in fp32
LONG = 2**20  # positions: 2.1 GB of cache
N_BYTES = 4 * sum(t.numel() for name, t in random_weights().items() if name != "rope.freqs")


def remedy(folder: Path, max_seq_len: int, **options) -> str:
    with pytest.raises(llama.UserError) as caught:
        llama.load(folder, TOKENIZER, max_seq_len, **options)
    return str(caught.value).rpartition(": ")[2]


def test_too_little_memory_names_what_would_fit(checkpoint, monkeypatch):
    def free(n_bytes: float) -> None:
        left = SimpleNamespace(available=int(n_bytes))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: left)

    smaller = "use `dtype=bfloat16` or `quantize=int8` or `quantize=int4`"
    free(CACHE * LONG + N_BYTES)
    assert remedy(checkpoint, LONG) == f"{smaller} or `max_seq_len={LONG // 2}`"
    free(CACHE * LONG / 2)
    assert remedy(checkpoint, LONG) == f"use `max_seq_len={LONG // 4}`"
    free(1000)
    assert remedy(checkpoint, 512) == "close programs, or use a smaller model"
