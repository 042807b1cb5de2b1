"""Tensor parallelism: several processes, the ranks, each with its share of every matrix.

What reads the residual stream (wq wk wv w1 w3 output) is divided by outputs, what writes it (wo w2)
by inputs, so that its partial results are summed: two all-reduces a layer (Megatron-LM, arXiv
1909.08053, section 3). torchrun starts the ranks; a process alone is rank 0 of 1, and pays nothing.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError
from .model import Transformer

BEAT = 1.0  # seconds between a rank's signs of life
PATIENCE = 12  # beats without one, and a rank has died


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun has started, if it has; only the first of them prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # `watch` sees to it
    store, rank, world = next(dist.rendezvous("env://"))
    forever = timedelta(days=365)  # `watch` finds out sooner than any timeout
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=forever)
    done = Event()
    watcher = Thread(target=watch, args=(store, rank, world, done), daemon=True)
    watcher.start()
    try:
        with open(os.devnull, "w") as null:
            out, err = (null, null) if rank else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                yield
        dist.barrier()
        done.set()
        watcher.join()
        dist.barrier()  # the store, on the first rank, is not gone before the last watcher
        dist.destroy_process_group()
    except UserError as error:
        time.sleep(3 * BEAT if rank else 0)  # most often the first rank has the same to say
        store.compare_set("failure", "", f"rank {rank}: {error}" if rank else str(error))
        done.wait()
    except RuntimeError:  # most often a rank is gone: `watch` says which, and ends this process
        time.sleep(2 * PATIENCE * BEAT)
        raise


def watch(store: dist.Store, rank: int, world: int, done: Event) -> None:
    """End this process when a rank has failed or died; the first that is left says which."""
    beats, quiet, terminated = [0] * world, [0] * world, 0
    while not done.wait(BEAT):
        # torchrun ends the ranks of a machine when it sees one die: time enough to see it, too.
        terminated += signal.SIGTERM in signal.sigpending()
        try:
            failure = store.get("failure").decode() if store.check(["failure"]) else ""
            before, beats = beats, [store.add(f"beat {i}", i == rank) for i in range(world)]
            quiet = [n + 1 if a == b else 0 for n, a, b in zip(quiet, before, beats)]
        except RuntimeError:  # the store is on the first rank's machine
            failure, quiet[0] = "", PATIENCE + 1
        dead = [i for i in range(world) if quiet[i] > (3 if terminated else PATIENCE)]
        failure = failure or "".join(f"rank {i} has died" for i in dead[:1])
        if failure and rank == min({*range(world)} - {*dead}):
            print(f"error: {failure}", file=sys.__stderr__, flush=True)
        if failure or terminated > 5:
            os._exit(1)


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(find: Callable, *args: object) -> Any:
    """What find(*args) is on the first rank, on every rank."""
    rank, world = place()
    found = [find(*args) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    return found[0]


def connect(model: Transformer) -> None:
    """Let a model whose matrices are one of several ranks' shares compute what the whole does."""

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        dist.all_reduce(output)

    def join(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        parts = [torch.empty_like(output) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, output)
        return torch.cat(parts, -1)

    model.args.n_kv_heads //= dist.get_world_size()  # in the caches
    for layer in model.layers:
        layer.attention.wo.register_forward_hook(add)
        layer.feed_forward.w2.register_forward_hook(add)
    model.tok_embeddings.register_forward_hook(join)
    model.output.register_forward_hook(join)
