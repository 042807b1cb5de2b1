"""Reads a Hugging Face folder as Meta's format: config, names of weights, rows of q and k.

A folder has config.json, tokenizer.model, and weights as safetensors or as torch.save writes them.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, empty_model, model_args, open_tokenizer
from .errors import UserError, check_file
from .params import check_params, read_json, to_model_args
from .tokenizer import Tokenizer
from .weights import UNUSED_SUFFIXES, Weight, check_tensor, read_tensors

FIELDS = {  # key of params.json: key of config.json
    "dim": "hidden_size",
    "multiple_of": "intermediate_size",  # see ffn_dim_multiplier in to_params
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
EMBEDDING = "model.embed_tokens.weight"
PERMUTED = (".wq.weight", ".wk.weight")  # see `permute`
FILES = (  # the first of these pairs of which a folder has a file holds its weights
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
CHAT_STYLES = {  # pattern in a chat template: its style; the first that matches
    r"<\|im_start\|>": "chatml",
    r"<\|user\|>.{1,40}eos_token": "zephyr",
    "<<SYS>>": "llama2",
    r"[\"']\[/INST\]": "mistral-v3",
    r"\[INST\]": "mistral",
}


def open_huggingface(folder: Path, tokenizer_path: str | Path | None) -> Checkpoint:
    """Open a Hugging Face folder under Meta's names.

    Args:
        tokenizer_path: Default: tokenizer.model in the folder.
    Raises:
        UserError: Names the field or file that is missing, damaged, or not LLaMA's architecture.
    """
    path = folder / "config.json"
    tokenizer_path = Path(tokenizer_path or folder / "tokenizer.model")
    config = read_json(path)
    params = to_params(config, path)
    if not tokenizer_path.exists():
        raise UserError(
            f"there is no {tokenizer_path}: download it too (models that come with tokenizer.json "
            "alone are not supported)"
        )
    params |= read_tokens(folder, config, Tokenizer(tokenizer_path))
    files = {
        "params.json": json.dumps(params, indent=2).encode(),
        "tokenizer.model": tokenizer_path.read_bytes(),
    }
    tensors, mapped = read_files(folder, find_weights(folder))
    if config.get("tie_word_embeddings") and EMBEDDING in tensors:
        tensors["lm_head.weight"] = tensors[EMBEDDING]
    args, weights = to_model_args(params, path, params["vocab_size"]), {}
    aliases = {name: hf_name(name) for name in empty_model(args, None, whole=True).state_dict()}
    for name, alias in aliases.items():
        if (tensor := tensors.pop(alias, None)) is not None:
            label = f"{folder}: {alias}"
            check_tensor(tensor, label)
            weights[name] = Weight(label, [tensor], 0, tensor.shape, mapped)
    if others := [name for name in tensors if not name.endswith(UNUSED_SUFFIXES)]:
        raise UserError(f"{folder} has {others[0]}, which config.json's model does not have")
    tokenizer = open_tokenizer(tokenizer_path, params)
    args = model_args(params, weights, tokenizer, path, aliases)
    for name, weight in weights.items():
        if name.endswith(PERMUTED):
            weight.parts = [permute(weight.parts[0], args.head_dim)]
    return Checkpoint(weights, params, args, tokenizer, files)


def to_params(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """config.json as params.json.

    Raises:
        UserError: Names the field that is missing, malformed or of another architecture.
    """
    params = {ours: config[f] for ours, f in FIELDS.items() if config.get(f) is not None}
    if missing := [FIELDS[ours] for ours in FIELDS if ours not in OPTIONAL | params.keys()]:
        raise UserError(f"{path} has no {missing[0]}: this is not a LLaMA model")
    rope = config.get("rope_parameters")  # since transformers 5
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    theta = config.get("rope_theta") if theta is None else theta  # before
    if theta is not None:
        params["rope_theta"] = theta
    check_params(params, path, FIELDS)
    # With this, ModelArgs.hidden_dim is exactly intermediate_size.
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
        "rope_parameters": (default_rope, {"rope_type": "default"}, {"rope_theta": theta}, None),
        "quantization_config": (None,),
    }
    for field, values in supported.items():
        value = config.get(field)
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            raise UserError(f"{path}: {field} is {json.dumps(value):.80}, which is not supported")
    return params


def read_tokens(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """added_tokens, eos_token_id and chat_style, as keys of params.json."""

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    added, ends, tokenizer_config = read("added_tokens.json"), [], read("tokenizer_config.json")
    # If added_tokens_decoder is malformed, only added_tokens.json counts.
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        decoder = tokenizer_config["added_tokens_decoder"]
        added |= {entry["content"]: int(token) for token, entry in decoder.items()}
    for fields in (config, read("generation_config.json")):
        value = fields.get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in [*added.values(), *ends]):
        raise UserError(f"{folder}: eos_token_id or an added token is not a token id")
    # Ids beyond the embedding have no meaning: some Llama 2 folders list a <pad> there. Mistral's
    # [INST] is a control token of the tokenizer, which it does not recognize in a text.
    ids = {*range(tokenizer.n_words, config["vocab_size"])}
    control = filter(tokenizer.sp_model.is_control, range(tokenizer.n_words))
    ids |= {*control} - {tokenizer.bos_id, tokenizer.eos_id}
    template = tokenizer_config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    text = json.dumps(template)  # of a text, or of a list of named templates
    found = {
        "added_tokens": {text: token for text, token in added.items() if text and token in ids},
        "eos_token_id": sorted({*ends}),
        "chat_style": next(
            (style for mark, style in CHAT_STYLES.items() if re.search(mark, text)),
            template and "unknown",
        ),
    }
    return {key: value for key, value in found.items() if value}


def hf_name(name: str) -> str:
    """Hugging Face's name for a weight of Meta's."""
    if name == "output.weight":
        return "lm_head.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def permute(tensor: Tensor, head_dim: int) -> Tensor:
    """A view of q or k with its rows in Meta's order, (n_heads, head_dim / 2, 2, dim).

    Hugging Face rotates the pairs (j, j + head_dim / 2) of a head's rows, Meta (2j, 2j + 1).
    """
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)


def find_weights(folder: Path) -> list[Path]:
    """The files of weights: those of the index file if there is one, otherwise one complete set."""
    for single, several in FILES:
        index, paths = folder / f"{single}.index.json", sorted(folder.glob(several))
        if index.exists() and paths:
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index} has no weight_map")
            return [folder / name for name in sorted({*map(str, names.values())})]
        if (folder / single).exists():
            return [folder / single]
        for number, path in enumerate(paths, 1):
            if not path.stem.endswith(f"-{number:05}-of-{len(paths):05}"):
                raise UserError(
                    f"{folder}: {path.name} is not part {number} of {len(paths)}: files are "
                    "missing, or there are those of two models"
                )
        if paths:
            return paths
    raise UserError(
        f"{folder} has no weights with these names: model*.safetensors, pytorch_model*.bin"
    )


def read_files(folder: Path, paths: list[Path]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of all files, and whether they are memory maps."""
    tensors, all_mapped = {}, True
    for path in paths:
        read = read_safetensors if path.suffix == ".safetensors" else read_tensors
        found, mapped = read(path)
        if both := tensors.keys() & found.keys():
            raise UserError(f"{folder}: {min(both)} is in two files")
        tensors |= found
        all_mapped &= mapped
    return tensors, all_mapped


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a safetensors file, and True: they are memory maps."""
    check_file(path)
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"reading {path} needs one more package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, True  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever the package raises for a damaged file)
        raise UserError(
            f"{path} cannot be read as safetensors ({error!s:.200}): if it is incomplete, download "
            "it again"
        ) from None
