"""What the three scripts share: flags, --help, errors, exit codes, and where they look for files."""

import contextlib
import difflib
import inspect
import os
import re
import shutil
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType

import fire
import torch

from . import __version__
from .checkpoint import find_files
from .errors import UserError, check, one_line
from .generation import LLaMA
from .system import available_cpus, peak_memory

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = 2**24  # bytes of weights: smaller models gain nothing from a second thread
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "8": "int8", "4": "int4"}


def run(main: Callable[..., None]) -> None:
    """Call a script's main with the command line's flags, under torchrun on every rank.

    Exit codes: 1 after a user's mistake or an error of the system (a full disk), which are one line
    on stderr; 2 after an unknown flag; 130 after Ctrl-C; 141 if the reader of stdout has left.
    A bug shows its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: its number must not go to a file
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    warnings.showwarning = lambda message, *_: print(
        f"warning: {flagged(str(message))}", file=sys.stderr
    )
    try:
        args, flags = parse(main, sys.argv[1:])
        with distributed():
            main(*args, **flags)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        discard_stdout()
        sys.exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            discard_stdout()
        fail(flagged(str(error)))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            fail("out of memory: close programs, or ask for less at once")
        if re.search("Connection (closed|reset)|gloo", str(error)):
            fail("the connection to another rank is lost: it has ended")
        if re.search("can't start new thread|Resource temporarily unavailable", str(error)):
            fail("the system allows no more threads: raise its limit (ulimit -u), or end programs")
        raise


def distributed() -> typing.ContextManager[None]:
    """The ranks that torchrun has started, if it has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from .parallel import init_distributed

        return init_distributed()
    return contextlib.nullcontext()


def from_rank0(find: Callable, *args: object) -> typing.Any:
    """What find(*args) returns; under torchrun on rank 0, and the same on every rank."""
    if torch.distributed.is_initialized():
        from .parallel import broadcast_from_rank0

        return broadcast_from_rank0(find, *args)
    return find(*args)


def fail(message: str) -> typing.NoReturn:
    """End with an error line and exit code 1; under torchrun only one rank prints it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from .parallel import first_to_report

        if not first_to_report():
            sys.stderr.flush()
            os._exit(1)
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for the other ranks
    sys.exit(f"error: {one_line(message)}")


def discard_stdout() -> None:
    """Keep the flush of stdout at exit from failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def flagged(message: str) -> str:
    """A message of the library with flags in place of `parameter` and `parameter=value`."""
    return re.sub(
        r"`(\w+)(?:=([^`]*))?`", lambda m: f"--{m[1]}" + (f" {m[2]}" if m[2] else ""), message
    )


def parse(main: Callable[..., None], argv: Sequence[str]) -> tuple[Sequence[str], dict]:
    """Positional arguments, as text, and flags in the types that main annotates them with."""
    parameters = inspect.signature(main).parameters
    flags = {n: p for n, p in parameters.items() if p.kind == p.KEYWORD_ONLY}
    n_args = argv.index("--") if "--" in argv else len(argv)
    command, rest = [normalized(arg, flags) for arg in argv[:n_args]], argv[n_args + 1 :]
    if {"-h", "--help"} & {*command, *rest[:1]}:
        print(manual(main, flags))
        sys.exit(0)
    if "--version" in command:
        print(f"llama-cpu {__version__}, torch {torch.__version__}")
        sys.exit(0)
    for arg in command:
        name = arg.partition("=")[0]
        if re.match("--?[a-zA-Z]", arg) and name.lstrip("-") not in flags:
            close = difflib.get_close_matches(name, [f"--{n}" for n in flags], 1, 0.5)
            hint = f": did you mean {close[0]}?" if close else ""
            print(f"there is no flag {name}{hint} (--help lists all)", file=sys.stderr)
            sys.exit(2)
    for arg, following in zip(command, [*command[1:], "--"]):
        if arg.lstrip("-") in flags and arg.startswith("-") and following.startswith("--"):
            raise UserError(f"`{arg.lstrip('-')}` needs a value")
    found: list = []

    @fire.decorators.SetParseFn(str)  # text stays text, where Fire would read Python literals
    def collect(*args: str, **values: str) -> None:
        found[:] = args, values

    options = ["--", "--separator", "\0"]  # Fire's own is -, which stands for stdin here
    fire.Fire(collect, [*command, *options], sys.argv[0])
    args, values = found
    if (args or rest) and not any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
        raise UserError(f"{[*args, *rest][0]!r:.60} is not a flag: --help lists the flags")
    return [*args, *rest], {name: convert(name, flags[name], text) for name, text in values.items()}


def normalized(arg: str, flags: Mapping[str, inspect.Parameter]) -> str:
    """--ckpt-dir as --ckpt_dir, and --verbose as --verbose=True: Fire would take the next argument."""
    name, equals, value = arg.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not arg.startswith("-") or name not in flags:
        return arg
    if not equals and name in flags and flags[name].annotation is bool:
        equals, value = "=", "True"
    return f"--{name}{equals}{value}"


def kind_and_choices(parameter: inspect.Parameter) -> tuple[type, list[str]]:
    """The type of a flag's value; the values that it can have, if they are listed."""
    kind = parameter.annotation
    if NoneType in typing.get_args(kind):  # X | None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return str, list(typing.get_args(kind))
    return kind, []


def convert(name: str, parameter: inspect.Parameter, text: str) -> str | int | float | bool:
    """A flag's value in the type that it is annotated with."""
    kind, choices = kind_and_choices(parameter)
    if choices:
        folded = {choice.lower(): choice for choice in choices}
        chosen = folded.get(ALIASES.get(text.lower(), text.lower()))
        check(chosen is not None, name, " or ".join(choices), text)
        return chosen
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = {int: "an integer", float: "a number", bool: "True or False"}[kind]
        raise UserError(f"`{name}` must be {expected}, not {text!r:.60}") from None


def manual(main: Callable[..., None], flags: Mapping[str, inspect.Parameter]) -> str:
    """The text of --help, from main's signature and docstring."""
    summary, _, rest = inspect.getdoc(main).partition("\n\nArgs:\n")
    arguments, _, examples = rest.partition("\n\nExamples:\n")
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    positional = [name for name in texts if name not in flags]
    usage = "".join(f" [{name.upper()} ...]" for name in positional)
    width = min(shutil.get_terminal_size().columns, 100) - 2
    lines = [f"usage: python {Path(sys.argv[0]).name}{usage} [--FLAG VALUE ...]", "", summary, ""]
    for name, text in texts.items():
        label, default = name.upper(), ""
        if name in flags:
            kind, choices = kind_and_choices(flags[name])
            value = "|".join(choices) or {int: "N", float: "X", str: "TEXT", bool: ""}[kind]
            label = f"--{name} {value}".rstrip()
            given = flags[name].default
            default = "" if given is None or kind is bool else f" (default: {given})"
        lines.append(f"  {label}")
        lines += textwrap.wrap(" ".join(text.split()) + default, width, initial_indent=" " * 6,
                               subsequent_indent=" " * 6)  # fmt: skip
    lines += ["  --help, --version", "", "Examples:", examples]
    return "\n".join(lines)


def set_threads(threads: int | None) -> None:
    """Use `threads` threads, or else as many as there are cores for this process."""
    check(threads is None or threads > 0, "threads", "1 or more", threads)
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def tune_threads(llama: LLaMA, threads: int | None, verbose: bool) -> None:
    """Use one thread for a small model, unless `threads` says otherwise; report if verbose."""
    if threads is None and llama.weight_bytes < ONE_THREAD:
        torch.set_num_threads(1)
    if verbose:
        print(f"{llama!r}, {torch.get_num_threads()} threads", file=sys.stderr)


def find_model(ckpt_dir: str | None, tokenizer_path: str | None) -> tuple[Path, Path]:
    """The directory of weights and the tokenizer that the flags name, or the defaults.

    Without ckpt_dir it is ./model, here or beside the scripts, or else the demo model.
    """
    if ckpt_dir is not None:
        folder = Path(ckpt_dir)
    else:
        folder = next((f for f in (Path("model"), ROOT / "model") if find_files(f)), None)
        if folder is None:
            folder = ROOT / "model" / "demo"
            print(f"no weights in ./model: running the demo model, {folder}", file=sys.stderr)
    return folder, find_tokenizer(folder) if tokenizer_path is None else Path(tokenizer_path)


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer beside the weights, or else in ./tokenizer, here or beside the scripts."""
    here = Path("tokenizer", "tokenizer.model")
    places = (folder / "tokenizer.model", here, ROOT / here)
    return next((path for path in places if path.exists()), here)


def read_prompts(prompts: Sequence[str], prompt_file: str | None) -> list[str]:
    """The texts to continue: arguments, stdin for -, and a file."""
    texts = [without_mark(sys.stdin.read()) if p == "-" else clean(p) for p in prompts]
    if prompt_file is not None:
        try:
            text = Path(prompt_file).read_bytes().decode()
        except OSError as error:
            raise UserError(f"`prompt_file` {prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"`prompt_file` {prompt_file} is not UTF-8 text: {error}") from None
        texts.append(without_mark(text))
    return texts


def without_mark(text: str) -> str:
    """A text file's text: without a byte order mark, and with Windows' line ends as newlines."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def clean(text: str) -> str:
    """A command-line argument as text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(text).decode("utf-8", "replace")


def timing_line(llama: LLaMA, load_seconds: float) -> str:
    """What the scripts report at the end."""
    peak = peak_memory() / 1e9
    return f"loaded in {load_seconds:.1f} s, {llama.timings}, peak memory {peak:.2f} GB"


def is_demo(folder: Path) -> bool:
    return folder.resolve() == (ROOT / "model" / "demo").resolve()
