"""The weights of a checkpoint: read by torch as memory maps, joined from shards."""

import ctypes
import math
import mmap
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .tokenizer import LFS_POINTER

FORMAT = "quantized.format"  # the version of a quantized checkpoint's format, one uint8
# Not weights: the model computes its own angles. Meta's 7B stores them for every layer.
UNUSED = ("rope.freqs", "rotary_emb.inv_freq")
BLOCK = 2**24  # elements copied at a time: bounds the memory that is held twice
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)


class Kind(NamedTuple):
    """What is special about a weight of shape (out_features, in_features)."""

    split_dim: int | None  # the dimension that Meta's shards, and our ranks, divide
    split_by: str  # what that dimension consists of: dim, heads, hidden or vocab
    min_bits: int  # the fewest that quantization may leave


WEIGHTS = {
    "tok_embeddings": Kind(1, "dim", 8),
    "attention_norm": Kind(None, "", 16),
    "wq": Kind(0, "heads", 4),
    "wk": Kind(0, "heads", 4),
    "wv": Kind(0, "heads", 4),
    "wo": Kind(1, "heads", 4),
    "ffn_norm": Kind(None, "", 16),
    "w1": Kind(0, "hidden", 4),
    "w2": Kind(1, "hidden", 4),
    "w3": Kind(0, "hidden", 4),
    "norm": Kind(None, "", 16),
    "output": Kind(0, "vocab", 8),
}
# The dimensions of a module's tensors that go with (out_features, in_features); None: neither.
BUFFERS = {"weight": (0, 1), "scales": (0, None), "groups": (1, 0), "directions": (None, 1)}
BUFFERS["corrections"] = (0, None)


def split_dim(name: str) -> int | None:
    """The dimension of the tensor `name` that shards and ranks divide. None: every shard has all of it."""
    kind, buffer = f".{name}".split(".")[-2:]
    dim = WEIGHTS[kind].split_dim if kind in WEIGHTS else None
    return None if dim is None else BUFFERS.get(buffer, (None, None))[dim]


@dataclass
class Weight:
    """A tensor of a checkpoint, in one part or in as many as there are shards.

    Args:
        name: For errors.
        parts: The shards' tensors, usually memory maps of their files.
        dim: The dimension in which the parts are concatenated.
        shape: Of the whole. A part may be a view with more dimensions, such as permuted q and k.
        mapped: The parts are memory maps, whose pages can be dropped.
    """

    name: str
    parts: list[Tensor]
    dim: int
    shape: torch.Size
    mapped: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def copy_to(self, out: Tensor) -> Tensor:
        """Copy into a tensor of the same shape and any float dtype, then drop the parts' pages."""
        sizes = [self.shape[self.dim] // len(self.parts)] * len(self.parts)
        if len(self.parts) > 1:
            sizes = [part.shape[self.dim] for part in self.parts]
        for part, target in zip(self.parts, out.split(sizes, self.dim)):
            n_rows = max(BLOCK * len(part) // part.numel(), 1)
            blocks = zip(target.view(part.shape).split(n_rows), part.split(n_rows))
            for target_rows, rows in blocks:
                target_rows.copy_(rows)
                if self.mapped:
                    drop_pages(rows)
        if out.is_floating_point() and not all(x.isfinite() for x in out.aminmax()):
            if all(part.isfinite().all() for part in self.parts):
                raise UserError(f"{self.name} has values that are too large for {out.dtype}")
            raise UserError(f"{self.name} has NaN or Inf in it: the file is damaged")
        return out

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.copy_to(torch.empty(self.shape, dtype=dtype))


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory that reading a mapped tensor has filled. The file keeps the bytes."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    n_elements = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1
    first = math.ceil(tensor.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = tensor.data_ptr() + n_elements * tensor.itemsize - first
    if n_bytes > 0:
        address = ctypes.c_void_p(first)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(n_bytes), mmap.MADV_DONTNEED)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a .pth file, and whether they are memory maps of it.

    Raises:
        UserError: torch.load(weights_only=True) does not read the file as a dict of tensors.
    """
    check_regular(path)
    mapped = is_mappable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged, or holds objects other than tensors, which could run code"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever torch raises for a damaged file)
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint: {reason:.200}") from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    # Numbers beside the weights, such as a step counter, are not for us.
    return {str(k): t for k, t in found.items() if isinstance(t, Tensor) and t.dim() > 0}, mapped


def is_plain(tensor: Tensor) -> bool:
    """True if a tensor's elements are all there, and of a dtype that weights have."""
    return tensor.dtype in DTYPES and tensor.layout == torch.strided and not tensor.is_meta


def check_regular(path: Path) -> None:
    """Refuse what is not a file with contents of its own: a FIFO would be waited for for ever."""
    if not path.is_file():
        kind = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"{path} {kind}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, not the file: run git lfs pull")


def is_mappable(path: Path) -> bool:
    """True if torch.load(mmap=True) reads the file right: a zip file without compression."""
    try:
        str(path).encode()  # torch maps only files whose names are UTF-8
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == 0 for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def open_checkpoint(paths: list[Path]) -> dict[str, Weight]:
    """Open every weight that the files, shards of one model, hold together, by name.

    Raises:
        UserError: A file cannot be read, or the shards do not belong together.
    """
    shards, maps = zip(*(read_tensors(path) for path in paths))
    weights = {}
    for name, first in shards[0].items():
        if name.endswith(UNUSED):
            continue
        parts = [shard.get(name) for shard in shards]
        dim = split_dim(name)
        for path, part in zip(paths, parts):
            if part is None or (part.shape, part.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{path} and {paths[0]} are not shards of one model: {name} differs"
                )
            if not is_plain(part) or not part.numel():
                kind = f"{part.layout} {part.dtype} {tuple(part.shape)} on {part.device}"
                raise UserError(f"{path}: {name:.60} is {kind}, which is not a weight of LLaMA's")
        if dim is None or dim >= first.dim():
            if name == "norm.weight":
                check_same(name, parts, paths)
            parts, dim = parts[:1], 0
        shape = list(first.shape)
        shape[dim] *= len(parts)
        weights[name] = Weight(
            f"{paths[0].parent}: {name}", parts, dim, torch.Size(shape), all(maps)
        )
    for path, shard in zip(paths, shards):
        if extra := [n for n in shard if n not in weights and not n.endswith(UNUSED)]:
            raise UserError(
                f"{path} and {paths[0]} are not shards of one model: {extra[0]} differs"
            )
    return weights


def check_same(name: str, parts: list[Tensor], paths: list[Path]) -> None:
    """Refuse shards of different models: what all shards have should be the same in all."""
    first = parts[0].float()
    for part, path in zip(parts, paths):
        if (part.float() - first).norm() > 0.1 * first.norm():
            raise UserError(f"{path} and {paths[0]} are shards of different models: {name} differs")


def is_quantized(weights: Mapping[str, Weight | Tensor]) -> bool:
    return not all(w.dtype.is_floating_point for n, w in weights.items() if n != FORMAT)
