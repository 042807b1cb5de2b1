"""Hugging Face's folders made Meta's: config.json, names of weights, order of q's and k's rows.

A folder has config.json, tokenizer.model, and safetensors files or such as torch.save writes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import write_merged
from .errors import UserError
from .model import Transformer
from .params import check_types, read_json, to_args
from .stored import DTYPES, Stored, Weight, read_index, stamp
from .tokenizer import Tokenizer

FIELDS = {  # of params.json, and where config.json has them
    "dim": "hidden_size",
    "multiple_of": "intermediate_size",  # what ffn_dim_multiplier gives is rounded up to it
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
NAMES = {  # Meta's, and what Hugging Face has in their place
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
FILES = (  # of weights: the first of these that a folder has
    "model.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)


@dataclass
class Halves(Weight):
    """q or k as Hugging Face's rotary embedding wants it, row by row as Meta's does.

    One turns the pairs (j, j + head_dim / 2) of a head's rows, the other (2j, 2j + 1).
    """

    head_dim: int

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        halves = (-1, 2, self.head_dim // 2, self.shape[1])
        for rows in self.ranges(self.shape[0], self.head_dim):  # whole heads
            block = self.pieces[0].rows(rows)
            yield rows.start, block.view(halves).transpose(1, 2).flatten(0, 2)


def to_params(config: dict, path: Path) -> dict:
    """config.json as params.json, or a refusal of what is not LLaMA's architecture."""
    missing = FIELDS.values() - config.keys()
    if missing:
        raise UserError(f"{path} has no {min(missing)}: this program does not run such a model")
    params = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    check_types(params, path)
    params["n_kv_heads"] = params["n_kv_heads"] or params["n_heads"]
    params["ffn_dim_multiplier"] = config["intermediate_size"] / int(2 / 3 * 4 * params["dim"])
    rope = config.get("rope_parameters")  # since transformers 5
    rope = rope if isinstance(rope, dict) else config  # and before
    params["rope_theta"] = rope.get("rope_theta") or 10000.0

    served = {
        "model_type": ("llama", "mistral"),
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "head_dim": (params["dim"] / params["n_heads"], None),
        "rope_scaling": (None,),
        "rope_parameters": ({"rope_type": "default", "rope_theta": params["rope_theta"]}, None),
        "quantization_config": (None,),
    }
    for field, values in served.items():
        if config.get(field) not in values:
            found = json.dumps(config.get(field))
            raise UserError(f"{path}: {field} is {found}: this program does not run such a model")
    return params


def foreign_name(name: str) -> str:
    """Hugging Face's name for a weight of Meta's."""
    if name == "output.weight":
        return "lm_head.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Name, place, shape and type of each tensor of a safetensors file, without its bytes.

    The package checks the file and reads its index. It would map the bytes into memory, where all
    that was ever read counts as this process's, so they are read as those of other files are.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} takes one more package: pip install safetensors") from None
    index, now = {}, stamp(path.stat())
    try:
        with path.open("rb") as file, safe_open(path, framework="pt") as tensors:
            offset = 8 + int.from_bytes(file.read(8), "little")  # after the header and its length
            for name in tensors.offset_keys():  # one after another, without gaps
                view = tensors.get_slice(name)
                shape = torch.Size(view.get_shape())
                index[name] = Stored(path, offset, shape, view[:0].dtype, name, now)
                offset += shape.numel() * index[name].dtype.itemsize
    except (SafetensorError, IndexError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({error}): get it again") from None
    return index


def open_folder(folder: Path) -> tuple[dict[str, Weight], dict]:
    """Every weight under Meta's name, its rows in Meta's order; and what params.json is to say."""
    config = {"num_key_value_heads": None} | read_json(folder / "config.json")
    params = to_params(config, folder / "config.json")
    params["sliding_window"] = config.get("sliding_window")
    if not (folder / "tokenizer.model").exists():
        raise UserError(f"{folder} has no tokenizer.model: get that file too")
    n_words = Tokenizer(folder / "tokenizer.model").n_words
    args = to_args(params | {"max_seq_len": 1}, folder / "config.json", n_words)
    stored = {}
    for path in next(filter(None, (sorted(folder.glob(pattern)) for pattern in FILES)), ()):
        stored |= read_safetensors(path) if path.suffix == ".safetensors" else read_index(path)
    if config.get("tie_word_embeddings"):
        stored["lm_head.weight"] = stored.get("model.embed_tokens.weight")

    with torch.device("meta"):
        model = Transformer(args)
    weights = {}
    for name, weight in model.state_dict().items():
        theirs = foreign_name(name)
        place = stored.pop(theirs, None)
        if place is None or place.shape != weight.shape:
            shape = tuple(weight.shape)
            raise UserError(f"{folder} has no {theirs} of shape {shape}: are all files there?")
        if place.dtype not in DTYPES or not place.dtype.is_floating_point:
            raise UserError(f"{folder}: {theirs} is {place.dtype}: this program does not run such")
        turned = ".wq." in name or ".wk." in name
        weights[name] = Halves([place], 0, args.head_dim) if turned else Weight([place], 0)
    for name in stored:
        if not name.endswith("rotary_emb.inv_freq"):  # in old folders; the model computes it anew
            raise UserError(f"{folder} has {name}: this program does not run such a model")
    return weights, params


def convert_folder(
    folder: Path, output_dir: Path, dtype: torch.dtype | None, quantize: str | None, overwrite: bool
) -> Path:
    """Write a Hugging Face folder as merged.pth, params.json and tokenizer.model in output_dir."""
    weights, params = open_folder(folder)
    beside = {
        "params.json": json.dumps(params, indent=2).encode(),
        "tokenizer.model": (folder / "tokenizer.model").read_bytes(),
    }
    return write_merged(weights, beside, output_dir, dtype, quantize, overwrite)
