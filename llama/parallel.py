"""Tensor parallelism: several processes, the ranks, each with its share of every matrix.

What reads the residual stream (wq wk wv w1 w3 output) is divided by outputs, what writes it (wo w2)
by inputs, so that its partial results are summed: two all-reduces a layer (Megatron-LM, arXiv
1909.08053, section 3). torchrun starts the ranks; a process alone is rank 0 of 1, and pays nothing.
"""

import json
import mmap
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError, one_line
from .model import Transformer

BEAT = 1.0  # seconds between a rank's signs of life
SLOT = 2**20  # bytes up to which what ranks send one another takes the time of a message
PAGE = mmap.PAGESIZE
PATIENCE = 12  # beats without one, and a rank has died


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun has started, if it has; only the first of them prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    bind()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # `watch` sees to it
    store, rank, world = next(dist.rendezvous("env://"))
    forever = timedelta(days=365)  # `watch` finds out sooner than any timeout
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=forever)
    global board
    board = Board() if Board.possible() else None
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
    except (UserError, OSError) as error:
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
            print(f"error: {one_line(failure)}", file=sys.__stderr__, flush=True)
        if failure or terminated > 5:
            os._exit(1)


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(find: Callable, *args: object) -> Any:
    """What find(*args) is on the first rank, on every rank."""
    rank, world = place()
    found = find(*args) if rank == 0 else None
    if world == 1:
        return found
    content = bytearray(json.dumps(found).encode())  # as broadcast_object_list, without NumPy
    size = torch.tensor(len(content))
    dist.broadcast(size, 0)
    data = (
        torch.frombuffer(content, dtype=torch.uint8)
        if rank == 0
        else torch.empty(size, dtype=torch.uint8)
    )
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def agreed(tokens: Tensor) -> list[int]:
    """The first rank's, on every rank: sampling may differ in a last bit between CPUs."""
    return (gather(tokens)[0] if place()[1] > 1 else tokens).tolist()


def connect(model: Transformer) -> None:
    """Let a model whose matrices are one of several ranks' shares compute what the whole does."""

    def add(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.nbytes > SLOT:  # bound by bytes, of which a ring moves fewer
            dist.all_reduce(output)
        else:
            torch.sum(gather(output), 0, out=output)

    def join(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return torch.cat(tuple(gather(output)), -1)

    model.args.n_kv_heads //= dist.get_world_size()  # in the caches
    for layer in model.layers:
        layer.attention.wo.register_forward_hook(add)
        layer.feed_forward.w2.register_forward_hook(add)
    model.tok_embeddings.register_forward_hook(join)
    model.output.register_forward_hook(join)


class Board:
    """Memory that all ranks share, if they are on one machine: each writes where all others read.

    A message through it takes microseconds, not a tenth of a millisecond. Two sides take turns: who
    writes on one again has seen all others write on the other, and so be done with reading this.
    """

    @staticmethod
    def possible() -> bool:
        together = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        in_order = platform.machine() == "x86_64"  # a core sees another's writes as they were made
        return together and in_order and hasattr(os, "memfd_create")

    def __init__(self):
        self.rank, world = place()
        path = from_first(lambda: f"/proc/{os.getpid()}/fd/{os.memfd_create('board')}")
        with open(path, "r+b") as file:
            file.truncate(PAGE + 2 * world * SLOT)
            shared = mmap.mmap(file.fileno(), PAGE + 2 * world * SLOT)
        self.turns = memoryview(shared)[: 8 * world].cast("q")  # of each rank, how many it wrote
        self.sides = torch.frombuffer(shared, dtype=torch.uint8, offset=PAGE).view(2, world, SLOT)

    def gather(self, x: Tensor) -> Tensor:
        """See the function of this name."""
        turn = self.turns[self.rank] + 1
        parts = self.sides[turn % 2, :, : x.nbytes].view(x.dtype).unflatten(1, x.shape)
        parts[self.rank] = x
        self.turns[self.rank] = turn
        while min(self.turns) < turn:
            os.sched_yield()
        return parts


board: Board | None = None  # where `joined` found that there can be one


def gather(x: Tensor) -> Tensor:
    """Every rank's x, to be used before the next call but one: (world, *x.shape).

    All at once: a ring would wait for one after another.
    """
    if board and x.nbytes <= SLOT:
        return board.gather(x)
    world = dist.get_world_size()
    parts = x.new_empty(world, *x.shape)
    copies = x.expand(parts.shape).contiguous()
    work = dist.all_to_all_single(parts, copies, async_op=True)
    while not work.is_completed():  # a sleeping core would take longer to wake up
        os.sched_yield()
    work.wait()
    return parts


def bind() -> None:
    """Keep the ranks of one machine to cores of their own, and so to the memory nearest to them.

    Else two of them meet on one core now and then, and all wait. What has bound this process to
    fewer cores than there are, such as numactl, has its reasons.
    """
    rank, n_ranks = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    cores = cores_by_node()
    if n_ranks <= len(cores) and {*cores} == os.sched_getaffinity(0):
        first, end = (n * len(cores) // n_ranks for n in (rank, rank + 1))
        os.sched_setaffinity(0, cores[first:end])


def cores_by_node(root: Path = Path("/sys/devices/system/node")) -> list[int]:
    """The machine's cores, those of one socket after another's; none where Linux does not tell."""
    cores = []
    for node in sorted(root.glob("node[0-9]*/cpulist")):
        for span in node.read_text().strip().split(","):  # such as 0-15,32-47
            first, _, last = span.partition("-")
            cores += range(int(first), int(last or first) + 1) if span else ()
    return cores
