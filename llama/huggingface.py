"""Hugging Face's folders as Meta's: config.json, names of weights, order of the rows of q and k.

A folder has config.json, tokenizer.model, and weights as safetensors or as torch.save writes them.
"""

import json
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import check_weights
from .errors import UserError
from .merge import Source
from .model import ModelArgs, Transformer
from .params import check_params, read_json, to_model_args
from .tokenizer import Tokenizer
from .weights import UNUSED, Weight, check_regular, is_plain, read_tensors

FIELDS = {  # of params.json: the field of config.json
    "dim": "hidden_size",
    "multiple_of": "intermediate_size",  # ffn_dim_multiplier's result is rounded up to it
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}
OPTIONAL = {"n_kv_heads", "sliding_window", "max_position_embeddings"}
NAMES = {  # Meta's names: Hugging Face's
    "tok_embeddings": "embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROTATED = (".wq.weight", ".wk.weight")  # their rows are permuted, see `permuted`
FILES = (  # of weights: the first of these that a folder has
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


def open_folder(folder: Path) -> Source:
    """Open a Hugging Face folder under Meta's names.

    Raises:
        UserError: Names the field or file that is missing, damaged, or not LLaMA's architecture.
    """
    path = folder / "config.json"
    config = read_json(path)
    params = to_params(config, path) | tokens_of(folder, config)
    if not (folder / "tokenizer.model").exists():
        raise UserError(f"{folder} has no tokenizer.model: download that file too")
    tokenizer = Tokenizer(
        folder / "tokenizer.model", params.get("added_tokens"), params.get("eos_token_id", ())
    )
    args = to_model_args(params, path, params["vocab_size"])
    tensors, mapped = read_files(folder, find_files(folder))
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors.get("model.embed_tokens.weight")
    weights = {}
    with torch.device("meta"):
        expected = Transformer(args).state_dict()
    for name, wanted in expected.items():
        theirs = foreign_name(name)
        tensor = tensors.pop(theirs, None)
        if tensor is None or tensor.shape != wanted.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise UserError(f"{folder}: {theirs} is {found}, not {tuple(wanted.shape)}")
        if not is_plain(tensor) or not tensor.dtype.is_floating_point:
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise UserError(f"{folder}: {theirs} is {kind}, which is not supported")
        if name.endswith(ROTATED):
            tensor = permuted(tensor, args)
        label = f"{folder}: {theirs}"
        weights[name] = Weight(label, [tensor], 0, wanted.shape, mapped)
    for name in tensors:
        if not name.endswith(UNUSED):
            raise UserError(f"{folder} has {name}: this is not a LLaMA model")
    files = {
        "params.json": json.dumps(params, indent=2).encode(),
        "tokenizer.model": (folder / "tokenizer.model").read_bytes(),
    }
    check_weights(weights, args, folder)
    return Source(weights, args, tokenizer, files)


def to_params(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """config.json as params.json.

    Raises:
        UserError: Names the field that is missing, malformed or of another architecture.
    """
    params = {}
    for ours, theirs in FIELDS.items():
        if config.get(theirs) is not None:
            params[ours] = config[theirs]
        elif ours not in OPTIONAL:
            raise UserError(f"{path} has no {theirs}: this is not a LLaMA model")
    rope = config.get("rope_parameters")  # since transformers 5
    rope = rope if isinstance(rope, dict) else config  # and before
    if rope.get("rope_theta") is not None:
        params["rope_theta"] = rope["rope_theta"]
    check_params(params, path, FIELDS)
    params["ffn_dim_multiplier"] = params["multiple_of"] / int(2 / 3 * 4 * params["dim"])

    default_rope = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)}
    supported = {
        "model_type": ("llama", "mistral"),
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "tie_word_embeddings": (True, False, None),
        "head_dim": (params["dim"] / params["n_heads"], None),
        "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
        "rope_parameters": (default_rope, {"rope_type": "default"}, None),
        "quantization_config": (None,),
    }
    for field, values in supported.items():
        value = config.get(field)
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise UserError(f"{path}: {field} is {json.dumps(value):.80}, which is not supported")
    return params


def tokens_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of params.json for tokens beyond the tokenizer's, ends and the prompt format."""
    optional = {}
    for name in ("tokenizer_config.json", "added_tokens.json", "generation_config.json"):
        optional[name] = read_json(folder / name) if (folder / name).exists() else {}
    decoder = optional["tokenizer_config.json"].get("added_tokens_decoder") or {}
    added = dict(optional["added_tokens.json"])
    # If the field is malformed, added_tokens.json counts alone.
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        added |= {entry["content"]: int(token) for token, entry in decoder.items()}
    n_pieces = Tokenizer(folder / "tokenizer.model").n_words if decoder or added else 0
    ends = []
    for fields in (config, optional["generation_config.json"]):
        value = fields.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in [*added.values(), *ends]):
        raise UserError(f"{folder}: eos_token_id or an added token is not a token id")
    # Ids beyond the embedding have no meaning: some Llama 2 folders list a <pad> there.
    vocab_size = config["vocab_size"]
    added = {text: token for text, token in added.items() if n_pieces <= token < vocab_size}
    found = {"added_tokens": added, "eos_token_id": sorted({*ends})}
    template = optional["tokenizer_config.json"].get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    found["chat_style"] = chat_style(template)
    return {key: value for key, value in found.items() if value}


def chat_style(template: object) -> str | None:
    """The name of the prompt format that a chat template writes, by the marks that it uses."""
    marks = {
        "<|im_start|>": "chatml",
        "<|user|>": "zephyr",
        "<<SYS>>": "llama2",
        "[INST]": "mistral",
    }
    text = json.dumps(template)  # a text, or a list of named templates
    return next((style for mark, style in marks.items() if mark in text), None)


def foreign_name(name: str) -> str:
    """Hugging Face's name for a weight of Meta's."""
    if name == "output.weight":
        return "lm_head.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def permuted(tensor: Tensor, args: ModelArgs) -> Tensor:
    """A view of q or k with its rows in Meta's order, (n_heads, head_dim / 2, 2, dim).

    Hugging Face rotates the pairs (j, j + head_dim / 2) of a head's rows, Meta (2j, 2j + 1).
    """
    return tensor.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2)


def find_files(folder: Path) -> list[Path]:
    """The files of weights: those of the index file if there is one, otherwise one complete set."""
    for single, several in FILES:
        suffix = Path(single).suffix
        index = folder / f"{single}.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index} has no weight_map")
            return [folder / name for name in sorted({*map(str, names.values())})]
        if (folder / single).exists():
            return [folder / single]
        paths = sorted(folder.glob(several))
        for number, path in enumerate(paths):
            if not path.name.endswith(f"-{number + 1:05}-of-{len(paths):05}{suffix}"):
                raise UserError(
                    f"{folder}: {path.name} is not part {number + 1} of {len(paths)}: files are "
                    "missing, or there are those of two models"
                )
        if paths:
            return paths
    raise UserError(f"{folder} has no model*.safetensors and no pytorch_model*.bin")


def read_files(folder: Path, paths: list[Path]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of all files, and whether they are memory maps."""
    tensors, all_mapped = {}, True
    for path in paths:
        check_regular(path)
        is_safe = path.suffix == ".safetensors"
        found, mapped = (read_safetensors(path), True) if is_safe else read_tensors(path)
        if both := tensors.keys() & found.keys():
            raise UserError(f"{folder}: {min(both)} is in two files")
        tensors |= found
        all_mapped &= mapped
    return {name: t for name, t in tensors.items() if prod(t.shape)}, all_mapped


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as memory maps."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"reading {path} needs one more package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the package raises for a damaged file)
        raise UserError(f"{path} cannot be read as safetensors: {error!s:.200}") from None
