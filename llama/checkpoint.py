"""How weights lie on disk: finding them, reading them block by block, merging their shards.

Meta's checkpoints are zip files written by torch.save. Their index alone is unpickled
(weights_only, onto the meta device); the bytes of each tensor are then read from where the index
says they lie, a block of rows at a time, straight into the tensor's final form.
"""

import json
import os
import pickle
import shutil
import struct
import typing
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from . import memory
from .errors import UserError, require
from .generation import LLaMA
from .linear import Int4Linear, Int8Linear, mixed, tune, weight_bytes
from .model import ModelArgs, Transformer
from .parallel import connect, place
from .quantize import VERSION, form_of, norm_before, turned, use_forms
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
FORMAT = "quantized.format"  # one number, beside quantized weights
UNUSED = {"rope.freqs", FORMAT}  # in files, and not in the model: it computes its own angles
SHARDS = {"7B": 1, "13B": 2, "30B": 4, "34B": 4, "65B": 8, "70B": 8}
BLOCK = 2**21  # bytes read at once: much for the disk, little for the caches
WORKING = 3 * 10**8  # bytes of memory for what is neither weights nor cache
LARGEST = 2**20  # no size in params.json, and no context, is larger
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
            if stamp(os.fstat(file.fileno())) != self.stamp:
                raise UserError(f"{self.path} was written to while it was read: try again")
        rows = torch.frombuffer(buffer, dtype=self.dtype)
        if self.dtype.is_floating_point and not all(x.isfinite() for x in rows.aminmax()):
            raise UserError(f"{self.path}: {self.name} has NaN or Inf in it: get the file again")
        return rows.view(end - start, *self.shape[1:])

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


def find_files(ckpt_dir: Path) -> list[Path]:
    """merged.pth where there is one, otherwise all shards in their order."""
    merged = ckpt_dir / "merged.pth"
    return [merged] if merged.exists() else sorted(ckpt_dir.glob("consolidated.*.pth"))


def check_files(folder: Path, paths: list[Path]) -> list[Path]:
    """The paths, if there are any and none is missing between them."""
    if not paths:
        there = "has no consolidated.*.pth and no merged.pth" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {there}: name the folder that has the weights with --ckpt_dir")
    for number, path in enumerate(paths):
        if path.name not in ("merged.pth", f"consolidated.{number:02}.pth"):
            raise UserError(f"{path} is there without consolidated.{number:02}.pth: get all shards")
    return paths


def open_checkpoint(paths: list[Path]) -> dict[str, Weight]:
    """Every weight that the files, shards of one model, hold together."""
    shards = [read_index(path) for path in paths]
    kinds = [{(s.name, s.shape, s.dtype) for s in shard.values()} for shard in shards]
    for path, kind in zip(paths, kinds):
        for name, *_ in kind ^ kinds[0]:
            raise UserError(f"{path} and {paths[0]} are not of one model: {name} differs")
    norms = [shard["norm.weight"] for shard in shards if "norm.weight" in shard]
    first, *others = [norm.rows(0, norm.shape[0]).float() for norm in norms] or [None]
    for path, other in zip(paths[1:], others):  # in every shard it should be the same
        if (other - first).norm() > 0.1 * first.norm():
            raise UserError(f"{path} and {paths[0]} are of different models: get them all again")
    weights = {}
    for name in shards[0]:
        pieces = [shard[name] for shard in shards]
        dim = SPLIT_DIM.get(name.split(".")[-2]) if len(pieces[0].shape) > 1 else None
        weights[name] = Weight(pieces[:1], 0) if dim is None else Weight(pieces, dim)
    return weights


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it belongs beside the weights") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): get it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} has no keys: get it again")
    return found


def read_params(ckpt_dir: Path, n_words: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """Meta's params.json, where `sliding_window` may say which context is the longest to run.

    It is Mistral's name for how many tokens back a token attends to: up to there to all of them,
    as LLaMA's do.
    """
    path = ckpt_dir / "params.json"
    params = read_json(path)
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = n_words
    params |= {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    args = to_args(params, path)
    window = params.get("sliding_window") or max_seq_len
    if args.vocab_size < n_words:
        raise UserError(
            f"{path}: vocab_size is {args.vocab_size}, but the tokenizer has {n_words} "
            "pieces: it is another model's"
        )
    if max_seq_len > window:
        raise UserError(f"--max_seq_len takes at most {window}, the sliding_window of {path}")
    return args


def check_types(params: dict, path: Path) -> None:
    """Refuse keys too many or too few for params.json, and values that none of them has."""
    kinds = typing.get_type_hints(ModelArgs) | {"sliding_window": int | None}
    unknown = sorted(params.keys() - kinds.keys())
    if unknown:
        raise UserError(f"{path} has keys that this program does not know: {', '.join(unknown)}")
    for key in {"dim", "multiple_of", "n_heads", "n_layers", "norm_eps", *params}:
        value = params.get(key, "missing")
        kind = typing.get_args(kinds[key]) or (kinds[key],)  # X of X | None
        allowed, limit = ((*kind, int), 1e12) if float in kind else (kind, LARGEST)
        if type(value) not in allowed or value is not None and not 0 < value <= limit:
            takes = f"a whole number from 1 to {limit}" if int in kind else "a number above 0"
            raise UserError(f"{path}: {key} is {value!r:.60}, and should be {takes}")


def to_args(params: dict, path: Path) -> ModelArgs:
    """The model that params.json describes, if there can be such a one."""
    check_types(params, path)
    args = ModelArgs(**{key: params[key] for key in params if key != "sliding_window"})
    if args.dim % (2 * args.n_heads) or args.n_heads % args.n_kv_heads:
        raise UserError(
            f"{path}: dim {args.dim} should be an even multiple of n_heads {args.n_heads}, and "
            f"that a multiple of n_kv_heads {args.n_kv_heads}"
        )
    if args.n_layers > 1000 or not 0 < args.hidden_dim <= LARGEST:
        raise UserError(f"{path}: no model has so many layers, or such wide ones: get it again")
    return args


def check_fit(weights: dict[str, Weight], args: ModelArgs, ckpt_dir: Path) -> None:
    """Refuse weights that are not, one by one, those of the model that params.json asks for."""

    def describe(tensor: Weight | Tensor | None) -> str:
        if tensor is None:
            return "not there"
        kind = "float" if tensor.dtype.is_floating_point else str(tensor.dtype)
        return f"{kind} {tuple(tensor.shape)}"

    # One layer too many tells as much as all that are too many, and is built sooner.
    there = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    n_layers = min(args.n_layers, len(there) + 1)
    with torch.device("meta"):
        expected = Transformer(replace(args, max_seq_len=1, n_layers=n_layers)).state_dict()
        for name, tensor in list(expected.items()):
            stem = name.removesuffix("weight")
            if f"{stem}scales" in weights and tensor.dim() == 2:
                form = Int4Linear if f"{stem}groups" in weights else Int8Linear
                expected |= form(*tensor.shape).state_dict(prefix=stem)
    for name in (*expected, *(weights.keys() - UNUSED)):
        found, wanted = describe(weights.get(name)), describe(expected.get(name))
        if found != wanted:
            raise UserError(
                f"{ckpt_dir}: {name} is {found}, and with this params.json and tokenizer should be "
                f"{wanted}: a shard is missing, or too many, or they are of different models"
            )
    version = weights[FORMAT].read(torch.uint8).tolist() if FORMAT in weights else None
    if is_quantized(weights) and version != [VERSION]:
        raise UserError(
            f"{ckpt_dir}: the weights were quantized by another version of this program, and stand "
            "for other numbers: quantize the original ones again with merge-weights.py"
        )


def check_memory(weights: dict[str, Weight], args: ModelArgs, quantize: str | None) -> None:
    """Refuse what this process has no memory for, and name the flags with which it would."""
    free = memory.available()

    def need(dtype: torch.dtype, quantize: str | None) -> int:
        cache = 2 * args.n_layers * args.n_kv_heads * args.head_dim * args.max_seq_len
        state = layout(weights, dtype, quantize)
        # PyTorch's 4-bit operator takes a group's step and low in bf16, not int8.
        n_bytes = sum(t.nbytes * (2 if k.endswith(".groups") else 1) for k, t in state.items())
        return n_bytes + cache * cache_dtype(state, dtype).itemsize + WORKING

    dtype = torch.get_default_dtype()
    if free is None or need(dtype, quantize) <= free:
        return
    smaller = (
        {
            "--dtype bfloat16": (torch.bfloat16, quantize),
            "--quantize int8": (dtype, "int8"),
            "--quantize int4": (dtype, "int4"),
        }
        if not is_quantized(weights)
        else {}
    )
    fits = [flag for flag, how in smaller.items() if need(*how) <= free]
    remedy = "give " + " or ".join(fits) if fits else "close programs, or take a smaller model"
    raise UserError(
        f"the model takes {need(dtype, quantize) / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory "
        f"are free: {remedy}"
    )


def cache_dtype(state: dict[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """Of keys and values, beside weights in that state: fp16's 11 bits where those have 8 or 4."""
    return torch.float16 if is_quantized(state) else dtype


def is_quantized(weights: Mapping[str, Weight | Tensor]) -> bool:
    return not all(weight.dtype.is_floating_point for weight in weights.values())


def share(name: str, weight: Weight, rank: int, world: int) -> Weight:
    """What a rank has of a weight: an equal part, or all of it where Meta's shards have all."""
    dim = SPLIT_DIM.get(name.split(".")[-2])
    if world == 1 or dim is None or dim >= len(weight.shape):
        return weight
    quantized_w2 = name.endswith("w2.weight") and weight.dtype == torch.int8
    if weight.shape[dim] % (world * (mixed(weight.shape[dim]) if quantized_w2 else 1)):
        raise UserError(f"{world} ranks cannot share {name} of shape {tuple(weight.shape)} alike")
    return weight.part(rank, world)


def layout(
    weights: dict[str, Weight], dtype: torch.dtype | None, quantize: str | None
) -> dict[str, Tensor]:
    """What `fill` will make of the weights: names, shapes and types, on the meta device."""
    if quantize and is_quantized(weights):
        raise UserError("the weights are quantized already: leave out --quantize")
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
    require(0 < max_seq_len <= LARGEST, "max_seq_len", f"1 to {LARGEST} tokens", max_seq_len)
    require(0 < max_batch_size <= LARGEST, "max_batch_size", "1 prompt or more", max_batch_size)
    ckpt_dir = Path(ckpt_dir)
    tokenizer = Tokenizer(tokenizer_path)
    args = read_params(ckpt_dir, tokenizer.n_words, max_seq_len, max_batch_size)
    weights = open_checkpoint(check_files(ckpt_dir, find_files(ckpt_dir)))
    check_fit(weights, args, ckpt_dir)
    for name in UNUSED & weights.keys():
        del weights[name]
    dtype = torch.get_default_dtype()
    rank, world = place()
    if args.n_heads % world or args.n_kv_heads % world:
        heads = f"{args.n_heads} heads, {args.n_kv_heads} of keys and values"
        raise UserError(f"{world} ranks cannot share {heads}: start a number that divides both")
    shares = {name: share(name, weight, rank, world) for name, weight in weights.items()}
    check_memory(shares, args, quantize)
    model = build(args, layout(shares, dtype, quantize))
    state = model.state_dict()
    total = sum(weight.n_bytes for weight in shares.values())
    with tqdm(desc="loading", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, weight in shares.items():
            fill(state, name, weights, quantize, rank, world)
            bar.update(weight.n_bytes)
    del state  # what `tune` packs anew is to be let go
    if world > 1:
        connect(model)
    plan = tune(model)
    return LLaMA(model.eval(), tokenizer, plan, weight_bytes(model))


def build(args: ModelArgs, state: dict[str, Tensor]) -> Transformer:
    """A model that holds tensors such as those of the state, which are on the meta device."""
    with torch.device("meta"):
        model = Transformer(args)
        use_forms(model, state)
    model.cache_dtype = cache_dtype(state, torch.get_default_dtype())
    # All at once: what is allocated among a load's many short-lived blocks would leave holes.
    for name, tensor in allocate(state).items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in dict(module.named_parameters(recurse=False)):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, key, tensor)
    return model


def merge(
    input_dir: Path,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the shards in input_dir as one output_dir/merged.pth."""
    paths = check_files(input_dir, sorted(input_dir.glob("consolidated.*.pth")))
    weights = open_checkpoint(paths)
    if quantize or (input_dir / "params.json").exists():
        embeddings = weights.get("tok_embeddings.weight")
        args = read_params(input_dir, embeddings.shape[0] if embeddings else 1, 1, 1)
        check_fit(weights, args, input_dir)
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
    partial = target.with_name(".merged.pth.partial")
    partial.unlink(missing_ok=True)  # what a killed run has left
    state = layout(weights, dtype, quantize)
    total = sum(tensor.nbytes for tensor in state.values())
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < total:
        raise UserError(f"{target} needs {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")

    try:
        places = reserve(partial, state)
        with (
            partial.open("r+b") as file,
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
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                raise UserError(f"{target}: another run is writing it: let that one finish")
        partial.replace(target)
    except OSError as error:
        error.filename = error.filename or str(partial)
        raise
    finally:
        partial.unlink(missing_ok=True)
    return target


def reserve(path: Path, state: dict[str, Tensor]) -> dict[str, Stored]:
    """A checkpoint of these tensors with holes where their bytes will be: says where those are.

    If they are quantized, it has the version of their format as well.
    """
    version = {FORMAT: torch.empty(1, dtype=torch.uint8)} if is_quantized(state) else {}
    with FakeTensorMode():
        fakes = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in (version | state).items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(fakes, path)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written ({error}): is the disk full?") from None
    index = read_index(path)
    if version:
        with path.open("r+b") as file:
            file.seek(index[FORMAT].offset)
            file.write(bytes([VERSION]))
    return {name: index[name] for name in state}
