"""Which layout and way of multiplying each form of weight gets: those that this CPU is fastest in.

They differ between CPUs, and between one token (bound by the memory's bandwidth) and many (bound by
arithmetic), so they are timed at load, but for small models. One that is missing here, or wrong, is
left out.
"""

import copy
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor, nn

from .linear import Form
from .system import without_holes

N_TOKENS = (1, 4, 16, 64, 128)  # how many at once the ways are timed for
SMALL = 2**23  # weights: fewer are not timed, so that a seed draws the same tokens each time
TRIAL = 2**24  # weights of the matrix that they are timed on
OTHER = 2**24  # numbers read before each time, so that the caches do not hold the matrix
RUNS = 16  # of which the shortest counts; a quarter, of many tokens, which vary less
UNAVAILABLE = (AttributeError, RuntimeError)  # no such operator in this PyTorch, on this CPU

Plan = tuple[tuple[int, str], ...]  # from how many tokens on, which way


@torch.inference_mode()
def tune(model: nn.Module) -> dict[str, str]:
    """Choose how each form in the model lies and is multiplied; say what was chosen."""
    kinds: dict[tuple, list[Form]] = {}
    for module in model.modules():
        if isinstance(module, Form):
            kind = (type(module), *module.layouts.items())
            kinds.setdefault(kind, []).append(module)
    chosen = {}
    with ThreadPoolExecutor(min(torch.get_num_threads(), 4)) as pool:
        for modules in kinds.values():
            largest = max(modules, key=size)
            layout, plan = "rows", largest.plan
            if sum(map(size, modules)) >= SMALL:
                layout, plan = choose(largest)
            with without_holes():
                list(pool.map(functools.partial(settle, layout=layout, plan=plan), modules))
            ways = ", ".join(f"{way} from {n} tokens" for n, way in plan)
            chosen.setdefault(type(largest).__name__, ways)  # the first, where widths differ
    return chosen


def size(module: Form) -> int:
    return module.out_features * module.in_features


def settle(module: Form, layout: str, plan: Plan) -> None:
    with suppress(RuntimeError):  # or it stays in rows, and its plan the one that always works
        module.pack(layout)
        module.plan = plan


def choose(module: Form) -> tuple[str, Plan]:
    """The layout and the plan that take the least time, tried on the first rows."""
    n_rows = min(module.out_features, TRIAL // module.in_features // 64 * 64 or 64)
    in_rows = type(module)(n_rows, module.in_features)
    for name, buffer in module.named_buffers():  # of as many rows each
        setattr(in_rows, name, buffer[:n_rows].clone())
    inputs = {n: torch.randn(n, module.in_features) for n in N_TOKENS}
    inputs = {n: x.to(torch.get_default_dtype()) for n, x in inputs.items()}
    expected = in_rows(inputs[1]).float()
    ways = {}
    for layout, names in module.layouts.items():
        with suppress(*UNAVAILABLE):
            trial = in_rows if layout == "rows" else copy.deepcopy(in_rows)
            trial.pack(layout)
            every = {(layout, name): getattr(trial, name) for name in names}
            ways |= {key: way for key, way in every.items() if is_right(way, inputs[1], expected)}
    other = torch.ones(min(OTHER, 8 * n_rows * module.in_features))
    seconds = {n: least_times(ways, x, other) for n, x in inputs.items()}

    best = (math.inf, "rows", module.plan)
    for layout in dict.fromkeys(layout for layout, _ in ways):
        plan, cost = [], {}
        for n, times in seconds.items():
            cost[n], way = min((s, way) for (where, way), s in times.items() if where == layout)
            if not plan or plan[-1][1] != way:
                plan.append((n, way))
        # A prompt and 128 new tokens, and now and then 16 as one of four.
        total = 128 * cost[1] + 4 * cost[4] + cost[128]
        best = min(best, (total, layout, tuple(plan)))
    return best[1:]


def is_right(multiply: Callable[[Tensor], Tensor], x: Tensor, expected: Tensor) -> bool:
    try:
        return bool((multiply(x).float() - expected).norm() < 0.03 * expected.norm())
    except UNAVAILABLE:
        return False


def least_times(ways: dict[tuple, Callable], x: Tensor, other: Tensor) -> dict[tuple, float]:
    """Seconds that each takes, of runs in turn, for few tokens with `other` read before each.

    What is far behind after the first runs is not run again.
    """
    least, few = dict.fromkeys(ways, math.inf), len(x) < 16
    for turn in range(RUNS if few else RUNS // 4):
        for key, multiply in ways.items():
            if turn < 2 or least[key] < 2 * min(least.values()):
                if few:
                    other.sum()
                begin = time.perf_counter()
                multiply(x)
                least[key] = min(least[key], time.perf_counter() - begin)
    return least
