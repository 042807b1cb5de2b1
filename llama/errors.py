"""The exception for a user's mistake, and checks that raise it."""

from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one line that says what is wrong and what to do. It names parameters in
    backquotes (`max_seq_len`, `quantize=int8`); llama/cli.py turns them into flags.
    """


def check(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise UserError unless the condition on an argument's value holds."""
    if not condition:
        raise UserError(f"`{name}` must be {expected}, not {value!r:.60}")


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a file with contents of its own.

    Opening a FIFO would block, and a git-lfs pointer only names the contents.
    """
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a directory: name a file")
        kind = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"{path} {kind}")
    try:
        with path.open("rb") as file:
            beginning = file.read(23)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if beginning == b"version https://git-lfs":
        raise UserError(f"{path} is a git-lfs pointer, not the file: run git lfs pull")
