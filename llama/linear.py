"""How a weight lies in memory, and how it is multiplied.

fp32 is PyTorch's own nn.Linear. Each other form can be multiplied in several ways, and which is the
fastest differs between CPUs and between one token (bound by the memory's bandwidth) and many (bound
by arithmetic): `tune` times a matrix each way at load and keeps the winners. Operators that are not
PyTorch's public API are used in this file alone, and left out where they are missing or wrong.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (64, 32)  # inputs that share an int4 scale: the first that divides them
BLOCK = 2**20  # weights unpacked at a time: what the CPU's caches hold
# Of a group's range, tried for int4.
CLIPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64)
N_TOKENS = (1, 4, 16, 64)  # how many at once the ways are timed for
TRIAL_ROWS = 1024  # of the matrix that they are timed on


class Form(nn.Module):
    """y = x W^T for a W of shape (out_features, in_features) that is not fp32.

    A subclass lists its `ways`, of which "unpack" needs nothing but public operators: it turns a
    block of rows at a time into fp32, inside the caches, and multiplies that.
    """

    ways: tuple[str, ...] = ("unpack",)
    precise = False  # activations must not be rounded to one int8 term

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.plan = ((1, "unpack"),)  # from how many tokens on, which way

    def prepare(self) -> None:
        """Once the weights are there: bring them into the order in which they are read."""

    def forward(self, x: Tensor) -> Tensor:
        way = next(way for n_tokens, way in reversed(self.plan) if n_tokens <= len(x))
        return getattr(self, way)(x)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W and what they are: (n_rows, in_features), up to `scale`'s factor a row."""
        raise NotImplementedError

    def scale(self, rows: slice) -> Tensor | None:
        return None

    def unpack(self, x: Tensor) -> Tensor:
        x32, out = x.float(), x.new_empty(len(x), self.out_features)
        for rows, block in self.blocks():
            y = F.linear(x32, block.float())
            scale = self.scale(rows)
            out[:, rows] = y if scale is None else y * scale
        return out


def row_blocks(n_rows: int, n_columns: int, multiple: int = 64) -> Iterator[slice]:
    step = max(multiple, BLOCK // n_columns // multiple * multiple)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


class BF16Linear(Form):
    ways = ("plain", "unpack")

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.bfloat16))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_blocks(*self.weight.shape):
            yield rows, self.weight[rows]

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.bfloat16()}

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Int8Linear(Form):
    """Symmetric, a scale for each output: W[i] = scales[i] * weight[i]."""

    ways = ("int8pack", "int_mm", "unpack")

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features, dtype=torch.float32))

    @staticmethod
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        """The buffers for an fp32 matrix."""
        q, scales = round_rows(weight)
        return {"weight": q, "scales": scales.squeeze(1)}

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_blocks(*self.weight.shape):
            yield rows, self.weight[rows]

    def scale(self, rows: slice) -> Tensor:
        return self.scales[rows]

    def int8pack(self, x: Tensor) -> Tensor:
        """Weights int8, activations bf16."""
        if self.in_features % 8:
            raise RuntimeError("PyTorch 2.13 reads past the end of such rows")
        y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales.bfloat16())
        return y.type_as(x)

    def int_mm(self, x: Tensor) -> Tensor:
        return self.int8_activations(x, [(slice(None), self.weight)])

    def int8_activations(self, x: Tensor, blocks: Iterator[tuple[slice, Tensor]]) -> Tensor:
        """Activations int8 as well, one scale a token; a second term where it must be precise."""
        q, s = round_rows(x.float())
        if self.precise:
            q2, s2 = round_rows(x.float() - q * s)
            q, s = torch.cat([q, q2]), torch.cat([s, s2])
        out = x.new_empty(len(x), self.out_features)
        for rows, block in blocks:
            y = torch._int_mm(q, block.t()) * s
            if self.precise:
                y = y[: len(x)] + y[len(x) :]
            out[:, rows] = y * self.scale(rows)
        return out


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = q * s, with q int8 and one s for each row."""
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / s).round_().to(torch.int8), s


class Int4Linear(Int8Linear):
    """Asymmetric, in groups of inputs, on two levels (QServe, arXiv 2405.04532).

    W[i, j] = scales[i] * (step * q + low), where q is 0 to 15 and (step, low) are the whole
    numbers groups[i, j // group_size(in_features)], such that the bracket is an int8. On disk two
    neighbouring q share a byte, the first in the low half; `prepare` brings them into the order of
    PyTorch's 4-bit operator.
    """

    ways = ("int4pack", "int_mm", "unpack")

    def __init__(self, out_features: int, in_features: int):
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
        """Each group's range is the one of several, clipped, that has the least squared error."""
        scales = weight.abs().amax(1).clamp(min=1e-12) / 119  # 119 + 8 (a rounded step's) = 127
        group = group_size(weight.shape[1])
        packed = torch.empty(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)
        groups = torch.empty(weight.shape[0], weight.shape[1] // group, 2, dtype=torch.int8)
        for rows in row_blocks(weight.shape[0], 8 * weight.shape[1], multiple=1):
            w = (weight[rows] / scales[rows, None]).unflatten(1, (-1, group))
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
        return {"weight": packed, "scales": scales, "groups": groups}

    def prepare(self) -> None:
        step, low = self.groups.float().unbind(2)
        both = torch.stack([step, low + 8 * step], 2) * self.scales[:, None, None]
        both = both.transpose(0, 1).to(torch.bfloat16).contiguous()
        self.register_buffer("scales_and_zeros", both)
        del self.groups
        interleaved = int4_layout()
        self.interleaved = interleaved if self.out_features % (interleaved or 1) == 0 else None
        if not self.interleaved:
            self.ways = ("int_mm", "unpack")
        else:
            for rows in row_blocks(self.out_features, self.in_features):
                plain = self.weight[rows]
                q = torch.stack([plain & 15, plain >> 4], 2).flatten(1).int()
                self.weight[rows] = pack_int4(q).view(plain.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_blocks(self.out_features, self.in_features):
            # Exact: bf16 keeps 8 bits, and step and low + 8 * step are whole numbers below 128.
            both = (self.scales_and_zeros[:, rows].float() / self.scales[rows, None]).round_()
            step, zero = both.to(torch.int8).unbind(2)  # (n_groups, n_rows)
            low = zero - 8 * step
            q = unpack_int4(self.weight[rows], self.interleaved).unflatten(0, (len(step), -1))
            block = q.mul_(step[:, None]).add_(low[:, None]).flatten(0, 1)
            yield rows, block.t()  # (n_rows, in_features)

    def int4pack(self, x: Tensor) -> Tensor:
        """Weights int4, activations bf16."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.weight, group_size(self.in_features), self.scales_and_zeros
        )
        return y.type_as(x)

    def int_mm(self, x: Tensor) -> Tensor:
        return self.int8_activations(x, self.blocks())


def group_size(in_features: int) -> int:
    return next((group for group in GROUPS if in_features % group == 0), 1)


def pack_int4(q: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)


@functools.cache
def int4_layout() -> int | None:
    """How many rows PyTorch's 4-bit layout interleaves on this CPU; None where it can't be told.

    Known layouts go input by input, for `n` rows at a time: row j shares a byte with row j + n / 2.
    """
    q = torch.randint(0, 16, (128, 64), dtype=torch.int32)
    try:
        packed = pack_int4(q).view(128, 32)
    except (AttributeError, RuntimeError):
        return None
    for n_rows in (64, 32, 16):
        if torch.equal(unpack_int4(packed, n_rows), q.t().to(torch.int8)):
            return n_rows
    return None


def unpack_int4(packed: Tensor, interleaved: int | None) -> Tensor:
    """(n_rows, in_features / 2) bytes, in either order, to int8 (in_features, n_rows)."""
    if interleaved is None:
        return torch.stack([packed & 15, packed >> 4], 2).flatten(1).t().to(torch.int8)
    in_features, half = packed.shape[1] * 2, interleaved // 2
    halves = packed.view(-1, in_features, half).transpose(0, 1)  # (in_features, n_blocks, half)
    out = torch.empty(in_features, halves.shape[1], 2, half, dtype=torch.uint8)
    torch.bitwise_and(halves, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(halves, 4, out=out[:, :, 1])
    return out.view(torch.int8).view(in_features, -1)


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


def tune(model: nn.Module) -> dict[str, str]:
    """Choose how each form in the model is multiplied; say what was chosen."""
    kinds: dict[tuple, list[Form]] = {}
    for module in model.modules():
        if isinstance(module, Form):
            module.prepare()
            kinds.setdefault((type(module), module.ways, module.precise), []).append(module)
    chosen = {}
    for modules in kinds.values():
        widest = max(modules, key=lambda module: module.in_features)
        plan = choose(widest)
        for module in modules:
            module.plan = plan
        name = type(widest).__name__ + (" (w2)" if widest.precise else "")
        chosen[name] = ", ".join(f"{way} from {n} tokens" for n, way in plan)
    return chosen


def choose(module: Form) -> tuple[tuple[int, str], ...]:
    """The fastest way for each of N_TOKENS, tried on a few rows of this form and width."""
    trial = type(module)(TRIAL_ROWS, module.in_features)
    for name, buffer in module.quantize(torch.randn(TRIAL_ROWS, module.in_features)).items():
        setattr(trial, name, buffer)
    trial.ways, trial.precise = module.ways, module.precise
    trial.prepare()
    return tuple((n_tokens, fastest(trial, n_tokens)) for n_tokens in N_TOKENS)


def fastest(module: Form, n_tokens: int) -> str:
    """The way that takes the least time for so many tokens, of those that give the right result."""
    x = torch.randn(n_tokens, module.in_features, dtype=torch.get_default_dtype())
    expected = module.unpack(x).float()
    seconds: dict[str, float] = {}
    for way in module.ways:
        multiply: Callable[[Tensor], Tensor] = getattr(module, way)
        try:
            first, y = timed(multiply, x)
        except (AttributeError, RuntimeError):  # no such operator in this PyTorch, on this CPU
            continue
        if (y.float() - expected).norm() < 0.03 * expected.norm():
            slow = first > 3 * min(seconds.values(), default=math.inf)
            again = [] if slow else [timed(multiply, x)[0] for _ in range(2)]
            seconds[way] = min([first, *again])
    return min(seconds, key=seconds.__getitem__, default="unpack")


def timed(multiply: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    y = multiply(x)
    return time.perf_counter() - begin, y
