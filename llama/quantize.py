"""What becomes of weights before they are rounded, and which take which form.

Real models have a few channels in the residual stream that are far larger than the rest, and one
int8 scale for a token's activations cannot serve both. Turning the stream by an orthogonal matrix R
spreads them out and changes nothing else (QuaRot, arXiv 2404.00456, section 4): what reads the
stream is multiplied by R on its input side, what writes it by R^T on its output side. RMSNorm's
gains stand in the way, so they are folded into the matrices that follow first. R does not reach the
input of w2, which is turned when it is multiplied instead, 64 neighbours at a time (section 4.2).
"""

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, nn

from .errors import require
from .linear import (
    GROUPS,
    BF16Linear,
    FP32Linear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    hadamard,
    mix,
    row_blocks,
)
from .stored import Weight

GAIN = {  # the norm whose gain goes into a matrix
    "wq": "attention_norm",
    "wk": "attention_norm",
    "wv": "attention_norm",
    "w1": "ffn_norm",
    "w3": "ffn_norm",
    "output": "norm",
}
READERS = {*GAIN, "tok_embeddings"}  # matrices with the residual stream on their input side
WRITERS = {"wo", "w2"}  # and on their output side
FLOAT_FORMS = {form.dtype: form for form in (FP32Linear, BF16Linear)}
BLOCK = 2**20  # numbers turned at a time: inside the caches
VERSION = 1  # of what quantized weights on disk stand for: raise it where that changes
# By measurement on the demo model: perplexity 3.2 % above fp32's with wv in int4, 2.4 % in int8.
INT8_ALWAYS = {"output", "wv"}


def check_quantize(name: str | None) -> None:
    require(name in (None, "int8", "int4"), "quantize", "int8 or int4", name)


def form_of(name: str, shape: torch.Size, quantize: str | None) -> type[nn.Module] | None:
    """The module that holds the weight `name` then; None: it stays as it is."""
    kind = name.split(".")[-2]
    if not quantize or len(shape) != 2 or kind not in READERS | WRITERS:
        return None
    if kind == "tok_embeddings":
        return Int8Embedding
    int4 = quantize == "int4" and kind not in INT8_ALWAYS and shape[1] % min(GROUPS) == 0
    return Int4Linear if int4 else Int8Linear


def form_there(stem: str, names: Container[str]) -> type[nn.Module] | None:
    """The module for what is stored under `stem` (it ends in a dot); None: floats."""
    if f"{stem}scales" not in names:
        return None
    if stem == "tok_embeddings.":
        return Int8Embedding
    return Int4Linear if f"{stem}groups" in names else Int8Linear


def use_forms(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device the weights of the state, each matrix in their form."""
    for path, module in list(model.named_modules()):
        weight, form = state.get(f"{path}.weight"), form_there(f"{path}.", state)
        if isinstance(module, nn.Linear):
            form = form or FLOAT_FORMS.get(weight.dtype)
        if form:
            new = form(weight.shape[0], weight.shape[1] * (2 if form is Int4Linear else 1))
            new.mixes = path.endswith("w2") and isinstance(new, Int8Linear)
            model.set_submodule(path, new)
        elif weight is not None:
            module.weight = nn.Parameter(weight, requires_grad=False)


def norm_before(name: str) -> str | None:
    """The norm whose gain goes into the matrix `name`."""
    path = name.split(".")  # layers.N.attention.wq.weight or output.weight
    return ".".join([*path[:-3], GAIN[path[-2]], "weight"]) if path[-2] in GAIN else None


def turned(name: str, weight: Weight, gain: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """A matrix W in fp32 as W R or R^T W, in blocks of rows, each with the number of its first."""
    kind = name.split(".")[-2]
    if kind in WRITERS:
        matrix = weight.read(torch.float32)
        for columns in row_blocks(*matrix.t().shape, BLOCK):
            matrix[:, columns] = rotate(matrix[:, columns].t()).t()
        for rows in row_blocks(*matrix.shape, BLOCK):
            yield rows.start, mix(matrix[rows]) if kind == "w2" else matrix[rows]
    else:
        for start, block in weight.blocks():
            yield start, rotate(block.float() if gain is None else block.float() * gain)


def rotate(x: Tensor) -> Tensor:
    """x R for fp32 (n, dim): random signs, then Hadamard in blocks of the power of two in dim.

    H of order a b is the Kronecker product of H_a and H_b: 2 (a + b) flops a number, not 2 a b.
    The second leaves each block transposed: another order of the same numbers, and as good.
    """
    dim = x.shape[1]
    power = (dim & -dim).bit_length() - 1
    a, b = 2 ** (power // 2), 2 ** (power - power // 2)
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(1)) * 2 - 1
    y = (x * signs).reshape(-1, b) @ hadamard(b)
    return (y.view(-1, a, b).mT.reshape(-1, a) @ hadamard(a)).view(x.shape)
