"""Several ranks: the same text as one process, from any files, each with its part of the memory."""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import DEMO, ROOT, TOKENIZER, load, printed, python, relative_error, write_shards

import llama
from llama.merge import open_source, write_merged
from llama.parallel import init_distributed

FLAGS = ["--tokenizer_path", TOKENIZER, "--temperature", 0, "--max_gen_len", 8]
PROMPTS = ["Once upon a time", "The", "Hello there, how are you"]
REPEATING = "the cat sat. the cat sat. the cat sat. the cat"
# So many that errors average out: those of two sequences differ by a tenth and more by chance.
TOKENS = torch.randint(3, 2000, (16, 24), generator=torch.Generator().manual_seed(1))
FILES = ("1 shards", "2 shards", "8 shards", "2 shards merged", "demo", "huggingface")
CASES = [  # folder, dtype, quantize
    *((name, "float32", None) for name in FILES),
    ("demo", "bfloat16", None),
    ("8 shards", "float32", "int8"),
    ("demo", "float32", "int8"),
    ("8 shards", "bfloat16", "int4"),
    ("demo", "bfloat16", "int4"),
    ("demo int8", "float32", None),
    ("demo int4", "float32", None),
    ("2 shards int4", "float32", None),
]
# Of which 4 ranks would have 32 inputs of wo: half a group.
SMALL_GROUPS = [("8 shards", "bfloat16", "int4"), ("2 shards int4", "float32", None)]


@pytest.fixture(scope="module")
def root(tmp_path_factory, weights) -> Path:
    """Folders of the same weights in 1, 2 and 8 shards and merged; of others; and quantized."""
    from test_huggingface import write_folder  # imports transformers, which ranks need not wait for

    root = tmp_path_factory.mktemp("parallel")
    for n_shards in (1, 2, 8):
        write_shards(root / f"{n_shards} shards", weights, n_shards)
    (root / "demo").symlink_to(DEMO)
    write_folder(root / "huggingface")
    for name in ("2 shards merged", "2 shards int4", "demo int8", "demo int4"):
        source, kind = name.rsplit(" ", 1)
        quantize = None if kind == "merged" else kind
        write_merged(open_source(root / source), root / name, quantize=quantize)
    return root


def run_cases(root: Path) -> dict[tuple, dict | str]:
    """What this process, one rank or alone, makes of each case; the error if it is refused."""
    found = {}
    for case in CASES:
        folder, dtype, quantize = case
        try:
            run = load(root / folder, dtype, quantize=quantize)
        except llama.UserError as error:
            found[case] = str(error)
            continue
        texts = run.generate(PROMPTS, 12, temperature=0, prompt_lookup=0)
        texts += run.generate(REPEATING, 12, temperature=0, prompt_lookup=8)
        embedding = run.model.tok_embeddings.state_dict().values()  # which every rank has
        found[case] = {
            "texts": texts,
            "drawn": run.generate(PROMPTS, 6, temperature=1),
            "logits": run.model(TOKENS, 0),
            "bytes": run.weight_bytes - sum(tensor.nbytes for tensor in embedding),
        }
    return found


@pytest.fixture(scope="module")
def alone(root) -> dict:
    return run_cases(root)


def torchrun(n_ranks: int, script: Path, *args: object) -> list[object]:
    """Arguments of Python that start the ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    return [*launcher, script, *args]


def start(command: list[object]) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, text=True)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, root, tmp_path_factory) -> list[dict]:
    """What each of 2 and of 4 ranks found, case by case."""
    folder, environment = tmp_path_factory.mktemp("ranks"), os.environ | {"PYTHONPATH": str(ROOT)}
    command = torchrun(request.param, Path(__file__), root, folder)
    done = python(*command, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found.{rank}") for rank in range(request.param)]


def test_greedy_text_is_that_of_one_process_from_any_files(ranks, alone):
    for case in CASES[: len(FILES)]:
        for rank in ranks:
            assert rank[case]["texts"] == alone[case]["texts"], case


def test_logits_are_as_near_to_those_of_fp32_as_one_process_has_them(ranks, alone):
    refused = [case for case, found in ranks[0].items() if isinstance(found, str)]
    assert refused == (SMALL_GROUPS if len(ranks) == 4 else [])
    assert all("attention.wo.groups" in ranks[0][case] for case in refused)
    for case, found in ranks[0].items():
        if case not in SMALL_GROUPS:
            exact = alone["demo" if "demo" in case[0] else "1 shards", "float32", None]["logits"]
            error = relative_error(found["logits"], exact)
            # In bf16 each rank rounds its partial sums.
            factor = 1.5 if case[1] == "bfloat16" else 1.15
            assert error < factor * relative_error(alone[case]["logits"], exact) + 1e-5, case


def test_every_rank_holds_its_part(ranks, alone):
    # The largest part of 5 heads, or of 8 and of 6 times 64 inputs of w2.
    of_demo, of_other = {2: (3 / 5, 1 / 2), 4: (2 / 5, 2 / 6)}[len(ranks)]
    for case, whole in alone.items():
        largest = of_demo if "demo" in case[0] else of_other
        for found in (rank[case] for rank in ranks if isinstance(rank[case], dict)):
            # Every rank has norms, scales of rows, and outliers.
            assert found["bytes"] < whole["bytes"] * largest + 5e4, case


def test_ranks_draw_the_same_text_without_a_seed(ranks):
    for case, found in ranks[0].items():
        if isinstance(found, dict):
            assert all(rank[case]["drawn"] == found["drawn"] for rank in ranks)


def test_rank_0_reads_and_prints_without_numpy(root, tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No numpy')")
    command = torchrun(2, ROOT / "example-cpu.py", "-", "--ckpt_dir", root / "2 shards", *FLAGS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = python(*command, env=environment, input=PROMPTS[0], text=True)
    assert done.stdout == printed(root / "2 shards", PROMPTS[:1], 8), done.stderr
    assert done.stderr.count("loaded in") == 1


def test_two_launchers_as_on_two_machines_run_one_model(root):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d"]
    command = [*launcher, f"--rdzv_endpoint=localhost:{port}", ROOT / "example-cpu.py"]
    command += [*PROMPTS, "--ckpt_dir", root / "2 shards", *FLAGS]
    processes = [start(command) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert sorted(out for out, _ in ends) == ["", printed(root / "2 shards", PROMPTS, 8)]


ERRORS = {
    "of all ranks": (6, ["--ckpt_dir", DEMO], "the model has 5 key-value heads for 6 ranks: start"),
    "of rank 0 alone": (2, ["--prompt_file", "a\n\x1b[31mred"], "red"),
    "of a flag": (2, ["--top_k", "many"], "argument --top_k: invalid int value: 'many'"),
}


@pytest.mark.parametrize(("n_ranks", "args", "said"), ERRORS.values(), ids=ERRORS)
def test_an_error_ends_all_ranks_in_one_line_that_is_filtered(n_ranks, args, said):
    done = python(*torchrun(n_ranks, ROOT / "example-cpu.py", *args), text=True)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = re.findall("^error: .*", done.stderr, re.MULTILINE)
    assert said in line and "\x1b" not in line


@pytest.mark.parametrize("killed", [0, 1])
def test_a_chat_is_that_of_one_process_and_ends_with_a_rank_that_dies(root, killed):
    sampling = llama.Sampling(8, temperature=0)
    chat = llama.Chat(load(root / "2 shards"), llama.STYLES["complete"], None, sampling)
    expected = "".join("".join(chat.reply(line)) + "\n" for line in ("Hi", "And you?"))
    flags = ["--style", "complete", "--ckpt_dir", root / "2 shards", *FLAGS]
    process = start(torchrun(2, ROOT / "example-chat.py", *flags))
    process.stdin.write("Hi\n/reset\nAnd you?\n")
    process.stdin.flush()
    assert "".join(process.stdout.readline() for _ in range(expected.count("\n"))) == expected

    for child in psutil.Process(process.pid).children():
        with suppress(psutil.ZombieProcess):  # torchrun has other children, for moments
            if child.environ().get("RANK") == str(killed):  # rank 0 waits for a line
                child.kill()
    _, errors = process.communicate(timeout=30)
    assert len(re.findall("^error: ", errors, re.MULTILINE)) == 1


if __name__ == "__main__":  # one rank of the fixture `ranks`
    with init_distributed():
        root, folder = map(Path, sys.argv[1:])
        torch.save(run_cases(root), folder / f"found.{dist.get_rank()}")
