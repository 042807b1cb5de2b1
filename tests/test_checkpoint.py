"""Loading: shards, merged.pth, and every file that torch reads right."""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, TOKENIZER, random_weights, run_python, write_shards
from torch import Tensor

import llama
from llama.merge import open_source, reserve, write_merged

PROMPT = "Once upon a time"
WQ, WK = "layers.0.attention.wq.weight", "layers.0.attention.wk.weight"


def greedy(folder: Path) -> str:
    return llama.load(folder, TOKENIZER).generate(PROMPT, 20, temperature=0)[0]


@pytest.fixture(scope="module")
def expected(checkpoint) -> str:
    """The text of the weights in one shard."""
    return greedy(checkpoint)


RELEASE = [  # folder, number of shards, names of angles, norm_eps
    ("7B", 1, "layers.{}.attention.inner_attention.rope.freqs", 1e-6),
    ("13B", 2, "rope.freqs", 1e-6),
    ("30B", 4, "rope.freqs", 1e-6),
    ("65B", 8, "rope.freqs", 1e-5),
]


@pytest.mark.parametrize(("size", "n_shards", "angles", "norm_eps"), RELEASE)
def test_the_first_release_runs_unmerged_and_merges_bit_for_bit(
    size, n_shards, angles, norm_eps, weights, tmp_path
):
    """The names and numbers of files as Meta published them; the shapes are small."""
    params = PARAMS | {"norm_eps": norm_eps}
    model = {name: weight for name, weight in weights.items() if name != "rope.freqs"}
    unused = {angles.format(layer): weights["rope.freqs"].half() for layer in range(2)}
    folder = write_shards(tmp_path / size, model | unused, n_shards, params)
    assert greedy(folder) == greedy(write_shards(tmp_path / "one", model, 1, params))
    merged = torch.load(write_merged(open_source(folder, False), tmp_path), weights_only=True)
    assert merged.keys() == model.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in model.items())


def test_merged_pth_is_preferred_to_shards(tmp_path, weights):
    write_shards(tmp_path, weights, 2)
    other = random_weights(seed=1)
    torch.save(other, tmp_path / "merged.pth")
    text = greedy(write_shards(tmp_path / "other", other, 1))
    assert greedy(tmp_path) == text


# Files that torch reads, and that are not as Meta's


def views(weights: dict[str, Tensor], path: Path) -> None:
    storage = torch.cat([weight.flatten() for weight in weights.values()])
    parts = storage.split([weight.numel() for weight in weights.values()])
    state = {name: p.view(w.shape) for (name, w), p in zip(weights.items(), parts)}
    state[WQ] = weights[WQ].t().contiguous().t()
    state[WK] = torch.complex(torch.zeros(128, 128), -weights[WK].float()).conj().imag
    assert state[WK].is_neg()
    torch.save(state, path)


def before_1_6(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path, _use_new_zipfile_serialization=False)


def rezipped(compression: int) -> Callable:
    def save(weights: dict[str, Tensor], path: Path) -> None:
        torch.save(weights, path.with_suffix(".old"))
        with (
            zipfile.ZipFile(path.with_suffix(".old")) as old,
            zipfile.ZipFile(path, "w", compression) as new,
        ):
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))

    return save


SAVED = {
    "views, transposed and negated": views,
    "of before PyTorch 1.6": before_1_6,
    "zipped by another program": rezipped(zipfile.ZIP_STORED),
    "compressed": rezipped(zipfile.ZIP_DEFLATED),
    "under model": lambda weights, path: torch.save({"model": weights, "step": 7}, path),
    "under state_dict": lambda weights, path: torch.save({"state_dict": weights}, path),
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
    content = json.dumps(PARAMS | more).encode()
    (tmp_path / "params.json").write_bytes(mark + content)
    assert greedy(tmp_path) == expected


def test_a_vocabulary_of_minus_1_is_as_large_as_the_embedding(weights, tmp_path):
    """One token more than the tokenizer has, such as Alpaca's [PAD], is never drawn."""
    row = torch.full((1, PARAMS["dim"]), 60000.0).half()
    more = {n: torch.cat([weights[n], row]) for n in ("tok_embeddings.weight", "output.weight")}
    write_shards(tmp_path, weights | more, 1)
    write_merged(open_source(tmp_path, False), tmp_path)
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


# What loading costs


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 0.45 GB in fp16, all zeros, which takes no room on the disk."""
    folder = tmp_path_factory.mktemp("large")
    params = PARAMS | {"dim": 2048, "n_layers": 4, "multiple_of": 256}
    args = llama.ModelArgs(**params | {"vocab_size": 4096, "max_seq_len": 1})
    with torch.device("meta"):
        state = llama.Transformer(args).half().state_dict()
    reserve(folder / "merged.pth", state)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int4")],
)
def test_loading_takes_little_more_memory_than_the_weights(large, dtype, quantize):
    code = """
import sys, torch, llama
torch.set_default_dtype(getattr(torch, sys.argv[1]))
quantize = None if sys.argv[4] == "None" else sys.argv[4]
model = llama.load(sys.argv[2], sys.argv[3], quantize=quantize)
model.generate("Hello", 2)
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
print(model.weight_bytes)
"""
    peak, weight_bytes = map(int, run_python(code, dtype, large, TOKENIZER, quantize).split())
    cache = 2 * 4 * 512 * 2048 * 4
    assert peak < 1.05 * weight_bytes + cache + 500e6


@pytest.mark.parametrize(
    ("dtype", "quantize", "unused"),
    [
        ("float32", None, "llama.merge llama.huggingface llama.quantization llama.parallel"),
        ("bfloat16", None, "llama.merge llama.huggingface llama.quantization llama.parallel"),
        ("float32", "int8", "llama.merge llama.huggingface llama.parallel"),
        ("float32", "int4", "llama.merge llama.huggingface llama.parallel"),
    ],
)
def test_loading_imports_neither_torchs_compiler_nor_what_it_does_not_use(
    dtype, quantize, unused, checkpoint
):
    code = """
import sys, torch, llama
torch.set_default_dtype(getattr(torch, sys.argv[1]))
quantize = None if sys.argv[4] == "None" else sys.argv[4]
llama.load(sys.argv[2], sys.argv[3], quantize=quantize).generate("Hello", 2)
print(*sys.modules)
"""
    modules = run_python(code, dtype, checkpoint, TOKENIZER, quantize).split()
    assert not {"torch._dynamo", *unused.split()} & {*modules}
