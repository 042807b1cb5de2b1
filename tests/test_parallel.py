"""Several ranks: the same text as one process, from any files, in their share of the memory."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, write_shards

from llama.checkpoint import merge

PROMPTS = ["Once upon a time", "The", "Hello there, how are you"]
TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
WORKER = """
import sys, torch, llama
from llama.parallel import joined, place

torch.set_grad_enabled(False)
_, tokenizer, inputs, results = sys.argv
prompts, tokens, cases = torch.load(inputs)
found = {}
with joined():
    for name, (folder, dtype, quantize) in cases.items():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            run = llama.load(folder, tokenizer, quantize=quantize)
        except llama.UserError as error:
            found[name] = str(error)
            continue
        state = run.model.state_dict(keep_vars=True).values()
        found[name] = {
            "texts": run.generate(prompts, 20, temperature=0),
            "logits": run.model(tokens, 0),
            "bytes": sum(tensor.nbytes for tensor in state),
            "drawn": run.generate(prompts, 20, temperature=1),
        }
    torch.save(found, f"{results}.{place()[0]}")
"""


def python(*args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def torchrun(n_ranks: int, script: Path, *args: object) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}")
    return python(*launcher, script, *args)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, weights) -> dict[str, Path]:
    """The same weights in 1, 2 and 8 shards, and merged as they are, in int8 and in int4."""
    root = tmp_path_factory.mktemp("parallel")
    folders = {f"{n} shards": write_shards(root / str(n), weights, n) for n in (1, 2, 8)}
    for quantize in (None, "int8", "int4"):
        folder = folders[f"merged {quantize}"] = root / f"merged-{quantize}"
        folder.mkdir()
        merge(root / "2", folder, None, quantize)
        shutil.copy(root / "2" / "params.json", folder)
    return folders


@pytest.fixture(scope="module")
def cases(folders) -> dict[str, tuple[str, str, str | None]]:
    """Folder, dtype and quantization of what is run, by name."""
    plain = {f"fp32 {name}": (name, "float32", None) for name in folders if "int" not in name}
    formed = {
        "bf16": ("2 shards", "bfloat16", None),
        "int8": ("8 shards", "float32", "int8"),
        "int4": ("8 shards", "float32", "int4"),
        "int8 merged": ("merged int8", "float32", None),
        "int4 merged": ("merged int4", "float32", None),
    }
    return {name: (str(folders[of]), *rest) for name, (of, *rest) in (plain | formed).items()}


def run_worker(n_ranks: int, cases: dict, folder: Path) -> list[dict]:
    """What each rank found, case by case."""
    (folder / "worker.py").write_text(WORKER)
    torch.save((PROMPTS, TOKENS, cases), folder / "inputs")
    args = [folder / "worker.py", TOKENIZER, folder / "inputs", folder / "results"]
    process = torchrun(n_ranks, *args) if n_ranks > 1 else python(*args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"results.{rank}") for rank in range(n_ranks)]


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory) -> dict:
    return run_worker(1, cases, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, cases, tmp_path_factory) -> list[dict]:
    return run_worker(request.param, cases, tmp_path_factory.mktemp("ranks"))


def test_greedy_text_is_that_of_one_process_from_any_files(ranks, alone):
    for name in alone:
        if name.startswith("fp32"):
            for rank in ranks:
                assert rank[name]["texts"] == alone[name]["texts"], name


def test_logits_are_as_near_to_those_of_fp32_as_one_process_has_them(ranks, alone):
    exact = alone["fp32 1 shards"]["logits"]

    def error(found: dict) -> float:
        return ((found["logits"] - exact).norm() / exact.norm()).item()

    for name, found in ranks[0].items():
        if isinstance(found, dict):
            assert error(found) < 1.1 * error(alone[name]) + 1e-5, name


def test_every_rank_holds_its_share(ranks, alone):
    for name, whole in alone.items():
        for rank in (rank for rank in ranks if isinstance(rank[name], dict)):
            # What every rank has: the norms, and a scale for each row of wo, w2 and the embedding.
            assert rank[name]["bytes"] < whole["bytes"] / len(ranks) * 1.1 + 20e3, name


def test_ranks_draw_the_same_text_without_a_seed(ranks):
    for name, found in ranks[0].items():
        if isinstance(found, dict):
            assert all(rank[name]["drawn"] == found["drawn"] for rank in ranks)


def test_int4_groups_that_cannot_be_divided_are_refused(ranks):
    if len(ranks) == 4:  # two groups of 64 in a row of wo
        assert re.fullmatch(r"4 ranks cannot share layers.0.*groups.*", ranks[0]["int4 merged"])


def rank_pids(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids of a torchrun's ranks."""
    pids = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        pids |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith("RANK=")}
    return pids


def test_one_shot_prints_what_one_process_prints(folders, run_script):
    args = ["-", "Once", "--ckpt_dir", folders["2 shards"], "--tokenizer_path", TOKENIZER]
    args += ["--temperature", "0", "--max_gen_len", "8"]
    process = torchrun(2, ROOT / "example-cpu.py", *args)
    printed, errors = process.communicate("Hello", timeout=300)
    assert printed.encode() == run_script("example-cpu.py", *args, input=b"Hello").stdout, errors
    assert errors.count("loaded in") == 1


def test_unequal_shares_are_refused_in_one_line(folders):
    args = ["--ckpt_dir", folders["2 shards"], "--tokenizer_path", TOKENIZER]
    process = torchrun(3, ROOT / "example-cpu.py", *args)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert printed == ""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    reason = "3 ranks cannot share 8 heads, 8 of keys and values"
    assert lines == [f"error: {reason}: start a number that divides both"]


def test_a_chat_is_that_of_one_process_and_ends_with_a_rank_that_dies(folders, run_script):
    args = ["--ckpt_dir", folders["2 shards"], "--tokenizer_path", TOKENIZER]
    args += ["--temperature", "0", "--max_gen_len", "8"]
    lines = ["Hi", "And you?", "/reset", "Hi"]
    text = "\n".join(lines) + "\n"
    expected = run_script("example-chat.py", *args, input=text.encode()).stdout.decode()
    process = torchrun(2, ROOT / "example-chat.py", *args)
    process.stdin.write(text)
    process.stdin.flush()
    printed = "".join(process.stdout.readline() for _ in expected.splitlines())
    assert printed == expected

    begin = time.monotonic()
    os.kill(rank_pids(process)[1], signal.SIGKILL)  # the first rank waits for a line
    _, errors = process.communicate(timeout=300)
    assert time.monotonic() - begin < 30
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
        "error: rank 1 has died"
    ]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable; 10.231.0.1 and .2."""
    names = [f"llama{os.getpid()}{side}" for side in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += ["ip -n {} link add cable type veth peer name cable netns {}".format(*names)]
    for i, name in enumerate(names, 1):
        commands += [f"ip -n {name} address add 10.231.0.{i}/24 dev cable"]
        commands += [f"ip -n {name} link set {device} up" for device in ("lo", "cable")]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_run_one_model(hosts, folders, run_script):
    args = ["Once", "--ckpt_dir", folders["2 shards"], "--tokenizer_path", TOKENIZER]
    args += ["--temperature", "0", "--max_gen_len", "8"]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=10.231.0.1:29400", ROOT / "example-cpu.py", *args]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, *map(str, launcher)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
        )
        for host in hosts
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    expected = run_script("example-cpu.py", *args).stdout
    assert sorted(printed for printed, _ in ends) == [b"", expected]
