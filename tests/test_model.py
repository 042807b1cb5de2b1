"""The transformer against other implementations of it."""

import math

import pytest
import torch
from conftest import GROUPED, PARAMS, load, random_weights, relative_error, write_shards
from peers import naive_logits, to_transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llama
from llama.cache import KVCache
from llama.model import Segment

TOKENS = torch.randint(3, 2048, (3, 40), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(3, 2048, (170,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=[PARAMS, GROUPED], ids=["multi-head", "grouped-query"])
def models(request, tmp_path_factory) -> tuple[llama.Transformer, Tensor, torch.nn.Module]:
    """A model, the naive model's logits of every position of LONG, and transformers' model."""
    params, weights = request.param, random_weights(params=request.param)
    folder = write_shards(tmp_path_factory.mktemp("model"), weights, 1, params)
    peer = to_transformers(weights, llama.ModelArgs(**params))
    return load(folder).model, naive_logits(weights, LONG, params), peer


def logits_of(model: llama.Transformer, tokens: Tensor, start: int, cache: KVCache) -> Tensor:
    """Logits of every token, which the cache holds afterwards."""
    with torch.inference_mode():
        return model.output(model.hidden(tokens, [Segment(start, len(tokens), cache)]))


def test_a_prompt_and_each_decoded_token_agree_with_transformers(models):
    model, _, peer = models
    with torch.no_grad():
        expected = peer(TOKENS).logits
    assert relative_error(model(TOKENS[:, :5], 0), expected[:, 4]) < 1e-4
    for position in range(5, TOKENS.shape[1]):
        logits = model(TOKENS[:, position : position + 1], position)
        assert relative_error(logits, expected[:, position]) < 1e-4


def test_every_position_agrees_with_the_naive_model(models):
    model, naive, _ = models
    assert relative_error(logits_of(model, LONG, 0, None), naive) < 1e-4


@pytest.mark.parametrize("n_new", [1, 2, 8, 16, 17, 64, 65])
@pytest.mark.parametrize("start", [1, 60, 100])
def test_tokens_after_a_cached_prefix_agree_with_the_naive_model(models, start, n_new):
    model, naive, _ = models
    cache, end = model.new_cache(200), start + n_new
    logits_of(model, LONG[:start], 0, cache)
    assert relative_error(logits_of(model, LONG[start:end], start, cache), naive[start:end]) < 1e-4


@pytest.mark.parametrize("n_tokens", [1, 3, 20, 70])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_attention_to_a_long_cache_is_the_softmax_of_its_scores(dtype, bound, n_tokens):
    end, head_dim, generator = 700, 64, torch.Generator().manual_seed(0)
    sizes = [(n_tokens, 6), (end, 3), (end, 3)]
    xq, *kv = (torch.randn(*size, head_dim, generator=generator) for size in sizes)
    xk, xv = (x.to(dtype) for x in kv)
    cache = KVCache(1, 3, head_dim, 800, dtype)
    cache.update(0, 0, xk, xv)
    k, v = (x.double().repeat_interleave(2, 1) for x in (xk, xv))
    scores = torch.einsum("qhd,khd->hqk", xq.double(), k) / math.sqrt(head_dim)
    future = torch.ones(n_tokens, end).triu(end - n_tokens + 1).bool()
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v)
    assert relative_error(cache.attend(0, xq, end), expected) < bound


def test_positions_beyond_the_context_are_refused(models):
    model, *_ = models
    n_tokens = model.args.max_seq_len - 2
    model(torch.ones(1, n_tokens, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(TOKENS[:1, :3], n_tokens)


@pytest.mark.parametrize("n_new", [1, 8])
def test_a_few_tokens_do_not_copy_the_cache(n_new):
    args = llama.ModelArgs(512, 1, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=8192)
    model = llama.Transformer(args)
    cache = model.new_cache(8000)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        logits_of(model, torch.ones(n_new, dtype=torch.int64), 7000, cache)
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert 0 < largest < cache.keys.nbytes / 2


LARGE_FFN = {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}
SIZES = [  # parameters, dim, heads, heads of keys, layers: arXiv 2302.13971, table 2
    (6.7e9, 4096, 32, 32, 32, {}),
    (13.0e9, 5120, 40, 40, 40, {}),
    (32.5e9, 6656, 52, 52, 60, {}),
    (65.2e9, 8192, 64, 64, 80, {}),
    (34.0e9, 8192, 64, 8, 48, {}),  # Code Llama
    (69.0e9, 8192, 64, 8, 80, LARGE_FFN),  # Llama 2
]


@pytest.mark.parametrize(("n_params", "dim", "n_heads", "n_kv_heads", "n_layers", "more"), SIZES)
def test_published_sizes(n_params, dim, n_heads, n_kv_heads, n_layers, more):
    args = llama.ModelArgs(dim, n_layers, n_heads, n_kv_heads, vocab_size=32000, **more)
    with torch.device("meta"):
        model = llama.Transformer(args)
    assert sum(w.numel() for w in model.parameters()) == pytest.approx(n_params, rel=0.01)
