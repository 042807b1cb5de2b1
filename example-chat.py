"""Chat with a LLaMA model, on the CPU."""

from contextlib import closing
from typing import Literal

import llama
from llama import STYLES, cli, terminal
from llama.errors import check

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)

HELP = """\
/reset   begin a new conversation
/retry   draw the last reply again
/help    show this (also /?)
/exit    leave (also /quit, /bye and Ctrl-D)
Ctrl-C   stop the reply, or clear the line
A line that ends in \\ continues on the next one. A space before / sends the line as it is."""


def main(
    *,
    style: Literal[tuple(STYLES)] | None = None,
    system: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    prompt_lookup: int = 16,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantize: Literal["int8", "int4"] | None = None,
    seed: int | None = None,
    threads: int | None = None,
    verbose: bool = False,
) -> None:
    """Chat with a LLaMA model, on the CPU.

    Each line of input is a message; the replies go to stdout, all else to stderr.

    Args:
        style: The prompt format that the model was trained on. Default: what the converted model's
            folder says, or else dialog, for plain LLaMA.
        system: The system prompt. Default: the style's.
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
        max_gen_len: Longest reply, in tokens. Default: half of the context.
        max_seq_len: Context, in tokens. When it is full, the oldest turns are forgotten.
        prompt_lookup: Maximum number of tokens to draft from the context for a forward pass: faster
            where text repeats itself. 0 turns it off.
        threads: Default: one for each core of this process; 1 for models below 16 MB.
        verbose: Report the model's size and the number of threads.

    Examples:
        python example-chat.py
        python example-chat.py --ckpt_dir model/TinyLlama --quantize int8 --style zephyr
    """
    torch.set_default_dtype(getattr(torch, dtype))
    max_gen_len = max(max_seq_len // 2, 1) if max_gen_len is None else max_gen_len
    sampling = llama.Sampling(
        max_gen_len, temperature, top_p, top_k, repetition_penalty, seed, prompt_lookup
    )
    folder, tokenizer = cli.find_model(ckpt_dir, tokenizer_path)
    cli.set_threads(threads, folder)
    model = llama.load(folder, tokenizer, max_seq_len, 1, quantize)
    if verbose:
        cli.report(model)
    style = style or model.chat_style
    check(style in STYLES, "style", " or ".join(STYLES), style)
    chat = llama.Chat(model, STYLES[style], system, sampling)
    if terminal.is_interactive():
        terminal.notice(
            f"{folder.name}, {model.weight_bytes / 1e6:,.0f} MB, style {style}. "
            "/help lists the commands."
        )
    converse(chat)


def converse(chat: llama.Chat) -> None:
    """Answer messages until the end of input."""
    messages = terminal.read_messages()
    while (message := cli.from_rank0(next, messages, None)) is not None:
        if message in ("/exit", "/quit", "/bye"):
            return
        if message == "/reset":
            chat.reset()
            terminal.notice("a new conversation")
        elif message in ("/help", "/?"):
            terminal.notice(HELP)
        elif message == "/retry":
            if last := chat.retry():
                answer(chat, last)
            else:
                terminal.notice("there is no reply yet")
        elif message.startswith("/"):
            terminal.notice(f"there is no command {message:.60}: /help lists them")
        elif message.strip():
            answer(chat, message)


def answer(chat: llama.Chat, message: str) -> None:
    """Print the reply to a message. In a terminal, Ctrl-C stops it and the conversation goes on."""
    interactive = cli.from_rank0(terminal.is_interactive)
    try:
        with closing(chat.reply(message)) as pieces:
            terminal.print_pieces(pieces)
    except llama.UserError as error:
        if not interactive:
            raise
        terminal.notice(cli.params_to_flags(str(error)))
        return
    except KeyboardInterrupt:
        if not interactive or torch.distributed.is_initialized():  # torchrun stops all ranks
            raise
        print(" ^C", end="")
    print(flush=True)
    terminal.notice(cli.params_to_flags(chat.status()) + cli.contention())


if __name__ == "__main__":
    cli.run(main)
