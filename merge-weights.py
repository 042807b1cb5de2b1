"""Merge INPUT_DIR/MODEL_SIZE/consolidated.*.pth into OUTPUT_DIR/merged.pth.

A Hugging Face folder (config.json, tokenizer.model and weights) is written in
Meta's format. Without --model_size the weights are in INPUT_DIR itself.

Examples:
  python merge-weights.py --model_size 13B --output_dir model/13B
  python merge-weights.py --output_dir model/7B-int8 --quantize int8
  python merge-weights.py --input_dir model/TinyLlama --output_dir model/tiny
"""

from argparse import Namespace
from pathlib import Path

from llama import UserError, cli, terminal
from llama.checkpoint import find_shards, found_in, has_weights, is_huggingface
from llama.merge import open_source, write_merged

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)

SIZES = ("7B", "13B", "30B", "34B", "65B", "70B")
FLAGS = {
    "model_size": (SIZES, None, "folder in INPUT_DIR (default: the weights are in INPUT_DIR)"),
    "input_dir": (Path, None, "where the weights, or folders of weights, are (default: model)"),
    "output_dir": (Path, ".", "for merged.pth and, in other folders than this, params.json"),
    "dtype": (cli.DTYPES, None, "convert the weights (default: keep their dtype)"),
    "quantize": (cli.SCHEMES, None, "round them; int8: half of fp16's file, int4: a third"),
    "overwrite": (bool, False, "replace files that exist"),
}


def main(args: Namespace) -> None:
    if torch.distributed.is_initialized():
        raise UserError("run merge-weights.py without torchrun: it is one process")
    parent = args.input_dir or next(filter(Path.is_dir, cli.MODELS), cli.MODELS[0])
    target = args.output_dir
    folder = parent / (args.model_size or "")
    if args.model_size and not folder.exists():
        is_meant = has_weights(parent) and args.model_size in ("7B", parent.name)
        remedy = f"{parent} has weights, leave out" if is_meant else "set `input_dir`, or another"
        raise UserError(f"there is no {folder}{found_in(parent)}: {remedy} `model_size`")
    others = find_shards(target) or is_huggingface(target)
    if others and target.resolve() != folder.resolve() and not args.overwrite:
        raise UserError(f"{target} has other weights: set another `output_dir`, or `overwrite`")
    tokenizer = cli.find_tokenizer(folder) if args.quantize else None
    # Meta's params.json is copied, but not into the current directory, the default of output_dir:
    # there the next model's would meet it.
    source = open_source(folder, tokenizer, copy_files=target.resolve() != Path.cwd())
    dtype = args.dtype and getattr(torch, args.dtype)
    merged = write_merged(source, target, dtype, args.quantize, args.overwrite)
    if (target / "params.json").exists() and cli.find_tokenizer(target):
        step = f"Run: python example-cpu.py --ckpt_dir {target}"
    elif (target / "params.json").exists():
        step = "To run it, put tokenizer.model beside it"
    elif not (folder / "params.json").exists():
        step = "To run it, put its params.json beside it"
    elif (folder / "merged.pth").exists():
        step = f"To run it, put a copy of {folder / 'params.json'} beside it"
    else:
        step = f"To run it, move it to {folder}, where params.json is"
    terminal.notice(f"wrote {merged}. {step}")


if __name__ == "__main__":
    cli.run(main, __doc__, FLAGS)
