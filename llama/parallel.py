"""Tensor parallelism: several processes, the ranks, each with its part of every matrix.

Matrices that read the residual stream (wq wk wv w1 w3 output) are column-parallel, those that write
it (wo w2) are row-parallel: their partial results are summed by two all-reduces a layer
(Megatron-LM, arXiv 1909.08053, section 3). torchrun starts the ranks.
"""

import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError
from .model import ModelArgs, Transformer
from .weights import HEADS, HIDDEN, OUTPUTS, WEIGHTS, Weight, as_bytes, split_dim

SMALL = 2**17  # bytes: every rank sends before it receives, so a send buffer must hold them
TIMEOUT = timedelta(days=1)  # of a rank that waits, in a chat for the user's next line
store: dist.Store | None = None  # of the running ranks
links: dict[int, socket.socket] = {}  # to every other rank


@contextmanager
def init_distributed() -> Iterator[None]:
    """Join the ranks that torchrun has started. Only rank 0 prints."""
    global store
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    signal.signal(signal.SIGTERM, raise_ended)  # torchrun's, when another rank has ended
    connect(store)
    with open(os.devnull, "w") as null:
        out, err = (null, null) if rank else (sys.stdout, sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            yield
    dist.barrier()
    dist.destroy_process_group()


def connect(store: dist.Store) -> None:
    """Open a TCP connection to every other rank."""
    rank = dist.get_rank()
    with socket.create_server(("", 0)) as server:
        store.set(f"address {rank}", json.dumps([own_host(), server.getsockname()[1]]))
        for other in range(rank):
            links[other] = socket.create_connection(json.loads(store.get(f"address {other}")))
            links[other].sendall(rank.to_bytes(4, "big"))
        while len(links) < dist.get_world_size() - 1:
            link, _ = server.accept()
            if name := link.recv(4, socket.MSG_WAITALL):  # not a port scanner
                links[int.from_bytes(name, "big")] = link
    for link in links.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * SMALL)


def own_host() -> str:
    """The name or address under which other machines find this one."""
    master = os.environ["MASTER_ADDR"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, int(os.environ["MASTER_PORT"])))  # sends nothing
        host = probe.getsockname()[0]
    return master if host.startswith("127.") else host


def raise_ended(*_: object) -> None:
    raise UserError("another rank has ended, and so does this one")


def first_to_report() -> bool:
    """True on the first rank that asks: an error that ends all ranks is printed once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second error must not hide the first
    try:
        rank = os.environ["RANK"]
        return store is None or store.compare_set("reported", "", rank) == rank.encode()
    except RuntimeError:  # the store is gone, with rank 0
        return True


def broadcast_from_rank0(function: Callable, *args: object) -> Any:
    """The JSON value that function(*args) returns on rank 0, on every rank."""
    is_first = dist.get_rank() == 0
    content = json.dumps(function(*args)).encode() if is_first else b""
    size = torch.tensor(len(content))
    dist.broadcast(size, 0)
    data = torch.tensor(list(content) if is_first else [0] * int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def offset(n_units: int, rank: int) -> int:
    """The first of n units that belongs to a rank."""
    return rank * n_units // dist.get_world_size()


def shard_range(name: str, shape: torch.Size, args: ModelArgs) -> tuple[int, int, int] | None:
    """The dimension in which ranks divide a tensor, and where this rank's part starts and ends.

    Returns:
        None if every rank has all of it.
    Raises:
        UserError: There are too many ranks, or quantized groups cannot be divided like that.
    """
    dim, spec = split_dim(name), WEIGHTS.get(f".{name}".split(".")[-2])
    if dim is None or not spec.unit:
        return None
    # Ranks get whole heads, whole outputs, and multiples of 64 hidden features (int4's groups).
    hidden = args.hidden_dim // math.gcd(args.hidden_dim, 64)
    n_units = {HEADS: args.n_kv_heads, HIDDEN: hidden, OUTPUTS: args.vocab_size}[spec.unit]
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    starts = [offset(n_units, n) * shape[dim] for n in range(n_ranks + 1)]
    if n_units < n_ranks:
        raise UserError(f"the model has {n_units} {spec.unit} for {n_ranks} ranks: start fewer")
    if any(start % n_units for start in starts):
        raise UserError(
            f"{n_ranks} ranks cannot divide {name} {tuple(shape)}, which consists of {n_units} "
            f"{spec.unit}: start fewer"
        )
    return dim, starts[rank] // n_units, starts[rank + 1] // n_units


def shard_weights(weights: dict[str, Weight], args: ModelArgs) -> dict[str, Weight]:
    """This rank's part of every weight."""
    if len(links) < dist.get_world_size() - 1:
        raise UserError(
            "the ranks are not connected: start them by llama.parallel.init_distributed"
        )
    parts = {}
    for name, weight in weights.items():
        parts[name] = weight
        if where := shard_range(name, weight.shape, args):
            dim, start, end = where
            shape, tensors = list(weight.shape), []
            shape[dim] = end - start
            # Dimension 0 of a permuted q or k counts heads, each of n_rows rows.
            n_rows = weight.shape[dim] // sum(part.shape[dim] for part in weight.parts)
            start, end = start // n_rows, end // n_rows
            for tensor in weight.parts:
                length = tensor.shape[dim]
                first, last = max(start, 0), min(end, length)
                if first < last:
                    tensors.append(tensor.narrow(dim, first, last - first))
                start, end = start - length, end - length
            parts[name] = Weight(weight.name, tensors, dim, torch.Size(shape), weight.mapped)
    return parts


def shard_model(model: Transformer) -> None:
    """Give the tensors of a model on the meta device the shapes of this rank's parts."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if where := shard_range(name, tensor.shape, model.args):
            dim, start, end = where
            tensor.data = tensor.data.narrow(dim, start, end - start)
    n_kv_heads, rank = model.args.n_kv_heads, dist.get_rank()
    n_kv_heads = offset(n_kv_heads, rank + 1) - offset(n_kv_heads, rank)
    model.args = replace(model.args, n_kv_heads=n_kv_heads)  # in the caches


def split_outliers(model: Transformer, args: ModelArgs) -> None:
    """Keep this rank's outlier channels of row-parallel quantized layers (wo, w2)."""
    for path, layer in model.named_modules():
        if hasattr(layer, "outliers") and split_dim(f"{path}.weight") == 1:
            shape = torch.Size((0, layer.in_features))
            _, start, end = shard_range(f"{path}.weight", shape, args)
            mine = (start <= layer.outliers) & (layer.outliers < end)
            layer.outliers = layer.outliers[mine] - start
            layer.outlier_weights = layer.outlier_weights[mine]


def parallelize(model: Transformer) -> None:
    """Add the communication with which models of the ranks' parts compute the whole logits."""
    vocab_size, rank = model.args.vocab_size, dist.get_rank()
    zeros = (offset(vocab_size, rank), vocab_size - offset(vocab_size, rank + 1))
    add_all_reduces(model)
    model.output.register_forward_hook(lambda _, inputs, part: all_reduce(F.pad(part, zeros)))


def add_all_reduces(model: Transformer) -> None:
    """Sum the partial results of wo and w2 over the ranks."""
    for layer in model.layers:
        for module in (layer.attention, layer.feed_forward):
            module.register_forward_hook(lambda module, inputs, output: all_reduce(output))


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the ranks: small tensors by the sockets, others by gloo.

    gloo receives on a thread of its own, which waits for a core if all cores compute. With its
    isend and irecv the 33 exchanges of an int8 token took 49 ms (953M parameters, two ranks). With
    the sockets the whole token takes 62, in one process 60.
    """
    x = x.contiguous()
    if x.nbytes > SMALL:
        dist.all_reduce(x)
        return x
    tensors = {rank: torch.empty_like(x) for rank in links} | {dist.get_rank(): x}
    try:
        for link in links.values():
            link.sendall(as_bytes(x))
        for rank, link in links.items():
            if link.recv_into(as_bytes(tensors[rank]), x.nbytes, socket.MSG_WAITALL) < x.nbytes:
                raise ConnectionError
    except ConnectionError:
        raise UserError("the connection to another rank is lost: it has ended") from None
    return torch.stack([tensors[rank] for rank in sorted(tensors)]).sum(0)
