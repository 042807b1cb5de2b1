"""The weights of a checkpoint: read by torch as memory maps, joined from shards."""

import ctypes
import math
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError, check_file

FORMAT_KEY = (
    "quantized.format"  # marks a quantized checkpoint: the version of its format, one uint8
)
# Not weights: the model computes its own angles. Meta's 7B stores them for every layer.
UNUSED_SUFFIXES = ("rope.freqs", "rotary_emb.inv_freq")
COPY_SIZE = 2**22  # elements that are copied at once: bounds the memory that is held twice
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES += (torch.int8, torch.uint8, torch.int64)  # of quantized checkpoints


class WeightSpec(NamedTuple):
    """How a weight of shape (out_features, in_features) is divided."""

    split_dim: int  # the dimension that Meta's shards divide
    unit: str | None  # ranks do not divide it further. None: every rank has the whole weight


HEADS, HIDDEN, OUTPUTS = "key-value heads", "blocks of hidden features", "outputs"
WEIGHTS = {  # norms are not here: they are whole in every shard
    "tok_embeddings": WeightSpec(1, None),
    "wq": WeightSpec(0, HEADS),
    "wk": WeightSpec(0, HEADS),
    "wv": WeightSpec(0, HEADS),
    "wo": WeightSpec(1, HEADS),
    "w1": WeightSpec(0, HIDDEN),
    "w2": WeightSpec(1, HIDDEN),
    "w3": WeightSpec(0, HIDDEN),
    "output": WeightSpec(0, OUTPUTS),
}
# For each tensor of a layer: its dimension of out_features, and that of in_features.
TENSOR_DIMS = {
    "weight": (0, 1),
    "scales": (0, None),
    "groups": (1, 0),
    "outliers": (None, None),
    "outlier_weights": (1, None),
}


def split_dim(name: str) -> int | None:
    """The dimension of a tensor that shards and ranks divide. None: every shard has all of it."""
    module, tensor = f".{name}".split(".")[-2:]
    if module not in WEIGHTS or tensor not in TENSOR_DIMS:
        return None
    return TENSOR_DIMS[tensor][WEIGHTS[module].split_dim]


@dataclass
class Weight:
    """A tensor of a checkpoint, in one part or in as many as there are shards.

    Args:
        name: For errors.
        parts: The shards' tensors, usually memory maps of their files.
        dim: The dimension in which the parts are concatenated.
        shape: Of the whole, 2-dimensional even if its part is a permuted view
            (llama/huggingface.py).
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

    def read(self, dtype: torch.dtype) -> Tensor:
        """The whole tensor. Releases the pages of the files that it has read.

        Raises:
            UserError: A value is not finite in this dtype.
        """
        out = torch.empty(self.shape, dtype=dtype)
        sizes = [part.shape[self.dim] for part in self.parts]
        targets = out.split(sizes, self.dim) if len(sizes) > 1 else [out]
        for part, target in zip(self.parts, targets):
            n_rows = max(COPY_SIZE * len(part) // part.numel(), 1)
            blocks = zip(target.view(part.shape).split(n_rows), part.split(n_rows))
            for target_rows, rows in blocks:
                target_rows.copy_(rows)
                if self.mapped:
                    drop_pages(rows)
        if dtype.is_floating_point and not all(x.isfinite() for x in out.aminmax()):
            if all(part.isfinite().all() for part in self.parts):
                raise UserError(f"{self.name} has values that are too large for {dtype}")
            raise UserError(f"{self.name} has NaN or Inf in it: the file is damaged")
        return out


def as_bytes(tensor: Tensor) -> ctypes.Array:
    """The memory of a contiguous tensor."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def drop_pages(tensor: Tensor) -> None:
    """Release the pages of a mapped tensor that were read. The file keeps the bytes."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    n_elements = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1
    first = math.ceil(tensor.data_ptr() / mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = tensor.data_ptr() + n_elements * tensor.itemsize - first
    if n_bytes > 0:
        address, size = ctypes.c_void_p(first), ctypes.c_size_t(n_bytes)
        ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a .pth file, and whether they are memory maps of it.

    Raises:
        UserError: torch.load(weights_only=True) does not read the file as a dict of tensors.
    """
    check_file(path)
    mapped = is_mappable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is damaged (download it again), or holds objects other than tensors, which "
            "could run code"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever torch raises for a damaged file)
        reason = re.split(r"\.?\s*\n|\. ", str(error))[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason:.200}): if it is incomplete, copy or "
            "download it again"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    # Scalars, such as a step counter, are not weights.
    tensors = {str(k): t.detach() for k, t in found.items() if isinstance(t, Tensor) and t.dim()}
    return tensors, mapped


def is_mappable(path: Path) -> bool:
    """True if torch.load(mmap=True) reads the file correctly: a zip file without compression."""
    try:
        str(path).encode()  # torch maps only files whose names are UTF-8
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == 0 for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def check_tensor(tensor: Tensor, label: str) -> None:
    """Refuse a tensor that cannot be a weight."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
        raise UserError(f"{label} is {kind}, which is not supported")
    if not tensor.numel():
        raise UserError(f"{label} is empty")


def open_shards(paths: list[Path]) -> dict[str, Weight]:
    """Map each name to its Weight, joined from the files, which are the shards of one model.

    Raises:
        UserError: A file cannot be read, a shard is missing, or they do not belong together.
    """
    for number, path in enumerate(paths):
        if path.name not in ("merged.pth", f"consolidated.{number:02}.pth"):
            raise UserError(f"{path} exists, but consolidated.{number:02}.pth is missing")
    shards, maps = zip(*(read_tensors(path) for path in paths))
    weights = {}
    for name in dict.fromkeys(chain(*shards)):
        if name.endswith(UNUSED_SUFFIXES):
            continue
        parts = [shard.get(name) for shard in shards]
        kinds = [part is not None and (part.shape, part.dtype) for part in parts]
        differing = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), None)
        if differing is None:
            check_tensor(parts[0], f"{paths[0]}: {name:.60}")
        if differing is None and name == "norm.weight":  # the same in all shards of one model
            differing = next(
                (n for n, part in enumerate(parts) if is_different(part, parts[0])), None
            )
        if differing is not None:
            raise UserError(
                f"{paths[differing]} and {paths[0]} are not shards of one model: {name:.60} differs"
            )
        dim, shape = split_dim(name), list(parts[0].shape)
        if dim is None or dim >= len(shape):
            dim, parts = 0, parts[:1]
        shape[dim] *= len(parts)
        label = f"{paths[0].parent}: {name}"
        weights[name] = Weight(label, parts, dim, torch.Size(shape), all(maps))
    return weights


def is_different(x: Tensor, y: Tensor) -> bool:
    return bool((x.float() - y.float()).norm() > 0.1 * y.float().norm())


def quantization_of(weights: Mapping[str, Weight]) -> str | None:
    """The quantization scheme of a checkpoint's weights: int8, int4 or None."""
    tensors = {name.rpartition(".")[2] for name in weights}
    return "int4" if "groups" in tensors else "int8" if "scales" in tensors else None
