"""Loading a checkpoint: find its files, check them, build the model with its final weights."""

import os
import re
import warnings
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
from .system import WORKING_MEMORY, available_memory
from .tokenizer import Tokenizer
from .weights import FORMAT, Weight, open_checkpoint, quantization_of

VERSION = 3  # of the format of quantized checkpoints
SCHEMES = ("int8", "int4")


def find_files(folder: Path) -> list[Path]:
    """merged.pth if there is one, otherwise all shards in their order."""
    merged = folder / "merged.pth"
    return [merged] if merged.exists() else find_shards(folder)


def find_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.[0-9][0-9].pth"))


def nearest_tokenizer(folder: Path) -> Path:
    """tokenizer.model in the folder or, as in Meta's download, beside the folders 7B, 13B, ...

    A folder with a params.json is a model, and its tokenizer.model is that model's.
    """
    path, above = folder / "tokenizer.model", folder.parent / "tokenizer.model"
    is_shared = above.exists() and not above.with_name("params.json").exists()
    return above if is_shared and not path.exists() else path


def check_files(folder: Path, paths: list[Path], argument: str) -> list[Path]:
    """Return the paths; raise UserError if there are none, or a shard is missing.

    argument: Name of the parameter that holds `folder`, for errors.
    """
    remedy = f"set `{argument}` to the directory of the weights"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a directory: {remedy}")
    if not folder.exists():
        raise UserError(f"there is no directory {folder}{found_in(folder.parent)}: {remedy}")
    if not paths:
        if (folder / "config.json").exists():
            command = (
                f"python merge-weights.py --input_dir {folder} --output_dir model/{folder.name}"
            )
            remedy = f"convert it first: {command}"
        elif [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]:
            remedy = "to convert its weights, download config.json and tokenizer.model too"
        missing = f"consolidated.*.pth and no merged.pth{found_in(folder)}"
        raise UserError(f"{folder} has no {missing}: {remedy}")
    for number, path in enumerate(paths):
        if path.name not in ("merged.pth", f"consolidated.{number:02}.pth"):
            raise UserError(f"{path} exists, but consolidated.{number:02}.pth is missing")
    return paths


def found_in(folder: Path) -> str:
    """The subfolders that contain weights, for errors."""
    paths = folder.iterdir() if os.access(folder, os.R_OK | os.X_OK) else ()
    names = (path.name for path in paths if os.access(path, os.X_OK) and find_files(path))
    found = sorted(names, key=lambda name: (len(name), name))  # 7B before 13B
    return f" (found: {', '.join(found)})" if found else ""


def model_args(
    params: dict[str, Any], weights: dict[str, Weight], tokenizer: Tokenizer | None, folder: Path
) -> ModelArgs:
    """The model's shape, checked against the shapes of the weights."""
    embedding = weights.get("tok_embeddings.weight")
    if embedding is None:
        raise UserError(f"{folder}: there is no tok_embeddings.weight: a file is missing")
    args = to_model_args(params, folder / "params.json", embedding.shape[0])
    if tokenizer and args.vocab_size < tokenizer.n_words:
        raise UserError(
            f"{folder}: vocab_size is {args.vocab_size}, and the tokenizer has "
            f"{tokenizer.n_words} tokens: it belongs to another model"
        )
    layers = {int(m[1]) for name in weights if (m := re.match(r"layers\.(\d{1,4})\.", name))}
    if layers and len(layers) != args.n_layers:
        raise UserError(
            f"{folder}: params.json says n_layers {args.n_layers}, and the weights have "
            f"{len(layers)} layers: they are of different models"
        )
    model = empty_model(replace(args, max_seq_len=1), quantization_of(weights), whole=True)
    expected = model.state_dict()
    for name in (*expected, *(weights.keys() - {FORMAT})):
        found, wanted = describe(weights.get(name)), describe(expected.get(name))
        if found != wanted:
            raise UserError(
                f"{folder}: {name} is {found}, but by params.json should be {wanted}: "
                "a file is missing, or they are of different models"
            )
    return args


def describe(tensor: Weight | Tensor | None) -> str:
    if tensor is None:
        return "not there"
    kind = "float" if tensor.dtype.is_floating_point else str(tensor.dtype)
    return f"{kind} {tuple(tensor.shape)}"


def check_version(weights: dict[str, Weight], folder: Path) -> None:
    """Refuse weights that another version of this program has quantized."""
    version = weights[FORMAT].read(torch.uint8).tolist() if FORMAT in weights else [1]
    if quantization_of(weights) and version != [VERSION]:
        raise UserError(
            f"{folder}: the weights were quantized by another version of this program (format "
            f"{version[0]}, not {VERSION}): quantize the original ones again"
        )


def empty_model(args: ModelArgs, scheme: str | None, whole: bool = False) -> Transformer:
    """The model on the meta device, with quantized layers if there is a scheme.

    Under torchrun the tensors have the shapes of this rank's parts, unless `whole`.
    """
    if scheme:
        from .quantization.linear import swap_modules

    with torch.device("meta"):
        model = Transformer(args)
        if scheme:
            swap_modules(model, scheme)
            model.cache_dtype = torch.float16  # half of fp32's, and precise beside int8
        if torch.distributed.is_initialized() and not whole:
            from .parallel import shard_model

            shard_model(model)
    return model


def check_memory(weights: dict[str, Weight], args: ModelArgs, quantize: str | None) -> None:
    """Refuse a model that does not fit in memory, and name the parameters with which it would."""
    free, default, stored = available_memory(), torch.get_default_dtype(), quantization_of(weights)

    def need(dtype: torch.dtype, scheme: str | None, length: int) -> int:
        torch.set_default_dtype(dtype)
        model = empty_model(replace(args, max_seq_len=1), scheme or stored)
        torch.set_default_dtype(default)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        # Quantizing holds one matrix as it is in the file, before there is a cache.
        largest = max(w.shape.numel() * w.dtype.itemsize for w in weights.values())
        return size + max(model.cache_bytes(length), largest if scheme else 0) + WORKING_MEMORY

    needed = need(default, quantize, args.max_seq_len)
    if needed <= free:
        return
    smaller = {
        "`dtype=bfloat16`": (torch.bfloat16, quantize),
        "`quantize=int8`": (default, "int8"),
        "`quantize=int4`": (default, "int4"),
    }
    choices = {} if stored else smaller
    fits = [name for name, c in choices.items() if need(*c, args.max_seq_len) <= free]
    lengths = [args.max_seq_len >> n for n in range(1, args.max_seq_len.bit_length() - 5)]
    fitting = (n for n in lengths if need(default, quantize, n) <= free)
    fits += [f"`max_seq_len={n}`" for n in fitting][:1]
    remedy = "use " + " or ".join(fits) if fits else "close programs, or use a smaller model"
    raise UserError(
        f"the model needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: "
        f"{remedy}"
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
        tokenizer_path: A sentencepiece model. Default: tokenizer.model in ckpt_dir or, as in Meta's
            download, beside it.
        max_seq_len: Tokens of context, prompt and continuation together.
        max_batch_size: Maximum number of prompts in a batch.
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
    paths = check_files(folder, find_files(folder), "ckpt_dir")
    params = read_params(folder / "params.json")
    tokenizer = open_tokenizer(tokenizer_path or nearest_tokenizer(folder), params)
    weights = open_checkpoint(paths)
    check_version(weights, folder)
    args = model_args(params, weights, tokenizer, folder)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    check_context(params, max_seq_len)
    if quantize and quantization_of(weights):
        raise UserError("the weights are quantized already: leave out `quantize`")
    if torch.distributed.is_initialized():
        from .parallel import shard_weights

        weights = shard_weights(weights, args)
    check_memory(weights, args, quantize)
    model = build(args, weights, quantize, tokenizer)
    return LLaMA(model, tokenizer, params.get("chat_style", "dialog"))


def open_tokenizer(path: str | Path, params: dict[str, Any]) -> Tokenizer:
    return Tokenizer(path, params.get("added_tokens"), params.get("eos_token_id", ()))


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
    args: ModelArgs, weights: dict[str, Weight], quantize: str | None, tokenizer: Tokenizer
) -> Transformer:
    """The model with its weights, each read once and converted into its final form."""
    scheme = quantize or quantization_of(weights)
    model = empty_model(args, scheme)
    total = sum(weight.shape.numel() for weight in weights.values())
    options = {"unit": " weights", "unit_scale": True, "disable": None}
    with tqdm(desc="loading", total=total, **options) as bar:

        def read(name: str, dtype: torch.dtype) -> Tensor:
            bar.update(weights[name].shape.numel())
            return weights[name].read(dtype)

        if quantize:
            from .quantization.calibration import calibrate, calibration_tokens

            def on_quantized(path: str, layer: nn.Module) -> None:
                bar.update(weights[f"{path}.weight"].shape.numel())

            tokens = calibration_tokens(tokenizer, args.vocab_size)
            calibrate(model, weights, tokens, on_quantized)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                weight = read(f"{path}.weight", module.weight.dtype)
                model.set_submodule(path, fast_linear(weight))
        rest = {n: t.dtype for n, t in model.state_dict().items() if t.is_meta}
        # A dict without a name: only the model may hold what `prepare_model` replaces.
        model.load_state_dict({n: read(n, d) for n, d in rest.items()}, strict=False, assign=True)
    if torch.distributed.is_initialized():
        from .parallel import parallelize, split_corrections

        if not quantize:
            split_corrections(model)
        parallelize(model)
    if scheme:
        from .quantization.linear import prepare_model

        prepare_model(model)
    return model.requires_grad_(False).eval()
