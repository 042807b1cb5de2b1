"""Continue prompts with a LLaMA model, on the CPU."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llama.cli import open_model, peak_memory, run
from llama.errors import UserError
from llama.generation import Sampling
from llama.parallel import from_first


def main(
    *prompts: str,
    prompt_file: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    max_seq_len: int = 512,
    max_gen_len: int = 256,
    max_batch_size: int = 32,
    dtype: str = "float32",
    quantize: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> None:
    """Continue each prompt and print it with its continuation.

    Args:
        prompts: What to continue; several run as one batch; - is what stdin has.
        prompt_file: One more prompt, this file as it is, to the last newline.
        ckpt_dir: Folder of params.json and merged.pth or consolidated.*.pth. Default: ./model
        tokenizer_path: Default: tokenizer.model in ckpt_dir, or else in ./tokenizer
        temperature: 0 takes the most probable token each time; higher is more surprising.
        top_p: Draw from the most probable tokens that together have this probability, 0 to 1.
        top_k: Draw from this many most probable tokens at most.
        repetition_penalty: Above 1, tokens that are there already become less probable.
        max_seq_len: Context, in tokens: prompt and continuation.
        max_gen_len: Longest continuation, in tokens.
        max_batch_size: Prompts computed at the same time.
        dtype: float32, or bfloat16 for half the memory.
        quantize: int8 or int4, for a quarter or a sixth of the memory.
        seed: Any whole number: the same seed draws the same tokens.
        threads: Default: as many as there are cores for this program.
        verbose: Say how the model lies in memory and is computed.
    """
    sampling = Sampling(max_gen_len, temperature, top_p, top_k, repetition_penalty, seed)
    texts = from_first(read_prompts, prompts, prompt_file)

    begin = time.perf_counter()
    llama = open_model(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, dtype, quantize, threads, verbose
    )
    load_seconds = time.perf_counter() - begin
    if len(texts) == 1:
        tokens = llama.tokenizer.encode(texts[0], bos=True, eos=False)
        continued = [llama.stream(tokens, **asdict(sampling))]
    else:
        continued = [[text] for text in llama.generate(texts, **asdict(sampling))]
    for pieces in continued:
        for piece in pieces:
            print(piece, end="", flush=True)
        print(f"\n\n{'=' * 34}\n", flush=True)
    print(f"loaded in {load_seconds:.1f} s, {llama.timings}, {peak_memory()}", file=sys.stderr)


def read_prompts(prompts: Sequence[str], prompt_file: str | None) -> list[str]:
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if prompt_file is not None:
        texts.append(read_prompt(Path(prompt_file)))
    return texts or ["I believe the meaning of life is"]


def read_prompt(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # \r stays as it is
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path} cannot be read as UTF-8 text: {error}") from None


if __name__ == "__main__":
    run(main)
