"""Loading a checkpoint: find its files, check them, build the model with its final weights."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import UserError, check
from .generation import LLaMA
from .linear import fast_linear
from .model import ModelArgs, Transformer
from .params import LARGEST, read_params, to_model_args
from .system import available_memory, without_holes
from .tokenizer import Tokenizer
from .weights import FORMAT, Weight, is_quantized, open_checkpoint

VERSION = 2  # of the format of quantized checkpoints
SCHEMES = ("int8", "int4")
WORKING_MEMORY = 3 * 10**8  # bytes for what is neither weights nor cache


def find_files(folder: Path) -> list[Path]:
    """merged.pth if there is one, otherwise all shards in their order."""
    merged = folder / "merged.pth"
    return [merged] if merged.exists() else find_shards(folder)


def find_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.[0-9][0-9].pth"))


def check_files(folder: Path, paths: list[Path]) -> list[Path]:
    """Return the paths if there are any, and none is missing between them."""
    if not folder.is_dir():
        siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
        names = (path.name for path in siblings if find_files(path))
        found = sorted(names, key=lambda name: (len(name), name))  # 7B before 13B
        found = f" (found: {', '.join(found)})" if found else ""
        raise UserError(f"there is no directory {folder}{found}: set `ckpt_dir` to another one")
    if not paths:
        remedy = "set `ckpt_dir` to the directory of the weights"
        if (folder / "config.json").exists():
            remedy = f"convert it first: python merge-weights.py --input_dir {folder}"
        raise UserError(f"{folder} has no consolidated.*.pth and no merged.pth: {remedy}")
    for number, path in enumerate(paths):
        if path.name not in ("merged.pth", f"consolidated.{number:02}.pth"):
            raise UserError(f"{path} exists, but consolidated.{number:02}.pth is missing")
    return paths


def check_weights(weights: dict[str, Weight], args: ModelArgs, folder: Path) -> None:
    """Refuse weights that are not exactly those of the model that params.json describes."""
    layers = {int(m[1]) for name in weights if (m := re.match(r"layers\.(\d{1,4})\.", name))}
    if layers and len(layers) != args.n_layers:
        raise UserError(
            f"{folder}: params.json says n_layers {args.n_layers}, and the weights have "
            f"{len(layers)} layers: they are of different models"
        )
    if is_quantized(weights):
        version = weights[FORMAT].read(torch.uint8).tolist() if FORMAT in weights else [1]
        if version != [VERSION]:
            raise UserError(
                f"{folder}: the weights were quantized by another version of this program (format "
                f"{version[0]}, not {VERSION}): quantize the original ones again"
            )
    expected = empty_model(replace(args, max_seq_len=1), None, weights, whole=True).state_dict()
    for name in (*expected, *(weights.keys() - {FORMAT})):
        found, wanted = describe(weights.get(name)), describe(expected.get(name))
        if found != wanted:
            raise UserError(
                f"{folder}: {name} is {found}, but by params.json should be {wanted}: "
                "a file is missing, or they are of different models"
            )


def describe(tensor: Weight | Tensor | None) -> str:
    if tensor is None:
        return "not there"
    kind = "float" if tensor.dtype.is_floating_point else str(tensor.dtype)
    return f"{kind} {tuple(tensor.shape)}"


def empty_model(
    args: ModelArgs, scheme: str | None, weights: Mapping[str, Weight], whole: bool = False
) -> Transformer:
    """The model on the meta device: quantized as the weights are, or as the scheme will.

    Under torchrun it has the shapes of this rank's parts, unless it is to be whole.
    """
    with torch.device("meta"):
        model = Transformer(args)
        if torch.distributed.is_initialized() and not whole:
            from .parallel import shard_model

            shard_model(model)
        if scheme or is_quantized(weights):
            from .quantization import calibration

            classes = calibration.classes_in(weights, model)
            if scheme:
                classes = calibration.classes_for(model, scheme)
            calibration.swap_modules(model, classes)
    return model


def check_memory(weights: dict[str, Weight], args: ModelArgs, quantize: str | None) -> None:
    """Refuse a model that does not fit in memory, and name the parameters with which it would."""
    free, default = available_memory(), torch.get_default_dtype()

    def need(dtype: torch.dtype, scheme: str | None, length: int = args.max_seq_len) -> int:
        state = empty_model(replace(args, max_seq_len=1), scheme, weights).state_dict().items()
        sizes = {
            k: t.numel() * (dtype if t.dtype == default else t.dtype).itemsize for k, t in state
        }
        cache = 2 * args.n_layers * args.n_kv_heads * args.head_dim * length
        quantized = scheme or is_quantized(weights)
        cache *= (torch.float16 if quantized else dtype).itemsize
        if torch.distributed.is_initialized():
            cache //= min(torch.distributed.get_world_size(), args.n_kv_heads)
        # One matrix after another is quantized in fp32, before there is a cache.
        largest = max(w.shape.numel() for w in weights.values()) * 4 if scheme else 0
        return sum(sizes.values()) + max(cache, largest) + WORKING_MEMORY

    needed = need(default, quantize)
    if needed <= free:
        return
    smaller = {
        "`dtype=bfloat16`": (torch.bfloat16, quantize),
        "`quantize=int8`": (default, "int8"),
        "`quantize=int4`": (default, "int4"),
    }
    if is_quantized(weights):
        smaller = {}
    fits = [name for name, options in smaller.items() if need(*options) <= free]
    halves = (args.max_seq_len >> n for n in range(1, args.max_seq_len.bit_length() - 5))
    fits += [f"`max_seq_len={n}`" for n in halves if need(default, quantize, n) <= free][:1]
    remedy = "use " + " or ".join(fits) if fits else "close programs, or use a smaller model"
    raise UserError(
        f"the model needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: {remedy}"
    )


def load(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 32,
    quantize: str | None = None,
) -> LLaMA:
    """Load a model and its tokenizer. Weights and activations have torch's default dtype.

    Under torchrun every rank loads its part.

    Args:
        ckpt_dir: Directory with params.json and merged.pth or consolidated.*.pth.
        tokenizer_path: A sentencepiece model. Default: tokenizer.model in ckpt_dir.
        max_seq_len: Tokens of context, prompt and continuation together.
        max_batch_size: Prompts that are computed at the same time.
        quantize: int8 or int4, to round the weights to 8 or 4 bits. Default: as they are stored.
    Returns:
        The model, ready for `generate` and `stream`.
    Raises:
        UserError: A file is missing, damaged or of another model, or there is too little memory.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        good = type(value) is int and 0 < value <= LARGEST
        check(good, name, f"an integer from 1 to {LARGEST}", value)
    check(quantize in (None, *SCHEMES), "quantize", "int8 or int4", quantize)
    folder = Path(ckpt_dir)
    paths = check_files(folder, find_files(folder))
    params = read_params(folder / "params.json")
    tokenizer = Tokenizer(
        tokenizer_path or folder / "tokenizer.model",
        params.get("added_tokens"),
        params.get("eos_token_id", ()),
    )
    weights = open_checkpoint(paths)
    args = model_args(params, weights, tokenizer, folder)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_context(params, max_seq_len)
    check_weights(weights, args, folder)
    stamps = [path.stat().st_mtime_ns for path in paths]
    weights.pop(FORMAT, None)
    if torch.distributed.is_initialized():
        from .parallel import shard_weights

        weights = shard_weights(weights, args)
    if quantize and is_quantized(weights):
        raise UserError("the weights are quantized already: leave out `quantize`")
    check_memory(weights, args, quantize)
    model = build(args, weights, quantize, tokenizer)
    if stamps != [path.stat().st_mtime_ns for path in paths]:
        raise UserError(f"a file in {folder} was written to while it was read: try again")
    return LLaMA(model.eval(), tokenizer, params.get("chat_style", "dialog"))


def model_args(
    params: dict[str, Any], weights: dict[str, Weight], tokenizer: Tokenizer | None, folder: Path
) -> ModelArgs:
    """The model's shape. Its vocabulary is as large as the embedding, if params.json says -1."""
    embedding = weights.get("tok_embeddings.weight")
    if embedding is None:
        raise UserError(f"{folder}: there is no tok_embeddings.weight: a file is missing")
    args = to_model_args(params, folder / "params.json", embedding.shape[0])
    if tokenizer and args.vocab_size < tokenizer.n_words:
        raise UserError(
            f"{folder}: vocab_size is {args.vocab_size}, and the tokenizer's "
            f"{tokenizer.n_words}: it is another model's"
        )
    return args


def check_context(params: dict[str, Any], max_seq_len: int) -> None:
    """Refuse or warn about a context that is longer than the model's."""
    if max_seq_len > params.get("sliding_window", LARGEST):
        raise UserError(
            f"`max_seq_len` must be at most {params['sliding_window']}, the model's sliding_window"
        )
    if max_seq_len > (trained := params.get("max_position_embeddings", LARGEST)):
        warnings.warn(
            f"the model was trained on {trained} tokens of context, and `max_seq_len` is "
            f"{max_seq_len}: expect nonsense beyond {trained}",
            stacklevel=3,
        )


def build(
    args: ModelArgs, weights: dict[str, Weight], scheme: str | None, tokenizer: Tokenizer
) -> Transformer:
    """The model with its weights, each read once and converted into its final form."""
    model = empty_model(args, scheme, weights)
    if scheme or is_quantized(weights):
        model.cache_dtype = torch.float16  # 11 bits of precision beside weights of 8 or 4
    distributed = torch.distributed.is_initialized()
    total = sum(weight.shape.numel() for weight in weights.values())
    options = {"unit": " weights", "unit_scale": True, "disable": None}
    with without_holes(), tqdm(desc="loading", total=total, **options) as bar:

        def deliver(path: str, layer: nn.Module) -> None:
            layer.prepare()
            model.set_submodule(path, layer)
            bar.update(weights[f"{path}.weight"].shape.numel())

        if scheme:
            from .quantization.calibration import calibrate, calibration_tokens

            tokens = calibration_tokens(tokenizer, args.vocab_size)
            calibrate(args, weights, scheme, tokens, deliver)
        for path, module in list(model.named_modules()):
            state = {} if list(module.children()) else module.state_dict()
            if not any(tensor.is_meta for tensor in state.values()):
                continue
            state = {n: weights[f"{path}.{n}"].read(t.dtype) for n, t in state.items()}
            bar.update(sum(tensor.numel() for tensor in state.values()))
            if isinstance(module, nn.Linear):
                model.set_submodule(path, fast_linear(state["weight"]))
                continue
            module.load_state_dict(state, assign=True)
            if hasattr(module, "prepare"):
                if distributed:
                    from .parallel import split_corrections

                    split_corrections(module, path)
                module.prepare()
    if distributed:
        from .parallel import parallelize

        parallelize(model)
    return model.requires_grad_(False)
