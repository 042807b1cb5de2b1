"""How weights lie on disk: finding them, reading them block by block, merging their shards.

Meta's checkpoints are zip files written by torch.save. Their index alone is unpickled (weights_only,
onto the meta device); the bytes of each tensor are then read from where the index says they lie, a
block of rows at a time, straight into the tensor's final form.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from .errors import UserError
from .generation import LLaMA
from .linear import tune
from .model import ModelArgs, Transformer
from .parallel import connect, place
from .quantize import form_of, norm_before, turned, use_forms
from .tokenizer import Tokenizer

SPLIT_DIM = {  # the dimension on which Meta's shards divide a weight of shape (out, in)
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "tok_embeddings": 1,
}
UNUSED = {"rope.freqs"}  # in every shard, the same, and computed anew by the model
SHARDS = {"7B": 1, "13B": 2, "30B": 4, "34B": 4, "65B": 8, "70B": 8}
BLOCK = 2**22  # bytes read at once: much for the disk, little for the caches


class Stored(NamedTuple):
    """Where one tensor lies in a file."""

    path: Path
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    stride: int | None = None  # bytes from row to row, where there is something between them

    def rows(self, start: int, end: int) -> Tensor:
        """Rows start to end, read from the file."""
        n_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        stride = self.stride or n_bytes
        n_rows = 1 if stride > n_bytes else end - start  # that a read takes
        buffer = bytearray((end - start) * n_bytes)
        with self.path.open("rb", buffering=0) as file:
            for row in range(0, end - start, n_rows):
                file.seek(self.offset + (start + row) * stride)
                view = memoryview(buffer)[row * n_bytes :][: n_rows * n_bytes]
                while view:
                    n_read = file.readinto(view)
                    if not n_read:
                        raise UserError(f"{self.path} ends too early: copy or download it again")
                    view = view[n_read:]
        return torch.frombuffer(buffer, dtype=self.dtype).view(end - start, *self.shape[1:])

    def narrow(self, dim: int, start: int, end: int) -> "Stored":
        """What of it is from start to end on dim 0 or 1."""
        stride = self.stride or prod(self.shape[1:]) * self.dtype.itemsize
        step = prod(self.shape[2:]) * self.dtype.itemsize if dim == 1 else stride
        shape = torch.Size([*self.shape[:dim], end - start, *self.shape[dim + 1 :]])
        return Stored(self.path, self.offset + start * step, shape, self.dtype, stride)


@dataclass
class Weight:
    """One weight of the model, in one piece or in as many as there are shards."""

    pieces: list[Stored]
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def shape(self) -> torch.Size:
        shape = list(self.pieces[0].shape)
        shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return torch.Size(shape)

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def part(self, rank: int, world: int) -> "Weight":
        """The rank's share, out of the pieces where it lies."""
        size = self.shape[self.dim] // world
        start, end = rank * size, (rank + 1) * size
        pieces = []
        for piece in self.pieces:
            length = piece.shape[self.dim]
            if start < length and end > 0:
                pieces.append(piece.narrow(self.dim, max(start, 0), min(end, length)))
            start, end = start - length, end - length
        return Weight(pieces, self.dim)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The whole weight as blocks of rows, each with the number of its first row."""
        if self.dim == 0:
            first = 0
            for piece in self.pieces:
                for start, end in self._ranges(piece.shape[0]):
                    yield first + start, piece.rows(start, end)
                first += piece.shape[0]
        else:
            for start, end in self._ranges(self.shape[0]):
                yield start, torch.cat([piece.rows(start, end) for piece in self.pieces], dim=1)

    def _ranges(self, n_rows: int) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK // (prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, n_rows, step):
            yield start, min(start + step, n_rows)

    def copy_to(self, out: Tensor) -> Tensor:
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.copy_to(torch.empty(self.shape, dtype=dtype))


def read_index(path: Path) -> dict[str, Stored]:
    """Name, place, shape and type of each tensor of a .pth file, without its bytes."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip file")
        tensors = torch.load(path, map_location="meta", weights_only=True)
        index = {}
        for name, tensor in tensors.items():
            begin = tensor.untyped_storage()._checkpoint_offset
            offset = begin + tensor.storage_offset() * tensor.itemsize
            if not tensor.is_contiguous() or offset + tensor.nbytes > path.stat().st_size:
                raise ValueError(f"{name} is not whole")
            index[name] = Stored(path, offset, tensor.shape, tensor.dtype)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a readable checkpoint ({reason}): get it again") from error
    return index


def find_files(ckpt_dir: Path) -> list[Path]:
    """merged.pth where there is one, otherwise all shards in their order."""
    merged = ckpt_dir / "merged.pth"
    return [merged] if merged.exists() else sorted(ckpt_dir.glob("consolidated.*.pth"))


def open_checkpoint(paths: list[Path]) -> dict[str, Weight]:
    """Every weight that the files, shards of one model, hold together."""
    shards = [read_index(path) for path in paths]
    weights = {}
    for name in shards[0]:
        pieces = [shard[name] for shard in shards]
        dim = SPLIT_DIM.get(name.split(".")[-2]) if len(pieces[0].shape) > 1 else None
        weights[name] = Weight(pieces[:1], 0) if dim is None else Weight(pieces, dim)
    return weights


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it belongs beside the weights") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): get it again") from None


def read_params(ckpt_dir: Path, n_words: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """Meta's params.json, where `sliding_window` may say which context is the longest to run.

    It is Mistral's name for how many tokens back a token attends to: up to there to all of them,
    as LLaMA's do.
    """
    path = ckpt_dir / "params.json"
    params = read_json(path)
    window = params.pop("sliding_window", None) or max_seq_len
    known = {field.name for field in fields(ModelArgs)}
    unknown = sorted(params.keys() - known)
    if unknown:
        raise UserError(f"{path} has keys that this program does not know: {', '.join(unknown)}")
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = n_words
    if params["vocab_size"] < n_words:
        raise UserError(
            f"{path}: vocab_size is {params['vocab_size']}, but the tokenizer has {n_words} "
            "pieces: it is another model's"
        )
    if max_seq_len > window:
        raise UserError(f"--max_seq_len takes at most {window}, the sliding_window of {path}")
    return ModelArgs(**params | {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size})


def share(name: str, weight: Weight, rank: int, world: int) -> Weight:
    """What a rank has of a weight: an equal part, or all of it where Meta's shards have all."""
    dim = SPLIT_DIM.get(name.split(".")[-2])
    if dim is None or dim >= len(weight.shape):
        return weight
    if weight.shape[dim] % world:
        raise UserError(f"{world} ranks cannot share {name} of shape {tuple(weight.shape)} alike")
    return weight.part(rank, world)


def layout(
    weights: dict[str, Weight], dtype: torch.dtype | None, quantize: str | None
) -> dict[str, Tensor]:
    """What `fill` will make of the weights: names, shapes and types, on the meta device."""
    state = {}
    with torch.device("meta"):
        for name, weight in weights.items():
            if form := quantize and form_of(name, weight.shape, quantize):
                state |= form(*weight.shape).state_dict(prefix=name.removesuffix("weight"))
            else:
                state[name] = torch.empty(weight.shape, dtype=final_dtype(name, weight, dtype))
    return state


def allocate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}


def fill(
    state: dict[str, Tensor],
    name: str,
    weights: dict[str, Weight],
    quantize: str | None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Read a weight, or a rank's share of it, into those tensors of the state that hold it."""
    weight = share(name, weights[name], rank, world)
    form = quantize and form_of(name, weight.shape, quantize)
    if quantize and not form:  # a norm, whose gain is in the matrices that follow
        state[name].fill_(1)
    elif not form:
        weight.copy_to(state[name])
    else:
        whole_rows = name.startswith("tok_embeddings")  # which R turns, before they are divided
        source = weights[name] if whole_rows else weight
        norm = norm_before(name)
        gain = weights[norm].read(torch.float32) if norm else None
        for start, block in turned(name, source, gain):
            for key, part in form.quantize(block).items():
                if whole_rows and part.dim() == 2:
                    part = part.chunk(world, 1)[rank]
                state[name.removesuffix("weight") + key][start : start + len(part)] = part


def final_dtype(name: str, weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    """dtype for floating-point weights; what quantized ones consist of stays as it is."""
    converts = dtype and name.endswith(".weight") and weight.dtype.is_floating_point
    return dtype if converts else weight.dtype


def load(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path,
    max_seq_len: int = 512,
    max_batch_size: int = 32,
    quantize: str | None = None,
) -> LLaMA:
    """The model in ckpt_dir, in the default dtype, with its tokenizer."""
    ckpt_dir = Path(ckpt_dir)
    tokenizer = Tokenizer(tokenizer_path)
    args = read_params(ckpt_dir, tokenizer.n_words, max_seq_len, max_batch_size)
    weights = open_checkpoint(find_files(ckpt_dir))
    for name in UNUSED & weights.keys():
        del weights[name]
    dtype = torch.get_default_dtype()
    rank, world = place()
    if args.n_heads % world or args.n_kv_heads % world:
        heads = f"{args.n_heads} heads, {args.n_kv_heads} of keys and values"
        raise UserError(f"{world} ranks cannot share {heads}: start a number that divides both")
    shares = {name: share(name, weight, rank, world) for name, weight in weights.items()}
    state = layout(shares, dtype, quantize)
    with torch.device("meta"):
        model = Transformer(args)
        use_forms(model, state)

    # All at once: what is allocated among a load's many short-lived blocks would leave holes.
    state = allocate(state)
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in dict(module.named_parameters(recurse=False)):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, key, tensor)
    total = sum(weight.n_bytes for weight in shares.values())
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, weight in shares.items():
            fill(state, name, weights, quantize, rank, world)
            bar.update(weight.n_bytes)
    if world > 1:
        connect(model)
    return LLaMA(model.eval(), tokenizer, tune(model))


def merge(
    input_dir: Path,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the shards in input_dir as one output_dir/merged.pth."""
    weights = open_checkpoint(sorted(input_dir.glob("consolidated.*.pth")))
    return write_merged(weights, output_dir, dtype, quantize, overwrite)


def write_merged(
    weights: dict[str, Weight],
    output_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the weights as one output_dir/merged.pth, in little memory."""
    target = output_dir / "merged.pth"
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists: move it away, or give --overwrite")
    state = layout(weights, dtype, quantize)
    total = sum(tensor.nbytes for tensor in state.values())
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < total:
        raise UserError(f"{target} needs {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    partial = target.with_name(f".merged.pth.{os.getpid()}")
    try:
        reserve(partial, state)
        places = read_index(partial)
        with (
            partial.open("r+b", buffering=0) as file,
            tqdm(desc="merging", total=total, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for weight_name, weight in weights.items():
                part = allocate(layout({weight_name: weight}, dtype, quantize))
                fill(part, weight_name, weights, quantize)
                for name, tensor in part.items():
                    file.seek(places[name].offset)
                    for block in tensor.flatten().split(BLOCK // tensor.itemsize):
                        buffer = bytearray(block.nbytes)
                        torch.frombuffer(buffer, dtype=block.dtype).copy_(block)
                        file.write(buffer)
                        bar.update(block.nbytes)
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def reserve(path: Path, state: dict[str, Tensor]) -> None:
    """A checkpoint with the index of these tensors, and holes where their bytes will be."""
    with FakeTensorMode():
        fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
