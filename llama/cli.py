"""What the three scripts share: flags, the model they name, errors and exit codes."""

import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import fire
import torch

from . import system
from .checkpoint import find_files, load
from .errors import UserError, one_line, require
from .generation import LLaMA
from .parallel import joined

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = 2**24  # weights: smaller models gain nothing from a second thread


def run(main: Callable[..., None]) -> None:
    """Call main with the command line's flags, as its signature names and types them.

    A user's mistake ends in one line on stderr and exit code 1, an unknown flag in usage and 2,
    Ctrl-C in 130, a reader of stdout who has left in 141. What the system refuses (a full disk, a
    file that may not be read) is told as a mistake is. Nothing runs before the whole command line
    is understood.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: no file of ours is to get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    argv = [os.fsencode(arg).decode("utf-8", "replace") for arg in sys.argv[1:]]
    try:
        with joined():
            args, kwargs = parse(main, argv)
            main(*args, **kwargs)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):  # what stdout holds back must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        sys.exit(f"error: {one_line(error)}")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory: close programs, or ask for less at once")


def parse(main: Callable[..., None], argv: list[str]) -> tuple[list[str], dict]:
    """Positional arguments, always text, and the flags given, of the types in main's signature."""
    n_flags = argv.index("--") if "--" in argv else len(argv)
    parameters = inspect.signature(main).parameters
    command = [quoted(spelled_out(arg, parameters), parameters) for arg in argv[:n_flags]]
    if {"--help", "-h"} & {*command}:
        command = ["--help"]
    name = Path(sys.argv[0]).name
    for arg in command:
        flag = arg.partition("=")[0]
        if flag.startswith("-") and flag.lstrip("-") not in {*parameters, "help", "h"}:
            usage = fire.helptext.UsageText(main, fire.trace.FireTrace(main, name))
            print(f"no such flag: {flag}\n{usage}", file=sys.stderr)
            sys.exit(2)
    found: list = []

    @functools.wraps(main)
    def collect(*args: str, **flags: str) -> None:
        found[:] = args, flags

    fire.Fire(collect, command, name)
    args, flags = found
    values = {name: convert(name, parameters[name], text) for name, text in flags.items()}
    return [*args, *argv[n_flags + 1 :]], values


def spelled_out(arg: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """-s as --seed where no other flag begins so: --help shows such flags."""
    flags = [name for name, p in parameters.items() if p.kind == inspect.Parameter.KEYWORD_ONLY]
    meant = [name for name in flags if arg.partition("=")[0] == f"-{name[0]}"]
    return f"--{meant[0]}{arg[2:]}" if len(meant) == 1 else arg


def quoted(arg: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """An argument such that Fire, which reads Python literals, passes its text on as it is."""
    if not re.match("--|-[a-zA-Z]", arg):
        return repr(arg)
    flag, equals, text = arg.partition("=")
    parameter = parameters.get(flag.lstrip("-"))
    if parameter and parameter.annotation is bool and not equals:
        return f"{flag}='True'"  # or else Fire takes what follows for its value
    return f"{flag}={text!r}" if equals else flag


def convert(name: str, parameter: inspect.Parameter, text: str | bool) -> str | int | float | bool:
    """A flag's value in the type that it is annotated with; True stands for none."""
    kind = (typing.get_args(parameter.annotation) or (parameter.annotation,))[0]  # X of X | None
    takes = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[kind]
    if text is True:
        raise UserError(f"--{name} takes {takes}")
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"--{name} takes {takes}, not {text!r}") from None


def open_model(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int,
    max_batch_size: int,
    dtype: str,
    quantize: str | None,
    threads: int | None,
    verbose: bool,
) -> LLaMA:
    """The model that a script's flags name, with dtype as PyTorch's default from here on.

    Without ckpt_dir it is ./model, here or beside the scripts, or else the demo that comes along.
    """
    torch.set_default_dtype(parse_dtype(dtype))
    set_threads(threads)
    folder = default_model() if ckpt_dir is None else Path(ckpt_dir)
    tokenizer = default_tokenizer(folder) if tokenizer_path is None else Path(tokenizer_path)
    llama = load(folder, tokenizer, max_seq_len, max_batch_size, quantize)
    n_weights = sum(tensor.numel() for tensor in llama.model.state_dict().values())
    if threads is None and n_weights < ONE_THREAD:
        torch.set_num_threads(1)
    if verbose:
        print(f"threads: {torch.get_num_threads()}", file=sys.stderr)
        print(f"weights: {llama.weight_bytes / 1e9:.3g} GB", file=sys.stderr)
        for form, ways in llama.plan.items():
            print(f"{form}: {ways}", file=sys.stderr)
    return llama


def set_threads(threads: int | None) -> None:
    """Use as many threads as asked for, or else as there are cores for this process."""
    require(threads is None or threads > 0, "threads", "1 or more", threads)
    if threads is not None:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), system.available_cpus()))


def parse_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    require(name in dtypes, "dtype", "float32 or bfloat16", name)
    return dtypes[name]


def default_model() -> Path:
    for folder in (Path("model"), ROOT / "model"):
        if find_files(folder):
            return folder
    demo = ROOT / "model" / "demo"
    print(f"no weights in ./model: running the demo model, {demo}", file=sys.stderr)
    return demo


def default_tokenizer(folder: Path) -> Path:
    """The one beside the weights, or else in ./tokenizer, here or beside the scripts."""
    here = Path("tokenizer", "tokenizer.model")
    places = (folder / "tokenizer.model", here, ROOT / here)
    return next((path for path in places if path.exists()), here)


def peak_memory() -> str:
    return f"peak memory {system.peak_memory() / 1e9:.2f} GB"
