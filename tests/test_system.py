"""What the system lets this process have: memory, threads, a container's limits."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import PARAMS, TOKENIZER, python, random_weights

import llama
from llama.cli import set_threads
from llama.system import available_cpus, available_memory, busy_cores


@pytest.fixture
def tell(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Write a file of the kernel's, below another root. 100 KB and 64 cores are there."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 1024))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_memory_is_limited_by_cgroups(tmp_path, tell):
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
    set_threads(flag, tmp_path)
    assert found == [expected]


def test_cores_of_other_programs_are_all_but_our_own(monkeypatch):
    times = SimpleNamespace(user=60.0, system=15.0, nice=5.0, idle=20.0)
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda: times)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil.Process, "cpu_percent", lambda self: 180.0)
    assert busy_cores() == pytest.approx(1.2)


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
