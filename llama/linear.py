"""How a weight lies in memory, and how it is multiplied.

A form of weight (float, int8, int4) can lie in memory in several layouts, and in each be multiplied
in several ways, of which llama/tune.py finds the fastest. Operators that are not PyTorch's public
API are used in this file alone, and each form has a way without them.
"""

import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import weighted_sums

GROUPS = (64, 32)  # inputs that share an int4 scale: the first that divides them
BAG = 128  # outputs whose weights lie together in the layout "bags"
BLOCK = 2**21  # weights unpacked at a time: what the CPU's caches hold
PIECE = 2**24  # weights packed at a time: bounds the memory that it takes
# Of a group's range, tried for int4.
CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64)
MIXED = 64  # neighbouring inputs of w2 that are mixed


class Form(nn.Module):
    """y = x W^T for a W of shape (out_features, in_features).

    `layouts` are those in which it can lie, each with its ways: methods that multiply. The first,
    "rows", is that of the checkpoint, and its last way needs nothing but public operators.
    """

    layouts: ClassVar[dict[str, tuple[str, ...]]] = {"rows": ("unpack",)}
    mixes = False  # W was mixed on its input side, so that x has to be

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.plan = ((1, self.layouts["rows"][-1]),)  # from how many tokens on, which way
        self.packed: list = []  # what the operators of another layout take in place of W

    def pack(self, layout: str) -> None:
        """Once the weights are there: bring them all into a layout, or raise RuntimeError."""

    def replace_weight(self, packed: list) -> None:
        self.packed, self.weight = packed, self.weight.to("meta")  # its size alone

    def forward(self, x: Tensor) -> Tensor:
        if self.mixes:
            x = mix(x.float()).type_as(x)
        for n_tokens, way in reversed(self.plan):
            if n_tokens <= len(x):
                return getattr(self, way)(x)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W and what they are: (n_rows, in_features), up to `scale`'s factor a row."""
        for rows in row_blocks(*self.weight.shape):
            yield rows, self.weight[rows]

    def scale(self, rows: slice) -> Tensor | None:
        return None

    def unpack(self, x: Tensor) -> Tensor:
        """A block of rows at a time in fp32, inside the caches."""
        x32, out = x.float(), x.new_empty(len(x), self.out_features)
        for rows, block in self.blocks():
            y = F.linear(x32, block.float())
            scale = self.scale(rows)
            out[:, rows] = y if scale is None else y * scale
        return out


@functools.cache
def hadamard(n: int) -> Tensor:
    """Orthogonal and symmetric (n, n) of +-1 / sqrt(n), n a power of two (by Sylvester)."""
    h = torch.ones(1, 1, dtype=torch.float32)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


def mix(x: Tensor) -> Tensor:
    """Each `mixed` neighbours in fp32 (..., n) times a Hadamard matrix, its own inverse."""
    size = mixed(x.shape[-1])
    return (x.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)


def mixed(n: int) -> int:
    return min(MIXED, n & -n)  # a power of two that divides n


def row_blocks(
    n_rows: int, n_columns: int, size: int = BLOCK, multiple: int = 64
) -> Iterator[slice]:
    """Slices of rows that have about `size` numbers each."""
    step = max(multiple, size // n_columns // multiple * multiple)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


class FP32Linear(Form):
    """W as it is."""

    layouts: ClassVar = {
        "rows": ("onednn_rows", "plain"),
        "bags": ("bags", "onednn_blocks", "unpack"),
    }
    dtype = torch.float32

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        weight = torch.empty(out_features, in_features, dtype=self.dtype)
        self.register_buffer("weight", weight)

    def pack(self, layout: str) -> None:
        if layout == "bags":
            n_blocks = math.ceil(self.out_features / BAG)
            table = self.weight.new_empty(n_blocks, self.in_features, BAG)
            for block, rows in zip(table, self.weight.split(BAG)):
                block[:, : len(rows)] = rows.t()
            self.weight = table

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def onednn_rows(self, x: Tensor) -> Tensor:
        return multiply_onednn(x, self.weight)

    def bags(self, x: Tensor) -> Tensor:
        """Sums of rows of W^T, at the memory's speed; a block serves a few tokens in turn."""
        table, outputs = self.weight, []
        for few in x.split(4):
            rows = bag_rows(len(table), self.in_features, len(few))
            sums = weighted_sums(table, rows, few.expand(len(table), -1, -1))
            outputs.append(sums.unflatten(0, (len(table), -1)).transpose(0, 1).flatten(1))
        return torch.cat(outputs)[:, : self.out_features]

    def onednn_blocks(self, x: Tensor) -> Tensor:
        return join([multiply_onednn(x, block) for _, block in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.dim() == 2:
            yield from super().blocks()
            return
        for start, block in zip(range(0, self.out_features, BAG), self.weight):
            end = min(start + BAG, self.out_features)  # the last block need not be full
            yield slice(start, end), block[:, : end - start].t()


@functools.lru_cache(maxsize=16)  # a model has some five shapes
def bag_rows(n_blocks: int, in_features: int, n_tokens: int) -> Tensor:
    """The rows of W^T that each block's bags, one a token, sum: (n_bags, in_features)."""
    rows = torch.arange(n_blocks * in_features, dtype=torch.int32).view(n_blocks, 1, -1)
    return rows.expand(-1, n_tokens, -1).flatten(0, 1)


def multiply_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class BF16Linear(FP32Linear):
    layouts: ClassVar = {
        "rows": ("onednn_rows", "plain", "unpack"),
        "onednn": ("onednn",),
        "fbgemm": ("fbgemm",),
    }
    dtype = torch.bfloat16

    def pack(self, layout: str) -> None:
        if layout == "onednn":
            self.replace_weight([torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)])
        elif layout == "fbgemm":
            pieces = row_blocks(*self.weight.shape, PIECE)
            self.replace_weight([pack_fp16(self.weight[rows]) for rows in pieces])

    def onednn(self, x: Tensor) -> Tensor:
        return multiply_onednn(x, self.packed[0])

    def fbgemm(self, x: Tensor) -> Tensor:
        """Activations and sums in fp32."""
        multiply = torch.ops.quantized.linear_dynamic_fp16
        return join([multiply(x.float(), piece) for piece in self.packed]).type_as(x)


def pack_fp16(block: Tensor) -> object:
    """bf16 weights as fp16, exact to 2^-25: fp16 has three bits more, and a smaller range."""
    if not block.abs().max() <= torch.finfo(torch.float16).max:
        raise RuntimeError("beyond fp16's range")
    return torch.ops.quantized.linear_prepack_fp16(block.float(), None)


def join(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class Int8Linear(Form):
    """Symmetric, a scale for each output: W[i] = scales[i] * weight[i]."""

    layouts: ClassVar = {
        "rows": ("int8pack", "unpack"),
        "onednn": ("onednn",),
        "fbgemm": ("fbgemm",),
    }

    def __init__(self, out_features: int, in_features: int):
        if in_features % 16:  # see int8pack
            self.layouts = self.layouts | {"rows": ("unpack",)}
        super().__init__(out_features, in_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """The buffers for an fp32 matrix."""
        scales = row_scales(weight, 127)
        q = (weight / scales).round_().to(torch.int8)
        return {"weight": q, "scales": scales.squeeze(1)}

    def pack(self, layout: str) -> None:
        if layout != "rows" and int8_is_exact() != (layout == "onednn"):
            raise RuntimeError("made for another CPU")
        if layout == "onednn":
            self.replace_weight([torch.ops.onednn.qlinear_prepack(self.weight, None)])
        elif layout == "fbgemm":
            pieces = row_blocks(*self.weight.shape, PIECE)
            packed = [pack_int8(self.weight[rows], self.scales[rows]) for rows in pieces]
            self.replace_weight(packed)

    def scale(self, rows: slice) -> Tensor:
        return self.scales[rows]

    def int8pack(self, x: Tensor) -> Tensor:
        """Weights int8, activations bf16."""
        if self.in_features % 16:
            raise RuntimeError("PyTorch 2.13 reads past the end of such rows")
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales.bfloat16())
        return y.type_as(x)

    def onednn(self, x: Tensor) -> Tensor:
        """Activations int8 as well, one scale a token."""
        q, s = round_activations(x)
        alone = isinstance(s, float)
        y = torch.ops.onednn.qlinear_pointwise(
            *(q, s if alone else 1.0, 128),
            *(self.packed[0], self.scales, NO_ZEROS, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return (y if alone else y.mul_(s)).type_as(x)

    def fbgemm(self, x: Tensor) -> Tensor:
        """Activations in two terms of 7 bits, for CPUs without VNNI: they sum two products in 16.

        For a few tokens the second is nearly free, since they are bound by reading the weights.
        """
        q, s = round_twice(x)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = join([multiply(q, 1.0, 64, piece) for piece in self.packed])
        return torch.add(y[: len(x)], y[len(x) :], alpha=1 / 126).mul_(s).type_as(x)


NO_ZEROS = torch.zeros(1, dtype=torch.int32)  # weights are symmetric
ZERO_AND_HALF = torch.tensor(128.5, dtype=torch.float32)  # uint8's zero; a half, for cuts to round


@functools.cache
def int8_is_exact() -> bool:
    """Whether oneDNN sums products of int8 in 32 bits, by VNNI, and not two at first in 16.

    Asking the CPU does not tell: oneDNN may have been forbidden it (ONEDNN_MAX_CPU_ISA).
    """
    q = torch.full((64, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(q, q.t()) == 64 * 127 * 127).all())


def pack_int8(block: Tensor, scales: Tensor) -> object:
    torch.backends.quantized.engine = "fbgemm"  # PyTorch itself would choose oneDNN here and there
    zeros = torch.zeros(len(block), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(block, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def row_scales(x: Tensor, limit: int) -> Tensor:
    """For each row of x the number (n, 1) that divides it to at most +-limit."""
    return x.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(limit)


@functools.lru_cache(maxsize=1)  # what wq wk wv, and w1 w3, multiply is the same
def round_activations(x: Tensor) -> tuple[Tensor, Tensor | float]:
    """x (n, k) as (q - 128) s: q a uint8, s a scale for each row (n, 1) or, of one, a number."""
    x = x.float()
    if len(x) == 1:  # fewer operators
        s = max(x.abs().max().item(), 1e-12) / 127
        return torch.add(ZERO_AND_HALF, x, alpha=1 / s).to(torch.uint8), s
    s = row_scales(x, 127)
    return (x / s).add_(ZERO_AND_HALF).to(torch.uint8), s


@functools.lru_cache(maxsize=1)
def round_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = s (q[:n] + q[n:] / 126), both of up to +-63: the second rounds what the first leaves."""
    x = x.float()
    s = row_scales(x, 63)
    exact = x / s
    q = exact.round()
    return torch.cat([q, exact.sub_(q).mul_(126).round_()]), s


class Int4Linear(Int8Linear):
    """Asymmetric, in groups of inputs, on two levels (QServe, arXiv 2405.04532).

    W[i, j] = scales[i] * (step * q + low), where q is 0 to 15 and (step, low) are the whole
    numbers groups[i, j // group_size(in_features)], such that the bracket is an int8. In rows two
    neighbouring q share a byte, the first in the low half.
    """

    def __init__(self, out_features: int, in_features: int):
        self.layouts = {"rows": ("int_mm", "unpack")}
        if out_features % 64 == 0:
            self.layouts["int4pack"] = ("int4pack", "int_mm", "unpack")
        Form.__init__(self, out_features, in_features)
        n_groups = in_features // group_size(in_features)
        shapes = {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "scales": ((out_features,), torch.float32),
            "groups": ((out_features, n_groups, 2), torch.int8),
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """The buffers for an fp32 matrix.

        Each group's range is the one of several, clipped, that has the least squared error.
        """
        scales = row_scales(weight, 119)  # 119 + 8 (a rounded step's) = 127
        group = group_size(weight.shape[1])
        packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
        groups = torch.empty(weight.shape[0], weight.shape[1] // group, 2, dtype=torch.int8)
        for rows in row_blocks(*weight.shape, BLOCK // 4, multiple=1):
            w = (weight[rows] / scales[rows]).unflatten(1, (-1, group))
            low, high = w.amin(2, keepdim=True), w.amax(2, keepdim=True)
            least, step, lo = torch.full_like(low, torch.inf), low, low
            for clip in CLIPS:
                try_lo = (low * clip).round()
                try_step = ((high - low) * clip / 15).round().clamp(min=1)
                exact = (w - try_lo).div_(try_step)
                error = exact.sub_(exact.round().clamp_(0, 15)).square_().sum(2, keepdim=True)
                error *= try_step.square()
                better = error < least
                least = torch.where(better, error, least)
                step, lo = torch.where(better, try_step, step), torch.where(better, try_lo, lo)
            q = w.sub_(lo).div_(step).round_().clamp_(0, 15).flatten(1).to(torch.uint8)
            packed[rows] = q[:, ::2] | q[:, 1::2] << 4
            groups[rows] = torch.cat([step, lo], 2).to(torch.int8)
        return {"weight": packed, "scales": scales.squeeze(1), "groups": groups}

    def pack(self, layout: str) -> None:
        if layout == "int4pack":
            for rows in row_blocks(self.out_features, self.in_features):
                plain = self.weight[rows]
                q = unpack_int4(plain, None).t().int()
                self.weight[rows] = pack_int4(q).view(plain.shape)
            step, low = self.groups.float().unbind(2)
            both = torch.stack([step, low + 8 * step], 2) * self.scales[:, None, None]
            both = both.transpose(0, 1).to(torch.bfloat16).contiguous()
            self.register_buffer("scales_and_zeros", both)
            self.packed = [self.weight, group_size(self.in_features), both]
            del self.groups

    def step_and_low(self, rows: slice) -> tuple[Tensor, Tensor]:
        """int8 (n_groups, n_rows), both."""
        if "groups" in self._buffers:
            return self.groups[rows].permute(2, 1, 0).contiguous().unbind()
        # Exact: bf16 keeps 8 bits, and step and low + 8 * step are whole numbers below 128.
        both = self.scales_and_zeros[:, rows].permute(2, 0, 1).contiguous().float()
        step, zero = both.div_(self.scales[rows]).round_().to(torch.int8)
        return step, zero - 8 * step

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        n_rows = None if "groups" in self._buffers else int4_layout()
        for rows in row_blocks(self.out_features, self.in_features):
            step, low = self.step_and_low(rows)
            q = unpack_int4(self.weight[rows], n_rows).unflatten(0, (len(step), -1))
            block = q.mul_(step[:, None]).add_(low[:, None]).flatten(0, 1)
            yield rows, block.t()  # (n_rows, in_features)

    def int_mm(self, x: Tensor) -> Tensor:
        """Activations int8 as well, one scale a token."""
        if not int8_is_exact():
            raise RuntimeError("made for another CPU")
        q, s = round_activations(x)
        q, out = q.bitwise_xor(128).view(torch.int8), x.new_empty(len(x), self.out_features)
        for rows, block in self.blocks():
            y = torch._int_mm(q, block.t()).float().mul_(s)
            torch.mul(y, self.scale(rows), out=out[:, rows])
        return out

    def int4pack(self, x: Tensor) -> Tensor:
        """Weights int4, activations bf16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), *self.packed).type_as(x)


def group_size(in_features: int) -> int:
    return next((group for group in GROUPS if in_features % group == 0), 1)


def pack_int4(q: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)


@functools.cache
def int4_layout() -> int:
    """How many rows PyTorch's 4-bit layout interleaves on this CPU; RuntimeError: it can't be told.

    Known layouts go input by input, for `n` rows at a time: row j shares a byte with row j + n / 2.
    """
    q = torch.randint(0, 16, (128, 64), dtype=torch.int32)
    packed = pack_int4(q).view(128, 32)
    for n_rows in (64, 32, 16):
        if torch.equal(unpack_int4(packed, n_rows), q.t().to(torch.int8)):
            return n_rows
    raise RuntimeError("this CPU's 4-bit layout is not known")


def unpack_int4(packed: Tensor, interleaved: int | None) -> Tensor:
    """(n_rows, in_features / 2) bytes, in either order, to int8 (in_features, n_rows)."""
    if interleaved is None:
        return torch.stack([packed & 15, packed >> 4], 2).flatten(1).t().to(torch.int8)
    in_features, words = packed.shape[1] * 2, interleaved // 16  # of 8 rows
    out = torch.empty(in_features, len(packed) // interleaved, 2, words, dtype=torch.int64)
    for half, q in enumerate((packed & 15, packed >> 4)):
        out[:, :, half] = q.view(torch.int64).view(-1, in_features, words).transpose(0, 1)
    return out.view(torch.int8).flatten(1)


class Int8Embedding(nn.Module):
    """A row for each token, int8 with a scale of its own; looked up in the load's default dtype."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.dtype = torch.get_default_dtype()
        self.register_buffer("weight", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(num_embeddings, dtype=torch.float32))

    quantize = staticmethod(Int8Linear.quantize)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.weight[tokens] * self.scales[tokens, None]).to(self.dtype)
