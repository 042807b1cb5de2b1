"""What a terminal needs: messages with editing and history, text wrapped at words, notices."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

N_HISTORY = 1000  # messages that are remembered


def is_interactive() -> bool:
    """True if a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_messages() -> Iterator[str]:
    """Yield the user's messages until the end of input.

    A message is one line; one that ends in a backslash continues on the next. In a terminal, pasted
    text of several lines is one message, and messages are remembered for later sessions. Ctrl-C
    clears the message.
    """
    interactive, text = is_interactive(), ""
    remember = open_history() if interactive else lambda message: None
    while True:
        prompt = "      > " if text else "prompt> "
        if sys.stdin.isatty() and not interactive:  # input() would print it to stdout
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if interactive else "")
        except KeyboardInterrupt:
            if not interactive or torch.distributed.is_torchelastic_launched():
                raise  # torchrun ends all ranks
            print()
            readline = sys.modules.get("readline")  # not on Windows
            if not text and not (readline and readline.get_line_buffer()):
                notice("Ctrl-D or /exit leaves")
            text = ""
            continue
        except EOFError:
            break
        text += line.removeprefix("\ufeff").rstrip()  # also Windows' \r
        if text.endswith("\\"):
            text = text[:-1] + "\n"
            continue
        if text.strip():
            remember(text)
        yield text
        text = ""
    if sys.stdin.isatty():
        print(file=sys.stdout if interactive else sys.stderr)
    if text:
        yield text


def open_history() -> Callable[[str], None]:
    """Let input() edit lines and recall messages; returns a function that remembers one."""
    try:
        import readline
    except ImportError:  # Windows' console has editing and history of its own
        return lambda message: None
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_auto_history(False)
    # In the user's state folder, as the XDG Base Directory Specification names it.
    home = os.environ.get("HOME", os.devnull)  # without a home nothing is kept
    state = os.environ.get("XDG_STATE_HOME") or Path(home, ".local", "state")
    path = Path(state, "llama-cpu", "history.jsonl")
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines()[-N_HISTORY:]:
            readline.add_history(json.loads(line))

    def remember(message: str) -> None:
        with contextlib.suppress(UnicodeError):  # with LC_ALL=C readline takes ASCII only
            readline.add_history(message)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(message) + "\n")

    return remember


def print_pieces(pieces: Iterable[str]) -> None:
    """Print a text as it comes, in a terminal wrapped at words."""
    if not is_interactive():
        for piece in pieces:
            print(piece, end="", flush=True)
        return
    column, word = 0, ""
    with without_echo():
        for char in chain.from_iterable(pieces):
            limit = shutil.get_terminal_size().columns  # the window may change
            if not char.isspace():
                word += char
                if column + width(word) >= limit and column:
                    # Take the word's beginning back, and begin a line with it.
                    char = "\b \b" * width(word[:-1]) + "\n" + word
                    column = 0
            else:
                column = 0 if char == "\n" else column + width(word) + 1
                word = ""
                if column >= limit:
                    char, column = "\n", 0
            print(char, end="", flush=True)


def width(text: str) -> int:
    """Columns of a text in a terminal: emoji and East Asian characters 2, combining marks 0."""
    shown = (char for char in text if unicodedata.category(char) not in ("Mn", "Me", "Cf"))
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in shown)


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Do not show what is typed or pasted meanwhile: the next prompt receives it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    # The prompt must understand bracketed paste: Apple's readline does not.
    is_gnu = "GNU" in (getattr(sys.modules.get("readline"), "__doc__", "") or "")
    understood = is_gnu and os.environ.get("TERM") != "dumb"
    on, off = ("\033[?2004h", "\033[?2004l") if understood else ("", "")
    before = termios.tcgetattr(sys.stdin)
    # Without ICANON keys stay as they are, for readline.
    silent = [*before[:3], before[3] & ~(termios.ECHO | termios.ICANON), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        print(on, end="", flush=True)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        print(off, end="", flush=True)


def notice(text: str) -> None:
    """Print a text that is not the model's to stderr, in a terminal dimmed and wrapped at words."""
    if sys.stderr.isatty():
        options = {"break_on_hyphens": False, "break_long_words": False}
        columns = shutil.get_terminal_size().columns
        text = "\n".join(textwrap.fill(line, columns, **options) for line in text.splitlines())
        text = text if os.environ.get("NO_COLOR") else f"\033[2m{text}\033[0m"
    print(text, file=sys.stderr, flush=True)
