"""int8 and int4 weights: how they are rounded, what is kept exact, and how they are stored."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, TOKENIZER, random_weights, relative_error, write_shards
from test_linear import dequantized, normal

import llama
from llama.checkpoint import SCHEMES, empty_model
from llama.merge import open_source, write_merged
from llama.quantization.calibration import calibration_tokens, input_directions
from llama.quantization.linear import Int4Linear, Int8Linear, QuantizedLinear

TOKENS = torch.randint(3, 2000, (4, 24), generator=torch.Generator().manual_seed(1))
WEIGHT_KINDS = {
    "normal": normal(128, 256),
    "uniform": torch.rand(160, 96, generator=torch.Generator().manual_seed(0)) - 0.3,
    "heavy tails": normal(48, 64) ** 5,
    "rows of all sizes": normal(64, 128) * torch.logspace(-6, 3, 64)[:, None],
}


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> llama.LLaMA:
    torch.set_default_dtype(dtype)
    try:
        return llama.load(folder, TOKENIZER, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def merged(source: Path, target: Path, quantize: str | None) -> Path:
    write_merged(open_source(source, copy_files=True), target, quantize=quantize)
    return target


def assert_same_state(model: llama.LLaMA, expected: llama.LLaMA) -> None:
    state, expected_state = model.model.state_dict(), expected.model.state_dict()
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        pair = [tensor, state[name]]
        if tensor.layout != torch.strided:  # oneDNN's own
            pair = [t.to_dense() for t in pair]
        assert torch.equal(*pair), name


@pytest.fixture(scope="module")
def original(tmp_path_factory, weights) -> Path:
    folder = write_shards(tmp_path_factory.mktemp("original"), weights, 1)
    shutil.copy(TOKENIZER, folder)  # by which merging, too, calibrates
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stored(scheme, original, tmp_path_factory) -> Path:
    """The checkpoint, quantized and merged."""
    return merged(original, tmp_path_factory.mktemp("merged") / scheme, scheme)


def without_directions(cls: type[QuantizedLinear], weight: torch.Tensor) -> QuantizedLinear:
    layer = cls(*weight.shape, n_directions=0)
    layer.quantize(weight, torch.empty(0, weight.shape[1]))
    return layer


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_int8_is_the_nearest_multiple_of_each_rows_scale(kind):
    weight = WEIGHT_KINDS[kind]
    layer = without_directions(Int8Linear, weight)
    torch.testing.assert_close(layer.scales, weight.abs().amax(1) / 127)
    half_a_step = layer.scales[:, None] / 2
    assert ((dequantized(layer) - weight).abs() <= half_a_step * 1.0001).all()


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_int4_errs_less_than_rounding_between_the_ends_of_each_group(kind):
    weight = WEIGHT_KINDS[kind]
    layer = without_directions(Int4Linear, weight)
    groups = weight.double().unflatten(1, (len(layer.groups), -1))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    for rows in (slice(0, 8), slice(-8, None), slice(None)):  # of all sizes
        error = (dequantized(layer) - weight)[rows].norm()
        assert error < 0.97 * (plain - groups)[rows].norm()


@pytest.fixture(scope="module")
def inputs(original) -> dict[str, torch.Tensor]:
    """What each matrix multiplies in fp32 when the model reads the calibration text."""
    found, model = {}, load(original).model
    for path, module in model.named_modules():
        if path.endswith((".wq", ".wo", ".w1", ".w2", "output")):
            module.register_forward_pre_hook(lambda _, x, path=path: found.update({path: x[0]}))
    tokens = calibration_tokens(llama.Tokenizer(TOKENIZER), model.args.vocab_size)
    with torch.inference_mode():
        model.output(model.hidden([tokens], [0], [None]))
    return found


def test_the_directions_are_the_first_singular_vectors_of_what_a_matrix_multiplies(stored, inputs):
    state = torch.load(stored / "merged.pth")
    assert len(inputs) == 4 * PARAMS["n_layers"] + 1
    for path, x in inputs.items():
        directions = state[f"{path}.directions"].double()
        n = len(directions)
        assert relative_error(directions @ directions.t(), torch.eye(n)) < 0.005  # bf16
        most = torch.linalg.svdvals(x.double())[:n].square().sum()
        assert (x.double() @ directions.t()).square().sum() > 0.999 * most, path


def test_of_an_input_of_low_rank_all_of_it_is_kept():
    x = normal(20, 3) @ normal(3, 64, seed=1)
    directions = input_directions(x, 16)
    torch.testing.assert_close(x @ directions.t() @ directions, x, atol=1e-4, rtol=1e-4)
    assert not directions[3:].any()
    assert input_directions(x[:2], 16).shape == (16, 64)  # of fewer tokens


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


def test_kept_directions_take_most_of_the_error_of_massive_activations(massive, scheme):
    exact = load(massive).model
    kept, bare = (load(massive, quantize=scheme).model for _ in range(2))
    originals = torch.load(massive / "consolidated.00.pth")
    for path, module in list(bare.named_modules()):
        if isinstance(module, QuantizedLinear):
            layer = without_directions(type(module), originals[f"{path}.weight"].float())
            layer.prepare()
            bare.set_submodule(path, layer)
    expected = exact(TOKENS, 0)
    assert relative_error(kept(TOKENS, 0), expected) < relative_error(bare(TOKENS, 0), expected) / 5


def test_matrices_of_one_input_share_their_directions(stored):
    for layer in load(stored).model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        assert attention.wq.directions is attention.wk.directions is attention.wv.directions
        assert feed_forward.w1.directions is feed_forward.w3.directions
        assert attention.wq.directions is not feed_forward.w1.directions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "bound"), [(None, 0.01), ("int8", 0.02), ("int4", 0.07)])
def test_the_demos_logits_stay_near_those_of_fp32(dtype, quantize, bound):
    model = load(DEMO)
    tokens = torch.tensor([model.tokenizer.encode("Once upon a time, in a", bos=True, eos=False)])
    expected = model.model(tokens, 0)
    logits = load(DEMO, dtype, quantize=quantize).model(tokens, 0)
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected) < bound


def test_a_merged_quantized_checkpoint_is_what_is_quantized_at_load(original, stored, scheme):
    assert_same_state(load(stored), load(original, quantize=scheme))


def test_shards_quantize_to_what_their_whole_does(original, tmp_path, scheme, weights):
    write_shards(tmp_path, weights, 4)
    assert_same_state(load(tmp_path, quantize=scheme), load(original, quantize=scheme))


def test_a_quantized_checkpoint_holds_the_documented_buffers(stored, scheme, weights):
    expected = {"quantized.format": (torch.uint8, (1,))}
    for name in weights.keys() - {"rope.freqs"}:
        path, shape = name.removesuffix(".weight"), tuple(weights[name].shape)
        if "norm" in path:
            expected[name] = (torch.float32, shape)
            continue
        n, m = shape
        cls = Int4Linear if scheme == "int4" and path.startswith("layers") else Int8Linear
        if path != "tok_embeddings":
            k = len(cls(n, m).directions)
            expected[f"{path}.directions"] = (torch.bfloat16, (k, m))
            expected[f"{path}.corrections"] = (torch.bfloat16, (k, n))
        if cls is Int4Linear:
            expected[f"{path}.weight"] = (torch.uint8, (n, m // 2))
            expected[f"{path}.groups"] = (torch.bfloat16, (m // 64, n, 2))
        else:
            expected[f"{path}.weight"] = (torch.int8, (n, m))
            expected[f"{path}.scales"] = (torch.float32, (n,))
    state = torch.load(stored / "merged.pth")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == expected
    assert state["quantized.format"].tolist() == [3]


def test_a_matrix_without_int4_groups_is_int8(tmp_path):
    params = PARAMS | {"dim": 144}  # not a multiple of 32
    write_shards(tmp_path, random_weights(params=params), 1, params)
    layer = load(tmp_path, quantize="int4").model.layers[0]
    assert isinstance(layer.attention.wq, Int8Linear)
    assert isinstance(layer.feed_forward.w2, Int4Linear)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_a_checkpoint_that_another_version_quantized_is_refused(stored, tmp_path, version):
    state = torch.load(stored / "merged.pth")
    del state["quantized.format"]
    if version is not None:
        state["quantized.format"] = torch.tensor([version], dtype=torch.uint8)
    torch.save(state, tmp_path / "merged.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    message = rf"{tmp_path}: .*another version.*format {version or 1}, not 3.*quantize the original"
    with pytest.raises(llama.UserError, match=message):
        load(tmp_path)


def test_quantizing_twice_is_refused(stored, tmp_path, scheme):
    with pytest.raises(llama.UserError, match="quantized already: leave out `quantize`"):
        load(stored, quantize=scheme)
    with pytest.raises(llama.UserError, match="quantized already"):
        merged(stored, tmp_path / "again", scheme)


def test_int4_takes_at_most_063_bytes_a_weight_of_7b():
    args = llama.ModelArgs(vocab_size=32000)
    state = empty_model(replace(args, max_seq_len=1), "int4").state_dict()
    n_weights = sum(t.numel() for t in empty_model(args, None).state_dict().values())
    assert n_weights == 6_738_415_616
    assert sum(t.nbytes for t in state.values()) < 0.63 * n_weights


PEAK = """
import sys, llama
size = llama.load(*sys.argv[1:3], quantize=sys.argv[3]).weight_bytes
print(size, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_quantizing_holds_one_matrix_beside_the_quantized_weights(tmp_path, scheme):
    params = PARAMS | {"dim": 1024, "multiple_of": 256, "n_layers": 9}  # 120 million weights
    write_shards(tmp_path, random_weights(params=params), 1, params)
    command = [sys.executable, "-c", PEAK, tmp_path, TOKENIZER, scheme]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    size, peak = map(int, subprocess.check_output(command, env=environment).split())
    assert peak * 1024 < 1.05 * size + 4 * 1024 * 2816 + 4.5e8
