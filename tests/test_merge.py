"""merge-weights.py and llama.merge: shards into one file, and nothing else when that fails."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import DEMO, TOKENIZER, error_line, printed, run_code, write_shards, write_zeros

import llama
from llama.checkpoint import Checkpoint
from llama.merge import open_source, write_merged
from llama.weights import Weight

resource = pytest.importorskip("resource", reason="limits are set through POSIX")
WQ = "layers.0.attention.wq.weight"


def merge(folder: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    """What merged.pth holds afterwards."""
    return torch.load(write_merged(open_source(folder), out, **options), weights_only=True)


@dataclass
class Hooked(Weight):
    """A weight that calls a function whenever it is read."""

    hook: Callable[[], None]

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        self.hook()
        return super().read(dtype)


def hooked(folder: Path, hook: Callable[[], None]) -> Checkpoint:
    source = open_source(folder)
    weights = {name: Hooked(**vars(w), hook=hook) for name, w in source.weights.items()}
    return source._replace(weights=weights, files={})


def test_merging_converts(weights, tmp_path):
    folder = write_shards(tmp_path / "in", weights, 2)
    for name, weight in merge(folder, tmp_path, dtype=torch.bfloat16).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[name].bfloat16())


@pytest.mark.parametrize("place", ["model/13B", "model"])  # Meta's download has it in the second
def test_after_a_merge_the_next_step_is_named_and_works(weights, tmp_path, run_script, place):
    """params.json and tokenizer.model are copied into another folder."""
    folder = write_shards(tmp_path / "model" / "13B", weights, 2)
    shutil.copy(TOKENIZER, tmp_path / place)
    result = run_script("merge-weights.py", "--model_size", "13b", "--output_dir", "out")
    assert (result.returncode, result.stdout) == (0, b""), result.stderr
    copied = {"merged.pth", "params.json", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied
    command = re.search(r"Run: python (\S+) (.*)", result.stderr.decode())
    done = run_script(command[1], *command[2].split(), "--temperature=0", "--max_gen_len=8", "Hi")
    assert done.stdout.decode() == printed(folder, ["Hi"], 8)
    flags = ["--input_dir", "model/13B", "--model_size", "13B"]
    assert "leave out --model_size" in error_line(run_script("merge-weights.py", *flags))


def test_a_folder_with_other_weights_is_no_output(weights, tmp_path, run_script):
    folder = write_shards(tmp_path / "model", weights, 1)
    write_shards(folder / "13B", weights, 2)
    done = run_script("merge-weights.py", "--model_size", "13B", "--output_dir", "model")
    assert "model has other weights: set another --output_dir" in error_line(done)
    assert not (folder / "merged.pth").exists()


def test_shards_beside_a_config_json_are_merged_as_shards(checkpoint, weights, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "in")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert torch.equal(merge(folder, tmp_path)[WQ], weights[WQ])


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
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_merging_takes_the_memory_of_one_weight(tmp_path):
    code = """
import pathlib, sys, llama.merge
from llama.system import peak_memory
before, folder = peak_memory(), pathlib.Path(sys.argv[1])
llama.merge.write_merged(llama.merge.open_source(folder), folder)
print(peak_memory() - before)
"""
    grown = int(run_code(code, write_zeros(tmp_path, n_shards=2)))  # of 0.45 GB
    (tmp_path / "merged.pth").unlink()
    assert grown < 250e6


@pytest.mark.parametrize("name", ["merged.pth", "params.json", "tokenizer.model"])
def test_an_existing_file_is_kept_unless_told_otherwise(name, tmp_path):
    mine = tmp_path / name
    mine.write_text("mine")
    source = open_source(DEMO)
    with pytest.raises(llama.UserError, match=f"{name} exists.*`overwrite`"):
        write_merged(source, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    write_merged(source, tmp_path, overwrite=True)
    assert mine.read_bytes() != b"mine"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_target_that_appears_while_a_merge_runs_is_kept(checkpoint, tmp_path, kind):
    target = tmp_path / "merged.pth"
    appear = {
        "file": lambda: target.write_text("mine"),
        "folder": target.mkdir,
        "dangling link": lambda: target.symlink_to(tmp_path / "nowhere"),
    }[kind]
    source = hooked(checkpoint, lambda: os.path.lexists(target) or appear())
    with pytest.raises(llama.UserError, match="exists"):
        write_merged(source, tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    assert kind != "file" or target.read_text() == "mine"


def test_weights_never_lie_beside_another_models_params(checkpoint, tmp_path, monkeypatch):
    """Where a run with --overwrite ends between two files."""
    out = tmp_path / "out"
    write_merged(open_source(checkpoint), out)
    source = open_source(shutil.copytree(checkpoint, tmp_path / "in"))
    source.files["params.json"] += b"\n"
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> None:
        if target.name == "merged.pth":
            raise KeyboardInterrupt
        replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_merged(source, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["params.json"]


def test_until_a_merge_is_complete_its_target_is_what_it_was(checkpoint, tmp_path):
    """If it is killed, all that is left is a file that nothing reads."""
    target, seen = tmp_path / "merged.pth", []
    target.write_text("mine")
    look = lambda: seen.append((target.read_text(), *({*tmp_path.iterdir()} - {target})))
    write_merged(hooked(checkpoint, look), tmp_path, overwrite=True)
    [(before, partial)] = {*seen}
    assert before == "mine"
    assert re.fullmatch(r"\.merged\.pth\.\w+\.partial", partial.name)


def test_a_disk_that_fails_at_the_end_takes_nothing_away(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "merged.pth").write_text("mine")
    monkeypatch.setattr(os, "fsync", lambda file: os.stat("nowhere"))  # raises an OSError
    with pytest.raises(FileNotFoundError):
        write_merged(open_source(checkpoint), tmp_path, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


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
    with pytest.raises(llama.UserError, match=r"merged.pth needs .* GB, and .* has 0\.0 free"):
        merge(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())
