"""Several ranks: the same text as one process, from any files, each with its part of the memory."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import DEMO, ROOT, TOKENIZER, relative_error, write_shards

import llama
from llama.merge import open_source, write_merged
from llama.parallel import init_distributed

PROMPTS = ["Once upon a time", "The", "Hello there, how are you"]
# So many that errors average out: those of two sequences differ by a tenth and more by chance.
TOKENS = torch.randint(3, 2000, (16, 24), generator=torch.Generator().manual_seed(1))
SHOT = {"max_gen_len": 8, "temperature": 0}
FLAGS = [f"--{name}={value}" for name, value in SHOT.items()]
REPEATING = "the cat sat. the cat sat. the cat sat. the cat"


def run_cases(cases: dict[str, tuple[str, str, str | None]]) -> dict:
    """What this process, one rank or alone, makes of each (folder, dtype, quantize)."""
    found = {}
    for name, (folder, dtype, quantize) in cases.items():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            run = llama.load(folder, TOKENIZER, quantize=quantize)
        except llama.UserError as error:
            found[name] = str(error)
            continue
        finally:
            torch.set_default_dtype(torch.float32)
        texts = run.generate(PROMPTS, 12, temperature=0, prompt_lookup=0)
        looked_up = run.generate(REPEATING, 12, temperature=0, prompt_lookup=8)
        drawn = run.generate(PROMPTS, 6, temperature=1)
        found[name] = {"texts": [*texts, *looked_up], "drawn": drawn}
        found[name] |= {"logits": run.model(TOKENS, 0), "bytes": run.weight_bytes}
        embedding = run.model.tok_embeddings.state_dict().values()
        found[name]["bytes"] -= sum(tensor.nbytes for tensor in embedding)
    return found


def python(*args: object, within: Sequence[str] = (), **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*within, sys.executable, *map(str, args)],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )


def torchrun(n_ranks: int, script: Path, *args: object, **environment: str) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}")
    return python(*launcher, script, *args, **environment)


def error_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, weights) -> dict[str, Path]:
    """The same weights in 1, 2 and 8 shards and merged; the demo, as it is and quantized."""
    root = tmp_path_factory.mktemp("parallel")
    folders = {f"{n} shards": write_shards(root / str(n), weights, n) for n in (1, 2, 8)}
    folders["demo"] = DEMO
    for name in ("2 shards None", "2 shards int4", "demo int8", "demo int4"):
        source, quantize = name.rsplit(" ", 1)
        folders[name], checkpoint = root / name, open_source(folders[source], copy_files=True)
        write_merged(checkpoint, folders[name], quantize=None if quantize == "None" else quantize)
    return folders


@pytest.fixture(scope="module")
def cases(folders) -> dict[str, tuple[str, str, str | None]]:
    """Folder, dtype and quantization of what is run, by name."""
    cases = {
        f"{name}, {dtype}, {quantize}": (str(folders[name]), dtype, quantize)
        for names, dtype, quantize in (
            (("1 shards", "2 shards", "8 shards", "2 shards None", "demo"), "float32", None),
            (("2 shards", "demo"), "bfloat16", None),
            (("8 shards", "demo"), "float32", "int8"),
            (("8 shards", "demo"), "bfloat16", "int4"),
            (("demo int8", "demo int4"), "float32", None),
        )
        for name in names
    }
    return cases | {"small groups": (str(folders["2 shards int4"]), "float32", None)}


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
        if "float32, None" in name and "int" not in name:
            for rank in ranks:
                assert rank[name]["texts"] == alone[name]["texts"], name


def test_logits_are_as_near_to_those_of_fp32_as_one_process_has_them(ranks, alone):
    refused = [name for name, found in ranks[0].items() if isinstance(found, str)]
    small_groups = ["8 shards, bfloat16, int4", "small groups"]  # 32 inputs of wo: half a group
    assert refused == (small_groups if len(ranks) == 4 else [])
    assert all("attention.wo.groups" in ranks[0][name] for name in refused)
    for name, found in ranks[0].items():
        if name not in small_groups:
            exact = alone[f"{'demo' if 'demo' in name else '1 shards'}, float32, None"]["logits"]
            error = relative_error(found["logits"], exact)
            assert error < 1.15 * relative_error(alone[name]["logits"], exact) + 1e-5, name


def test_every_rank_holds_its_part(ranks, alone):
    for name, whole in alone.items():
        # The largest part of 5 heads, or of 8 and of 6 times 64 inputs of w2.
        of_demo, of_other = {2: (3 / 5, 1 / 2), 4: (2 / 5, 2 / 6)}[len(ranks)]
        largest = of_demo if "demo" in name else of_other
        for found in (rank[name] for rank in ranks if isinstance(rank[name], dict)):
            # Every rank has norms, scales of rows, directions and corrections.
            assert found["bytes"] < whole["bytes"] * largest + 5e4, name


def test_ranks_draw_the_same_text_without_a_seed(ranks):
    for name, found in ranks[0].items():
        if isinstance(found, dict):
            assert all(rank[name]["drawn"] == found["drawn"] for rank in ranks)


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


def test_rank_0_reads_and_prints_without_numpy(shot, tmp_path):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise ModuleNotFoundError('No numpy')")
    args, expected = shot
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    first, _, _ = expected.partition("=" * 34)  # the first prompt's
    process = torchrun(2, ROOT / "example-cpu.py", "-", *args[len(PROMPTS) :], PYTHONPATH=path)
    printed, errors = process.communicate(PROMPTS[0], timeout=300)
    assert printed == f"{first}{'=' * 34}\n\n", errors
    assert errors.count("loaded in") == 1


def error_of_ranks(n_ranks: int, *args: object) -> str:
    """The error that the ranks end with: printed once, and nothing on stdout."""
    process = torchrun(n_ranks, ROOT / "example-cpu.py", *args)
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, printed) == (1, "")
    [line] = error_lines(errors)
    return line


def test_more_ranks_than_heads_of_keys_are_refused():
    error = error_of_ranks(6, "--ckpt_dir", DEMO)
    assert re.match(r"error: 6 ranks cannot divide .*attention.*5 heads: start fewer", error)


def test_an_error_of_ranks_is_filtered(tmp_path):
    state = torch.load(DEMO / "consolidated.00.pth")
    torch.save(state | {"a\n\x1b[31mred.b": torch.ones(3)}, tmp_path / "consolidated.00.pth")
    shutil.copy(DEMO / "params.json", tmp_path)
    line = error_of_ranks(2, "--ckpt_dir", tmp_path, "--tokenizer_path", TOKENIZER)
    assert "red.b" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("killed", [0, 1])
def test_a_chat_is_that_of_one_process_and_ends_with_a_rank_that_dies(folders, killed):
    folder = folders["2 shards"]
    sampling = llama.Sampling(**SHOT)
    chat = llama.Chat(llama.load(folder, TOKENIZER), llama.STYLES["complete"], None, sampling)
    expected = ["".join(chat.reply(line)) for line in ("Hi", "And you?")]
    chat.reset()
    expected.append("".join(chat.reply("Hi")))
    args = ["--ckpt_dir", folder, "--tokenizer_path", TOKENIZER, "--style", "complete", *FLAGS]
    process = torchrun(2, ROOT / "example-chat.py", *args)
    process.stdin.write("Hi\nAnd you?\n/reset\nHi\n")
    process.stdin.flush()
    n_lines = "\n".join(expected).count("\n") + 1
    assert "".join(process.stdout.readline() for _ in range(n_lines)) == "\n".join(expected) + "\n"

    os.kill(rank_pids(process)[killed], signal.SIGKILL)  # rank 0 waits for a line
    _, errors = process.communicate(timeout=30)
    assert len(error_lines(errors)) == 1


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", "20000 1"), ("GOMP_SPINCOUNT=7", "7 1"), ("OMP_WAIT_POLICY=ACTIVE", "None None")],
)
def test_threads_spin_for_a_bounded_time_unless_the_user_says_otherwise(given, expected):
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    code = f"import os, llama; print(*map(os.environ.get, {names[:2]}))"
    command = ["env", *(f"-u{name}" for name in names), *given.split(), sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f"{expected}\n"


@pytest.mark.parametrize(("flags", "expected"), [([], 1), (["--threads", "3"], 3)])
def test_a_small_model_runs_on_one_thread_unless_threads_says_otherwise(flags, expected):
    args = ["--ckpt_dir", DEMO, "--verbose", "--max_gen_len", "1", *flags]
    process = python(ROOT / "example-cpu.py", "Hi", *args, OMP_NUM_THREADS="2")
    _, errors = process.communicate(timeout=300)
    assert f", {expected} threads\n" in errors


if __name__ == "__main__":  # one rank of the fixture `ranks`
    with init_distributed():
        folder = Path(sys.argv[1])
        torch.save(run_cases(torch.load(folder / "cases")), folder / f"found.{dist.get_rank()}")
