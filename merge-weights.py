"""Make one file of a LLaMA checkpoint: Meta's shards, or a Hugging Face folder."""

import sys
from pathlib import Path

from llama.checkpoint import find_shards, merge
from llama.cli import parse_dtype, run
from llama.errors import UserError, require
from llama.huggingface import convert_folder
from llama.quantize import check_quantize

SIZES = ("7B", "13B", "30B", "34B", "65B", "70B")


def main(
    *,
    model_size: str | None = None,
    input_dir: str = "model",
    output_dir: str = ".",
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge INPUT_DIR/MODEL_SIZE/consolidated.*.pth into OUTPUT_DIR/merged.pth.

    Without MODEL_SIZE the weights are in INPUT_DIR itself. Where there is a config.json, they are
    Hugging Face's, and params.json and tokenizer.model are written too.

    Args:
        model_size: 7B, 13B, 30B, 34B, 65B or 70B.
        input_dir: The folder that holds a folder of that name, or the weights.
        output_dir: Where merged.pth goes.
        dtype: float32 or bfloat16, to convert. Default: as the shards are
        quantize: int8 or int4, so that loading reads a half or a quarter as much.
        overwrite: Replace what is there already.
    """
    require(model_size in (None, *SIZES), "model_size", ", ".join(SIZES), model_size)
    check_quantize(quantize)
    folder = Path(input_dir, model_size or "")
    foreign = (folder / "config.json").exists()
    if not foreign and not find_shards(folder):
        raise UserError(
            f"{folder} has neither consolidated.*.pth nor a config.json: "
            "name the folder that has the weights with --input_dir and --model_size"
        )
    write = convert_folder if foreign else merge
    to = None if dtype is None else parse_dtype(dtype)
    target = write(folder, Path(output_dir), to, quantize, overwrite)
    params = Path(output_dir if foreign else folder, "params.json")
    print(f"wrote {target}: it runs beside {params}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
