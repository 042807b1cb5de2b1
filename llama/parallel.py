"""Tensor parallelism: several processes, the ranks, each with its part of every matrix.

Matrices that read the residual stream (wq wk wv w1 w3 output) are divided by outputs, those that
write it (wo w2) by inputs, and their partial results are summed: two all-reduces a layer
(Megatron-LM, arXiv 1909.08053, section 3). torchrun starts the ranks.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .model import ModelArgs, Transformer
from .weights import WEIGHTS, Weight, split_dim

SMALL = 2**18  # bytes: up to here sending to every rank is faster than all_reduce
TIMEOUT = timedelta(days=1)  # of a rank that waits, in a chat for the user's next line
store: dist.Store | None = None  # of the running ranks


@contextmanager
def init_distributed() -> Iterator[None]:
    """Join the ranks that torchrun has started, if it has. Only rank 0 prints."""
    global store
    if not dist.is_torchelastic_launched():
        yield
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    signal.signal(signal.SIGTERM, raise_ended)  # torchrun's, when another rank has ended
    with open(os.devnull, "w") as null:
        out, err = (null, null) if rank else (sys.stdout, sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            yield
    dist.barrier()
    dist.destroy_process_group()


def raise_ended(*_: object) -> None:
    raise UserError("another rank has ended, and so does this one")


def first_to_report() -> bool:
    """True on the first rank that asks: an error that ends all ranks is printed once."""
    try:
        rank = os.environ["RANK"]
        return store is None or store.compare_set("reported", "", rank) == rank.encode()
    except RuntimeError:  # the store has ended, with rank 0's machine
        return True


def world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast_from_rank0(find: Callable, *args: object) -> Any:
    """The JSON value that find(*args) returns on rank 0, on every rank."""
    rank, world_size = world()
    found = find(*args) if rank == 0 else None
    if world_size == 1:
        return found
    content = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)
    size = torch.tensor(len(content))
    dist.broadcast(size, 0)
    content = content if rank == 0 else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return json.loads(bytes(content.tolist()))


def bounds(n: int, rank: int | None = None) -> tuple[int, int]:
    """The first and the end of a rank's part of n things; of this rank's by default."""
    this_rank, world_size = world()
    rank = this_rank if rank is None else rank
    return rank * n // world_size, (rank + 1) * n // world_size


def n_units(name: str, args: ModelArgs) -> int:
    """The number of equal, indivisible units in a weight's split dimension, such as heads."""
    hidden_unit = min(args.hidden_dim & -args.hidden_dim, 64)  # a power of two: int4's groups
    return {
        "heads": args.n_kv_heads,
        "hidden": args.hidden_dim // hidden_unit,
        "dim": args.dim,
        "vocab": args.vocab_size,
    }[WEIGHTS[name.split(".")[-2]].split_by]


def shard_weights(weights: dict[str, Weight], args: ModelArgs) -> dict[str, Weight]:
    """This rank's part of every weight.

    Raises:
        UserError: There are more ranks than heads, or quantized groups cannot be divided so.
    """
    world_size = dist.get_world_size()
    if args.n_kv_heads < world_size:
        raise UserError(
            f"{world_size} ranks cannot divide {args.n_kv_heads} heads of keys and values: "
            "start fewer"
        )
    return {name: narrow(weight, name, args) for name, weight in weights.items()}


def narrow(weight: Weight, name: str, args: ModelArgs) -> Weight:
    """This rank's part of a weight."""
    dim = split_dim(name)
    if dim is None or dim >= len(weight.shape):
        return weight
    unit, rest = divmod(weight.shape[dim], n_units(name, args))
    if rest:
        shape, world_size = tuple(weight.shape), dist.get_world_size()
        raise UserError(f"{world_size} ranks cannot divide {weight.name} of shape {shape}")
    start, end = (unit * bound for bound in bounds(n_units(name, args)))
    if start == end:
        raise UserError(
            f"{dist.get_world_size()} ranks are too many for {weight.name}: start fewer"
        )
    shape, parts = list(weight.shape), []
    shape[dim] = end - start
    for part in weight.parts:
        length = part.shape[dim]
        first, last = max(start, 0), min(end, length)
        if first < last:
            parts.append(part.narrow(dim, first, last - first))
        start, end = start - length, end - length
    return Weight(weight.name, parts, dim, torch.Size(shape), weight.mapped)


def shard_model(model: Transformer) -> None:
    """Give the parameters of a model on the meta device the shapes of this rank's parts."""
    for name, parameter in model.named_parameters():
        dim = split_dim(name)
        if dim is not None:
            units = n_units(name, model.args)
            start, end = (parameter.shape[dim] // units * bound for bound in bounds(units))
            parameter.data = parameter.data.narrow(dim, 0, end - start)


def split_corrections(layer: nn.Module, path: str) -> None:
    """Make the corrections of a quantized layer that is divided by inputs this rank's.

    The layer's y = Q r + C u, with u = U x, would need u of the whole input before r. With u and r
    of this rank's part of the input, and C + Q U^T (this rank's) - Q U^T (all ranks'), the sum over
    the ranks is the same.
    """
    if split_dim(f"{path}.weight") == 1 and hasattr(layer, "directions"):
        directions = layer.directions.float()
        local = torch.cat([F.linear(block, directions) for block in layer.blocks()])
        total = local.clone()
        dist.all_reduce(total)
        layer.corrections = layer.corrections + local - total


def parallelize(model: Transformer) -> None:
    """Let a model of this rank's parts compute what the whole model does."""
    args = model.args

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if output.nbytes > SMALL:
            dist.all_reduce(output)
            return output
        return torch.stack(exchange(output, output.shape[-1])).sum(0)

    def concatenate(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        total = args.dim if module is model.tok_embeddings else args.vocab_size
        return torch.cat(exchange(output, total), -1)

    start, end = bounds(args.n_kv_heads)
    model.args = replace(args, n_kv_heads=end - start)  # in the caches
    for layer in model.layers:
        layer.attention.wo.register_forward_hook(add)
        layer.feed_forward.w2.register_forward_hook(add)
    model.tok_embeddings.register_forward_hook(concatenate)
    model.output.register_forward_hook(concatenate)


def exchange(x: Tensor, total: int) -> list[Tensor]:
    """Every rank's x, sent to each other rank directly.

    x has either `total` columns on every rank or, of that many, this rank's part.

    Measured for 8 KB between two processes: 94 us; gloo's all_gather 209, all_reduce 334.
    """
    rank, world_size = world()
    x = x.contiguous()
    received, work = [], []
    for other in range(world_size):
        start, end = bounds(total, other) if x.shape[-1] != total else (0, total)
        received.append(x if other == rank else x.new_empty(*x.shape[:-1], end - start))
        if other != rank:
            work += [dist.irecv(received[other], other), dist.isend(x, other)]
    for request in work:
        request.wait()
    return received
