"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake of the user's: the message says, in one line, what is wrong and what to do."""


def one_line(error: object) -> str:
    """Its text without line breaks and escape sequences, which names in files may have."""
    return "".join(c if c.isprintable() else " " for c in str(error))[:500]


def require(holds: bool, flag: str, takes: str, value: object) -> None:
    """Refuse a flag's value unless what it has to fulfil holds."""
    if not holds:
        raise UserError(f"--{flag} takes {takes}, not {value!r}")
