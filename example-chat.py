"""Chat with a LLaMA model, on the CPU."""

import os
import sys
from collections.abc import Iterator
from contextlib import closing

from llama.chat import STYLES, Chat
from llama.cli import open_model, run
from llama.errors import UserError, require
from llama.generation import Sampling
from llama.parallel import from_first, place

HELP = """\
/reset   begin a new conversation
/help    show this
/exit    leave, as the end of input and Ctrl-C at the prompt do
Ctrl-C   stop the reply; the conversation goes on
A line ending in \\ goes on in the next. A space before / sends a line that begins with it."""


def main(
    *,
    style: str = "dialog",
    system: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    max_seq_len: int = 512,
    max_gen_len: int = 512,
    dtype: str = "float32",
    quantize: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> None:
    """Talk with a model line by line; /help tells how.

    Args:
        style: How the talk is written out for the model: dialog, complete, llama2, alpaca, vicuna.
        system: What the model is told first, instead of the style's preamble. Default: that
        ckpt_dir: Folder of params.json and merged.pth or consolidated.*.pth. Default: ./model
        tokenizer_path: Default: tokenizer.model in ckpt_dir, or else in ./tokenizer
        temperature: 0 takes the most probable token each time; higher is more surprising.
        top_p: Draw from the most probable tokens that together have this probability, 0 to 1.
        top_k: Draw from this many most probable tokens at most.
        repetition_penalty: Above 1, tokens that are there already become less probable.
        max_seq_len: Context, in tokens: when it is full, the oldest turns are forgotten.
        max_gen_len: Longest reply, in tokens.
        dtype: float32, or bfloat16 for half the memory.
        quantize: int8 or int4, for a quarter or a sixth of the memory.
        seed: Any whole number: the same seed draws the same tokens.
        threads: Default: as many as there are cores for this program.
        verbose: Say how the model lies in memory and is computed.
    """
    require(style in STYLES, "style", ", ".join(STYLES), style)
    sampling = Sampling(max_gen_len, temperature, top_p, top_k, repetition_penalty, seed)
    llama = open_model(ckpt_dir, tokenizer_path, max_seq_len, 1, dtype, quantize, threads, verbose)
    chat = Chat(llama, STYLES[style], system, sampling)
    lines = read_lines()
    while (line := from_first(next, lines, None)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
            notice("a new conversation")
        elif line.startswith("/"):
            notice(HELP if line == "/help" else f"no such command: {line}; /help lists them")
        elif line.strip():
            answer(chat, line)


def read_lines() -> Iterator[str]:
    """The user's lines until the end of input; one that ends in a backslash has several."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  (input() then has line editing and history)
        except ImportError:
            pass
    text = ""
    while True:
        try:
            text += input(("      > " if text else "prompt> ") if interactive else "")
        except EOFError:
            if interactive:
                print()
            if text:
                yield text
            return
        text = text.rstrip()  # also of Windows' \r
        if text.endswith("\\"):
            text = text[:-1] + "\n"
        else:
            yield text
            text = ""


def answer(chat: Chat, line: str) -> None:
    try:
        with closing(chat.reply(line)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except UserError as error:
        if not from_first(sys.stdin.isatty):
            raise
        notice(str(error))
        return
    except KeyboardInterrupt:
        if not sys.stdin.isatty() or place()[1] > 1:  # torchrun stops as a whole
            raise
    print(flush=True)
    notice(chat.status())


def notice(text: str) -> None:
    """A line for the user that is none of the model's, dimmed where that is possible."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
