"""params.json: the shape of a model, and keys that llama/huggingface.py adds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError, check_file
from .model import ModelArgs

LARGEST = 2**20  # no size in params.json, and no context, is larger
REQUIRED = ("dim", "multiple_of", "n_heads", "n_layers", "norm_eps")
KEYS = {
    **dict.fromkeys(("dim", "multiple_of", "n_heads", "n_kv_heads", "n_layers", "vocab_size"), int),
    **dict.fromkeys(("norm_eps", "rope_theta", "ffn_dim_multiplier"), float),
    **dict.fromkeys(("max_batch_size", "max_seq_len"), int),
    # Beside Meta's keys, from a Hugging Face folder:
    "sliding_window": int,  # the longest context in which every token attends to all before it
    "max_position_embeddings": int,  # the longest context that the model was trained on
    "eos_token_id": list,  # ids that end a sequence, beside the tokenizer's </s>
    "added_tokens": dict,  # tokens beside the tokenizer's, {text: id}
    "chat_style": str,  # the prompt format, see STYLES in llama/chat.py
}
EXPECTED = {
    int: f"an integer from 1 to {LARGEST}",
    float: "a number above 0",
    list: "a list of token ids",
    dict: "an object with a token id for each text",
    str: "a text",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a byte order mark before it is skipped."""
    if not path.exists():
        raise UserError(f"{path} is missing: it belongs beside the weights")
    check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def read_params(path: Path) -> dict[str, Any]:
    """Read params.json and check the keys and the types of their values.

    Returns:
        The keys that have a value: null, false and a vocab_size of -1 stand for a key's default.
    Raises:
        UserError: Names the key that is missing, unknown or has an impossible value.
    """
    params = {k: v for k, v in read_json(path).items() if v is not None and v is not False}
    if params.get("vocab_size") == -1:
        del params["vocab_size"]
    return check_params(params, path, {})


def check_params(params: dict[str, Any], path: Path, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Check keys and values. aliases: What the file at `path` calls a key, where that differs."""
    if unknown := sorted(params.keys() - KEYS.keys()):
        raise UserError(f"{path} has keys that this program does not know: {', '.join(unknown)}")
    if missing := [aliases.get(key, key) for key in REQUIRED if key not in params]:
        raise UserError(f"{path} has no {missing[0]}")
    for key, value in params.items():
        if not is_valid(value, KEYS[key]):
            expected = EXPECTED[KEYS[key]]
            raise UserError(f"{path}: {aliases.get(key, key)} is {value!r:.60}, not {expected}")
    return params


def is_valid(value: object, kind: type) -> bool:
    if kind in (int, float):
        return type(value) in (int, kind) and 0 < value <= (LARGEST if kind is int else 1e12)
    if type(value) is not kind or kind is str:
        return type(value) is kind
    ids = value.values() if kind is dict else value
    return "" not in value and all(type(token) is int and 0 <= token <= LARGEST for token in ids)


def to_model_args(params: dict[str, Any], path: Path, vocab_size: int) -> ModelArgs:
    """The shape of the model. vocab_size: Rows of the embedding, for a params.json that says -1."""
    args = ModelArgs(**{key: v for key, v in params.items() if key in ModelArgs.__annotations__})
    if args.vocab_size == -1:
        args.vocab_size = vocab_size
    if args.dim % (2 * args.n_heads) or args.n_heads % args.n_kv_heads:
        raise UserError(
            f"{path}: dim {args.dim} should be an even multiple of n_heads {args.n_heads}, and "
            f"n_heads a multiple of n_kv_heads {args.n_kv_heads}"
        )
    if args.n_layers > 1000 or not 0 < args.hidden_dim <= LARGEST:
        raise UserError(
            f"{path}: no LLaMA model has n_layers {args.n_layers} and feed-forward layers of width "
            f"{args.hidden_dim}, which follows from dim, multiple_of and ffn_dim_multiplier"
        )
    return args
