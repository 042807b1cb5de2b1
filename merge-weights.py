"""Merge the shards of a LLaMA checkpoint into one file."""

import sys
from pathlib import Path

from llama.checkpoint import SHARDS, merge
from llama.cli import run
from llama.errors import UserError


def main(
    model_size: str,
    input_dir: str = "model",
    output_dir: str = ".",
    overwrite: bool = False,
) -> None:
    """Merge INPUT_DIR/MODEL_SIZE/consolidated.*.pth into OUTPUT_DIR/merged.pth.

    Args:
        model_size: 7B, 13B, 30B or 65B.
        input_dir: The folder that holds a folder of that name.
        output_dir: Where merged.pth goes.
        overwrite: Replace a merged.pth that is there already.
    """
    if model_size not in SHARDS:
        raise UserError(f"--model_size takes {', '.join(SHARDS)}, not {model_size!r}")
    target = merge(Path(input_dir, model_size), Path(output_dir), overwrite)
    print(f"wrote {target}: it runs beside params.json of {model_size}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
