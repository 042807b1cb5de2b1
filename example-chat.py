"""Chat with a LLaMA model, on the CPU.

Each line of input is a message; the replies go to stdout, all else to stderr.

Examples:
  python example-chat.py
  python example-chat.py --ckpt_dir model/TinyLlama --quantize int8
"""

import re
import sys
from argparse import Namespace
from contextlib import closing

import llama
from llama import STYLES, cli, terminal

import torch  # isort: skip  (after llama, which sets what torch reads when it is imported)

FLAGS = {
    "style": (tuple(STYLES), None, "prompt format (default: the model's own, or dialog)"),
    "system": (str, None, "system prompt (default: the style's)"),
    "max_gen_len": (int, None, "longest reply, in tokens (default: half of the context)"),
    **cli.MODEL_FLAGS,
}
HELP = """\
/reset   begin a new conversation
/retry   draw the last reply again
/help    show this (also /?)
/exit    leave (also /quit, /bye and Ctrl-D)
Ctrl-C   stop the reply, or clear the line
A line that ends in \\ continues on the next one. A space before / sends the line as it is."""


def main(args: Namespace) -> None:
    torch.set_default_dtype(getattr(torch, args.dtype))
    if args.max_gen_len is None:
        args.max_gen_len = max(args.max_seq_len // 2, 1)
    sampling = cli.sampling(args)
    folder, tokenizer = cli.find_model(args.ckpt_dir, args.tokenizer_path)
    max_threads = cli.set_threads(args.threads, folder)
    model = llama.load(folder, tokenizer, args.max_seq_len, 1, args.quantize)
    model.max_threads = max_threads
    if args.verbose:
        cli.report(model)
    style = args.style or model.chat_style
    if style not in STYLES:
        style = "dialog"
        terminal.notice("the model's chat template is not known: choose a --style")
    chat = llama.Chat(model, style, args.system, sampling)
    if sys.stdin.isatty():
        terminal.notice(
            f"{folder.resolve().name}, {model.weight_bytes / 1e6:,.0f} MB, style {style}. "
            "/help lists the commands."
        )
    converse(chat)


def converse(chat: llama.Chat) -> None:
    """Answer messages until the end of input."""
    messages = terminal.read_messages()
    while (message := cli.from_rank0(next, messages, None)) is not None:
        # A path or a comment, or a text of several lines, is a message.
        command = message.lower() if re.fullmatch(r"/[\w?]*( .*)?", message) else ""
        if command in ("/exit", "/quit", "/bye"):
            return
        if command == "/reset":
            chat.reset()
            terminal.notice("a new conversation")
        elif command in ("/help", "/?"):
            terminal.notice(HELP)
        elif command == "/retry":
            if (last := chat.retry()) is None:
                terminal.notice("there is no reply yet")
            else:
                answer(chat, last)
        elif command:
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
    terminal.notice(cli.params_to_flags(chat.status()) + cli.contention(chat.llama))


if __name__ == "__main__":
    cli.run(main, __doc__, FLAGS)
