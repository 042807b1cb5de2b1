"""The transformer against other implementations of it."""

import math

import pytest
import torch
from conftest import HIDDEN, PARAMS, TOKENIZER
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llama

TOKENS = torch.randint(3, 2048, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(checkpoint) -> llama.Transformer:
    return llama.load(checkpoint, TOKENIZER).model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def to_huggingface(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """transformers' model: other names, and heads' pairs (j, j + head_dim / 2) for (2j, 2j + 1)."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=PARAMS["dim"],
        intermediate_size=HIDDEN,
        num_hidden_layers=PARAMS["n_layers"],
        num_attention_heads=PARAMS["n_heads"],
        rms_norm_eps=PARAMS["norm_eps"],
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    names = {
        "tok_embeddings": "model.embed_tokens",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "output": "lm_head",
    }
    state = {}
    for name, weight in weights.items():
        if name == "rope.freqs":
            continue
        weight = weight.float()
        if "wq" in name or "wk" in name:
            pairs = weight.view(PARAMS["n_heads"], -1, 2, PARAMS["dim"])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        prefix = "model." if name.startswith(("layers", "norm")) else ""
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[prefix + name] = weight
    peer = LlamaForCausalLM(config).eval()
    peer.load_state_dict(state)
    return peer


def naive_logits(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The paper's formulas on one sequence, without a cache: (seqlen, vocab_size), in fp64."""
    w = {name.removesuffix(".weight"): weight.double() for name, weight in weights.items()}
    seqlen, n_heads = len(tokens), PARAMS["n_heads"]
    head_dim = PARAMS["dim"] // n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + PARAMS["norm_eps"]).sqrt() * w[name]

    def rotate(x: Tensor) -> Tensor:  # (seqlen, n_heads, head_dim)
        out = torch.empty_like(x)
        for m in range(seqlen):
            for j in range(head_dim // 2):
                angle = m * 10000 ** (-2 * j / head_dim)
                cos, sin = math.cos(angle), math.sin(angle)
                a, b = x[m, :, 2 * j], x[m, :, 2 * j + 1]
                out[m, :, 2 * j] = a * cos - b * sin
                out[m, :, 2 * j + 1] = a * sin + b * cos
        return out

    h = w["tok_embeddings"][tokens]
    for layer in range(PARAMS["n_layers"]):
        at = f"layers.{layer}."
        x = norm(h, at + "attention_norm")
        q, k, v = (
            (x @ w[f"{at}attention.{name}"].T).view(seqlen, n_heads, head_dim)
            for name in ("wq", "wk", "wv")
        )
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / math.sqrt(head_dim)
        future = torch.ones(seqlen, seqlen).triu(1).bool()
        attended = scores.masked_fill(future, -math.inf).softmax(-1)
        x = torch.einsum("hqk,khd->qhd", attended, v).flatten(1)
        h = h + x @ w[at + "attention.wo"].T
        x = norm(h, at + "ffn_norm")
        gate = x @ w[at + "feed_forward.w1"].T
        x = gate * gate.sigmoid() * (x @ w[at + "feed_forward.w3"].T)
        h = h + x @ w[at + "feed_forward.w2"].T
    return norm(h, "norm") @ w["output"].T


def test_prefill_agrees_with_transformers(model, weights):
    with torch.no_grad():
        expected = to_huggingface(weights)(TOKENS).logits[:, -1]
    assert relative_error(model(TOKENS, 0), expected) < 1e-4


def test_each_decoded_token_agrees_with_transformers(model, weights):
    with torch.no_grad():
        expected = to_huggingface(weights)(TOKENS).logits
    model(TOKENS[:, :5], 0)
    for position in range(5, TOKENS.shape[1]):
        logits = model(TOKENS[:, position : position + 1], position)
        assert relative_error(logits, expected[:, position]) < 1e-4


def test_every_position_agrees_with_the_naive_forward(model, weights):
    tokens = TOKENS[0]
    actual = model.output(model.hidden([tokens], [0], [None]))
    assert relative_error(actual, naive_logits(weights, tokens)) < 1e-4


@pytest.mark.parametrize("read", [2**23, 1])  # numbers of all heads at a time, and of one
def test_a_prompt_in_pieces_agrees_with_the_naive_forward(model, weights, monkeypatch, read):
    monkeypatch.setattr("llama.cache.READ", read)
    expected = naive_logits(weights, TOKENS[0])
    for start, end in [(0, 7), (7, 8), (8, 25), (25, 40)]:
        logits = model(TOKENS[:1, start:end], start)
        assert relative_error(logits[0], expected[end - 1]) < 1e-4


def test_sequences_that_begin_anew_each_with_its_own_start(model):
    rows = [TOKENS[0, :7], TOKENS[1, :3]]
    expected = [model(row[None], 0) for row in rows]
    torch.testing.assert_close(model(rows, [0, 0]), torch.cat(expected))


def test_what_is_beyond_the_last_position_is_refused(model):
    tokens = torch.ones(1, model.args.max_seq_len - 2, dtype=torch.int64)
    model(tokens, 0)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(TOKENS[:1, :3], tokens.shape[1])


def test_logits_are_fp32_of_the_last_position(checkpoint):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = llama.load(checkpoint, TOKENIZER).model
    finally:
        torch.set_default_dtype(torch.float32)
    logits = model(TOKENS, 0)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 2048)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.bfloat16}
    assert model.caches[0].keys.dtype == torch.bfloat16


def test_the_cache_holds_the_tokens_in_use_and_no_more(model):
    model(TOKENS, 0)
    head_dim = PARAMS["dim"] // PARAMS["n_heads"]
    n_positions = math.ceil(TOKENS.shape[1] / 64) * 64
    expected = (PARAMS["n_layers"], PARAMS["n_heads"], n_positions, head_dim)
    assert [cache.values.shape for cache in model.caches] == [expected] * 3
    assert [cache.keys.numel() for cache in model.caches] == [math.prod(expected)] * 3


def test_the_published_sizes_have_the_published_parameter_counts():
    sizes = {  # Table 2 of arXiv 2302.13971
        6.7e9: (4096, 32, 32),
        13.0e9: (5120, 40, 40),
        32.5e9: (6656, 52, 60),
        65.2e9: (8192, 64, 80),
    }
    for n_params, (dim, n_heads, n_layers) in sizes.items():
        args = llama.ModelArgs(dim=dim, n_heads=n_heads, n_layers=n_layers, vocab_size=32000)
        with torch.device("meta"):
            model = llama.Transformer(args)
        count = sum(weight.numel() for weight in model.parameters())
        assert abs(count / n_params - 1) < 0.01
