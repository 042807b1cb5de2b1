"""What the three scripts share: flags, the model they name, errors and exit codes."""

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import fire
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
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        args, kwargs = parse(main, sys.argv[1:])
        main(*args, **kwargs)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def parse(main: Callable[..., None], argv: list[str]) -> tuple[tuple[str, ...], dict]:
    """Positional arguments, always text, and flags, of the types in main's signature."""
    parameters = inspect.signature(main).parameters
    n_flags = argv.index("--") if "--" in argv else len(argv)
    argv, after = argv[:n_flags], argv[n_flags + 1 :]
    switches = [f"--{name}" for name, p in parameters.items() if p.annotation is bool]
    argv = [f"{arg}=True" if arg in switches else arg for arg in argv]
    found: list = []

    @fire.decorators.SetParseFn(str)
    @functools.wraps(main)
    def collect(*args: str, **kwargs: str) -> None:
        found[:] = args, kwargs

    # Fire calls a function before it looks at what is left over, so main itself must wait.
    fire.Fire(collect, command=argv, name=Path(sys.argv[0]).name)
    args, kwargs = found
    flags = {name: convert(name, s, parameters[name].annotation) for name, s in kwargs.items()}
    return (*args, *after), flags


def convert(name: str, text: str, annotation: type) -> str | int | float | bool:
    """A flag's value in the type that it is annotated with."""
    kind = (typing.get_args(annotation) or (annotation,))[0]  # X of X | None
    try:
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        names = {int: "a whole number", float: "a number", bool: "True or False"}
        raise UserError(f"--{name} takes {names[kind]}, not {text!r}") from None


def open_model(
    ckpt_dir: str | None,
    tokenizer_path: str | None,
    max_seq_len: int,
    max_batch_size: int,
    dtype: str,
    quantize: str | None,
) -> LLaMA:
    """The model that a script's flags name, with dtype as PyTorch's default from here on.

    Without ckpt_dir it is ./model, here or beside the scripts, or else the demo that comes along.
    """
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
    return load(folder, tokenizer, max_seq_len, max_batch_size, quantize)


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
