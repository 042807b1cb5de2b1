"""What the three scripts share: flags, the model they name, errors and exit codes."""

import argparse
import functools
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import torch

from .checkpoint import find_files, load
from .errors import UserError, require
from .generation import LLaMA

ROOT = Path(__file__).resolve().parent.parent


def run(main: Callable[..., None]) -> None:
    """Call main with the command line's flags, as its signature names and types them.

    A user's mistake ends in one line on stderr and exit code 1, an unknown flag in usage and 2,
    Ctrl-C in 130. Nothing runs before the whole command line is understood.
    """
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(encoding="utf-8", errors="replace")
    argv = [os.fsencode(arg).decode("utf-8", "replace") for arg in sys.argv[1:]]
    try:
        args, kwargs = parse(main, argv)
        main(*args, **kwargs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def parse(main: Callable[..., None], argv: list[str]) -> tuple[list[str], dict]:
    """Positional arguments, always text, and the flags given, of the types in main's signature.

    main's docstring has the help: "flag: what it is", each in one line.
    """
    parser = argparse.ArgumentParser(
        description=main.__doc__.partition("Args:")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    about = dict(re.findall(r"^ +(\w+): (.+)", main.__doc__, re.MULTILINE))
    for name, p in inspect.signature(main).parameters.items():
        kind = (typing.get_args(p.annotation) or (p.annotation,))[0]  # X of X | None
        default = "" if p.default in (None, False, p.empty) else f" Default: {p.default}"
        if p.kind is p.VAR_POSITIONAL:
            options = {"dest": "args", "nargs": "*", "metavar": name.upper()}
        elif kind is bool:
            options = {"action": "store_true"}
        else:
            options = {
                "type": functools.partial(convert, name, kind),
                "metavar": {int: "N", float: "X", str: "TEXT"}[kind],
                "required": p.default is p.empty,
            }
        names = [] if p.kind is p.VAR_POSITIONAL else [f"--{name}"]
        parser.add_argument(*names, help=about[name] + default, **options)
    n_flags = argv.index("--") if "--" in argv else len(argv)
    flags = vars(parser.parse_intermixed_args(argv[:n_flags]))
    args = flags.pop("args", []) + argv[n_flags + 1 :]
    return args, flags


def convert(name: str, kind: type, text: str) -> str | int | float:
    """A flag's value in its type."""
    try:
        return kind(text)
    except ValueError:
        takes = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name} takes {takes}, not {text!r}") from None


def open_model(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int,
    max_batch_size: int,
    dtype: str,
    quantize: str | None,
    verbose: bool,
) -> LLaMA:
    """The model that a script's flags name, with dtype as PyTorch's default from here on.

    Without ckpt_dir it is ./model, here or beside the scripts, or else the demo that comes along.
    """
    require(max_seq_len > 0, "max_seq_len", "1 token or more", max_seq_len)
    require(max_batch_size > 0, "max_batch_size", "1 prompt or more", max_batch_size)
    torch.set_default_dtype(parse_dtype(dtype))
    check_quantize(quantize)
    folder = Path(ckpt_dir) if ckpt_dir else default_model()
    if not find_files(folder):
        raise UserError(
            f"{folder} has no consolidated.*.pth and no merged.pth: "
            "name the folder that has the weights with --ckpt_dir"
        )
    own = folder / "tokenizer.model"
    tokenizer = tokenizer_path or (own if own.exists() else "tokenizer/tokenizer.model")
    llama = load(folder, tokenizer, max_seq_len, max_batch_size, quantize)
    if verbose:
        for form, ways in llama.plan.items():
            print(f"{form}: {ways}", file=sys.stderr)
    return llama


def parse_dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    require(name in dtypes, "dtype", "float32 or bfloat16", name)
    return dtypes[name]


def check_quantize(name: str | None) -> None:
    require(name in (None, "int8", "int4"), "quantize", "int8 or int4", name)


def default_model() -> Path:
    for folder in (Path("model"), ROOT / "model"):
        if find_files(folder):
            return folder
    demo = ROOT / "model" / "demo"
    print(f"no weights in ./model: running the demo model, {demo}", file=sys.stderr)
    return demo


def peak_memory() -> str:
    """The most memory that this process has held, where the platform tells."""
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]
        return f"peak memory {int(kilobytes) * 1024 / 1e9:.2f} GB"
    return "peak memory unknown"
