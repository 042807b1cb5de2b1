"""Loading: a checkpoint becomes a model with its weights in their final form."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import (
    SCHEMES,
    Checkpoint,
    check_folder,
    empty_model,
    find_files,
    find_shards,
    is_huggingface,
    nearest_tokenizer,
    open_meta,
)
from .errors import UserError, check
from .generation import LLaMA
from .linear import fast_linear
from .model import ModelArgs, Transformer
from .params import LARGEST
from .system import WORKING_MEMORY, available_memory
from .tokenizer import Tokenizer
from .weights import FORMAT_KEY, Weight, quantization_of


def open_checkpoint(
    folder: Path, tokenizer_path: str | Path | None, originals: bool = False
) -> Checkpoint:
    """Open a model in Meta's or Hugging Face's format.

    Args:
        folder: The directory of the model.
        tokenizer_path: Default: tokenizer.model in the folder or, for Meta's format, beside it.
        originals: Prefer shards, and weights in Hugging Face's format, to merged.pth.
    """
    paths = find_shards(folder) if originals else find_files(folder)
    if not paths and is_huggingface(folder):
        from .huggingface import open_huggingface

        return open_huggingface(folder, tokenizer_path)
    return open_meta(folder, paths or find_files(folder), tokenizer_path)


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
    """Load a model and its tokenizer. Activations, and weights that are not quantized, have torch's
    default dtype.

    Where the ranks of llama/parallel.py run, every rank loads its part.

    Args:
        ckpt_dir: Directory with params.json and merged.pth or consolidated.*.pth, or a Hugging Face
            folder with config.json, tokenizer.model and weights.
        tokenizer_path: A sentencepiece model. Default: tokenizer.model in ckpt_dir or, as in Meta's
            download, beside it.
        max_seq_len: Tokens of context, prompt and continuation together.
        max_batch_size: Maximum number of prompts in a batch.
        quantize: int8 or int4, to round the weights to 8 or 4 bits. Default: do not round them.
    Returns:
        The model, ready for `generate` and `stream`.
    Raises:
        UserError: A file is missing, damaged or of another model, or there is too little memory.
    """
    for name, value in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        good = type(value) is int and 0 < value <= LARGEST
        check(good, name, f"an integer from 1 to {LARGEST}", value)
    check(quantize in (None, *SCHEMES), "quantize", "int8 or int4", quantize)
    check(isinstance(ckpt_dir, str | Path), "ckpt_dir", "a path", ckpt_dir)
    folder = Path(ckpt_dir)
    check_folder(folder, "ckpt_dir")
    weights, params, args, tokenizer, _ = open_checkpoint(folder, tokenizer_path)
    if tokenizer is None:
        raise UserError(
            f"there is no tokenizer {tokenizer_path or nearest_tokenizer(folder)}: tokenizer.model "
            "comes with the weights, put it there, or set `tokenizer_path` to it"
        )
    check_context(params, max_seq_len)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    if quantize and quantization_of(weights):
        raise UserError(f"{find_files(folder)[0]} is quantized already: leave out `quantize`")
    if torch.distributed.is_initialized():
        from .parallel import shard_weights

        weights = shard_weights(weights, args)
    check_memory(weights, args, quantize)
    model = build(args, weights, quantize, tokenizer)
    return LLaMA(model, tokenizer, params.get("chat_style", "dialog"))


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
    """The model with its weights, each read once and brought into its final form."""
    scheme = quantize or quantization_of(weights)
    model = empty_model(args, scheme)
    total = sum(weights[name].shape.numel() for name in weights.keys() - {FORMAT_KEY})
    options = {"unit": " weights", "unit_scale": True, "delay": 1, "disable": None}
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
        from .parallel import parallelize, split_outliers

        if not quantize:
            split_outliers(model, args)
        parallelize(model)
    if scheme:
        from .quantization.linear import prepare_model

        prepare_model(model)
    return model.requires_grad_(False).eval()
