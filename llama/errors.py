"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake of the user's: the message says, in one line, what is wrong and what to do."""


def require(holds: bool, flag: str, takes: str, value: object) -> None:
    """Refuse a flag's value unless what it has to fulfil holds."""
    if not holds:
        raise UserError(f"--{flag} takes {takes}, not {value!r}")
