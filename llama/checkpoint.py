"""Checkpoints: finding them, loading them in their final form, merging their shards."""

import ctypes
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from . import system
from .errors import UserError, require
from .generation import LLaMA
from .linear import mixed
from .model import ModelArgs, Transformer
from .parallel import connect, place
from .params import LARGEST, read_params
from .quantize import (
    VERSION,
    WRITERS,
    check_quantize,
    form_of,
    form_there,
    norm_before,
    turned,
    use_forms,
)
from .stored import Stored, Weight, read_index
from .tokenizer import Tokenizer
from .tune import tune

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
OUTPUTS = ("params.json", "tokenizer.model", "merged.pth")  # what a merge may write
FORMAT = "quantized.format"  # one number, beside quantized weights
# In files, and not in the model, which computes its rotary angles. Meta's 7B has them per layer.
UNUSED = ("rope.freqs", "rotary_emb.inv_freq", FORMAT)
WORKING = 3 * 10**8  # bytes of memory for what is neither weights nor cache


def find_files(ckpt_dir: Path) -> list[Path]:
    """merged.pth where there is one, otherwise all shards in their order."""
    merged = ckpt_dir / "merged.pth"
    return [merged] if merged.exists() else find_shards(ckpt_dir)


def find_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.[0-9][0-9].pth"))


def check_files(folder: Path, paths: list[Path]) -> list[Path]:
    """The paths, if there are any and none is missing between them."""
    if not paths:
        there = "has no consolidated.*.pth and no merged.pth" if folder.is_dir() else "is no folder"
        remedy = "name the folder that has the weights with --ckpt_dir"
        if (folder / "config.json").exists():
            remedy = f"convert it first, merge-weights.py --input_dir {folder}"
        raise UserError(f"{folder} {there}: {remedy}")
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
    first, *others = [norm.rows(slice(0, norm.shape[0])).float() for norm in norms] or [None]
    for path, other in zip(paths[1:], others):  # in every shard it should be the same
        if (other - first).norm() > 0.1 * first.norm():
            raise UserError(f"{path} and {paths[0]} are of different models: get them all again")
    weights = {}
    for name in shards[0]:
        pieces = [shard[name] for shard in shards]
        dim = SPLIT_DIM.get(name.split(".")[-2]) if len(pieces[0].shape) > 1 else None
        weights[name] = Weight(pieces[:1], 0) if dim is None else Weight(pieces, dim)
    return weights


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
            form = form_there(stem, weights)
            if form and tensor.dim() == 2:
                expected |= form(*tensor.shape).state_dict(prefix=stem)
    for name in (*expected, *(name for name in weights if not name.endswith(UNUSED))):
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
    free = system.available_memory()

    def need(dtype: torch.dtype, quantize: str | None, length: int = args.max_seq_len) -> int:
        cache = 2 * args.n_layers * args.n_kv_heads * args.head_dim * length
        state = layout(weights, dtype, quantize)
        # PyTorch's 4-bit operator takes a group's step and low in bf16, not int8.
        n_bytes = sum(t.nbytes * (2 if k.endswith(".groups") else 1) for k, t in state.items())
        # One matrix after another is turned whole, in fp32, before there is a cache.
        sizes = [w.shape.numel() for k, w in weights.items() if k.split(".")[-2] in WRITERS]
        turning = 4 * max(sizes) if quantize else 0
        return n_bytes + max(cache * cache_dtype(state, dtype).itemsize, turning) + WORKING

    dtype = torch.get_default_dtype()
    if need(dtype, quantize) <= free:
        return
    smaller = {
        "--dtype bfloat16": (torch.bfloat16, quantize),
        "--quantize int8": (dtype, "int8"),
        "--quantize int4": (dtype, "int4"),
    }
    if is_quantized(weights):
        smaller = {}
    fits = [flag for flag, how in smaller.items() if need(*how) <= free]
    halves = (args.max_seq_len >> n for n in range(1, args.max_seq_len.bit_length() - 5))
    fits += [f"--max_seq_len {n}" for n in halves if need(dtype, quantize, n) <= free][:1]
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
        shape = tuple(weight.shape)
        raise UserError(f"{world} ranks cannot share {name} of shape {shape} alike: start fewer")
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
            if form := form_of(name, weight.shape, quantize):
                state |= form(*weight.shape).state_dict(prefix=name.removesuffix("weight"))
            else:  # what quantized weights consist of stays as it is
                converts = dtype and name.endswith(".weight") and weight.dtype.is_floating_point
                state[name] = torch.empty(weight.shape, dtype=dtype if converts else weight.dtype)
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
    form = form_of(name, weight.shape, quantize)
    if quantize and name.endswith("norm.weight"):  # its gain is in the matrices that follow
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
    check_quantize(quantize)
    ckpt_dir = Path(ckpt_dir)
    paths = check_files(ckpt_dir, find_files(ckpt_dir))
    tokenizer = Tokenizer(tokenizer_path)
    args = read_params(ckpt_dir, tokenizer.n_words, max_seq_len, max_batch_size)
    weights = open_checkpoint(paths)
    check_fit(weights, args, ckpt_dir)
    weights = {name: w for name, w in weights.items() if not name.endswith(UNUSED)}
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
    return LLaMA(model.eval(), tokenizer, tune(model))


def build(args: ModelArgs, state: dict[str, Tensor]) -> Transformer:
    """A model that holds tensors such as those of the state, which are on the meta device."""
    with torch.device("meta"):
        model = Transformer(args)
        use_forms(model, state)
    model.cache_dtype = cache_dtype(state, torch.get_default_dtype())
    # All at once: what is allocated among a load's many short-lived blocks would leave holes.
    model.load_state_dict(allocate(state), assign=True)
    return model


def merge(
    input_dir: Path,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the shards in input_dir as one output_dir/merged.pth."""
    paths = check_files(input_dir, find_shards(input_dir))
    weights = open_checkpoint(paths)
    if quantize or (input_dir / "params.json").exists():
        embeddings = weights.get("tok_embeddings.weight")
        args = read_params(input_dir, embeddings.shape[0] if embeddings else 1, 1, 1)
        check_fit(weights, args, input_dir)
    return write_merged(weights, {}, output_dir, dtype, quantize, overwrite)


def write_merged(
    weights: dict[str, Weight],
    beside: Mapping[str, bytes],
    output_dir: Path,
    dtype: torch.dtype | None,
    quantize: str | None,
    overwrite: bool,
) -> Path:
    """Write the weights as one output_dir/merged.pth, and the files that go beside it.

    When all are whole and on the disk they are renamed to what they are called, merged.pth last.
    """
    contents = {output_dir / name: content for name, content in beside.items()}
    merged = output_dir / "merged.pth"
    paths = [*(path for path, new in contents.items() if not same(path, new)), merged]

    def check_paths() -> None:
        if output_dir.exists() and not output_dir.is_dir():
            raise UserError(f"{output_dir} is no folder: name one with --output_dir")
        for path in paths:
            if path.is_dir() or os.path.lexists(path) and not overwrite:
                remedy = "" if path.is_dir() else ", or give --overwrite"
                raise UserError(f"{path} exists: move it away{remedy}")

    check_paths()
    state = layout(weights, dtype, quantize)
    total = sum(tensor.nbytes for tensor in state.values())
    output_dir.mkdir(parents=True, exist_ok=True)
    # What killed runs have left makes room, where the system tells how much it takes.
    left = [path for name in OUTPUTS for path in output_dir.glob(f".{name}.*.partial")]
    freed = sum(512 * getattr(path.stat(), "st_blocks", 0) for path in left)
    free = shutil.disk_usage(output_dir).free + freed
    if free < total:
        raise UserError(f"{merged} needs {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    for path in left:
        path.unlink(missing_ok=True)

    run = os.urandom(4).hex()
    partials = {path: path.with_name(f".{path.name}.{run}.partial") for path in paths}
    try:
        for path, partial in partials.items():
            partial.write_bytes(contents.get(path, b""))  # PyTorch tells less well what hinders it
        write_weights(partials[merged], weights, state, dtype, quantize)
        for partial in partials.values():
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        check_paths()
        if len(paths) > 1:  # rather no weights for a moment than these beside other params.json
            merged.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(partial)
        raise
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return merged


def same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def write_weights(
    path: Path,
    weights: dict[str, Weight],
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    quantize: str | None,
) -> None:
    """Make `path` a checkpoint of the state that `layout` says the weights become."""
    places = reserve(path, state)
    total = sum(tensor.nbytes for tensor in state.values())
    with (
        path.open("r+b") as file,
        tqdm(desc="merging", total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for weight_name, weight in weights.items():
            part = allocate(layout({weight_name: weight}, dtype, quantize))
            fill(part, weight_name, weights, quantize)
            for name, tensor in part.items():
                file.seek(places[name].offset)
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
                bar.update(tensor.nbytes)
            if not path.exists():
                raise UserError(f"{path.parent}: another run merges into it: let that one finish")


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
