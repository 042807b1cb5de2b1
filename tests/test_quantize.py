"""int8 and int4 weights: how they are rounded, what is kept exact, and how they are stored."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO, PARAMS, TOKENIZER, load, random_weights, relative_error, write_shards
from test_linear import dequantized, normal, prepared, quantized

import llama
from llama.checkpoint import SCHEMES, empty_model
from llama.merge import open_source, write_merged
from llama.quantization.linear import Int4Linear, Int8Linear

TOKENS = torch.randint(3, 2000, (4, 24), generator=torch.Generator().manual_seed(1))
STORY = "Once upon a time, in a village by the sea, there lived a girl named Lily. She loved to"
W2 = "layers.1.feed_forward.w2"
WEIGHT_KINDS = {
    "normal": normal(128, 256),
    "uniform": torch.rand(160, 96, generator=torch.Generator().manual_seed(0)) - 0.3,
    "heavy tails": normal(48, 64) ** 5,
    "rows of all sizes": normal(64, 128) * torch.logspace(-6, 3, 64)[:, None],
}


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stored(scheme, checkpoint, tmp_path_factory) -> Path:
    """The checkpoint, quantized and merged."""
    source = open_source(checkpoint, TOKENIZER)
    return write_merged(source, tmp_path_factory.mktemp("merged"), quantize=scheme).parent


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_int8_is_the_nearest_multiple_of_each_rows_scale(kind):
    weight = WEIGHT_KINDS[kind]
    layer = quantized(Int8Linear, weight, k=0)
    torch.testing.assert_close(layer.scales, weight.abs().amax(1) / 127)
    half_a_step = layer.scales[:, None] / 2
    assert ((dequantized(layer) - weight).abs() <= half_a_step * 1.0001).all()


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_int4_errs_less_than_rounding_between_the_ends_of_each_group(kind):
    weight = WEIGHT_KINDS[kind]
    layer = quantized(Int4Linear, weight, k=0)
    groups = weight.double().unflatten(1, (len(layer.groups), -1))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    for rows in (slice(0, 8), slice(-8, None), slice(None)):  # of all sizes
        error = (dequantized(layer) - weight)[rows].norm()
        assert error < 0.97 * (plain - groups)[rows].norm()


@pytest.fixture(scope="module")
def massive(tmp_path_factory) -> Path:
    """A model of which two channels of the residual stream carry 100 times what the others do.

    At every token, and ten times that at <s>. As in real models, the weights that read them are
    small in proportion. The embedding consists of integers, which int8 holds exactly.
    """
    weights, channels = random_weights(), [7, 100]
    embedding = weights["tok_embeddings.weight"].mul_(2).round_()
    embedding[:, channels] = 127
    embedding[1] *= 10
    for name, weight in weights.items():
        if "norm" in name:
            weight *= 127 / 3 * math.sqrt(len(channels) / PARAMS["dim"])
        elif name.split(".")[-2] in ("wq", "wk", "wv", "w1", "w3", "output"):
            weight[:, channels] /= 127
    return write_shards(tmp_path_factory.mktemp("massive"), weights, 1)


def test_outlier_channels_take_most_of_the_error_of_massive_activations(massive, scheme):
    exact, bare = load(massive).model, load(massive).model
    kept = load(massive, quantize=scheme).model
    for name, weight in torch.load(massive / "consolidated.00.pth").items():
        if weight.dim() == 2 and name != "tok_embeddings.weight":
            path = name.removesuffix(".weight")
            cls = Int4Linear if scheme == "int4" and path != "output" else Int8Linear
            bare.set_submodule(path, prepared(cls, weight.float(), k=0))
    expected = exact(TOKENS, 0)
    assert relative_error(kept(TOKENS, 0), expected) < relative_error(bare(TOKENS, 0), expected) / 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantize", "bound"), [(None, 0.01), ("int8", 0.018), ("int4", 0.052)])
def test_the_demos_logits_stay_near_those_of_fp32(dtype, quantize, bound):
    model = load(DEMO)
    tokens = torch.tensor([model.tokenizer.encode(STORY, bos=True, eos=False)])
    beginnings = [tokens[:, :n] for n in range(4, tokens.shape[1])]
    expected = torch.cat([model.model(beginning, 0) for beginning in beginnings])
    rounded = load(DEMO, dtype, quantize=quantize).model
    logits = torch.cat([rounded(beginning, 0) for beginning in beginnings])
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < bound  # int4 without outliers: 0.056


def test_quantizing_while_merging_or_from_shards_is_the_same(stored, scheme, tmp_path, weights):
    logits = load(stored).model(TOKENS, 0)
    folder = write_shards(tmp_path, weights, 4)
    assert torch.equal(load(folder, quantize=scheme).model(TOKENS, 0), logits)
    # Merging calibrates by the tokenizer that it is told, as in `stored`, or by the nearest one.
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    write_merged(open_source(folder), folder, quantize=scheme)
    assert torch.equal(load(folder).model(TOKENS, 0), logits)


def test_a_product_that_is_kept_is_that_of_its_layer_and_input(stored):
    first, second = (layer.attention for layer in load(stored).model.layers[:2])
    x = normal(1, PARAMS["dim"])
    y = second.wq(x)
    assert not torch.equal(first.wq(x), y)
    torch.testing.assert_close(second.wq(x * -2), y * -2)
    assert torch.equal(second.wq(x.clone()), y)


def test_a_quantized_checkpoint_holds_the_documented_buffers(stored, scheme):
    """Other buffers are another format, which needs another number."""
    int8 = {"weight": torch.int8, "scales": torch.float32}
    int4 = {"weight": torch.uint8, "groups": torch.bfloat16}
    exact = {"outliers": torch.int64, "outlier_weights": torch.bfloat16}
    layer = exact | (int4 if scheme == "int4" else int8)
    state = torch.load(stored / "merged.pth")
    assert state["quantized.format"].tolist() == [4]
    for path, expected in (("tok_embeddings", int8), ("output", int8 | exact), (W2, layer)):
        names = {name for name in state if name.startswith(f"{path}.")}
        assert {name.removeprefix(f"{path}."): state[name].dtype for name in names} == expected


def test_a_matrix_without_int4_groups_is_int8(tmp_path):
    params = PARAMS | {"dim": 144}  # not a multiple of 32
    write_shards(tmp_path, random_weights(params=params), 1, params)
    source = open_source(tmp_path)
    state = torch.load(write_merged(source, tmp_path, quantize="int4"))
    assert state["layers.0.attention.wq.weight"].dtype == torch.int8
    assert state["layers.0.feed_forward.w2.weight"].dtype == torch.uint8
    assert load(tmp_path).model(TOKENS, 0).isfinite().all()


@pytest.mark.parametrize("version", [None, 3])
def test_a_checkpoint_that_another_version_quantized_is_refused(stored, tmp_path, version):
    state = torch.load(stored / "merged.pth")
    del state["quantized.format"]
    if version is not None:
        state["quantized.format"] = torch.tensor([version], dtype=torch.uint8)
    torch.save(state, tmp_path / "merged.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    message = rf"{tmp_path}: .*another version.*format {version or 1}, not 4.*quantize the original"
    with pytest.raises(llama.UserError, match=message):
        load(tmp_path)


def test_quantizing_twice_is_refused(stored, tmp_path, scheme):
    with pytest.raises(llama.UserError, match="quantized already: leave out `quantize`"):
        load(stored, quantize=scheme)
    with pytest.raises(llama.UserError, match="quantized already"):
        write_merged(open_source(stored), tmp_path, quantize=scheme)


def test_int4_takes_at_most_063_bytes_a_weight_of_7b():
    args = llama.ModelArgs(vocab_size=32000)
    state = empty_model(replace(args, max_seq_len=1), "int4").state_dict()
    assert sum(t.nbytes for t in state.values()) < 0.63 * 6_738_415_616
