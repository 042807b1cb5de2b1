"""Every linear layer against the matrix that it holds, with this CPU's kernels and with others'."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial

import pytest
import torch
from conftest import ROOT, relative_error
from torch import Tensor

from llama.linear import (
    OneDNNLinear,
    PlainLinear,
    TransposedLinear,
    fast_linear,
    has_onednn,
    has_vnni,
)
from llama.quantization.linear import Int4Linear, Int8Linear, QuantizedLinear

N_TOKENS = (1, 3, 4, 5, 40, 64, 100)
ODD_INPUTS = (64, 40)  # int8 alone: int4's groups need a multiple of 32
SHAPES = ((128, 256), (48, 64), (160, 96), (2049, 128), (64, 160), ODD_INPUTS)
OTHER_CPUS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
# How far a token's product may be from the exact one: fp32 and bf16 round sums, int8 and int4
# activations.
BOUNDS = {"float32": 1e-6, "bfloat16": 0.003, "Int8Linear": 0.012, "Int4Linear": 0.015}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(cls: type[QuantizedLinear], weight: Tensor, k: int = 16) -> QuantizedLinear:
    """A layer with k outlier channels, its buffers as they are on disk."""
    layer = cls(*weight.shape, n_outliers=k)
    layer.quantize(weight, torch.arange(k) * 2 + 1)
    return layer


def prepared(cls: type[QuantizedLinear], weight: Tensor, k: int = 16) -> QuantizedLinear:
    layer = quantized(cls, weight, k)
    layer.prepare()
    return layer


def dequantized(layer: QuantizedLinear) -> Tensor:
    """Q in fp64, by the documented meaning of the buffers."""
    if isinstance(layer, Int8Linear):
        return layer.weight.double() * layer.scales.double()[:, None]
    q = torch.stack([layer.weight & 15, layer.weight >> 4], 2).flatten(1).double() - 8
    scale, zero = layer.groups.double().transpose(0, 1)[..., None, :].unbind(3)
    return (q.unflatten(1, (scale.shape[1], -1)) * scale + zero).flatten(1)


def exact(layer: QuantizedLinear, x: Tensor, rounded: bool = False) -> Tensor:
    """Q x' + W[:, c] x[c] in fp64; rounded: with x' as int8 with one scale for each token."""
    x = x.double()
    rest = x.index_fill(1, layer.outliers, 0)
    if rounded:
        step = rest.abs().amax(1, keepdim=True) / 127
        rest = (rest / step).round() * step
    outliers = x[:, layer.outliers] @ layer.outlier_weights.double()
    return rest @ dequantized(layer).t() + outliers


def measure() -> Iterator[tuple[str, str, float]]:
    """Every layer that runs here, the case, and how far its product is from that in fp64.

    The tokens are of all sizes, so that one that coarsened the others would show.
    """
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        kind, weight = str(dtype).removeprefix("torch."), normal(*shape)
        w = weight.to(dtype)
        plain = [PlainLinear(w), TransposedLinear(w), fast_linear(w.clone())]
        plain += [OneDNNLinear(w.clone())] if has_onednn(dtype) else []
        layers = [(layer, kind, lambda x, w=w: x.double() @ w.double().t()) for layer in plain]
        for cls in [Int8Linear] if shape == ODD_INPUTS else [Int8Linear, Int4Linear]:
            stored = quantized(cls, weight)
            layers.append((prepared(cls, weight), cls.__name__, partial(exact, stored)))
        for n_tokens in N_TOKENS:
            sizes = torch.logspace(-3, 3, n_tokens)[:, None]
            x = (normal(n_tokens, shape[1], seed=2) * sizes).to(dtype)
            for layer, name, expected in layers:
                y = layer(x)
                assert (y.dtype, y.shape) == (dtype, (n_tokens, shape[0])), layer
                case = f"{type(layer).__name__} {kind}, {shape}, {n_tokens} tokens"
                yield name, case, max(map(relative_error, y, expected(x)))


def wrong(found: Iterable) -> list:
    return [(case, error) for name, case, error in found if not error < BOUNDS[name]]


def test_every_layer_multiplies_by_the_matrix_that_it_holds():
    assert wrong(measure()) == []


@pytest.mark.parametrize("capability", OTHER_CPUS)
def test_every_layer_does_with_the_kernels_of_other_cpus(capability):
    environment = os.environ | OTHER_CPUS[capability] | {"PYTHONPATH": str(ROOT)}
    report = json.loads(subprocess.check_output([sys.executable, __file__], env=environment))
    if report["capability"] != capability:
        pytest.skip(f"this CPU's kernels are always {report['capability']}'s")
    assert not report["vnni"]
    assert wrong(report["found"]) == []


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_int8_rounds_each_token_to_one_scale_and_nothing_else(n_tokens):
    if not has_vnni():
        pytest.skip("without VNNI, activations are not rounded to int8")
    weight, x = normal(128, 256), normal(n_tokens, 256, seed=2)
    expected = exact(quantized(Int8Linear, weight), x, rounded=True)
    assert relative_error(prepared(Int8Linear, weight)(x), expected) < 1e-5


@pytest.mark.parametrize("cls", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("n_tokens", [1, 5, 100])
def test_the_largest_sums_do_not_overflow_and_zero_stays_zero(cls, n_tokens):
    layer = prepared(cls, torch.full((64, 4096), 127.0), k=0)
    y = layer(torch.full((n_tokens, 4096), 63.0))
    assert relative_error(y, torch.full_like(y, 127.0 * 63 * 4096)) < 0.005
    assert torch.equal(layer(torch.zeros(n_tokens, 4096)), torch.zeros(n_tokens, 64))


if __name__ == "__main__":  # with the kernels that the environment allows
    report = {"capability": torch.backends.cpu.get_cpu_capability(), "vnni": has_vnni()}
    print(json.dumps(report | {"found": list(measure())}))
