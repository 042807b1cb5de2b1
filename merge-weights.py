"""Merge the shards of a LLaMA checkpoint into one file."""

import sys
from pathlib import Path

from llama.checkpoint import SHARDS, merge
from llama.cli import check_quantize, parse_dtype, run
from llama.errors import UserError


def main(
    model_size: str,
    input_dir: str = "model",
    output_dir: str = ".",
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge INPUT_DIR/MODEL_SIZE/consolidated.*.pth into OUTPUT_DIR/merged.pth.

    Args:
        model_size: 7B, 13B, 30B or 65B.
        input_dir: The folder that holds a folder of that name.
        output_dir: Where merged.pth goes.
        dtype: float32 or bfloat16, to convert; without, the weights stay what they are.
        quantize: int8 or int4, so that the next start reads a half or a quarter as much.
        overwrite: Replace a merged.pth that is there already.
    """
    if model_size not in SHARDS:
        raise UserError(f"--model_size takes {', '.join(SHARDS)}, not {model_size!r}")
    check_quantize(quantize)
    target = merge(
        Path(input_dir, model_size),
        Path(output_dir),
        dtype and parse_dtype(dtype),
        quantize,
        overwrite,
    )
    print(f"wrote {target}: it runs beside params.json of {model_size}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
