"""int8, int4 and bf16 weights against fp32 ones."""

import pytest
import torch
from conftest import DEMO, TOKENIZER, random_weights, write_shards

import llama
from llama import linear
from llama.checkpoint import merge
from llama.linear import BF16Linear, Int4Linear, Int8Linear
from llama.quantize import hadamard, rotate

TOKENS = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(1))
FORMS = {"bf16": BF16Linear, "int8": Int8Linear, "int4": Int4Linear}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def made(form: type, weight: torch.Tensor) -> linear.Form:
    """A module of this form that holds the matrix."""
    module = form(*weight.shape)
    for name, buffer in form.quantize(weight).items():
        setattr(module, name, buffer)
    module.prepare()
    return module


def dense(module: linear.Form) -> torch.Tensor:
    """The matrix that the module stands for, from its rows."""
    rows = []
    for where, block in module.blocks():
        scale = module.scale(where)
        rows.append(block.float() if scale is None else block.float() * scale[:, None])
    return torch.cat(rows)


def test_int8_is_the_nearest_multiple_of_each_rows_scale():
    weight = torch.randn(64, 128)
    scales = weight.abs().amax(1) / 127
    expected = (weight / scales[:, None]).round() * scales[:, None]
    torch.testing.assert_close(dense(made(Int8Linear, weight)), expected)


@pytest.mark.parametrize("shape", [(128, 256), (160, 96), (48, 64)])
def test_int4_is_within_half_a_step_of_each_group(shape):
    weight = torch.randn(shape)
    group = linear.group_size(shape[1])
    q = Int4Linear.quantize(weight)
    step = q["groups"][..., 0].float() * q["scales"][:, None]
    error = (dense(made(Int4Linear, weight)) - weight).unflatten(1, (-1, group))
    # Clipping trades a larger error at a group's ends for a smaller one elsewhere.
    assert error.square().mean() < 1.2 * (step.square() / 12).mean()
    assert error.abs().amax() < 4 * step.amax()


def test_int4_groups_fit_int8_exactly():
    weight = torch.randn(64, 128) * torch.logspace(-3, 0, 64)[:, None]
    for _, block in made(Int4Linear, weight).blocks():
        assert block.dtype == torch.int8
    q = Int4Linear.quantize(weight)
    step, low = q["groups"].int().unbind(2)
    assert (low >= -128).all()
    assert (15 * step + low <= 127).all()
    stored = torch.stack([q["weight"] & 15, q["weight"] >> 4], 2).flatten(1)
    repeated = q["groups"].repeat_interleave(64, 1).float()
    expected = (stored * repeated[..., 0] + repeated[..., 1]) * q["scales"][:, None]
    torch.testing.assert_close(dense(made(Int4Linear, weight)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize("name", FORMS)
def test_every_way_multiplies_by_the_same_matrix(name, n_tokens, dtype):
    if name == "bf16" and dtype == torch.float32:
        pytest.skip("bf16 weights come with bf16 activations")
    module = made(FORMS[name], torch.randn(128, 256))
    x = torch.randn(n_tokens, 256).to(dtype)
    expected = x.float() @ dense(module).t()
    bounds = {"int_mm": 0.02} | dict.fromkeys(("plain", "int8pack", "int4pack"), 0.01)
    for way in module.ways:
        y = getattr(module, way)(x)
        assert y.dtype == dtype
        assert relative_error(y, expected) < bounds.get(way, 1e-5 if dtype.itemsize == 4 else 0.01)


def test_two_int8_terms_are_as_good_as_unrounded_activations():
    module = made(Int8Linear, torch.randn(128, 256))
    module.precise = True
    x = torch.randn(8, 256)
    x[:, 3] *= 100  # an outlier channel, as real models have
    assert relative_error(module.int_mm(x), x @ dense(module).t()) < 1e-3


def test_a_missing_operator_leaves_the_plain_way(monkeypatch):
    module = made(Int8Linear, torch.randn(64, 64))

    def missing(x):
        raise RuntimeError("not implemented for this CPU")

    monkeypatch.setattr(module, "int8pack", missing)
    monkeypatch.setattr(module, "int_mm", missing)
    assert linear.fastest(module, 1) == "unpack"


def test_a_way_that_gives_a_wrong_result_is_not_taken(monkeypatch):
    module = made(Int8Linear, torch.randn(64, 64))
    right = module.unpack
    for way in ("int8pack", "int_mm"):
        monkeypatch.setattr(module, way, lambda x: right(x) * 1.1)
    assert linear.fastest(module, 1) == "unpack"


def test_an_unknown_4_bit_layout_leaves_the_plain_order(monkeypatch):
    weight = torch.randn(128, 64)
    expected = dense(made(Int4Linear, weight))
    monkeypatch.setattr(linear, "int4_layout", lambda: None)
    torch.testing.assert_close(dense(made(Int4Linear, weight)), expected)


@pytest.mark.parametrize("dim", [128, 160, 5 * 1024, 13 * 512])
def test_the_rotation_is_orthogonal(dim):
    x = torch.randn(3, dim)
    torch.testing.assert_close(rotate(x) @ rotate(x).t(), x @ x.t(), rtol=1e-4, atol=1e-2)


def test_hadamard_matrices_are_orthogonal_signs():
    h = hadamard(16)
    torch.testing.assert_close(h @ h.t(), torch.eye(16))
    assert (h.abs() == 0.25).all()


def test_rotating_changes_nothing_in_fp32(checkpoint, weights, tmp_path):
    """The model with gains folded and its residual stream turned, in fp32, against the plain one."""
    dim = weights["norm.weight"].numel()
    r = rotate(torch.eye(dim))
    turned = {}
    for name, weight in weights.items():
        kind, weight = name.split(".")[-2], weight.float()
        gains = {"wq": "attention_norm", "wk": "attention_norm", "wv": "attention_norm"}
        gains |= {"w1": "ffn_norm", "w3": "ffn_norm"}
        if kind in gains:
            layer = ".".join(name.split(".")[:2])
            turned[name] = weight * weights[f"{layer}.{gains[kind]}.weight"].float() @ r
        elif kind == "output":
            turned[name] = weight * weights["norm.weight"].float() @ r
        elif kind == "tok_embeddings":
            turned[name] = weight @ r
        elif kind in ("wo", "w2"):
            turned[name] = r.t() @ weight
        else:
            turned[name] = torch.ones_like(weight)
    write_shards(tmp_path, turned, 1)
    plain = llama.load(checkpoint, TOKENIZER).model(TOKENS, 0)
    assert relative_error(llama.load(tmp_path, TOKENIZER).model(TOKENS, 0), plain) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "quantize", "bound"),
    [
        (torch.bfloat16, None, 0.01),
        (torch.float32, "int8", 0.02),
        (torch.bfloat16, "int8", 0.02),
        (torch.float32, "int4", 0.1),
        (torch.bfloat16, "int4", 0.1),
    ],
)
def test_the_demos_logits_stay_near_those_of_fp32(dtype, quantize, bound):
    model = llama.load(DEMO, TOKENIZER)
    tokens = torch.tensor([model.tokenizer.encode("Once upon a time, in a", bos=True, eos=False)])
    expected = model.model(tokens, 0)
    torch.set_default_dtype(dtype)
    try:
        model = llama.load(DEMO, TOKENIZER, quantize=quantize).model
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(model(tokens, 0), expected) < bound


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_merged_quantized_checkpoint_is_the_one_quantized_at_load(checkpoint, tmp_path, quantize):
    expected = llama.load(checkpoint, TOKENIZER, quantize=quantize).model.state_dict()
    merge(checkpoint, tmp_path, quantize=quantize)
    (tmp_path / "params.json").write_bytes((checkpoint / "params.json").read_bytes())
    state = llama.load(tmp_path, TOKENIZER).model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


def test_shards_quantize_to_what_their_whole_does(checkpoint, tmp_path):
    write_shards(tmp_path, random_weights(), 4)
    expected = llama.load(checkpoint, TOKENIZER, quantize="int8").model.state_dict()
    state = llama.load(tmp_path, TOKENIZER, quantize="int8").model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
