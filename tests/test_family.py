"""LLaMA's family: grouped-query attention, Meta's later params.json, and Hugging Face's folders."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, write_shards
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llama

GROUPED = {  # two query heads to each of eight kv heads, as many as Llama 2 70B's
    "dim": 128,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 16,
    "n_kv_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 2048,
}
GROUPED_HIDDEN = 448  # 32 * ceil(int(1.3 * int(2 / 3 * 4 * 128)) / 32)
TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def grouped_weights() -> dict[str, Tensor]:
    """Random fp16 weights of GROUPED."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    weights = {"tok_embeddings.weight": normal(2048, 128) * 8}
    for layer in range(2):
        for name, shape in {
            "attention.wq": (128, 128),
            "attention.wk": (64, 128),
            "attention.wv": (64, 128),
            "attention.wo": (128, 128),
            "feed_forward.w1": (GROUPED_HIDDEN, 128),
            "feed_forward.w2": (128, GROUPED_HIDDEN),
            "feed_forward.w3": (GROUPED_HIDDEN, 128),
            "attention_norm": (128,),
            "ffn_norm": (128,),
        }.items():
            weights[f"layers.{layer}.{name}.weight"] = normal(*shape) + ("norm" in name)
    return weights | {"norm.weight": 1 + normal(128), "output.weight": normal(2048, 128)}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, grouped_weights) -> dict[int, Path]:
    """Folders of GROUPED in Meta's format, by the number of shards."""
    folders = {}
    for n_shards in (1, 2, 4):
        folder = tmp_path_factory.mktemp("grouped") / "70B"
        folders[n_shards] = write_shards(folder, grouped_weights, n_shards)
        (folder / "params.json").write_text(json.dumps(GROUPED))
    return folders


def repeat_kv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with a key head of its own, a copy, for each query head."""
    return {
        name: weight.unflatten(0, (8, 8)).repeat_interleave(2, 0).flatten(0, 1)
        if ".wk" in name or ".wv" in name
        else weight
        for name, weight in weights.items()
    }


def test_grouped_query_attention_equals_attention_with_repeated_heads(grouped, grouped_weights):
    model = llama.load(grouped[1], TOKENIZER).model
    peer = llama.Transformer(llama.ModelArgs(**GROUPED | {"n_kv_heads": 16}))
    peer.load_state_dict(repeat_kv(grouped_weights))
    assert relative_error(model(TOKENS[:, :9], 0), peer(TOKENS[:, :9], 0)) < 1e-5
    assert relative_error(model(TOKENS[:, 9:16], 9), peer(TOKENS[:, 9:16], 9)) < 1e-5
    for position in range(16, 24):
        token = TOKENS[:, position : position + 1]
        assert relative_error(model(token, position), peer(token, position)) < 1e-5


def test_a_prompt_of_one_token_attends_to_it_alone(grouped, grouped_weights):
    model = llama.load(grouped[1], TOKENIZER).model
    peer = llama.Transformer(llama.ModelArgs(**GROUPED | {"n_kv_heads": 16}))
    peer.load_state_dict(repeat_kv(grouped_weights))
    assert relative_error(model(TOKENS[:, :1], 0), peer(TOKENS[:, :1], 0)) < 1e-5


@pytest.mark.parametrize("n_new", [1, 4])
def test_the_cache_is_kept_by_kv_head_and_never_copied_by_query_head(n_new):
    args = llama.ModelArgs(
        dim=512, n_heads=32, n_kv_heads=2, n_layers=1, vocab_size=64, max_seq_len=8192
    )
    model = llama.Transformer(args)
    cache = model.new_cache(8000)
    assert cache.keys.shape == (1, 2, 8000, 16)
    tokens = torch.ones(1, n_new, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(tokens, [7000], [cache])
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert largest < cache.keys.nbytes


@pytest.mark.parametrize("n_shards", [2, 4])
def test_grouped_query_shards_run_unmerged_as_the_whole_does(grouped, n_shards):
    whole = llama.load(grouped[1], TOKENIZER).model
    parts = llama.load(grouped[n_shards], TOKENIZER).model
    assert torch.equal(parts(TOKENS, 0), whole(TOKENS, 0))


@pytest.mark.parametrize("n_shards", [2, 4])
def test_grouped_query_shards_merge_bit_for_bit(
    grouped, grouped_weights, n_shards, run_script, tmp_path
):
    (tmp_path / "in").symlink_to(grouped[n_shards].parent)
    process = run_script("merge-weights.py", "--input_dir", "in", "--model_size", "70B")
    assert process.returncode == 0, process.stderr
    merged = torch.load(tmp_path / "merged.pth")
    assert merged.keys() == grouped_weights.keys()
    for name, weight in grouped_weights.items():
        assert torch.equal(merged[name], weight), name


def test_the_published_shapes_of_later_models_follow_from_their_params():
    sizes = {  # parameters and width of the feed-forward layer, as published
        (6.74e9, 11008): {"dim": 4096, "n_heads": 32, "n_layers": 32},
        (34.0e9, 22016): {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 48},
        (69.0e9, 28672): {
            "dim": 8192,
            "n_heads": 64,
            "n_kv_heads": 8,
            "n_layers": 80,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
        },
    }
    for (n_params, hidden_dim), params in sizes.items():
        args = llama.ModelArgs(**params, vocab_size=32000)
        with torch.device("meta"):
            model = llama.Transformer(args)
        assert args.hidden_dim == hidden_dim
        assert sum(w.numel() for w in model.parameters()) == pytest.approx(n_params, rel=0.01)
