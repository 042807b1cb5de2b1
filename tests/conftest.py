"""Checkpoints in Meta's layout, made for the tests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for another

import pytest
import torch

# A background job of a shell ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "model" / "demo"
TOKENIZER = DEMO / "tokenizer.model"
PARAMS = {
    "dim": 128,
    "multiple_of": 64,
    "n_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
HIDDEN = 384  # 64 * ceil(int(2 / 3 * 4 * 128) / 64)
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")  # split on dim 0
COLUMNS = ("wo", "w2", "tok_embeddings")  # split on dim 1


def random_weights(seed: int = 0, vocab_size: int = 2048) -> dict[str, torch.Tensor]:
    """fp16 weights of PARAMS' model, large enough for logits that differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    dim = PARAMS["dim"]
    weights = {"tok_embeddings.weight": normal(vocab_size, dim) * 8}
    for layer in range(PARAMS["n_layers"]):
        for name in ("wq", "wk", "wv", "wo"):
            weights[f"layers.{layer}.attention.{name}.weight"] = normal(dim, dim) * 2
        for name, shape in {"w1": (HIDDEN, dim), "w2": (dim, HIDDEN), "w3": (HIDDEN, dim)}.items():
            weights[f"layers.{layer}.feed_forward.{name}.weight"] = normal(*shape)
        for name in ("attention_norm", "ffn_norm"):
            weights[f"layers.{layer}.{name}.weight"] = 1 + normal(dim)
    weights["norm.weight"] = 1 + normal(dim)
    weights["output.weight"] = normal(vocab_size, dim)
    weights["rope.freqs"] = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    return weights


def write_shards(folder: Path, weights: dict[str, torch.Tensor], n_shards: int) -> Path:
    """A folder as Meta would ship it."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(n_shards):
        state = {}
        for name, weight in weights.items():
            kind = name.split(".")[-2]
            dim = 0 if kind in ROWS else 1 if kind in COLUMNS else None
            part = weight if dim is None else weight.chunk(n_shards, dim)[shard]
            state[name] = part.clone()
        torch.save(state, folder / f"consolidated.{shard:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, weights: dict) -> Path:
    return write_shards(tmp_path_factory.mktemp("one") / "7B", weights, 1)


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository in a folder that is not the repository."""

    def run(script: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(
            command, check=False, cwd=tmp_path, capture_output=True, timeout=120, **kwargs
        )

    return run
