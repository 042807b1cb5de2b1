"""Several ranks: the same text as one process, from any files, in their share of the memory."""

import os
import re
import shutil
import subprocess
import sys
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


def torchrun(n_ranks: int, script: Path, *args: object, **options) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc_per_node={n_ranks}", str(script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **options,
    )


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
        "int4 bf16": ("1 shards", "bfloat16", "int4"),
    }
    return {name: (str(folders[of]), *rest) for name, (of, *rest) in (plain | formed).items()}


def run_worker(n_ranks: int, cases: dict, folder: Path) -> list[dict]:
    """What each rank found, case by case."""
    (folder / "worker.py").write_text(WORKER)
    torch.save((PROMPTS, TOKENS, cases), folder / "inputs")
    args = [folder / "worker.py", TOKENIZER, folder / "inputs", folder / "results"]
    if n_ranks == 1:
        subprocess.run(
            [sys.executable, *map(str, args)],
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    else:
        process = torchrun(n_ranks, *args)
        _, errors = process.communicate(timeout=100)
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


def test_logits_are_those_of_one_process(ranks, alone):
    for name, expected in alone.items():
        if "int4 merged" in name and len(ranks) == 4:  # see below
            continue
        actual = ranks[0][name]["logits"]
        error = (actual - expected["logits"]).norm() / expected["logits"].norm()
        bound = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.03, "int4": 0.15}[name.split()[0]]
        assert error < bound, (name, error)


def test_every_rank_holds_its_share(ranks, alone):
    for name, whole in alone.items():
        if "int4 merged" in name and len(ranks) == 4:
            continue
        for rank in ranks:
            # What every rank has: the norms, and a scale for each row of wo, w2 and the embedding.
            assert rank[name]["bytes"] < whole["bytes"] / len(ranks) * 1.1 + 20e3, name


def test_ranks_draw_the_same_text_without_a_seed(ranks):
    for name, found in ranks[0].items():
        if isinstance(found, dict):
            assert all(rank[name]["drawn"] == found["drawn"] for rank in ranks)


def test_int4_groups_that_cannot_be_divided_are_refused(ranks):
    if len(ranks) == 4:  # two groups of 64 in a row of wo
        assert re.fullmatch(r"4 ranks cannot share layers.0.*groups.*", ranks[0]["int4 merged"])
