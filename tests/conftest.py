"""Small checkpoints in Meta's layout, and running the library and the scripts on them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for another

import pytest
import torch
from torch import Tensor

import llama
from llama.merge import reserve

# A background job of a shell ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "model" / "demo"
TOKENIZER = DEMO / "tokenizer.model"
PARAMS = {"dim": 128, "multiple_of": 64, "n_heads": 8, "n_layers": 2}
PARAMS |= {"norm_eps": 1e-5, "vocab_size": -1}
GROUPED = PARAMS | {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "rope_theta": 1e6}
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")  # split on dim 0
COLUMNS = ("wo", "w2", "tok_embeddings")  # split on dim 1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in fp64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def random_weights(
    seed: int = 0, vocab_size: int = 2048, params: Mapping = PARAMS
) -> dict[str, Tensor]:
    """fp16 weights of a model, large enough for logits that differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    args = llama.ModelArgs(**params)
    dim, hidden, kv_dim = args.dim, args.hidden_dim, args.n_kv_heads * args.head_dim
    weights = {"tok_embeddings.weight": normal(vocab_size, dim) * 8}
    for layer in range(params["n_layers"]):
        for name, rows in {"wq": dim, "wk": kv_dim, "wv": kv_dim, "wo": dim}.items():
            weights[f"layers.{layer}.attention.{name}.weight"] = normal(rows, dim) * 2
        for name, shape in {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}.items():
            weights[f"layers.{layer}.feed_forward.{name}.weight"] = normal(*shape)
        for name in ("attention_norm", "ffn_norm"):
            weights[f"layers.{layer}.{name}.weight"] = 1 + normal(dim)
    weights["norm.weight"] = 1 + normal(dim)
    weights["output.weight"] = normal(vocab_size, dim)
    weights["rope.freqs"] = 1 / 10000 ** (torch.arange(0, args.head_dim, 2) / args.head_dim)
    return weights


def write_shards(
    folder: Path, weights: Mapping[str, Tensor], n_shards: int, params: Mapping = PARAMS
) -> Path:
    """A folder as Meta would ship it."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(n_shards):
        state = {}
        for name, weight in weights.items():
            kind = name.split(".")[-2]
            dim = 0 if kind in ROWS else 1 if kind in COLUMNS else None
            part = weight if dim is None else weight.chunk(n_shards, dim)[shard]
            state[name] = part.clone()
        path = folder / f"consolidated.{shard:02}.pth"
        reserve(path, state) if part.is_meta else torch.save(state, path)
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_zeros(folder: Path, n_shards: int = 1, **params: int) -> Path:
    """Shards of fp16 zeros, which take no room on the disk."""
    params = PARAMS | {"dim": 2048, "n_layers": 4, "multiple_of": 256, "vocab_size": 4096} | params
    with torch.device("meta"):
        model = llama.Transformer(llama.ModelArgs(**params, max_seq_len=1)).half()
    return write_shards(folder, model.state_dict(), n_shards, params)


def load(folder: Path, dtype: str = "float32", **options: object) -> llama.LLaMA:
    """A model with the demo's tokenizer, its activations in this dtype."""
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return llama.load(folder, TOKENIZER, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def printed(folder: Path, prompts: list[str], n_tokens: int, dtype: str = "float32") -> str:
    """What example-cpu.py prints at temperature 0, by the library."""
    texts = load(folder, dtype).generate(prompts, n_tokens, temperature=0)
    return "".join(f"{text}\n\n{'=' * 34}\n\n" for text in texts)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, weights: dict) -> Path:
    return write_shards(tmp_path_factory.mktemp("one") / "7B", weights, 1)


@pytest.fixture(scope="session")
def flags(checkpoint: Path) -> list[str]:
    """Flags with which a script draws the most probable tokens of the checkpoint."""
    return ["--ckpt_dir", str(checkpoint), "--tokenizer_path", str(TOKENIZER), "--temperature", "0"]


def python(*args: object, **options: object) -> subprocess.CompletedProcess:
    """Run Python, by default in the repository's root, and keep what it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = {"cwd": ROOT, "timeout": 120, **pipes, **options}
    return subprocess.run([sys.executable, *map(str, args)], check=False, **options)


def run_code(code: str, *args: object) -> str:
    """What a program prints that runs in a process of its own."""
    done = python("-c", code, *args, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository in a folder that is not the repository."""
    return lambda script, *args, **options: python(ROOT / script, *args, cwd=tmp_path, **options)


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line on stderr, and nothing on stdout, in which a run has ended with exit code 1."""
    errors = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
    lines = [line for line in errors.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert (result.returncode, len(lines), "Traceback" in errors) == (1, 1, False), errors
    assert not result.stdout
    return lines[0]
