"""Several ranks: the same text as one process, from any files, in their share of the memory."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, write_shards

import llama
from llama import parallel
from llama.chat import STYLES, Chat
from llama.checkpoint import merge, share
from llama.generation import Sampling
from llama.parallel import cores_by_node, joined, place
from llama.stored import Stored, Weight

PROMPTS = ["Once upon a time", "The", "Hello there, how are you"]
# So many that errors average out: those of two sequences differ by a tenth and more by chance.
TOKENS = torch.randint(3, 2000, (16, 24), generator=torch.Generator().manual_seed(1))
SHOT = {"max_gen_len": 8, "temperature": 0}
FLAGS = [f"--{name}={value}" for name, value in SHOT.items()]


def run_cases(cases: dict[str, tuple[str, str, str | None]]) -> dict:
    """What this process, one rank or alone, makes of each (folder, dtype, quantize)."""
    found = {}
    for name, (folder, dtype, quantize) in cases.items():
        parallel.SLOT = 64 if "long messages" in name else 2**20
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            run = llama.load(folder, TOKENIZER, quantize=quantize)
        except llama.UserError as error:
            found[name] = str(error)
            continue
        finally:
            torch.set_default_dtype(torch.float32)
        found[name] = {
            "texts": run.generate(PROMPTS, 20, temperature=0),
            "logits": run.model(TOKENS, 0),
            "bytes": run.weight_bytes,
            "drawn": run.generate(PROMPTS, 20, temperature=1),
        }
    return found


def python(*args: object, within: Sequence[str] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [*within, sys.executable, *map(str, args)],
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
    plain["fp32 long messages"] = ("2 shards", "float32", None)
    formed = {
        "bf16": ("2 shards", "bfloat16", None),
        "int8": ("8 shards", "float32", "int8"),
        "int4": ("8 shards", "float32", "int4"),
        "int8 merged": ("merged int8", "float32", None),
        "int4 merged": ("merged int4", "float32", None),
    }
    return {name: (str(folders[of]), *rest) for name, (of, *rest) in (plain | formed).items()}


@pytest.fixture(scope="module")
def alone(cases) -> dict:
    return run_cases(cases)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, cases, tmp_path_factory) -> list[dict]:
    """What each of 2 and of 4 ranks found, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(cases, folder / "cases")
    process = torchrun(request.param, Path(__file__), folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"found.{rank}") for rank in range(request.param)]


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


def test_a_quantized_w2_is_shared_in_whole_blocks_or_refused():
    def weight(n_inputs: int) -> Weight:
        shape = torch.Size([8, n_inputs])
        return Weight([Stored(Path("x"), 0, shape, torch.int8, "", ())], 1)

    name = "layers.0.feed_forward.w2.weight"
    assert share(name, weight(4 * 64), 1, 2).shape == (8, 2 * 64)
    with pytest.raises(llama.UserError, match="2 ranks cannot share"):
        share(name, weight(3 * 64), 1, 2)


def rank_pids(launcher: subprocess.Popen) -> dict[int, int]:
    """Process ids of a torchrun's ranks."""
    pids = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        pids |= {int(entry[5:]): int(pid) for entry in environment if entry.startswith("RANK=")}
    return pids


@pytest.fixture(scope="module")
def shot(folders) -> tuple[list, str]:
    """Arguments of example-cpu.py, and what it prints for PROMPTS when it is one process."""
    folder = folders["2 shards"]
    texts = llama.load(folder, TOKENIZER).generate(PROMPTS, **SHOT)
    args = ["--ckpt_dir", folder, "--tokenizer_path", TOKENIZER, *FLAGS]
    return [*PROMPTS, *args], "".join(f"{text}\n\n{'=' * 34}\n\n" for text in texts)


def test_one_rank_reads_and_prints(shot):
    args, expected = shot
    process = torchrun(2, ROOT / "example-cpu.py", "-", *args[1:])
    printed, errors = process.communicate(PROMPTS[0], timeout=300)
    assert printed == expected, errors
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


def test_a_chat_is_that_of_one_process_and_ends_with_a_rank_that_dies(folders):
    folder = folders["2 shards"]
    chat = Chat(llama.load(folder, TOKENIZER), STYLES["complete"], None, Sampling(**SHOT))
    expected = ["".join(chat.reply(line)) for line in ("Hi", "And you?", "Hi")]
    args = ["--ckpt_dir", folder, "--tokenizer_path", TOKENIZER, "--style", "complete", *FLAGS]
    process = torchrun(2, ROOT / "example-chat.py", *args)
    process.stdin.write("Hi\nAnd you?\n/reset\nHi\n")
    process.stdin.flush()
    n_lines = "\n".join(expected).count("\n") + 1
    assert "".join(process.stdout.readline() for _ in range(n_lines)) == "\n".join(expected) + "\n"

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


def test_two_hosts_run_one_model(hosts, shot):
    args, expected = shot
    launcher = "-m torch.distributed.run --nnodes=2 --rdzv_backend=c10d"
    processes = []
    for i, host in enumerate(hosts):  # whose names do not resolve, so that each is told its own
        place = f"--rdzv_endpoint=10.231.0.1:29400 --rdzv_conf=is_host={1 - i}"
        command = [*launcher.split(), *place.split(), f"--local_addr=10.231.0.{i + 1}"]
        command += [ROOT / "example-cpu.py", *args]
        processes.append(
            python(*command, within=f"ip netns exec {host} env GLOO_SOCKET_IFNAME=cable".split())
        )
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert sorted(printed for printed, _ in ends) == ["", expected]


if __name__ == "__main__":  # one rank of the fixture `ranks`
    with joined():
        folder = Path(sys.argv[1])
        torch.save(run_cases(torch.load(folder / "cases")), folder / f"found.{place()[0]}")


@pytest.mark.parametrize(
    ("rank", "n_ranks", "now", "bound"),
    [
        (0, 2, {0, 1, 2, 3, 4}, [0, 2]),
        (1, 2, {0, 1, 2, 3, 4}, [4, 1, 3]),
        (1, 2, {2, 3}, None),  # by another
        (0, 6, {0, 1, 2, 3, 4}, None),  # too few for all
    ],
)
def test_ranks_are_bound_to_cores_of_their_own(monkeypatch, rank, n_ranks, now, bound):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_ranks))
    monkeypatch.setattr(parallel, "cores_by_node", lambda: [0, 2, 4, 1, 3])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: now, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *args: calls.append(args), raising=False)
    parallel.bind()
    assert calls == ([] if bound is None else [(0, bound)])


def test_cores_are_counted_socket_by_socket(tmp_path):
    for node, spans in (("node0", "0-1,4-5"), ("node1", "2-3,6"), ("node2", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(spans + "\n")
    assert cores_by_node(tmp_path) == [0, 1, 4, 5, 2, 3, 6]
    assert cores_by_node(tmp_path / "not there") == []
