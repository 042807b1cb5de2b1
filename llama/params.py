"""params.json: the shape of a model, as Meta's checkpoints and their family describe it."""

import json
import typing
from pathlib import Path

from .errors import UserError
from .model import ModelArgs

LARGEST = 2**20  # no size in params.json, and no context, is larger


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
    args = to_args(params, path, n_words)
    window = params.get("sliding_window") or max_seq_len
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


def to_args(params: dict, path: Path, n_words: int) -> ModelArgs:
    """The model that params.json describes, if there can be such a one with this tokenizer."""
    check_types(params, path)
    args = ModelArgs(**{key: params[key] for key in params if key != "sliding_window"})
    if args.dim % (2 * args.n_heads) or args.n_heads % args.n_kv_heads:
        raise UserError(
            f"{path}: dim {args.dim} should be an even multiple of n_heads {args.n_heads}, and "
            f"that a multiple of n_kv_heads {args.n_kv_heads}"
        )
    if args.vocab_size < n_words:
        raise UserError(
            f"{path}: vocab_size is {args.vocab_size}, but the tokenizer has {n_words} "
            "pieces: it is another model's"
        )
    if args.n_layers > 1000 or not 0 < args.hidden_dim <= LARGEST:
        raise UserError(f"{path}: no model has so many layers, or such wide ones: get it again")
    return args
