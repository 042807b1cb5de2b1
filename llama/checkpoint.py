"""A checkpoint on the disk: its files are found, opened and checked against one another."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .model import ModelArgs, Transformer
from .params import read_params, to_model_args
from .tokenizer import Tokenizer
from .weights import FORMAT_KEY, Weight, open_shards, quantization_of

VERSION = 4  # of the format of quantized checkpoints
SCHEMES = ("int8", "int4")


class Checkpoint(NamedTuple):
    """The files of a model, opened and checked.

    Attributes:
        weights: Under Meta's names.
        params: The keys of params.json.
        args: The model's shape. None: there is no params.json.
        tokenizer: None if there is none, which only a merge allows.
        files: The contents of files that belong beside merged.pth, by their names.
    """

    weights: dict[str, Weight]
    params: dict[str, Any]
    args: ModelArgs | None
    tokenizer: Tokenizer | None
    files: dict[str, bytes]


def find_files(folder: Path) -> list[Path]:
    """merged.pth if there is one, otherwise all shards in their order."""
    merged = folder / "merged.pth"
    return [merged] if merged.exists() else find_shards(folder)


def find_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.[0-9][0-9].pth"))


def is_huggingface(folder: Path) -> bool:
    """True if there are weights in Hugging Face's format, and config.json."""
    found = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    return found and (folder / "config.json").exists()


def has_weights(folder: Path) -> bool:
    return bool(find_files(folder)) or is_huggingface(folder)


def nearest_tokenizer(folder: Path) -> Path:
    """tokenizer.model in the folder or, as in Meta's download, beside the folders 7B, 13B, ...

    A folder with a params.json is a model, and its tokenizer.model is that model's.
    """
    path, above = folder / "tokenizer.model", folder.parent / "tokenizer.model"
    is_shared = above.exists() and not above.with_name("params.json").exists()
    return above if is_shared and not path.exists() else path


def check_folder(folder: Path, argument: str) -> None:
    """Raise UserError unless a directory has weights. argument: The parameter that names it."""
    remedy = f"set `{argument}` to the directory of the weights"
    if folder.suffix == ".gguf":
        raise UserError(f"{folder}: GGUF is not supported: download the original weights")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a directory: {remedy}")
    if not folder.exists():
        raise UserError(f"there is no directory {folder}{found_in(folder.parent)}: {remedy}")
    if not has_weights(folder):
        if any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no config.json: download it too")
        raise UserError(
            f"{folder} has no weights{found_in(folder)}: {remedy}, which are merged.pth, "
            "consolidated.*.pth, or config.json with *.safetensors or pytorch_model*.bin"
        )


def found_in(folder: Path, but: Path | None = None) -> str:
    """The subfolders that contain weights, for errors. but: One that is left out."""
    readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    paths = folder.iterdir() if readable else ()
    paths = (path for path in paths if os.access(path, os.X_OK) and path.resolve() != but)
    names = (path.name for path in paths if has_weights(path))
    found = sorted(names, key=lambda name: (len(name), name))  # 7B before 13B
    more = ", ..." if len(found) > 8 else ""
    return f" (found: {', '.join(found[:8])}{more})" if found else ""


def open_meta(folder: Path, paths: list[Path], tokenizer_path: str | Path | None) -> Checkpoint:
    """Open a model in Meta's format.

    Args:
        folder: The directory of params.json.
        paths: merged.pth or all shards.
        tokenizer_path: Default: tokenizer.model in the folder or beside it.
    """
    weights = open_shards(paths)
    check_version(weights, folder)
    params = read_params(folder / "params.json")
    path, tokenizer = Path(tokenizer_path or nearest_tokenizer(folder)), None
    if path.exists():
        tokenizer = open_tokenizer(path, params)
    args = model_args(params, weights, tokenizer, folder / "params.json", {})
    return Checkpoint(weights, params, args, tokenizer, {})


def open_tokenizer(path: str | Path, params: dict[str, Any]) -> Tokenizer:
    return Tokenizer(path, params.get("added_tokens"), params.get("eos_token_id", ()))


def model_args(
    params: dict[str, Any],
    weights: dict[str, Weight],
    tokenizer: Tokenizer | None,
    path: Path,
    aliases: Mapping[str, str],
) -> ModelArgs:
    """The model's shape, checked against the tokenizer and the shapes of the weights.

    Args:
        path: The file of the params, for errors.
        aliases: What the files call a weight, where that differs, for errors.
    """
    embedding = weights.get("tok_embeddings.weight")
    if embedding is None:
        raise UserError(f"{path.parent}: there is no token embedding: a file is missing")
    args = to_model_args(params, path, embedding.shape[0])
    if tokenizer and args.vocab_size < tokenizer.n_words:
        raise UserError(
            f"{path.parent}: vocab_size is {args.vocab_size}, and the tokenizer has "
            f"{tokenizer.n_words} tokens: it belongs to another model"
        )
    if tokenizer and args.vocab_size > 2 * tokenizer.n_words:
        warnings.warn(
            f"the tokenizer has {tokenizer.n_words} tokens, and the model {args.vocab_size}: it "
            "seems to be another model's",
            stacklevel=2,
        )
    model = empty_model(replace(args, max_seq_len=1), quantization_of(weights), whole=True)
    expected = model.state_dict()
    for name in (*expected, *sorted(weights.keys() - {FORMAT_KEY})):
        found, wanted = describe(weights.get(name)), describe(expected.get(name))
        if found != wanted:
            raise UserError(
                f"{path.parent}: a file is missing, or they are of different models: "
                f"{aliases.get(name, name)} is {found}, but by {path.name} should be {wanted}"
            )
    return args


def describe(tensor: Weight | Tensor | None) -> str:
    if tensor is None:
        return "not there"
    kind = "float" if tensor.dtype.is_floating_point else str(tensor.dtype)
    return f"{kind} {tuple(tensor.shape)}"


def check_version(weights: dict[str, Weight], folder: Path) -> None:
    """Refuse weights that another version of this program has quantized."""
    version = weights[FORMAT_KEY].read(torch.uint8).tolist() if FORMAT_KEY in weights else [1]
    if quantization_of(weights) and version != [VERSION]:
        raise UserError(
            f"{folder}: the weights were quantized by another version of this program (format "
            f"{version[0]}, not {VERSION}): quantize the original weights again"
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
