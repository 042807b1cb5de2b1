"""Shards: merged, and read unmerged."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, PARAMS, TOKENIZER, random_weights, write_shards

import llama
from llama.checkpoint import merge, open_checkpoint

PROMPT = "Once upon a time"


@pytest.fixture(scope="module", params=[2, 4, 8])
def sharded(request, tmp_path_factory, weights):
    return write_shards(tmp_path_factory.mktemp("shards"), weights, request.param)


def test_shards_merge_bit_for_bit(sharded, weights, tmp_path):
    merged = torch.load(merge(sharded, tmp_path), weights_only=True)
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        assert merged[name].dtype == weight.dtype
        assert torch.equal(merged[name], weight)


def test_shards_run_unmerged_to_the_same_text(sharded, checkpoint):
    expected = llama.load(checkpoint, TOKENIZER).generate([PROMPT], 20, temperature=0)
    assert llama.load(sharded, TOKENIZER).generate([PROMPT], 20, temperature=0) == expected


def test_merged_pth_is_preferred_to_shards(tmp_path, weights):
    write_shards(tmp_path, weights, 2)
    torch.save(random_weights(seed=1), tmp_path / "merged.pth")
    model = llama.load(tmp_path, TOKENIZER).model
    expected = random_weights(seed=1)["layers.0.attention.wq.weight"].float()
    assert torch.equal(model.layers[0].attention.wq.weight, expected)


def test_blocks_are_read_in_the_right_order(sharded, weights, monkeypatch):
    monkeypatch.setattr("llama.stored.BLOCK", 1000)
    paths = sorted(sharded.glob("*.pth"))
    for name, weight in open_checkpoint(paths).items():
        assert torch.equal(weight.read(torch.float16), weights[name].half())


def test_merging_converts(sharded, weights, tmp_path):
    merged = torch.load(merge(sharded, tmp_path, dtype=torch.bfloat16), weights_only=True)
    for name, weight in weights.items():
        if name.endswith(".weight"):
            assert torch.equal(merged[name], weight.bfloat16())


def test_an_existing_merged_pth_is_kept_unless_told_otherwise(checkpoint, tmp_path):
    target = tmp_path / "merged.pth"
    target.write_bytes(b"mine")
    with pytest.raises(llama.UserError, match="--overwrite"):
        merge(checkpoint, tmp_path)
    assert target.read_bytes() == b"mine"
    merge(checkpoint, tmp_path, overwrite=True)
    assert len(target.read_bytes()) > 1_000_000


def test_a_merge_that_fails_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama.checkpoint.fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_needs_the_space_it_will_take(checkpoint, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("llama.checkpoint.shutil.disk_usage", lambda path: usage)
    with pytest.raises(llama.UserError, match="free"):
        merge(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", None), ("float32", "int8"), ("bfloat16", "int4")]
)
def test_loading_peaks_at_little_more_than_the_weights(tmp_path, dtype, quantize):
    """VmHWM of a process that only loads, against one that has only imported PyTorch."""
    dim, n_layers = 1024, 6
    params = PARAMS | {"dim": dim, "n_layers": n_layers, "multiple_of": 256}
    with torch.device("meta"):
        shapes = llama.Transformer(llama.ModelArgs(**params | {"vocab_size": 2048})).state_dict()
    weights = {name: torch.full(w.shape, 0.01, dtype=torch.half) for name, w in shapes.items()}
    torch.save(weights, tmp_path / "merged.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    code = f"""
import re, torch, llama, llama.checkpoint
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.set_default_dtype(torch.{dtype})
before = peak()
model = llama.load({str(tmp_path)!r}, {str(TOKENIZER)!r}, quantize={quantize!r})
print(peak() - before, model.weight_bytes)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("VmHWM is Linux's")
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    grown, n_bytes = map(int, output.split())
    assert grown < 1.05 * n_bytes + 250e6  # PyTorch alone is another 230 MB


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_start_does_not_import_pytorchs_compiler(quantize):
    """It takes a second, and initialising weights on the meta device would do it."""
    code = f"""
import sys, llama
llama.tune.SMALL = 0
llama.load({str(DEMO)!r}, {str(TOKENIZER)!r}, quantize={quantize!r}).generate(["Once"], 2)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("size", "n_shards"), [("7B", 1), ("13B", 2), ("30B", 4), ("65B", 8)])
def test_the_files_of_metas_first_release_run_and_merge(size, n_shards, weights, tmp_path):
    """Rotary angles are in every layer of 7B, and once in the others; neither is used."""
    angles = weights["rope.freqs"]
    plain = {name: weight for name, weight in weights.items() if name != "rope.freqs"}
    names = ["rope.freqs"]
    if size == "7B":
        names = [f"layers.{n}.attention.inner_attention.rope.freqs" for n in (0, 1)]
    files = plain | dict.fromkeys(names, angles)
    folder = write_shards(tmp_path / size, files, n_shards)
    expected = llama.load(write_shards(tmp_path / "plain", plain, 1), TOKENIZER)
    text = expected.generate(["Once upon a time"], 8, temperature=0)
    assert llama.load(folder, TOKENIZER).generate(["Once upon a time"], 8, temperature=0) == text
    merge(folder, folder)
    assert llama.load(folder, TOKENIZER).generate(["Once upon a time"], 8, temperature=0) == text
