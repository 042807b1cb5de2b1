"""Matrix products with the PyTorch kernel that is fastest on this CPU.

Only this file uses private operators of PyTorch (torch.ops, torch._int_mm). Each has a public
fallback, for a PyTorch or a CPU without it.

| weights | CPU         | few tokens                 | more tokens                     |
|---------|-------------|----------------------------|---------------------------------|
| fp32    | AMD, AVX512 | sums of rows of W^T (3)    | oneDNN, blocks of W^T           |
| fp32    | AMD         | oneDNN                     | the same                        |
| fp32    | AVX512      | F.linear (1)               | oneDNN                          |
| fp32    | others      | F.linear                   | the same                        |
| bf16    | AVX512      | oneDNN, its own layout     | the same                        |
| bf16    | Intel, AVX2 | sums of rows of W^T (3)    | blocks of W^T converted to fp32 |
| bf16    | others      | F.linear (3)               | blocks converted to fp32        |
| int8    | VNNI        | oneDNN, int8 activations   | the same                        |
| int8    | AVX2        | FBGEMM, activations as sums of two 7-bit terms | the same    |
| int8    | others      | _weight_int8pack_mm (31)   | blocks converted to fp32        |
| int4    | VNNI        | _weight_int4pack_mm (63)   | blocks unpacked to int8         |
| int4    | others      | _weight_int4pack_mm (63)   | blocks unpacked to fp32         |

The first row that fits counts. In parentheses: up to how many tokens. fp32 products of blocks are
oneDNN's on AMD, F.linear elsewhere. The 8-bit operator needs in_features that are a multiple of
16, the 4-bit operator out_features that are a multiple of 64.

`python tests/benchmark.py kernels` measures all of them on the CPU at hand.
"""

import functools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import weighted_sums

FEW_TOKENS = 3  # up to here memory bandwidth is the bound, beyond it arithmetic
OUTPUT_BLOCK = 128  # outputs in a block of W^T
BLOCK_SIZE = 2**21  # elements of int4 that are unpacked at once: they stay in the caches
FP32_BLOCK_SIZE = 2**20  # elements that are converted to fp32 at once
ZERO_POINT = torch.zeros(1, dtype=torch.int32)  # of symmetric int8 weights
UNAVAILABLE = (AttributeError, RuntimeError)  # no such operator in this PyTorch, or on this CPU


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear by oneDNN, for plain weights and for those of `onednn_pack`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_pack(weight: Tensor) -> Tensor:
    """An fp32 or bf16 matrix in the layout that is fastest for `onednn_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def int8_pack(weight: Tensor) -> Tensor:
    """An int8 matrix (m, k) in the layout of `int8_linear`."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def int8_linear(q: Tensor, x_scale: Tensor | float, packed: Tensor, scales: Tensor) -> Tensor:
    """fp32 (x_scale * q) (scales * W)^T.

    Args:
        q: int8 (n, k).
        x_scale: fp32 (n, 1), or a number for all rows.
        packed: int8 W, (m, k), as `int8_pack` returns it.
        scales: fp32 (m,).
    """
    one_scale = isinstance(x_scale, float)
    y = torch.ops.onednn.qlinear_pointwise(
        *(q.view(torch.uint8) ^ 128, x_scale if one_scale else 1.0, 128, packed, scales),
        *(ZERO_POINT, None, 1.0, 0, torch.float32, "none", [], ""),
    )
    return y if one_scale else y.mul_(x_scale)


def int8_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """int32 q W for int8 q (n, k) and W (k, m)."""
    return torch._int_mm(q, weight)


def fbgemm_pack(weight: Tensor, scales: Tensor) -> torch.ScriptObject:
    """int8 W, (m, k), and fp32 scales, (m,), in the form of `fbgemm_linear`, which is no tensor."""
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        quantized = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def fbgemm_linear(x: Tensor, packed: torch.ScriptObject) -> Tensor:
    """fp32 round(x) (scales * W)^T for fp32 x, (n, k), of at most 63.

    Larger sums of two products saturate at 16 bits.
    """
    operator = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return operator(x, 1.0, 64, packed)


def int8pack_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """x (scales * W)^T for bf16 x and scales, int8 W."""
    return torch.ops.aten._weight_int8pack_mm(x, weight, scales)


def int4_pack(q: Tensor) -> Tensor:
    """int32 (n, k) of 0 to 15 in the operator's layout, uint8 (n, k / 2)."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)


def int4_linear(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """x W^T for bf16 x; W = scale * (q - 8) + zero, both bf16 (k / group_size, n, 2)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """True if oneDNN's linear works in this dtype on this CPU, with plain and packed weights."""
    x, weight = torch.ones(1, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
    try:
        packed = onednn_linear(x, onednn_pack(weight))
        return bool((packed == 64).all() and (onednn_linear(x, weight) == 64).all())
    except UNAVAILABLE:
        return False


@functools.cache
def is_amd() -> bool:
    return "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


@functools.cache
def has_vnni() -> bool:
    """True if oneDNN accumulates int8 products in 32 bits. Without VNNI, pairs saturate at 16."""
    q = torch.full((64, 64), 127, dtype=torch.int8)
    try:
        exact = (int8_linear(q, 1.0, int8_pack(q), torch.ones(64)) == 64 * 127 * 127).all()
        return bool(exact and (int8_matmul(q, q.t()) == 64 * 127 * 127).all())
    except UNAVAILABLE:
        return False


@functools.cache
def has_fbgemm() -> bool:
    """True if FBGEMM multiplies int8 exactly, as long as activations have 7 bits."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # before AVX2, or not x86
        return False
    q = torch.full((64, 64), 127, dtype=torch.int8)
    try:
        packed = fbgemm_pack(q, torch.ones(64))
        return bool((fbgemm_linear(q / 127 * 63, packed) == 64 * 63 * 127).all())
    except UNAVAILABLE:
        return False


@functools.cache
def has_int8pack() -> bool:
    one, weight = torch.ones(64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.int8)
    try:
        return bool((int8pack_linear(one[None], weight, one) == 64).all())
    except UNAVAILABLE:
        return False


@functools.cache
def int4_interleaving() -> int:
    """How many rows PyTorch's 4-bit layout interleaves on this CPU; 0 if it is not known.

    Known layouts pack n rows together. Each input has n / 2 bytes: byte j holds row j in its low
    half and row j + n / 2 in its high half.
    """
    q = (torch.arange(128)[:, None] * 7 + torch.arange(64) * 3) % 16
    try:
        packed = int4_pack(q.int()).view(128, 32)
    except UNAVAILABLE:
        return 0
    expected = q.t().to(torch.int8)
    return next((n for n in (64, 32, 16) if torch.equal(unpack_int4(packed, n), expected)), 0)


def unpack_int4(packed: Tensor, interleaving: int) -> Tensor:
    """(n_rows, in_features / 2) bytes to int8 (in_features, n_rows) of 0 to 15.

    interleaving: See `int4_interleaving`. 0: two neighbouring inputs share a byte, the first in the
    low half.
    """
    if not interleaving:
        return torch.stack([packed & 15, packed >> 4], 2).flatten(1).t().to(torch.int8)
    in_features, words = packed.shape[1] * 2, interleaving // 16  # words of 8 rows, one byte each
    out = torch.empty(in_features, len(packed) // interleaving, 2, words, dtype=torch.int64)
    for half, q in enumerate((packed & 15, packed >> 4)):
        out[:, :, half] = q.view(torch.int64).view(-1, in_features, words).transpose(0, 1)
    return out.view(torch.int8).flatten(1)


def row_blocks(n_rows: int, n_columns: int, size: int = BLOCK_SIZE) -> list[slice]:
    """Slices of about `size` elements; each starts at a multiple of 64 rows."""
    step = max(size // n_columns // 64, 1) * 64
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def fp32_blocks(weight: Tensor) -> Iterator[Tensor]:
    """A matrix in fp32, some rows at a time. Each block overwrites the one before."""
    slices = row_blocks(*weight.shape, FP32_BLOCK_SIZE)
    buffer = torch.empty(slices[0].stop, weight.shape[1], dtype=torch.float32)
    return (buffer[: rows.stop - rows.start].copy_(weight[rows]) for rows in slices)


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear, and on AMD, where MKL is slow, oneDNN's product."""
    return (onednn_linear if is_amd() and has_onednn(x.dtype) else F.linear)(x, weight)


def linear_by_blocks(x: Tensor, blocks: Iterator[Tensor]) -> Tensor:
    """x W^T for fp32 blocks of rows of W. In fp32; the result has the dtype of x."""
    x32 = x.float()
    return torch.cat([fp32_linear(x32, block) for block in blocks], 1).type_as(x)


class PlainLinear(nn.Module):
    """F.linear; for many tokens, weights of 16 bits are converted to fp32 block by block."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= FEW_TOKENS or self.weight.dtype == torch.float32:
            return F.linear(x, self.weight)
        return linear_by_blocks(x, fp32_blocks(self.weight))


class OneDNNLinear(nn.Module):
    """oneDNN's product: fp32 weights as they are, bf16 weights in its own layout.

    Measured on Intel with AVX-512, beside F.linear: bf16 1.4 times as fast for one token, fp32 1.9
    times for 8 tokens and 1.1 times for 128. fp32 on AMD with AVX2: 1.2, 2.4 and 1.4 times for 1, 8
    and 128 tokens.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        packed = weight if weight.dtype == torch.float32 else onednn_pack(weight)
        self.register_buffer("weight", packed)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self.weight.dtype == torch.float32:
            return fp32_linear(x, self.weight)
        return onednn_linear(x, self.weight)


class TransposedLinear(nn.Module):
    """W^T in blocks of columns. Few tokens: weighted sums of its rows, at memory bandwidth.

    Measured for one token: fp32 on AMD with AVX-512 1.3 times as fast as oneDNN, 2 times as
    F.linear (MKL); bf16 on Intel with AVX2 1.2 to 1.4 times as fast as F.linear.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, in_features = weight.shape
        blocks = weight.split(OUTPUT_BLOCK)
        # The last block need not be full.
        table = weight.new_zeros(len(blocks), in_features, OUTPUT_BLOCK)
        for block, rows in zip(table, blocks):
            block[:, : len(rows)] = rows.t()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= FEW_TOKENS:
            rows = all_rows(*self.table.shape[:2])
            sums = [weighted_sums(self.table, rows, row.expand(len(rows), -1)) for row in x]
            return torch.stack(sums).flatten(1)[:, : self.out_features]
        blocks = (block.float().t() for block in self.table)
        return linear_by_blocks(x, blocks)[:, : self.out_features]


@functools.lru_cache(maxsize=8)  # a model has some five shapes
def all_rows(n_blocks: int, n_rows: int) -> Tensor:
    return torch.arange(n_blocks * n_rows, dtype=torch.int32).view(n_blocks, n_rows)


def fast_linear(weight: Tensor) -> nn.Module:
    """The layer that computes x W^T fastest on this CPU, for an fp32 or bf16 weight."""
    cpu = torch.backends.cpu.get_cpu_capability(), is_amd()
    if cpu == (("AVX512", True) if weight.dtype == torch.float32 else ("AVX2", False)):
        return TransposedLinear(weight)
    if (cpu[0] == "AVX512" or is_amd()) and has_onednn(weight.dtype):
        return OneDNNLinear(weight)
    return PlainLinear(weight)
