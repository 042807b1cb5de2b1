"""Continue prompts with a LLaMA model, on the CPU."""

import time
from typing import Literal

import llama
from llama import cli, terminal

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)

PROMPT = "I believe the meaning of life is"
DEMO_PROMPT = "Once upon a time"  # the demo model knows stories and nothing else


def main(
    *prompts: str,
    prompt_file: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    prompt_lookup: int = 16,
    max_seq_len: int = 512,
    max_gen_len: int = 256,
    max_batch_size: int = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Literal["int8", "int4"] | None = None,
    seed: int | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> None:
    """Continue prompts with a LLaMA model, on the CPU.

    Each prompt is printed with its continuation. Timings and errors go to stderr.

    Args:
        prompts: A text to continue; several run as one batch; - reads stdin.
        prompt_file: One more prompt: the text of this file.
        ckpt_dir: Directory with params.json and merged.pth or consolidated.*.pth. Default: ./model,
            or else the demo model.
        tokenizer_path: Default: tokenizer.model in ckpt_dir, or else in ./tokenizer.
        dtype: float32 is exact; bfloat16 takes half the memory.
        quantize: Round the weights: int8 takes a quarter of float32's memory, int4 a sixth.
        temperature: 0 takes the most probable token each time; higher is more surprising.
        top_p: Draw from the most probable tokens that together have this probability.
        top_k: Draw only from the TOP_K most probable tokens.
        repetition_penalty: Above 1, tokens that already occurred become less probable.
        seed: The same seed gives the same text on the same machine.
        max_gen_len: Longest continuation, in tokens.
        max_seq_len: Context, in tokens: prompt and continuation together.
        max_batch_size: Maximum number of prompts in a batch.
        prompt_lookup: Maximum number of tokens to draft from the context for a forward pass: faster
            where text repeats itself. 0 turns it off.
        threads: Default: one for each core of this process; 1 for models below 16 MB.
        verbose: Report the model's size and the number of threads.

    Examples:
        python example-cpu.py "Once upon a time"
        python example-cpu.py --ckpt_dir model/13B --quantize int8 "Simply put, relativity states"
        python example-cpu.py --prompt_file letter.txt --max_seq_len 2048 --temperature 0
    """
    torch.set_default_dtype(getattr(torch, dtype))
    sampling = llama.Sampling(
        max_gen_len, temperature, top_p, top_k, repetition_penalty, seed, prompt_lookup
    )
    texts = cli.from_rank0(cli.read_prompts, prompts, prompt_file)

    begin = time.perf_counter()
    folder, tokenizer = cli.find_model(ckpt_dir, tokenizer_path)
    cli.set_threads(threads, folder)
    model = llama.load(folder, tokenizer, max_seq_len, max_batch_size, quantize)
    load_seconds = time.perf_counter() - begin
    if verbose:
        cli.report(model)

    texts = texts or [DEMO_PROMPT if cli.is_demo(folder) else PROMPT]
    if len(texts) == 1:
        continued = [model.stream(texts[0], **vars(sampling))]
    else:
        continued = [[text] for text in model.generate(texts, **vars(sampling))]
    for pieces in continued:
        terminal.print_pieces(pieces)
        print(f"\n\n{'=' * 34}\n", flush=True)
    cli.report_timings(model, load_seconds)


if __name__ == "__main__":
    cli.run(main)
