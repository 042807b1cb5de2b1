"""What the three scripts share: flags, --help, errors, exit codes, where they look for files."""

import argparse
import contextlib
import difflib
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import psutil
import torch

from . import __version__
from .checkpoint import SCHEMES, found_in, has_weights, is_huggingface, nearest_tokenizer
from .errors import UserError, check
from .generation import LLaMA
from .sampling import Sampling
from .system import available_cpus, peak_memory
from .terminal import notice

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "model" / "demo"
MODELS = (Path("model"), ROOT / "model")  # where weights are by default: here, beside the scripts
ONE_THREAD = 2**24  # bytes of files: smaller models gain nothing from a second thread
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "8": "int8", "4": "int4"}
DTYPES = ("float32", "bfloat16")
# Type (list: a path, repeatable) or choices, default, text.
Flags = dict[str, tuple[type | tuple[str, ...], object, str]]
MODEL_FLAGS: Flags = {  # of example-cpu.py and example-chat.py
    "ckpt_dir": (Path, None, "directory of the weights (default: model, or else model/demo)"),
    "tokenizer_path": (Path, None, "tokenizer.model (default: in ckpt_dir, its parent, tokenizer)"),
    "dtype": (DTYPES, "float32", "dtype of the weights or, with --quantize, of the activations"),
    "quantize": (SCHEMES, None, "round the weights: int8 to a quarter of float32, int4 to a sixth"),
    "temperature": (float, Sampling.temperature, "0: the most probable token; higher: more random"),
    "top_p": (float, Sampling.top_p, "draw from top tokens that together have this probability"),
    "top_k": (int, None, "draw only from this many most probable tokens"),
    "repetition_penalty": (float, Sampling.repetition_penalty, "above 1: fewer repetitions"),
    "seed": (int, None, "the same seed and --threads give the same text on one machine"),
    "prompt_lookup": (int, Sampling.prompt_lookup, "most tokens to draft for each pass; 0: none"),
    "max_seq_len": (int, 512, "context: tokens of prompt and reply together"),
    "threads": (int, None, "threads (default: one for each free core; one for models below 16 MB)"),
    "verbose": (bool, False, "report the model's size and the number of threads"),
}


def run(
    main: Callable[[argparse.Namespace], None], doc: str, flags: Flags, prompts: str | None = None
) -> None:
    """Call a script's main with the values of its flags, under torchrun on every rank.

    The other arguments are those of `Parser`.

    Exit codes: 1 after a user's mistake or an error of the system (a full disk), which are one line
    on stderr; 2 after an unknown flag; 130 after Ctrl-C; 141 if the reader of stdout has left.
    A bug shows its traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next open() would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")
    warnings.showwarning = lambda message, *_: notice(f"warning: {params_to_flags(str(message))}")
    try:
        with distributed():
            main(Parser(doc, flags, prompts).parse(sys.argv[1:]))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        # The flush of stdout at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        if isinstance(error, OSError):
            fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}")
        fail(params_to_flags(str(error)))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            fail("out of memory: close programs, or ask for less at once")
        if "gloo/transport" in str(error):
            fail("the connection to another rank is lost: it has ended")
        if re.search("can't start new thread|Resource temporarily unavailable", str(error)):
            fail("the system allows no more threads: raise its limit (ulimit -u), or end programs")
        raise


def distributed() -> typing.ContextManager[None]:
    """The ranks that torchrun has started, if it has."""
    if torch.distributed.is_torchelastic_launched():
        from .parallel import init_distributed

        return init_distributed()
    return contextlib.nullcontext()


def from_rank0(function: Callable, *args: object) -> typing.Any:
    """function(*args); under torchrun only rank 0 calls it, and all ranks get the result."""
    if torch.distributed.is_initialized():
        from .parallel import broadcast_from_rank0

        return broadcast_from_rank0(function, *args)
    return function(*args)


def fail(message: str) -> typing.NoReturn:
    """End with an error line and exit code 1; under torchrun only one rank prints it."""
    message = "error: " + "".join(c if c.isprintable() else " " for c in message)[:500]
    if torch.distributed.is_torchelastic_launched():
        from .parallel import first_to_report

        if first_to_report():
            print(message, file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for the other ranks
    sys.exit(message)


def params_to_flags(message: str) -> str:
    """A message of the library with flags in place of `parameter` and `parameter=value`."""
    return re.sub(r"`(\w+)=?([^`]*)`", lambda m: f"--{m[1]} {m[2]}".rstrip(), message)


class Parser(argparse.ArgumentParser):
    """The flags of a script.

    --max-gen-len is --max_gen_len, and flags may stand between prompts. An unknown flag ends the
    script with exit code 2 and names the nearest known one.

    Args:
        doc: The script's docstring: a description, and "Examples:" at its end.
        flags: As MODEL_FLAGS.
        prompts: What positional arguments are. Default: there are none.
    """

    def __init__(self, doc: str, flags: Flags, prompts: str | None = None):
        description, _, examples = doc.partition("Examples:")
        super().__init__(
            description=description,
            epilog=f"Examples:{examples}",
            allow_abbrev=False,
            add_help=False,  # with -h it would take -hello for -h ello
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="python %(prog)s [--FLAG VALUE ...]" + " [PROMPT ...]" * bool(prompts),
        )
        versions = f"llama-cpu {__version__}, torch {torch.__version__}"
        self.add_argument("--help", action="help", help="show this page (also -h)")
        self.add_argument("--version", action="version", version=versions)
        if prompts:
            self.add_argument("prompts", nargs="*", metavar="PROMPT", help=prompts)
        for name, (kind, default, text) in flags.items():
            if kind is bool:
                options = {"action": "store_true"}
            elif isinstance(kind, tuple):
                options = {"type": as_choice, "choices": kind}
            elif kind is list:
                options = {"action": "append", "type": as_path, "metavar": "FILE"}
            elif kind is Path:
                options = {"type": as_path, "metavar": "PATH"}
            else:
                options = {"type": kind, "metavar": kind.__name__.upper()}
            text += f" (default: {default})" if default else ""
            self.add_argument(f"--{name}", default=default, help=text, **options)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of the flags. All arguments after -- are prompts."""
        if [*argv[-2:]] == ["--", "--help"]:  # as in 2023, with fire
            argv = ["--help"]
        end = argv.index("--") if "--" in argv else len(argv)
        name = re.compile(r"\A--[\w-]+(?==|\Z)")
        own = ["--help" if arg == "-h" else arg for arg in argv[:end]]
        flags = [name.sub(lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in own]
        args, other = self.parse_known_intermixed_args(flags)
        if unknown := [arg for arg in other if arg.startswith("-")]:
            flag, known = unknown[0].partition("=")[0], self._option_string_actions
            near = [name for name in known if name.startswith(flag)]
            near = near or difflib.get_close_matches(flag, known, 1, 0.7)
            hint = "; prompts that begin with - go after --" if "prompts" in args else ""
            hint = f": did you mean {near[0]}?" if near else hint
            print(f"error: there is no flag {flag}{hint} (--help lists all)", file=sys.stderr)
            sys.exit(2)
        rest = [*other, *argv[end + 1 :]]
        if "prompts" in args:
            args.prompts += rest
        elif rest:
            self.error(f"{rest[0]!r} has no flag before it: --help lists the flags")
        return args

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def as_path(text: str) -> Path:
    """A path. Shells expand ~ in `--flag ~/file`, not in `--flag=~/file`."""
    return Path(os.path.expanduser(text))


def as_choice(text: str) -> str:
    """A choice as the flags spell it: 8 for int8, 13b for 13B, FP32 for float32."""
    text = text.upper() if re.fullmatch(r"\d+[bB]", text) else text.lower()
    return ALIASES.get(text, text)


def sampling(args: argparse.Namespace) -> Sampling:
    """How the flags say that tokens are drawn."""
    return Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})


def set_threads(threads: int | None, folder: Path) -> int | None:
    """Use `threads` threads, or one for a small model, or as many as this process has cores.

    Returns:
        Their number, for `LLaMA.max_threads`; None if the user has set it.
    """
    cores = psutil.cpu_count()
    check(threads is None or 0 < threads <= cores, "threads", f"1 to {cores} (cores)", threads)
    is_small = sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) < ONE_THREAD
    is_fixed = threads is not None or "OMP_NUM_THREADS" in os.environ
    limit = 1 if is_small else cores if is_fixed else available_cpus()
    torch.set_num_threads(threads or min(torch.get_num_threads(), limit))
    return None if is_fixed else torch.get_num_threads()


def find_model(ckpt_dir: Path | None, tokenizer_path: Path | None) -> tuple[Path, Path | None]:
    """The directory of weights and the tokenizer that the flags name, or the defaults.

    Without ckpt_dir it is ./model, here or beside the scripts, or else the demo model.
    """
    folder = ckpt_dir or next(filter(has_weights, MODELS), DEMO)
    near = [] if folder.exists() else [model / folder for model in MODELS]
    if path := next(filter(has_weights, near), None):
        raise UserError(f"there is no directory {folder}: did you mean `ckpt_dir={path}`?")
    if ckpt_dir is None and folder == DEMO:
        found = found_in(MODELS[0], but=DEMO)
        notice(f"running the demo, {folder}: --ckpt_dir names other weights{found}")
    if tokenizer_path:
        inside = tokenizer_path / "tokenizer.model"
        return folder, inside if tokenizer_path.is_dir() else tokenizer_path
    tokenizer = find_tokenizer(folder)
    if tokenizer and tokenizer.parent != folder and tokenizer.with_name("params.json").exists():
        notice(f"using the tokenizer of another model, {tokenizer}")
    return folder, tokenizer


def find_tokenizer(folder: Path) -> Path | None:
    """The weights' tokenizer or, for Meta's, that in ./tokenizer, here or beside the scripts."""
    places = [folder / "tokenizer.model"]
    if not is_huggingface(folder):
        here, above = Path("tokenizer", "tokenizer.model"), folder.parent / "tokenizer.model"
        # All sizes of LLaMA have the same, so that of a model in the parent folder comes last.
        places = [nearest_tokenizer(folder), here, ROOT / here, above]
    return next((path for path in places if path.exists()), None)


def read_prompts(prompts: Sequence[str], prompt_files: Sequence[Path] | None) -> list[str]:
    """The texts to continue: arguments, stdin for -, and files."""
    # Bytes of the command line that are not UTF-8 become U+FFFD.
    texts = [read_stdin() if p == "-" else os.fsencode(p).decode(errors="replace") for p in prompts]
    for path in prompt_files or ():
        try:
            texts.append(path.read_text(encoding="utf-8-sig").removesuffix("\n"))
        except OSError as error:
            raise UserError(f"`prompt_file` {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"`prompt_file` {path} is not UTF-8 text: {error}") from None
        if not texts[-1]:
            raise UserError(f"`prompt_file` {path} is empty")
    return texts


def read_stdin() -> str:
    """The text on stdin, without a byte order mark and the last newline."""
    if sys.stdin.isatty():
        notice("reading a prompt from stdin: Ctrl-D on a line of its own ends it")
    text = sys.stdin.read().removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")
    if not text:
        raise UserError("stdin is empty: - reads the prompt from it, once")
    return text


def report(llama: LLaMA) -> None:
    """Print a line about the model and the threads to stderr, for --verbose."""
    n_threads = torch.get_num_threads()
    notice(f"{llama!r}, {n_threads} {'thread' if n_threads == 1 else 'threads'}")


def report_timings(llama: LLaMA, load_seconds: float) -> None:
    """Print a line about speed and memory to stderr."""
    peak = peak_memory() / 1e9
    text = f"loaded in {load_seconds:.1f} s, {llama.timings}, peak memory {peak:.2f} GB"
    notice(params_to_flags(text) + contention(llama))


def contention(llama: LLaMA) -> str:
    """Says that other programs have taken cores from this one, if they have."""
    now, most = torch.get_num_threads(), llama.max_threads
    return f", {now} of {most} threads: other programs are busy" if most and now < most else ""
