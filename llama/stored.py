"""Tensors in files: where each lies, and its bytes, read a block of rows at a time.

Meta's checkpoints are zip files written by torch.save. Their index alone is unpickled
(weights_only, onto the meta device); the bytes of each tensor are then read from where the index
says they lie.
"""

import os
import pickle
import struct
import typing
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .linear import row_blocks

BLOCK = 2**21  # bytes read at once: much for the disk, little for the caches
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8}
UNREADABLE = (  # what torch.load and zipfile raise for bytes that are no checkpoint
    *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError, EOFError, MemoryError),
    *(LookupError, ArithmeticError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile),
)


class Stored(NamedTuple):
    """Where one tensor lies in a file."""

    path: Path
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    name: str
    stamp: tuple[int, ...]  # of the file when its index was read
    stride: int | None = None  # bytes from row to row, where there is something between them

    def rows(self, rows: slice) -> Tensor:
        """Those rows, read from the file."""
        n_bytes, total = prod(self.shape[1:]) * self.dtype.itemsize, rows.stop - rows.start
        stride = self.stride or n_bytes
        n_rows = 1 if stride > n_bytes else total  # that a read takes
        buffer = bytearray(total * n_bytes)
        with self.path.open("rb", buffering=0) as file:
            for row in range(0, total, n_rows):
                file.seek(self.offset + (rows.start + row) * stride)
                view = memoryview(buffer)[row * n_bytes :][: n_rows * n_bytes]
                while view:
                    n_read = file.readinto(view)
                    if not n_read:
                        raise UserError(f"{self.path} ends too early: copy or download it again")
                    view = view[n_read:]
            if stamp(os.fstat(file.fileno())) != self.stamp:
                raise UserError(f"{self.path} was written to while it was read: try again")
        numbers = torch.frombuffer(buffer, dtype=self.dtype)
        if self.dtype.is_floating_point and not all(x.isfinite() for x in numbers.aminmax()):
            raise UserError(f"{self.path}: {self.name} has NaN or Inf in it: get the file again")
        return numbers.view(total, *self.shape[1:])

    def narrow(self, dim: int, start: int, end: int) -> "Stored":
        """What of it is from start to end on dim 0 or 1."""
        stride = self.stride or prod(self.shape[1:]) * self.dtype.itemsize
        step = prod(self.shape[2:]) * self.dtype.itemsize if dim == 1 else stride
        shape = torch.Size([*self.shape[:dim], end - start, *self.shape[dim + 1 :]])
        return self._replace(offset=self.offset + start * step, shape=shape, stride=stride)


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
                for rows in self.ranges(piece.shape[0]):
                    yield first + rows.start, piece.rows(rows)
                first += piece.shape[0]
        else:
            for rows in self.ranges(self.shape[0]):
                yield rows.start, torch.cat([piece.rows(rows) for piece in self.pieces], dim=1)

    def ranges(self, n_rows: int, multiple: int = 1) -> Iterator[slice]:
        """Of rows that are read at once."""
        return row_blocks(n_rows, prod(self.shape[1:]), BLOCK // self.dtype.itemsize, multiple)

    def copy_to(self, out: Tensor) -> Tensor:
        for start, block in self.blocks():
            if out.dtype == torch.bfloat16:
                block = block.float()  # PyTorch converts fp16 to bf16 one number at a time
            out[start : start + len(block)] = block
        return out

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.copy_to(torch.empty(self.shape, dtype=dtype))


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to, or another takes its place."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_index(path: Path) -> dict[str, Stored]:
    """Name, place, shape and type of each tensor of a .pth file, without its bytes."""

    def refuse(reason: str) -> typing.NoReturn:
        raise UserError(f"{path} is not a readable checkpoint ({reason}): get it again")

    now = stamp(path.stat())
    try:
        records = read_records(path)
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        refuse("its index is damaged, or would run code")
    except UNREADABLE as error:
        refuse((str(error) or type(error).__name__).partition("\n")[0][:80])
    if not isinstance(tensors, dict):
        refuse("it has no names")
    index = {}
    for name, tensor in tensors.items():
        if not (
            isinstance(name, str)
            and "." in name
            and isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.dtype in DTYPES
            and tensor.dim()
            and tensor.numel()
            and tensor.is_contiguous()
        ):
            refuse(f"{name!r:.60} is no whole tensor of numbers")
        storage = tensor.untyped_storage()
        begin, skipped = storage._checkpoint_offset, tensor.storage_offset() * tensor.itemsize
        if max(storage.nbytes(), skipped + tensor.nbytes) > records.get(begin, 0):
            refuse(f"{name:.60} is not whole")
        index[name] = Stored(path, begin + skipped, tensor.shape, tensor.dtype, name, now)
    return index


def read_records(path: Path) -> dict[int, int]:
    """Where the records of a .pth file begin, and how many bytes each has.

    Raises ValueError or zipfile.BadZipFile where they are not as torch.save writes them.
    """
    records = {}
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # PyTorch's format before 1.6 is a bare pickle
            raise ValueError("not a zip file")
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                entry = PureWindowsPath(info.filename)  # it knows / and \ and drives
                if entry.anchor or ".." in entry.parts:
                    raise ValueError(f"{info.filename:.60} would lie outside of its folder")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{info.filename:.60} is compressed")
                if entry.name == "byteorder" and archive.read(info) != b"little":
                    raise ValueError("its numbers are big-endian")
                file.seek(info.header_offset + 26)
                begin = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                records[begin] = info.file_size
    return records
