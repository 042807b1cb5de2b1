"""Loading: shards, merged.pth, and every file that torch reads right."""

import io
import json
import os
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GROUPED, PARAMS, TOKENIZER, random_weights, run_code, write_shards, write_zeros
from torch import Tensor

import llama
from llama.merge import open_source, write_merged

PROMPT = "Once upon a time"
WQ = "layers.0.attention.wq.weight"


def greedy(folder: Path) -> str:
    return llama.load(folder, TOKENIZER).generate(PROMPT, 20, temperature=0)[0]


@pytest.fixture(scope="module")
def expected(checkpoint) -> str:
    """The text of the weights in one shard."""
    return greedy(checkpoint)


OLD_ANGLES = "layers.{}.attention.inner_attention.rope.freqs"
RELEASES = {  # number of shards, names of angles, params.json
    "7B": (1, OLD_ANGLES, PARAMS),
    "13B": (2, "rope.freqs", PARAMS),
    "30B": (4, "rope.freqs", PARAMS),
    "65B": (8, "rope.freqs", PARAMS),
    "70B of Llama 2": (8, "rope.freqs", GROUPED),
}


@pytest.mark.parametrize(("n_shards", "angles", "params"), RELEASES.values(), ids=RELEASES)
def test_metas_releases_run_unmerged_and_merge_bit_for_bit(n_shards, angles, params, tmp_path):
    """The names and numbers of files as Meta published them; the shapes are small."""
    weights = random_weights(params=params)
    freqs = weights.pop("rope.freqs").half()
    unused = {angles.format(layer): freqs for layer in range(2)}
    folder = write_shards(tmp_path / "in", weights | unused, n_shards, params)
    assert greedy(folder) == greedy(write_shards(tmp_path / "one", weights, 1, params))
    merged = torch.load(write_merged(open_source(folder), tmp_path), weights_only=True)
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in weights.items())


def test_merged_pth_is_preferred_to_shards(tmp_path, weights):
    write_shards(tmp_path, weights, 2)
    other = random_weights(seed=1)
    torch.save(other, tmp_path / "merged.pth")
    assert greedy(tmp_path) == greedy(write_shards(tmp_path / "other", other, 1))


def test_a_tokenizer_beside_the_folder_is_metas_unless_it_is_another_models(tmp_path, weights):
    folder = write_shards(tmp_path / "7B", weights, 1)
    shutil.copy(TOKENIZER, tmp_path)
    assert llama.load(folder).generate("Hi", 0) == ["Hi"]
    (tmp_path / "params.json").touch()
    with pytest.raises(llama.UserError, match="there is no tokenizer"):
        llama.load(folder)


def views(weights: dict[str, Tensor], path: Path) -> None:
    storage = torch.cat([weight.flatten() for weight in weights.values()])
    parts = storage.split([weight.numel() for weight in weights.values()])
    state = {name: p.view(w.shape) for (name, w), p in zip(weights.items(), parts)}
    state[WQ] = weights[WQ].t().contiguous().t()
    torch.save(state, path)


def zipped(weights: dict[str, Tensor], path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    torch.save(weights, path)
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


SAVED = {
    "views, and a transposed one": views,
    "of before PyTorch 1.6": partial(torch.save, _use_new_zipfile_serialization=False),
    "zipped by another program": zipped,
    "compressed": partial(zipped, compression=zipfile.ZIP_DEFLATED),
    "under model": lambda weights, path: torch.save({"model": weights, "step": 7}, path),
    "under state_dict": lambda weights, path: torch.save({"state_dict": weights}, path),
    "parameters": lambda weights, path: torch.save(
        {name: torch.nn.Parameter(weight) for name, weight in weights.items()}, path
    ),
    "with a counter": lambda weights, path: torch.save(weights | {"step": torch.tensor(7)}, path),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_a_file_that_torch_reads_runs(save, weights, tmp_path, expected):
    save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert greedy(tmp_path) == expected


DEFAULTS = {"n_kv_heads": None, "ffn_dim_multiplier": False, "use_scaled_rope": False}


@pytest.mark.parametrize(("more", "mark"), [(DEFAULTS, b""), ({}, b"\xef\xbb\xbf")])
def test_null_false_and_a_byte_order_mark_in_params_json(more, mark, weights, tmp_path, expected):
    write_shards(tmp_path, weights, 1)
    (tmp_path / "params.json").write_bytes(mark + json.dumps(PARAMS | more).encode())
    assert greedy(tmp_path) == expected


def test_a_vocabulary_of_minus_1_is_as_large_as_the_embedding(weights, tmp_path):
    """One token more than the tokenizer has, such as Alpaca's [PAD], is never drawn."""
    row = torch.full((1, PARAMS["dim"]), 60000.0).half()
    more = {n: torch.cat([weights[n], row]) for n in ("tok_embeddings.weight", "output.weight")}
    write_shards(tmp_path, weights | more, 1)
    write_merged(open_source(tmp_path), tmp_path)
    model = llama.load(tmp_path, TOKENIZER)
    assert model.model.args.vocab_size == 2049
    assert model.model.output(torch.ones(1, PARAMS["dim"])).argmax() == 2048
    assert model.generate(PROMPT, 8, temperature=0)[0].startswith(PROMPT)


def test_a_folder_that_is_not_utf_8_is_read_and_written(checkpoint, tmp_path, run_script):
    folder = os.fsencode(tmp_path) + b"/out\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    flags = ["--input_dir", str(checkpoint), "--output_dir", os.fsdecode(folder)]
    assert run_script("merge-weights.py", *flags).returncode == 0
    assert sorted(os.listdir(folder)) == [b"merged.pth", b"params.json"]
    assert [os.fsencode(path) for path in tmp_path.iterdir()] == [folder]
    flags = ["--ckpt_dir", os.fsdecode(folder), "--tokenizer_path", TOKENIZER]
    assert run_script("example-cpu.py", *flags, "--max_gen_len", 2).returncode == 0


LOAD = """
import sys, torch, llama
folder, tokenizer, dtype, quantize = sys.argv[1:]
torch.set_default_dtype(getattr(torch, dtype))
model = llama.load(folder, tokenizer, quantize=quantize or None)
model.generate("Hello", 2)
"""
PEAK = 'print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)'
TYPES = [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int4")]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """0.45 GB in fp16."""
    return write_zeros(tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(("dtype", "quantize"), TYPES)
def test_loading_takes_little_more_memory_than_the_weights(large, dtype, quantize):
    assert peak_beside_weights(large, dtype, quantize or "") < 265e6


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_loading_quantized_weights_takes_no_second_copy(large, scheme, tmp_path):
    write_merged(open_source(large), tmp_path, quantize=scheme)
    assert peak_beside_weights(tmp_path, "float32", "") < 100e6  # the weights: 227 and 141 MB


def peak_beside_weights(folder: Path, dtype: str, quantize: str) -> float:
    """Bytes that loading and generating take at most, without PyTorch, weights and cache."""
    code = f"import torch, llama\n{PEAK}\n{LOAD}\n{PEAK}\nprint(model.weight_bytes)"
    printed = run_code(code, folder, TOKENIZER, dtype, quantize)
    imported, peak, weight_bytes = map(int, printed.split())  # importing takes 0.23 GB or more
    return peak - imported - 1.05 * weight_bytes - 2 * 4 * 512 * 2048 * 4


@pytest.mark.parametrize(("dtype", "quantize"), TYPES)
def test_loading_imports_no_more_than_it_uses(dtype, quantize, checkpoint):
    code = f"{LOAD}\nprint(*sys.modules)"
    modules = set(run_code(code, checkpoint, TOKENIZER, dtype, quantize or "").split())
    assert not modules & {"torch._dynamo", "llama.merge", "llama.huggingface", "llama.parallel"}
    assert ("llama.quantization" in modules) == (quantize is not None)
