"""Bad checkpoints, tokenizers and prompts: each ends in one line that names the file."""

import functools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, random_weights, write_shards

import llama
from llama import system
from llama.checkpoint import merge
from llama.generation import Sampling, sample
from llama.stored import read_index

PARAMS = {
    "dim": 64,
    "multiple_of": 32,
    "n_heads": 2,
    "n_layers": 1,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
LAYER = {"wq": 64, "wk": 64, "wv": 64, "wo": 64, "w1": 192, "w2": 64, "w3": 192}


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """fp16 weights of PARAMS' model."""
    whole = random_weights()
    names = [name for name in whole if not name.startswith("layers.1")]
    weights = {name: whole[name][..., :64].clone() for name in names}
    for name in names:
        kind = name.split(".")[-2]
        if kind in LAYER:
            columns = 192 if kind == "w2" else 64
            weights[name] = whole[name][: LAYER[kind], :columns].clone()
    return weights


@pytest.fixture
def folder(tmp_path, tiny) -> Path:
    """Two shards that load."""
    return write(tmp_path / "7B", tiny)


def write(folder: Path, weights: dict[str, torch.Tensor], n_shards: int = 2) -> Path:
    write_shards(folder, weights, n_shards)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


def refusal(folder: Path, tokenizer: Path = TOKENIZER, **options) -> str:
    with pytest.raises(llama.UserError) as caught:
        llama.load(folder, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a shard; None: take away. Dots are written as __."""
    state = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, path)


def test_what_the_cases_start_from_loads(folder):
    assert llama.load(folder, TOKENIZER).generate(["a"], 2)


# params.json


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "1", '"dim"', "\xff", "[" * 100_000])
def test_a_params_json_that_is_no_object_is_refused(folder, text):
    (folder / "params.json").write_text(text, encoding="latin-1")
    assert str(folder / "params.json") in refusal(folder)


@pytest.mark.parametrize("key", [*sorted(PARAMS.keys() - {"vocab_size"}), None])
def test_a_missing_key_is_named_and_so_is_a_missing_file(folder, key):
    path = folder / "params.json"
    if key is None:
        path.unlink()
        assert f"{path} is missing" in refusal(folder)
    else:
        path.write_text(json.dumps({k: v for k, v in PARAMS.items() if k != key}))
        assert re.match(f"{path}: {key} is 'missing'", refusal(folder))


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "dim": [0, -64, 63, 10**12, 10**400, 64.0, "64", None, True, [64], {}],
        "n_heads": [0, -1, 3, 64, 10**12, 2.0, "2", None],
        "n_kv_heads": [0, -1, 3, "1", 1.0],
        "n_layers": [0, -1, 2, 10**6, 10**12, 1.0, None],
        "multiple_of": [0, -1, 10**12, 31, 1e3, None],
        "vocab_size": [0, -2, 10, 2**21, "32000", 1.5],
        "norm_eps": [0, -1e-5, math.nan, math.inf, "1e-5", None],
        "rope_theta": [0, -1, math.nan, math.inf, "10000"],
        "ffn_dim_multiplier": [0, 1e-9, -1, math.inf, 1e11, "1"],
        "sliding_window": [0, -1, "4096", 10],
        "moe": [None],
    }.items(),
)
def test_a_value_that_no_model_has_is_refused(folder, key, values):
    for value in values:
        (folder / "params.json").write_text(json.dumps(PARAMS | {key: value}))
        message = refusal(folder)
        assert str(folder) in message, (value, message)


def test_a_params_json_of_10_to_the_12_parameters_is_refused_before_anything_is_built(folder):
    sizes = {"dim": 2**18, "n_heads": 2**11, "n_layers": 1000}
    (folder / "params.json").write_text(json.dumps(PARAMS | sizes))
    before = system.peak_memory()
    assert "tok_embeddings.weight is float (2048, 64)" in refusal(folder)
    assert system.peak_memory() - before < 200e6


# Shards


def cut(n_tenths: int):
    def damage(folder: Path) -> None:
        path = folder / "consolidated.01.pth"
        os.truncate(path, path.stat().st_size * n_tenths // 10)

    return damage


def rewrite(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def swap(**tensors):
    return lambda folder: change(folder / "consolidated.01.pth", **tensors)


def swap_both(**tensors):
    def damage(folder: Path) -> None:
        for path in folder.glob("*.pth"):
            change(path, **tensors)

    return damage


def other_model(folder: Path) -> None:
    change(folder / "consolidated.01.pth", norm__weight=torch.full((64,), 7.0).half())


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    for path in folder.glob("*.pth"):
        path.unlink()


def gap(folder: Path) -> None:
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")


def extra(folder: Path) -> None:
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.02.pth")


def lost_first(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def lost_last(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


NAN = torch.tensor([math.nan] + [0.0] * 63).half()
DAMAGES = {
    "no folder": (nothing, "7B"),
    "no shards": (empty, "has no consolidated"),
    "a shard missing in the middle": (gap, "without consolidated.01.pth"),
    "the first shard missing": (lost_first, "without consolidated.00.pth"),
    "the last shard missing": (lost_last, "a shard is missing"),
    "a shard too many": (extra, "too many"),
    "a shard of another model": (other_model, "different models"),
    **{f"cut at {n} tenths": (cut(n), "01.pth is not a readable") for n in range(10)},
    "no zip": (rewrite("consolidated.01.pth", b"hello" * 100), "not a zip"),
    "a web page": (rewrite("merged.pth", b"<html>404</html>"), "merged.pth.*not a zip"),
    "a key missing in one": (swap(output__weight=None), "output.weight differs"),
    "a key missing": (swap_both(output__weight=None), "output.weight is not there"),
    "a norm missing": (swap_both(norm__weight=None), "norm.weight is not there"),
    "an unexpected key": (swap_both(extra__weight=torch.ones(3)), "extra.weight is float"),
    "one layer too many": (swap_both(layers__1__ffn_norm__weight=torch.ones(64)), "layers.1"),
    "a wrong shape": (swap_both(norm__weight=torch.ones(63)), r"\(63,\).*should be.*\(64,\)"),
    "a wrong shape in one": (swap(norm__weight=torch.ones(63)), "norm.weight differs"),
    "a wrong type": (swap_both(norm__weight=torch.ones(64).int()), "norm.weight.*no whole"),
    "whole numbers": (swap_both(norm__weight=torch.ones(64).to(torch.int8)), "norm.weight is"),
    "complex numbers": (swap_both(norm__weight=torch.ones(64) * 1j), "norm.weight.*no whole"),
    "no tensor": (swap_both(norm__weight=[1.0] * 64), "norm.weight.*no whole"),
    "no element": (swap_both(norm__weight=torch.ones(0)), "norm.weight.*no whole"),
    "no dimension": (swap_both(norm__weight=torch.ones(())), "norm.weight.*no whole"),
    "expanded": (swap_both(norm__weight=torch.ones(1).expand(64)), "norm.weight.*no whole"),
    "sparse": (swap_both(norm__weight=torch.ones(64).to_sparse()), "norm.weight.*no whole|no data"),
    "quantized scales too many": (swap_both(output__scales=torch.ones(64)), "output.weight is"),
    "groups too many": (swap_both(output__groups=torch.ones(64)), "output.groups is"),
    "NaN": (swap(norm__weight=NAN), "01.pth: norm.weight has NaN"),
    "Inf": (
        swap(layers__0__attention__wo__weight=torch.full((64, 32), math.inf).half()),
        "01.*wo.*NaN",
    ),
    "-Inf": (swap(output__weight=torch.full((1024, 64), -math.inf).half()), "01.*output.*NaN"),
    "a name that is no name": (lambda f: torch.save({3: NAN}, f / "merged.pth"), "merged.pth"),
    "a name without a dot": (lambda f: torch.save({"a": NAN}, f / "merged.pth"), "merged.pth"),
    "no names": (lambda f: torch.save([NAN], f / "merged.pth"), "merged.pth.*no names"),
    "an empty one": (lambda f: torch.save({}, f / "merged.pth"), "tok_embeddings.*not there"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_load_and_by_merge(folder, tmp_path, damage, expected):
    damage(folder)
    message = refusal(folder)
    assert re.search(expected, message) or not folder.exists(), message
    assert str(tmp_path) in message
    if not (folder / "merged.pth").exists():
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(llama.UserError):
            merge(folder, out)
        assert not list(out.iterdir())


def test_weights_are_refused_before_any_of_them_is_read(folder, monkeypatch):
    (folder / "params.json").write_text(json.dumps(PARAMS | {"multiple_of": 64, "dim": 32}))
    monkeypatch.setattr("llama.checkpoint.fill", None)
    assert "should be float" in refusal(folder)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_finite_weights_of_any_size_load(folder, quantize):
    """The largest fp16 numbers add up to Inf, and zeros leave nothing to compare with."""
    large = torch.full((1024, 64), 65504.0).half()
    change(folder / "consolidated.01.pth", output__weight=large)
    zeros = {f"layers__0__feed_forward__w{i}__weight": torch.zeros(96, 64) for i in (1, 3)}
    for path in folder.glob("*.pth"):
        change(path, **zeros)
    assert llama.load(folder, TOKENIZER, quantize=quantize)


def test_quantized_weights_are_not_quantized_again(folder, tmp_path):
    merged = merge(folder, tmp_path, quantize="int8").rename(folder / "merged.pth")
    assert llama.load(folder, TOKENIZER)
    assert "quantized already" in refusal(folder, quantize="int4")
    state = torch.load(merged, weights_only=True)
    for version in (torch.tensor([200], dtype=torch.uint8), None):
        change(merged, quantized__format=version)
        assert "another version" in refusal(folder)
    state["output.scales"] = state["output.scales"][1:].clone()
    torch.save(state, merged)
    assert "output.scales" in refusal(folder)


# Pickles that run code, and zip files that lie


class Call:
    """Unpickles to function(*args), as in every such attack."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def gadgets(mark: Path) -> dict[str, object]:
    (mark.parent / "hubconf.py").write_text(f"open({str(mark)!r}, 'w')\ndef model(): pass")
    code = f"open({str(mark)!r}, 'w')"
    inner = mark.with_name("inner.pth")
    torch.save(Call(os.system, f"touch {mark}"), inner)
    return {
        "os.system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "subprocess": Call(subprocess.Popen, ["touch", str(mark)]),
        "runpy": Call(runpy.run_path, str(mark.parent / "hubconf.py")),
        "torch.hub": Call(torch.hub.load, str(mark.parent), "model", "local"),
        "torch.load": Call(functools.partial(torch.load, str(inner), weights_only=False)),
    }


FORMATS = {
    "zip": lambda value, path: torch.save(value, path),
    "old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "pickle before a zip": lambda value, path: (
        torch.save({"a.b": torch.ones(1)}, path),
        path.write_bytes(pickle.dumps(value) + path.read_bytes()),
    ),
}
GADGETS = ["os.system", "eval", "exec", "subprocess", "runpy", "torch.hub", "torch.load"]


@pytest.mark.parametrize("gadget", GADGETS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_pickle_that_runs_code_is_refused_and_the_code_not_run(folder, tmp_path, gadget, form):
    mark = tmp_path / "mark"
    attack = gadgets(mark)[gadget]
    good = torch.load(folder / "consolidated.01.pth", weights_only=True)
    for name in ("consolidated.01.pth", "consolidated.00.pth", "merged.pth"):
        for value in (attack, good | {"norm.weight": attack}, good | {"a.b": {"c": [attack]}}):
            FORMATS[form](value, folder / name)
            assert f"{folder / name} is not a readable checkpoint" in refusal(folder)
    assert not mark.exists()


def write_pth(path: Path, numel: int, shape: tuple, stride: tuple, offset=0, key="0") -> None:
    """A file whose only storage has 100 floats, and whose pickle says what it likes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", numel) if value is Pickler else None

    path.unlink(missing_ok=True)
    arguments = (Pickler, offset, shape, stride, False, OrderedDict())
    with path.with_suffix(".pkl").open("w+b") as file:
        Pickler(file, protocol=2).dump({"a.b": Call(torch._utils._rebuild_tensor_v2, *arguments)})
        file.seek(0)
        index = file.read()
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", index, len(index))
    writer.write_record("byteorder", b"little", 6)
    writer.write_record("data/0", bytes(400), 400)
    writer.write_record("data/1", bytes(400), 400)
    writer.write_end_of_file()


def test_a_tensor_that_lies_outside_of_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    write_pth(path, 100, (10, 10), (10, 1))
    assert read_index(path)["a.b"].shape == (10, 10)
    for lie in (
        {"numel": 101},
        {"numel": 200, "shape": (200,), "stride": (1,)},
        {"numel": 10**12},
        {"numel": 2**62},
        {"shape": (11, 10)},
        {"shape": (10**6, 10**6), "stride": (10**6, 1)},
        {"shape": (2**40, 2**40)},
        {"shape": (-1, 10)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (1, 10)},
        {"stride": (0, 0)},
        {"shape": (1000, 10), "stride": (-10, 1)},
        {"key": "7"},
        {"key": "../0"},
    ):
        write_pth(path, **{"numel": 100, "shape": (10, 10), "stride": (10, 1)} | lie)
        with pytest.raises(llama.UserError, match="a.pth is not a readable"):
            read_index(path)


@pytest.mark.parametrize(
    "name", ["/etc/evil", "../evil", "a/../../evil", "\\evil", "..\\evil", "C:\\evil", "C:evil"]
)
def test_a_zip_entry_outside_of_its_folder_is_refused(folder, name):
    with zipfile.ZipFile(folder / "consolidated.01.pth", "a") as archive:
        archive.writestr(name, "x")
    assert "01.pth is not a readable checkpoint (" in refusal(folder)


def test_compressed_entries_are_refused(folder):
    with zipfile.ZipFile(folder / "consolidated.01.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/x", "x" * 10_000)
    assert "compressed" in refusal(folder)


def test_big_endian_numbers_are_refused(folder, tiny, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(sys, "byteorder", "big")
        torch.save(tiny, folder / "merged.pth")
    assert "big-endian" in refusal(folder)


# Tokenizers


def protobuf_length(data: bytes) -> int:
    """Where the pieces end: every field until then is tag, length, content."""
    at = 0
    while data[at] == 0x0A:
        at += 2 + data[at + 1]
    return at


TOKENIZERS = {
    "missing": (None, "is no file.*--tokenizer_path"),
    "empty": (b"", "no <s>"),
    "text": (b"hello there\n" * 50, "no sentencepiece model"),
    "Llama 3": (b"IQ== 0\nIg== 1\nIw== 2\n", "Llama 3.*tiktoken"),
    "Llama 3 from Windows": (b"IQ== 0\r\nIg== 1\r\n", "Llama 3.*tiktoken"),
    "json": (b'{"version": "1.0", "model": {"type": "BPE"}}', "no sentencepiece model"),
    "pieces alone": (lambda data: data[: protobuf_length(data)], "tokenizer.model|params.json"),
    **{
        f"cut at {n} tenths": (lambda data, n=n: data[: len(data) * n // 10], "sentencepiece")
        for n in range(1, 10)
    },
}


@pytest.mark.parametrize(("content", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_what_is_no_tokenizer_of_llama_is_refused(folder, tmp_path, content, expected):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content(TOKENIZER.read_bytes()) if callable(content) else content)
    message = refusal(folder, path)
    assert str(path) in message
    assert re.search(expected, message), message


@pytest.mark.parametrize("n_pieces", [2047, 2049])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(folder, tiny, n_pieces):
    """params.json says -1: as many as the tokenizer has."""
    weights = tiny | {
        name: torch.ones(n_pieces, 64).half() for name in ("tok_embeddings.weight", "output.weight")
    }
    write(folder, weights, 1)
    (folder / "consolidated.01.pth").unlink()
    message = refusal(folder)
    assert f"({n_pieces}, 64)" in message and "(2048, 64)" in message and "tokenizer" in message


# Memory


@pytest.fixture
def tell(tmp_path):
    """Writes a file of the kernel's, below tmp_path."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_a_containers_limit_bounds_the_available_memory(tmp_path, tell):
    tell("proc/self/cgroup", "0::/user/me\n")
    tell("sys/fs/cgroup/user/me/memory.max", "max\n")
    assert system.available_memory(tmp_path) > 2**20
    tell("sys/fs/cgroup/user/memory.max", "30720\n")
    tell("sys/fs/cgroup/user/memory.stat", "anon 10240\nfile 20480\n")
    assert system.available_memory(tmp_path) == 20 * 1024
    tell("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/1\n")
    tell("sys/fs/cgroup/memory/memory.limit_in_bytes", "20480")
    tell("sys/fs/cgroup/memory/memory.stat", "rss 1\ntotal_rss 10240\n")
    assert system.available_memory(tmp_path) == 10 * 1024


def test_affinity_and_a_containers_quota_bound_the_number_of_threads(tmp_path, tell, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(8)}, raising=False)
    assert system.available_cpus(tmp_path) == 8
    tell("proc/self/cgroup", "0::/me\n")
    tell("sys/fs/cgroup/me/cpu.max", "max 100000\n")
    assert system.available_cpus(tmp_path) == 8
    tell("sys/fs/cgroup/cpu.max", "350000 100000\n")
    assert system.available_cpus(tmp_path) == 4
    tell("proc/self/cgroup", "3:cpuacct,cpu:/\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").unlink()
    tell("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    tell("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert system.available_cpus(tmp_path) == 8
    tell("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n")
    assert system.available_cpus(tmp_path) == 2


def test_too_little_memory_names_the_flags_that_would_fit(checkpoint, monkeypatch):
    """In fp32 the fixture's weights take 3.8 MB, 1 GB of cache 2**20 tokens: 2.1 in bf16."""
    monkeypatch.setattr("llama.checkpoint.WORKING", 0)

    def refused(free: int, **options) -> str:
        monkeypatch.setattr(system, "available_memory", lambda: free)
        return refusal(checkpoint, **options)

    bf16, int8, int4 = "--dtype bfloat16", "--quantize int8", "--quantize int4"
    n_bytes = 4 * sum(t.numel() for name, t in random_weights().items() if name != "rope.freqs")
    cache = 2 * 2 * 512 * 128 * 4
    others = f"give {bf16} or {int8} or {int4}"
    assert refused(n_bytes + cache - 1).endswith(f"{others} or --max_seq_len 256")
    assert refused(n_bytes + cache // 8).endswith(f"{others} or --max_seq_len 64")
    assert refused(n_bytes).endswith(others)
    assert refused((n_bytes + cache) // 2 - 1).endswith(f"give {int8} or {int4}")
    assert refused(n_bytes // 4 + cache // 2 - 1).endswith(f"give {int4}")  # fp16 in the cache
    w2 = 4 * 128 * 384  # turned in fp32
    assert refused(n_bytes // 4 + w2 - 1, max_seq_len=1, quantize="int8").endswith(f"give {int4}")
    assert refused(1000).endswith("smaller model")
    monkeypatch.setattr(system, "available_memory", lambda: n_bytes + cache)
    assert llama.load(checkpoint, TOKENIZER)


# Flags and prompts


@pytest.mark.parametrize("flag", ["max_seq_len", "max_batch_size"])
def test_a_size_out_of_range_is_refused(checkpoint, flag):
    for value in (0, -1, 10**12):
        assert refusal(checkpoint, **{flag: value}).startswith(f"--{flag} takes ")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny) -> llama.LLaMA:
    folder = write(tmp_path_factory.mktemp("tiny") / "7B", tiny)
    return llama.load(folder, TOKENIZER, max_seq_len=64)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t  \n", "\0", "a\0b", "\ufeff", "e\u0301"])
def test_odd_prompts_are_continued(model, prompt):
    (text,) = model.generate([prompt], 3, temperature=0)
    assert text.startswith(prompt)


def test_half_a_surrogate_pair_becomes_a_question_mark(model):
    assert model.generate(["a\ud800b"], 0) == ["a?b"]


def test_a_prompt_of_ten_megabytes_is_refused_with_its_length(model):
    with pytest.raises(llama.UserError, match="[0-9]{7} tokens"):
        model.generate(["hello " * (10**7 // 6)], 3)


def test_a_thousand_prompts_are_all_continued(model):
    prompts = [f"number {i}" for i in range(1000)]
    texts = model.generate(prompts, 1, temperature=0)
    assert len(texts) == 1000
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts))


@pytest.mark.parametrize("max_gen_len", [0, 1])
def test_nothing_to_generate_gives_the_prompt(model, max_gen_len):
    (text,) = model.generate(["hello"], max_gen_len, top_p=0)
    assert text.startswith("hello") and (max_gen_len or text == "hello")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_logit_that_is_not_finite_ends_generation(value, temperature):
    logits = torch.zeros(2, 50)
    logits[1, 7] = value
    sampling = Sampling(1, temperature)
    with pytest.raises(llama.UserError, match="not finite"):
        sample(logits, [[1], [1]], sampling, sampling.generator())


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-6, 1e-5, 1e300])
def test_extreme_temperatures_draw_a_token(temperature):
    logits = torch.tensor([[0.0, 3e38, -3e38, 1.0]])
    sampling = Sampling(1, temperature, seed=0)
    assert sample(logits, [[1]], sampling, sampling.generator()).item() in range(4)


def test_a_local_header_beyond_the_end_is_refused(folder):
    """The last entry's place is read from its header, which may not be there."""
    path = folder / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")
    data[at + 42 : at + 46] = struct.pack("<I", len(data) - 28)
    path.write_bytes(data)
    assert "01.pth is not a readable checkpoint" in refusal(folder)
