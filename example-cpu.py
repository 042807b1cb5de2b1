"""Continue prompts with a LLaMA model, on the CPU.

Each prompt is printed with its continuation. Timings and errors go to stderr.

Examples:
  python example-cpu.py "Once upon a time"
  python example-cpu.py --ckpt_dir model/13B --quantize int8 "Simply put, the"
  python example-cpu.py --prompt_file letter.txt --max_seq_len 2048
"""

import time
from argparse import Namespace

import llama
from llama import cli, terminal

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)

PROMPT = "I believe the meaning of life is"
DEMO_PROMPT = "Once upon a time"  # the demo model knows stories and nothing else
PROMPTS = "a text to continue (default: a sample); several run as one batch; - reads stdin"
FLAGS = {
    "prompt_file": (list, None, "one more prompt: the text of this file; may be repeated"),
    "max_gen_len": (int, 256, "longest continuation, in tokens"),
    "max_batch_size": (int, 32, "most prompts in a batch"),
    **cli.MODEL_FLAGS,
}


def main(args: Namespace) -> None:
    torch.set_default_dtype(getattr(torch, args.dtype))
    sampling = cli.sampling(args)
    prompts = cli.from_rank0(cli.read_prompts, args.prompts, args.prompt_file)

    begin = time.perf_counter()
    folder, tokenizer = cli.find_model(args.ckpt_dir, args.tokenizer_path)
    max_threads = cli.set_threads(args.threads, folder)
    model = llama.load(folder, tokenizer, args.max_seq_len, args.max_batch_size, args.quantize)
    model.max_threads = max_threads
    load_seconds = time.perf_counter() - begin
    if args.verbose:
        cli.report(model)

    if not prompts:
        terminal.notice("no prompt is given: this continues a sample ('-' reads one from stdin)")
        prompts = [DEMO_PROMPT if folder.resolve() == cli.DEMO else PROMPT]
    if len(prompts) == 1:
        texts = [model.stream(prompts[0], **vars(sampling))]
    else:
        texts = [[text] for text in model.generate(prompts, **vars(sampling))]
    for pieces in texts:
        terminal.print_pieces(pieces)
        print(f"\n\n{'=' * 34}\n", flush=True)
    cli.report_timings(model, load_seconds)


if __name__ == "__main__":
    cli.run(main, __doc__, FLAGS, PROMPTS)
