"""The exception for a user's mistake, and how an error is printed."""


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one line that says what is wrong and what to do. It names parameters of the
    library in backquotes (`max_seq_len`, `quantize=int8`); llama/cli.py turns them into flags.
    """


def check(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise UserError unless the condition on a parameter's value holds."""
    if not condition:
        raise UserError(f"`{name}` must be {expected}, not {value!r:.60}")


def one_line(error: object) -> str:
    """An error's text without line breaks and escape sequences, at most 500 characters long."""
    return "".join(c if c.isprintable() else " " for c in str(error))[:500]
