"""merge-weights.py and llama.merge: shards into one file, and nothing else when that fails."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    DEMO,
    GROUPED,
    PARAMS,
    TOKENIZER,
    error_line,
    random_weights,
    run_python,
    write_shards,
)

import llama
from llama.merge import Source, open_source, write_merged
from llama.weights import Weight

resource = pytest.importorskip("resource", reason="limits are set through POSIX")
WQ = "layers.0.attention.wq.weight"


def merge(folder: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    """What merged.pth holds afterwards."""
    return torch.load(write_merged(open_source(folder, False), out, **options), weights_only=True)


class Hooked(Weight):
    """A weight that calls a function whenever it is read."""

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        self.hook()
        return super().read(dtype)


def hooked(folder: Path, hook: Callable[[], None]) -> Source:
    source, weights = open_source(folder, False), {}
    for name, weight in source.weights.items():
        weights[name] = Hooked(weight.name, weight.parts, weight.dim, weight.shape, weight.mapped)
        weights[name].hook = hook
    return source._replace(weights=weights)


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
def test_shards_merge_bit_for_bit(n_shards, tmp_path):
    """With grouped-query attention, where wk and wv are smaller than wq."""
    weights = random_weights(params=GROUPED)
    merged = merge(write_shards(tmp_path / "in", weights, n_shards, GROUPED), tmp_path)
    assert merged.keys() == weights.keys() - {"rope.freqs"}
    for name, weight in merged.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, weights[name]), name


def test_merging_converts(weights, tmp_path):
    folder = write_shards(tmp_path / "in", weights, 2)
    for name, weight in merge(folder, tmp_path, dtype=torch.bfloat16).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[name].bfloat16())


def test_after_a_merge_the_next_step_is_named_and_works(weights, tmp_path, run_script):
    """params.json and tokenizer.model are copied into another folder."""
    write_shards(tmp_path / "model" / "13B", weights, 2)
    shutil.copy(TOKENIZER, tmp_path / "model" / "13B")
    result = run_script("merge-weights.py", "--model_size", "13b", "--output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout == b""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("merged.pth", "params.json", "tokenizer.model")
    }
    command = re.search(r"Run: python (\S+) (.*)", result.stderr.decode())
    flags = [*command[2].split(), "--temperature", "0", "--max_gen_len", "8"]
    expected = llama.load(tmp_path / "model" / "13B").generate(
        "I believe the meaning of life is", 8, temperature=0
    )
    assert run_script(command[1], *flags).stdout.decode().startswith(expected[0] + "\n\n==")


def test_shards_beside_a_config_json_are_merged_as_shards(checkpoint, tmp_path, run_script):
    folder = shutil.copytree(checkpoint, tmp_path / "in")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    result = run_script("merge-weights.py", "--input_dir", folder, "--output_dir", "out")
    assert result.returncode == 0, result.stderr


TOO_LARGE = [
    (torch.tensor(1e300, dtype=torch.float64), {"dtype": torch.float32}),
    (torch.tensor(3.4e38), {"dtype": torch.bfloat16}),
    (torch.tensor(3.4e38), {"quantize": "int8"}),
    (torch.tensor(3.4e38), {"quantize": "int4"}),
]


@pytest.mark.parametrize(("value", "options"), TOO_LARGE)
def test_weights_that_would_become_inf_are_refused_by_name(value, options, weights, tmp_path):
    large = value.repeat(weights[WQ].shape)
    folder = write_shards(tmp_path / "in", weights | {WQ: large}, 1)
    with pytest.raises(llama.UserError, match=f"{WQ} has values that are too large"):
        merge(folder, tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_merging_takes_the_memory_of_one_weight(tmp_path):
    """Of 0.4 GB in two shards."""
    params = PARAMS | {"dim": 2048, "n_layers": 4, "vocab_size": 4096, "multiple_of": 256}
    with torch.device("meta"):
        shapes = llama.Transformer(llama.ModelArgs(**params)).state_dict()
    zeros = {name: torch.zeros(weight.shape).half() for name, weight in shapes.items()}
    write_shards(tmp_path, zeros, 2, params)
    code = """
import pathlib, sys, llama.merge
from llama.system import peak_memory
before, folder = peak_memory(), pathlib.Path(sys.argv[1])
llama.merge.write_merged(llama.merge.open_source(folder, False), folder)
print(peak_memory() - before)
"""
    grown = int(run_python(code, tmp_path))
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    assert grown < 250e6


# What exists is kept


@pytest.mark.parametrize("name", ["merged.pth", "params.json", "tokenizer.model"])
def test_an_existing_file_is_kept_unless_told_otherwise(name, tmp_path, run_script):
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    flags = ["--input_dir", DEMO, "--output_dir", "out"]
    message = error_line(run_script("merge-weights.py", *flags))
    assert f"{name} exists" in message and "--overwrite" in message
    assert [path.read_text() for path in mine.parent.iterdir()] == ["mine"]
    assert run_script("merge-weights.py", *flags, "--overwrite").returncode == 0
    assert mine.read_bytes() != b"mine"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "another merge"])
def test_a_target_that_appears_while_a_merge_runs_is_kept(checkpoint, weights, tmp_path, kind):
    target = tmp_path / "merged.pth"
    appear = {
        "file": lambda: target.write_text("mine"),
        "folder": target.mkdir,
        "dangling link": lambda: target.symlink_to(tmp_path / "nowhere"),
        "another merge": lambda: merge(checkpoint, tmp_path),
    }[kind]
    source = hooked(checkpoint, lambda: os.path.lexists(target) or appear())
    with pytest.raises(llama.UserError, match="exists"):
        write_merged(source, tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    assert kind != "file" or target.read_text() == "mine"
    if kind == "another merge":
        merged = torch.load(target, weights_only=True)
        assert all(torch.equal(weight, weights[name]) for name, weight in merged.items())


def test_weights_never_lie_beside_another_models_params(checkpoint, tmp_path, monkeypatch):
    """Where a run with --overwrite ends between two files."""
    out = tmp_path / "out"
    write_merged(open_source(checkpoint, True), out)
    source = open_source(shutil.copytree(checkpoint, tmp_path / "in"), True)
    source.files["params.json"] += b"\n"
    replace, replaced = Path.replace, []

    def interrupted(self: Path, target: Path) -> None:
        if replaced:
            raise KeyboardInterrupt
        replaced.append(replace(self, target))

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_merged(source, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["params.json"]


# A merge that fails


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_merge import hooked
from llama.merge import write_merged
folder, out = map(Path, sys.argv[1:])
def kill():
    global n_left
    n_left -= 1
    if n_left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
for n_left in (0, 3, 12):
    child = os.fork()
    if not child:
        write_merged(hooked(folder, kill), out, overwrite=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], (out / "merged.pth").read_text())
"""


def test_a_merge_that_is_killed_leaves_nothing_that_matters(checkpoint, tmp_path):
    """Its partial file is neither read by anything nor in the way of the next run."""
    (tmp_path / "merged.pth").write_text("mine")
    assert run_python(KILLED, checkpoint, tmp_path) == "9 mine\n" * 3
    left = [path.name for path in tmp_path.iterdir() if path.name != "merged.pth"]
    assert len(left) == 3
    assert all(re.fullmatch(r"\.merged\.pth\.\w+\.partial", name) for name in left)
    write_merged(open_source(checkpoint, True), tmp_path, overwrite=True)
    assert llama.load(tmp_path, TOKENIZER).generate("Once", 2)


@pytest.mark.parametrize("n_bytes", [1000, 1_500_000])
def test_a_disk_that_fills_up_while_merging(checkpoint, tmp_path, run_script, n_bytes):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = run_script(
        *("merge-weights.py", "--input_dir", checkpoint, "--output_dir", out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes)),
    )
    error_line(result)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_disk_that_is_too_small_is_seen_before(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(llama.UserError, match=r"merged.pth needs .* GB, and 0\.0 are free"):
        merge(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())
