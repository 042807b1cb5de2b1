"""int8, int4 and bf16 weights against fp32 ones."""

import pytest
import torch
from conftest import DEMO, TOKENIZER, random_weights, write_shards
from torch import nn

import llama
from llama import linear, tune
from llama.checkpoint import merge
from llama.linear import BF16Linear, FP32Linear, Int4Linear, Int8Linear, hadamard, mix
from llama.quantize import rotate

TOKENS = torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(1))
WAYS = {  # and how far each may be from the product with the matrix that its form holds
    (FP32Linear, "rows", "plain"): 1e-6,
    (FP32Linear, "rows", "onednn_rows"): 1e-6,
    (FP32Linear, "bags", "bags"): 1e-6,
    (FP32Linear, "bags", "onednn_blocks"): 1e-6,
    (FP32Linear, "bags", "unpack"): 1e-6,
    (BF16Linear, "rows", "plain"): 0.01,
    (BF16Linear, "rows", "onednn_rows"): 0.01,
    (BF16Linear, "rows", "unpack"): 0.005,
    (BF16Linear, "onednn", "onednn"): 0.01,
    (BF16Linear, "fbgemm", "fbgemm"): 0.005,
    (Int8Linear, "rows", "int8pack"): 0.01,
    (Int8Linear, "rows", "unpack"): 1e-6,
    (Int8Linear, "onednn", "onednn"): 0.02,
    (Int8Linear, "fbgemm", "fbgemm"): 2e-4,
    (Int4Linear, "rows", "int_mm"): 0.02,
    (Int4Linear, "rows", "unpack"): 1e-6,
    (Int4Linear, "int4pack", "int4pack"): 0.01,
    (Int4Linear, "int4pack", "int_mm"): 0.02,
    (Int4Linear, "int4pack", "unpack"): 1e-6,
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def made(form: type[linear.Form], weight: torch.Tensor, layout: str = "rows") -> linear.Form:
    """A module of this form that holds the matrix; skips where this CPU has no such layout."""
    try:
        module = form(*weight.shape)
        floats = form in (FP32Linear, BF16Linear)
        module.load_state_dict({"weight": weight} if floats else form.quantize(weight))
        module.pack(layout)
        return module
    except tune.UNAVAILABLE as error:
        pytest.skip(f"not on this CPU: {error}")


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
def test_int4_errs_as_rounding_to_each_groups_steps_does(shape):
    weight = torch.randn(shape)
    group = linear.group_size(shape[1])
    q = Int4Linear.quantize(weight)
    step = q["groups"][..., 0].float() * q["scales"][:, None]
    error = (dense(made(Int4Linear, weight)) - weight).unflatten(1, (-1, group))
    # Clipping trades a larger error at a group's ends for a smaller one elsewhere.
    assert error.square().mean() < 1.2 * (step.square() / 12).mean()
    assert error.abs().amax() < 4 * step.amax()


def test_int4_clips_each_group_to_the_least_squared_error(monkeypatch):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))

    def error() -> float:
        return (dense(made(Int4Linear, weight)) - weight).square().sum().item()

    clipped = error()
    monkeypatch.setattr(linear, "CLIPS", (1.0,))
    assert clipped < 0.89 * error()  # 0.91 if steps did not weigh in


def test_int4_groups_fit_int8_exactly():
    weight = torch.randn(64, 128) * torch.logspace(-3, 0, 64)[:, None]
    for _, block in made(Int4Linear, weight).blocks():
        assert block.dtype == torch.int8
    q = Int4Linear.quantize(weight)
    step, low = q["groups"].int().unbind(2)
    assert (15 * step + low <= 127).all()
    stored = torch.stack([q["weight"] & 15, q["weight"] >> 4], 2).flatten(1)
    repeated = q["groups"].repeat_interleave(64, 1).float()
    expected = (stored * repeated[..., 0] + repeated[..., 1]) * q["scales"][:, None]
    torch.testing.assert_close(dense(made(Int4Linear, weight)), expected)


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(linear, "int8_is_exact", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize(("form", "layout", "way"), WAYS)
def test_every_way_multiplies_by_the_same_matrix(request, form, layout, way, n_tokens, dtype):
    if layout == "fbgemm":
        request.getfixturevalue("without_vnni")
    if form in (FP32Linear, BF16Linear) and dtype != form.dtype:
        pytest.skip("these weights come with activations of their own type")
    weight = torch.randn(128, 256)
    x = torch.randn(n_tokens, 256).to(dtype)
    expected = x.float() @ dense(made(form, weight)).t()
    try:
        y = getattr(made(form, weight, layout), way)(x)
    except tune.UNAVAILABLE as error:
        pytest.skip(f"not on this CPU: {error}")
    assert y.dtype == dtype
    rounding = 0.005 if dtype == torch.bfloat16 else 0
    assert relative_error(y, expected) < WAYS[form, layout, way] + rounding


def test_all_ways_are_tested():
    forms = {form for form, *_ in WAYS}
    ways = {
        (f, layout, way)
        for f in forms
        for layout in made(f, torch.ones(64, 64)).layouts
        for way in made(f, torch.ones(64, 64)).layouts[layout]
    }
    assert ways == WAYS.keys()


def test_a_matrix_is_packed_in_pieces_that_join(monkeypatch, without_vnni):
    monkeypatch.setattr(linear, "PIECE", 64 * 256)
    weight, x = torch.randn(150, 256), torch.randn(3, 256)
    for form in (BF16Linear, Int8Linear):
        module = made(form, weight, "fbgemm")
        assert len(module.packed) == 3
        assert relative_error(module.fbgemm(x), x @ dense(made(form, weight)).t()) < 2e-4


@pytest.mark.parametrize("way", FP32Linear.layouts["bags"])
def test_bags_need_not_be_full(way):
    weight, x = torch.randn(linear.BAG + 22, 256), torch.randn(3, 256)
    y = getattr(made(FP32Linear, weight, "bags"), way)(x)
    assert relative_error(y, x @ weight.t()) < 1e-6


def test_weights_beyond_fp16_stay_bf16():
    module = made(BF16Linear, torch.full((64, 64), 1e5))
    tune.settle(module, "fbgemm", ((1, "fbgemm"),))
    assert torch.equal(module(torch.ones(1, 64)), torch.full((1, 64), 64 * 99840.0))


def test_rows_that_the_8_bit_operator_would_read_past_are_multiplied_otherwise(monkeypatch):
    choose = tune.choose
    model = nn.Sequential(*(made(Int8Linear, torch.randn(40, n)) for n in (64, 40)))
    monkeypatch.setattr(tune, "SMALL", 0)
    monkeypatch.setattr(tune, "choose", lambda module: ("rows", ((1, module.layouts["rows"][0]),)))
    tune.tune(model)
    assert [module.plan for module in model] == [((1, "int8pack"),), ((1, "unpack"),)]
    assert "int8pack" not in {way for _, way in choose(model[1])[1]}
    with pytest.raises(RuntimeError):
        model[1].int8pack(torch.ones(1, 40))


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize(
    ("form", "layout", "way"),
    [(Int8Linear, "onednn", "onednn"), (Int4Linear, "int4pack", "int_mm")],
)
def test_int8_activations_are_rounded_to_one_scale_a_token_and_by_nothing_else(
    form, layout, way, n_tokens
):
    weight, x = torch.randn(128, 256), torch.randn(n_tokens, 256)
    module = made(form, weight, layout)
    s = x.abs().amax(1, keepdim=True) / 127
    expected = (x / s).round() * s @ dense(made(form, weight)).t()
    try:
        y = getattr(module, way)(x)
    except tune.UNAVAILABLE as error:
        pytest.skip(f"not on this CPU: {error}")
    assert relative_error(y, expected) < 1e-6


def test_fbgemm_sums_the_largest_numbers_without_overflow_and_keeps_small_ones(without_vnni):
    module = made(Int8Linear, torch.full((64, 256), 127.0), "fbgemm")
    x = torch.randn(8, 256)
    x[0] = 63
    x[1:, 3] *= 100  # an outlier channel, as real models have
    expected = x @ torch.full((256, 64), 127.0)
    assert torch.equal(module.fbgemm(x)[0], expected[0])
    assert relative_error(module.fbgemm(x), expected) < 1e-3


@pytest.mark.parametrize(("exact", "layout"), [(True, "fbgemm"), (False, "onednn")])
def test_int8_has_a_layout_for_vnni_and_another_for_cpus_without(monkeypatch, exact, layout):
    monkeypatch.setattr(linear, "int8_is_exact", lambda: exact)
    with pytest.raises(RuntimeError, match="another CPU"):
        made(Int8Linear, torch.randn(64, 64)).pack(layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "layout", "way"),
    [(Int8Linear, "onednn", "onednn"), (Int4Linear, "rows", "int_mm")],
)
def test_what_several_matrices_multiply_is_rounded_once(form, layout, way, dtype):
    modules = [made(form, torch.randn(64, 64), layout) for _ in range(3)]
    x, misses = torch.randn(5, 64).to(dtype), linear.round_activations.cache_info().misses
    for module in modules:
        getattr(module, way)(x)
    assert linear.round_activations.cache_info().misses == misses + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [linear.round_activations, linear.round_twice])
def test_one_matrix_of_activations_is_rounded_once_and_others_are_not_taken_for_it(rounded, dtype):
    x = torch.randn(2, 64).to(dtype)
    first = rounded(x)
    assert rounded(x) is first
    q, s = rounded(x.clone().mul_(-2))
    assert not torch.equal(q, first[0])
    torch.testing.assert_close(s, 2 * first[1])


def test_a_missing_operator_leaves_the_plain_way(monkeypatch):
    def missing(self, x):
        raise RuntimeError("not implemented for this CPU")

    for way in ("int8pack", "onednn", "fbgemm"):
        monkeypatch.setattr(Int8Linear, way, missing)
    assert tune.choose(made(Int8Linear, torch.randn(64, 64))) == ("rows", ((1, "unpack"),))


def test_a_way_that_gives_a_wrong_result_is_not_taken(monkeypatch):
    for way in ("int8pack", "onednn", "fbgemm"):
        monkeypatch.setattr(Int8Linear, way, lambda self, x: x.new_zeros(len(x), 64))
    assert tune.choose(made(Int8Linear, torch.randn(64, 64))) == ("rows", ((1, "unpack"),))


def test_an_unknown_4_bit_layout_leaves_its_operator(monkeypatch):
    def unknown():
        raise RuntimeError("not known")

    module = made(Int4Linear, torch.randn(128, 64), "int4pack")
    monkeypatch.setattr(linear, "int4_layout", unknown)
    monkeypatch.setattr(linear, "int8_is_exact", lambda: True)
    x = torch.randn(3, 64)
    for way in ("int_mm", "unpack"):
        with pytest.raises(RuntimeError, match="not known"):
            getattr(module, way)(x)
    assert module.int4pack(x).shape == (3, 128)


@pytest.mark.parametrize("dim", [128, 160, 5 * 1024, 13 * 512])
def test_the_rotation_is_orthogonal(dim):
    x = torch.randn(3, dim)
    torch.testing.assert_close(rotate(x) @ rotate(x).t(), x @ x.t(), rtol=1e-4, atol=1e-2)


def test_hadamard_matrices_are_orthogonal_signs():
    h = hadamard(16)
    torch.testing.assert_close(h @ h.t(), torch.eye(16))
    assert (h.abs() == 0.25).all()


@pytest.mark.parametrize("n", [5632, 160, 7])
def test_mixing_both_sides_changes_nothing(n):
    x, weight = torch.randn(3, n), torch.randn(5, n)
    assert relative_error(mix(x) @ mix(weight).t(), x @ weight.t()) < 1e-5
    torch.testing.assert_close(mix(mix(x)), x)


def test_rotating_changes_nothing_in_fp32(checkpoint, weights, tmp_path):
    """With gains folded and the residual stream turned, in fp32, against the plain model."""
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
@pytest.mark.parametrize("timed", [False, True])
def test_the_demos_logits_stay_near_those_of_fp32(dtype, quantize, bound, timed, monkeypatch):
    if timed:
        monkeypatch.setattr(tune, "SMALL", 0)
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
    assert "layers.0.attention.wq.weight" in state
    assert ("layers.0.attention.wq.groups" in state) == (quantize == "int4")
    assert "layers.0.attention.wv.groups" not in state
    written = torch.load(tmp_path / "merged.pth")
    original = torch.load(checkpoint / "consolidated.00.pth")
    assert torch.equal(written["rope.freqs"], original["rope.freqs"])
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


def test_shards_quantize_to_what_their_whole_does(checkpoint, tmp_path):
    write_shards(tmp_path, random_weights(), 4)
    expected = llama.load(checkpoint, TOKENIZER, quantize="int8").model.state_dict()
    state = llama.load(tmp_path, TOKENIZER, quantize="int8").model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize(("quantize", "dtype"), [(None, torch.float32), ("int8", torch.float16)])
def test_keys_and_values_are_kept_as_precisely_as_weights_deserve(quantize, dtype):
    model, tokens = llama.load(DEMO, TOKENIZER, quantize=quantize).model, TOKENS.view(1, -1)[:, :80]
    expected = model(tokens, 0)
    cache = model.new_cache(80)
    assert (cache.keys.dtype, cache.values.dtype) == (dtype, dtype)
    model(tokens[:, :64], [0], [cache])
    for position in range(64, 75):  # one token at a time, and then several
        model(tokens[:, position : position + 1], [position], [cache])
    y = model(tokens[:, 75:], [75], [cache])
    assert relative_error(y, expected) < (0.02 if quantize else 1e-5)
