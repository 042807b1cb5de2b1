"""Linear layers with int8 and int4 weights, and a few input channels that are not rounded.

A few channels carry most of a layer's input: massive activations (arXiv 2402.17762), in the same
channels for every text. Rounding their weights, or letting them set the scale of the other
activations, costs most of the accuracy. So both layers compute

    y = Q x' + W[:, c] x[c]

where Q is the rounded W, c are the outlier channels (llama/quantization/calibration.py finds them),
and x' is x with zeros there. LLM.int8() (arXiv 2208.07339) divides the product like this, OWQ
(arXiv 2306.02272) chooses the channels beforehand.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..linear import (
    fbgemm_linear,
    fbgemm_pack,
    fp32_blocks,
    has_fbgemm,
    has_int8pack,
    has_vnni,
    int4_interleaving,
    int4_linear,
    int4_pack,
    int8_linear,
    int8_matmul,
    int8_pack,
    int8pack_linear,
    linear_by_blocks,
    row_blocks,
    unpack_int4,
)
from ..model import Transformer
from ..weights import TENSOR_DIMS
from .rounding import int4_group_size, quantize_int4, row_scales

INT8PACK_TOKENS = 32  # from here on converting int8 to fp32 is faster than the 8-bit operator
MANY_TOKENS = 64  # from here on unpacking int4 to int8 is faster than the 4-bit operator


class QuantizedLinear(nn.Module):
    """y = Q x' + W[:, c] x[c], see above.

    Subclasses hold Q, and define quantize_weight, prepare_weight and multiply, which returns x Q^T
    in fp32 and may overwrite x.

    Attributes:
        in_features: Of the whole layer, even if this rank has a part of it.

    Buffers, before `prepare`:
        outliers: c, int64 (n_outliers,), ascending.
        outlier_weights: W[:, c]^T, bf16 (n_outliers, out_features).
    """

    def __init__(self, out_features: int, in_features: int, n_outliers: int):
        super().__init__()
        self.in_features = in_features
        n_outliers = min(n_outliers, in_features)
        self.register_buffer("outliers", torch.empty(n_outliers, dtype=torch.int64))
        outlier_weights = torch.empty(n_outliers, out_features, dtype=torch.bfloat16)
        self.register_buffer("outlier_weights", outlier_weights)

    @torch.no_grad()
    def quantize(self, weight: Tensor, outliers: Tensor) -> None:
        """Fill the buffers from W, of any float dtype."""
        self.outliers = outliers
        self.outlier_weights = weight.t().index_select(0, outliers).bfloat16()
        self.quantize_weight(weight)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Bring the filled buffers into the form that this CPU multiplies fastest."""
        self.outlier_weights = self.outlier_weights.float()  # one token: fp32 4 us, bf16 33
        self.prepare_weight()

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        y = self.multiply(x32.index_fill(1, self.outliers, 0))
        return y.addmm_(x32.index_select(1, self.outliers), self.outlier_weights).type_as(x)


def token_scales(x: Tensor, largest: int = 127) -> Tensor | float:
    """The scale of each row, (n, 1), or a number for one row, which takes fewer operators."""
    if len(x) == 1:
        return max(x.abs().max().item(), 1e-12) / largest
    return row_scales(x, largest)


def round_activations(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """x (n, k) as scale * q: int8 q, and the scale of `token_scales`. Overwrites x."""
    scale = token_scales(x)
    return x.mul_(1 / scale).round_().to(torch.int8), scale


class Int8Linear(QuantizedLinear):
    """Symmetric, one scale for each output: Q[i] = scales[i] * weight[i].

    Buffers, before `prepare`:
        weight: int8 (out_features, in_features).
        scales: fp32 (out_features,).
    """

    def __init__(self, out_features: int, in_features: int, n_outliers: int = 8):
        super().__init__(out_features, in_features, n_outliers)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    def quantize_weight(self, weight: Tensor) -> None:
        self.weight, self.scales = quantize_rows(weight)

    def prepare_weight(self) -> None:
        if has_vnni():
            self.weight = int8_pack(self.weight)
        elif has_fbgemm():
            self.packed = fbgemm_pack(self.weight, self.scales)
            self.weight = self.weight.to("meta")  # its shape and size

    def multiply(self, x: Tensor) -> Tensor:
        if has_vnni():
            return int8_linear(*round_activations(x), self.weight, self.scales)
        if has_fbgemm():
            return self.multiply_twice(x)
        # PyTorch 2.13 reads past the end of rows that are not a multiple of 16 long.
        if len(x) < INT8PACK_TOKENS and has_int8pack() and x.shape[1] % 16 == 0:
            return int8pack_linear(x.bfloat16(), self.weight, self.scales.bfloat16()).float()
        return linear_by_blocks(x, fp32_blocks(self.weight)).mul_(self.scales)

    def multiply_twice(self, x: Tensor) -> Tensor:
        """x Q^T by products that do not saturate at 16 bits: x = scale * (high + low / 126).

        Both have 7 bits. For few tokens the second costs little, because both read Q once. Measured
        on AMD with AVX2, 953M parameters, beside _weight_int8pack_mm and blocks in fp32: 1.5 times
        as fast for one token, 1.9 times for 6, 1.1 times for 128.
        """
        scale = token_scales(x, 63)
        high = x.mul_(1 / scale).round()
        low = x.sub_(high).mul_(126)
        high, low = fbgemm_linear(torch.cat([high, low]), self.packed).split(len(x))
        return high.add_(low, alpha=1 / 126).mul_(scale)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q and fp32 scales such that q * scales[:, None] is nearest to a matrix."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    for rows in row_blocks(*weight.shape):
        block = weight[rows].float()
        scale = row_scales(block)
        q[rows], scales[rows] = (block / scale).round_(), scale.squeeze(1)
    return q, scales


class Int4Linear(QuantizedLinear):
    """Asymmetric, in groups of neighbouring inputs: Q = scale * (q - 8) + zero, q from 0 to 15.

    `zero` is the value that q = 8 stands for, as PyTorch's 4-bit operator expects, not an integer.

    Buffers, before `prepare`:
        weight: uint8 (out_features, in_features / 2). Two neighbours share a byte, the first is in
            the low half.
        groups: scale and zero, bf16 (in_features / group_size, out_features, 2).
    """

    def __init__(self, out_features: int, in_features: int, n_outliers: int = 24):
        super().__init__(out_features, in_features, n_outliers)
        self.group_size = int4_group_size(in_features)
        n_groups = in_features // self.group_size
        weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        self.register_buffer("weight", weight)
        self.register_buffer("groups", torch.empty(n_groups, out_features, 2, dtype=torch.bfloat16))
        self.interleaving = 0  # of weight, see unpack_int4

    def row_blocks(self) -> list[slice]:
        return row_blocks(len(self.weight), 2 * self.weight.shape[1])

    def quantize_weight(self, weight: Tensor) -> None:
        q, self.groups = quantize_int4(weight, self.group_size)
        self.weight = q[:, ::2] | q[:, 1::2] << 4

    def prepare_weight(self) -> None:
        if len(self.weight) % 64 == 0:
            self.interleaving = int4_interleaving()
        if self.interleaving:
            for rows in self.row_blocks():
                plain = self.weight[rows]
                plain.copy_(int4_pack(unpack_int4(plain, 0).t().int()).view(plain.shape))
        if has_vnni():
            scale, zero = self.groups.float().unbind(2)
            limits = torch.maximum((zero - 8 * scale).abs(), (zero + 7 * scale).abs()).amax(0)
            self.int8_scales = limits.clamp_min_(1e-12).div_(127)  # Q / these fits in int8

    def multiply(self, x: Tensor) -> Tensor:
        if self.interleaving and len(x) < MANY_TOKENS:
            return int4_linear(x.bfloat16(), self.weight, self.group_size, self.groups).float()
        return self.multiply_int8(x) if has_vnni() else linear_by_blocks(x, self.blocks())

    def multiply_int8(self, x: Tensor) -> Tensor:
        """x Q^T by int8 products: each block of Q is rounded to one scale for each output."""
        q, scale = round_activations(x)
        y = x.new_empty(len(x), len(self.weight))
        for rows in self.row_blocks():
            int8_scale = self.int8_scales[rows]
            # Q / int8_scale = low + step * q, in int16 with 8 fractional bits. The product may wrap
            # around; the sum fits.
            fixed = self.groups[:, rows].permute(2, 0, 1) * (256 / int8_scale)
            step, low = fixed[0], fixed[1].sub_(fixed[0], alpha=8).add_(128).round_()
            step, low = step.round_().to(torch.int16), low.to(torch.int16)
            block = unpack_int4(self.weight[rows], self.interleaving).to(torch.int16)
            block = block.unflatten(0, (len(step), -1)).mul_(step[:, None]).add_(low[:, None])
            block = block.bitwise_right_shift_(8).to(torch.int8).flatten(0, 1)
            torch.mul(int8_matmul(q, block).float().mul_(scale), int8_scale, out=y[:, rows])
        return y

    def blocks(self) -> Iterator[Tensor]:
        for rows in self.row_blocks():
            q = unpack_int4(self.weight[rows], self.interleaving).float()  # (in_features, n_rows)
            scale, zero = self.groups[:, None, rows].float().unbind(3)
            block = torch.addcmul(zero, q.sub_(8).unflatten(0, (len(scale), -1)), scale)
            yield block.flatten(0, 1).t()


class Int8Embedding(nn.Module):
    """A row for each token, int8 with a scale of its own; looked up in the default dtype.

    Buffers:
        weight: int8 (num_embeddings, embedding_dim).
        scales: fp32 (num_embeddings,).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.dtype = torch.get_default_dtype()
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(num_embeddings, dtype=torch.float32))

    def quantize(self, weight: Tensor) -> None:
        """Fill the buffers."""
        self.weight, self.scales = quantize_rows(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.index_select(0, tokens)
        return (rows * self.scales[tokens, None]).to(self.dtype)


def swap_modules(model: nn.Module, scheme: str) -> None:
    """Replace the matrices of a model on the meta device by quantized ones with empty buffers."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            model.set_submodule(path, Int8Embedding(*module.weight.shape))
        elif isinstance(module, nn.Linear):
            int4 = scheme == "int4" and path != "output" and int4_group_size(module.in_features)
            cls = Int4Linear if int4 else Int8Linear  # the output layer stays in int8
            model.set_submodule(path, cls(*module.weight.shape))


class FusedSlice(nn.Module):
    """One of the projections (wq, wk, wv or w1, w3) that a fused layer computes together.

    One product instead of two or three: fewer operators, and more rows for each.
    """

    def __init__(self, fused: QuantizedLinear, outputs: slice, multiply: Callable):
        super().__init__()
        self.fused, self.outputs, self.multiply = fused, outputs, multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.fused, x)[:, self.outputs]


def fuse(parent: nn.Module, names: Sequence[str], multiply: Callable) -> None:
    """Concatenate quantized layers that have one input, so that their outliers are equal."""
    layers = [getattr(parent, name) for name in names]
    ends = [*itertools.accumulate(len(layer.weight) for layer in layers)]
    fused = layers[0]
    for buffer in fused.state_dict():
        dim, _ = TENSOR_DIMS[buffer]
        if dim is not None:
            setattr(fused, buffer, torch.cat([getattr(layer, buffer) for layer in layers], dim))
    for name, start, end in zip(names, [0, *ends], ends):
        setattr(parent, name, FusedSlice(fused, slice(start, end), multiply))


def prepare_model(model: Transformer) -> None:
    """Fuse and prepare the quantized layers of a model whose buffers are filled."""
    # Caches the last product for the other slices. Neither it nor its input may be modified.
    multiply = functools.lru_cache(maxsize=1)(lambda layer, x: layer(x))
    for layer in model.layers:
        fuse(layer.attention, ("wq", "wk", "wv"), multiply)
        fuse(layer.feed_forward, ("w1", "w3"), multiply)
        for module in layer.modules():
            if isinstance(module, QuantizedLinear):
                module.prepare()
    model.output.prepare()
