"""Make one file of a LLaMA checkpoint: Meta's shards, or a Hugging Face folder."""

from pathlib import Path
from typing import Literal

from llama import cli, terminal
from llama.merge import open_source, write_merged

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)


def main(
    *,
    model_size: Literal["7B", "13B", "30B", "34B", "65B", "70B"] | None = None,
    input_dir: str = "model",
    output_dir: str = ".",
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    overwrite: bool = False,
) -> None:
    """Merge INPUT_DIR/MODEL_SIZE/consolidated.*.pth into OUTPUT_DIR/merged.pth.

    A Hugging Face folder (config.json, tokenizer.model and weights) is converted to Meta's format.

    Args:
        model_size: Name of the folder in INPUT_DIR. Default: the weights are in INPUT_DIR itself.
        input_dir: Where the weights, or folders of weights, are.
        output_dir: Where merged.pth is written.
        dtype: Convert the weights. Default: keep their dtype.
        quantize: Round the weights: int8 halves fp16's file, int4 makes it a third.
        overwrite: Replace files that exist.

    Examples:
        python merge-weights.py --model_size 13B --output_dir model/13B
        python merge-weights.py --input_dir TinyLlama-1.1B-Chat-v1.0 --output_dir model
        python merge-weights.py --input_dir model/7B --output_dir model --quantize int8
    """
    folder, target = Path(input_dir, model_size or ""), Path(output_dir)
    tokenizer = cli.find_tokenizer(folder) if quantize else None
    # Meta's params.json goes along, but not into the repository, the default of output_dir.
    source = open_source(folder, target.resolve() != Path.cwd(), tokenizer)
    merged = write_merged(source, target, dtype and getattr(torch, dtype), quantize, overwrite)
    if (target / "params.json").exists():
        terminal.notice(f"wrote {merged}. Run: python example-cpu.py --ckpt_dir {target}")
    else:
        terminal.notice(f"wrote {merged}. To run it, put its params.json beside it")


if __name__ == "__main__":
    cli.run(main)
