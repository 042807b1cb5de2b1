"""Damaged and foreign files, and values that no model has: one line that names file and cause."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, TOKENIZER, write_shards
from torch import Tensor

import llama
from llama.merge import open_source, write_merged


@pytest.fixture
def folder(tmp_path, weights) -> Path:
    """Two shards that load."""
    return write_shards(tmp_path / "7B", weights, 2)


def refusal(folder: Path, tokenizer: Path = TOKENIZER) -> str:
    with pytest.raises(llama.UserError) as caught:
        llama.load(folder, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "null", "\xff", "[" * 100_000])
def test_a_params_json_that_is_not_an_object_is_refused(folder, text):
    (folder / "params.json").write_text(text, encoding="latin-1")
    assert str(folder / "params.json") in refusal(folder)


def test_a_missing_key_or_file_is_named(folder):
    path = folder / "params.json"
    for key in PARAMS.keys() - {"vocab_size"}:
        path.write_text(json.dumps({k: v for k, v in PARAMS.items() if k != key}))
        assert f"{path} has no {key}" in refusal(folder)
    path.unlink()
    assert f"{path} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "dim": [0, -128, 63, 10**400, 128.0, "128", None, True],
        "n_heads": [0, 3, 128, None],
        "n_kv_heads": [0, 3, "1"],
        "n_layers": [0, -1, 3, 10**6, None],
        "multiple_of": [0, 31, 1e3, None],
        "vocab_size": [0, -2, 10, "32000"],
        "norm_eps": [0, math.nan, math.inf, "1e-5", None],
        "rope_theta": [0, "", [], math.nan],
        "ffn_dim_multiplier": [0, 1e-9, 1e11],
        "eos_token_id": [2, "2", ["2"]],
        "added_tokens": [[], {"<|im_end|>": "2048"}, {"": 2048}],
        "moe": [1],
    }.items(),
)
def test_a_value_that_no_model_has_is_refused(folder, key, values):
    for value in values:
        (folder / "params.json").write_text(json.dumps(PARAMS | {key: value}))
        message = refusal(folder)
        assert str(folder) in message, value
        assert key in message or "weight" in message, value


def change(folder: Path, files: str, module: str, weight: Tensor | None) -> None:
    """Replace a module's weight in these files; None: remove it."""
    for path in folder.glob(files):
        state = torch.load(path, weights_only=True) | {f"{module}.weight": weight}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FIRST, LAST, BOTH = "consolidated.00.pth", "consolidated.01.pth", "*.pth"
SEVENS = torch.full((128,), 7.0).half()
NAN = torch.full((1024, 128), math.nan).half()
DAMAGES = {
    "a gap": (lambda f: (f / LAST).rename(f / "consolidated.02.pth"), f"{LAST} is missing"),
    "the first shard missing": (lambda f: (f / FIRST).unlink(), f"{FIRST} is missing"),
    "the last shard missing": (lambda f: (f / LAST).unlink(), "a file is missing.*should be"),
    "another model's shard": (lambda f: change(f, LAST, "norm", SEVENS), "not shards of one mod"),
    "cut": (lambda f: os.truncate(f / LAST, 700_000), LAST),
    "a web page": (lambda f: (f / LAST).write_text("<html>404</html>"), LAST),
    "a git-lfs pointer": (lambda f: (f / LAST).write_bytes(LFS), f"{LAST} is a git-lfs pointer"),
    "a pointer": (lambda f: (f / "params.json").write_bytes(LFS), "params.json is a git-lfs po"),
    "a FIFO": (lambda f: ((f / LAST).unlink(), os.mkfifo(f / LAST)), "not a regular file"),
    "a list": (lambda f: torch.save([torch.ones(1)], f / LAST), f"{LAST} holds a list"),
    "a key missing in one": (lambda f: change(f, LAST, "output", None), "output.weight differs"),
    "a key missing": (lambda f: change(f, BOTH, "norm", None), "norm.weight is not there"),
    "a key too many": (lambda f: change(f, BOTH, "extra", torch.ones(3)), "extra.weight is float"),
    "a wrong shape": (lambda f: change(f, BOTH, "norm", SEVENS[:63]), "63,.*should be.*128,"),
    "integers": (lambda f: change(f, BOTH, "norm", SEVENS.int()), "norm.weight is.*int32"),
    "NaN": (lambda f: change(f, LAST, "output", NAN), "output.weight.*NaN"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused_by_load_and_by_merge(folder, tmp_path, damage, expected):
    damage(folder)
    message = refusal(folder)
    assert re.search(expected, message), message
    assert str(folder) in message
    with pytest.raises(llama.UserError):
        write_merged(open_source(folder), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


class Command(str):
    """Unpickles to what running it returns."""

    def __reduce__(self):
        return os.system, (str(self),)


def test_a_pickle_that_runs_code_is_refused_and_not_run(folder, tmp_path):
    attack = {"norm.weight": Command(f"touch {tmp_path}/mark")}
    torch.save(attack, folder / "merged.pth")
    assert "merged.pth is damaged (download it again), or holds objects" in refusal(folder)
    assert not (tmp_path / "mark").exists()


def test_a_folder_that_is_no_path_is_refused_by_name():
    with pytest.raises(llama.UserError, match="`ckpt_dir` must be a path, not None"):
        llama.load(None)


def test_a_folder_without_weights_says_which_have_some(tmp_path):
    for name in ("7B", "13B"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "merged.pth").touch()
    (tmp_path / "config.json").touch()
    found = r"\(found: 7B, 13B\).*set `ckpt_dir`"
    assert re.search(rf"no directory {tmp_path / '30B'} {found}", refusal(tmp_path / "30B"))
    assert re.search(rf"{tmp_path} has no weights {found}", refusal(tmp_path))


TOKENIZERS = {
    "missing": (None, "there is no tokenizer.*`tokenizer_path`"),
    "empty": (b"", "no <s>"),
    "text": (b"hello there\n" * 50, "not a valid sentencepiece model"),
    "Llama 3": (b"IQ== 0\nIg== 1\nIw== 2\n", "Llama 3.*tiktoken"),
    "Llama 3 from Windows": (b"IQ== 0\r\nIg== 1\r\n", "Llama 3.*tiktoken"),
    "a git-lfs pointer": (LFS, "git-lfs pointer.*git lfs pull"),
    "cut": (TOKENIZER.read_bytes()[:9999], "not a valid sentencepiece model"),
    # Refused at once, not when the piece is drawn that the byte is in.
    "a damaged byte": (TOKENIZER.read_bytes().replace(b"once", b"\xffnce", 1), "not a valid sent"),
}


@pytest.mark.parametrize(("content", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_what_is_not_llamas_tokenizer_is_refused(checkpoint, tmp_path, content, expected):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    message = refusal(checkpoint, path)
    assert str(path) in message
    assert re.search(expected, message), message
