"""Continue prompts with a LLaMA model, on the CPU."""

import sys
import time

from llama.cli import open_model, peak_memory, run


def main(
    *prompts: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_gen_len: int = 256,
    max_batch_size: int = 32,
    dtype: str = "float32",
    quantize: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
) -> None:
    """Continue each prompt and print it with its continuation.

    Args:
        prompts: What to continue; several run as one batch.
        ckpt_dir: Folder of params.json and merged.pth or consolidated.*.pth. Default: ./model.
        tokenizer_path: Default: tokenizer.model in ckpt_dir, or else ./tokenizer/tokenizer.model.
        temperature: 0 takes the most probable token each time; higher is more surprising.
        top_p: Draw from the most probable tokens that together have this probability, 0 to 1.
        max_seq_len: Context, in tokens: prompt and continuation.
        max_gen_len: Longest continuation, in tokens.
        max_batch_size: Prompts computed at the same time.
        dtype: float32, or bfloat16 for half the memory.
        quantize: int8 or int4, for a quarter or a seventh of the memory.
        seed: Any whole number: the same seed draws the same tokens.
        verbose: Say how the model lies in memory and is computed.
    """
    begin = time.perf_counter()
    llama = open_model(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, dtype, quantize)
    load_seconds = time.perf_counter() - begin
    prompts = prompts or ("I believe the meaning of life is",)
    for text in llama.generate(prompts, max_gen_len, temperature, top_p, seed):
        print(f"{text}\n\n{'=' * 34}\n", flush=True)
    print(f"loaded in {load_seconds:.1f} s, {llama.timings}, {peak_memory()}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
