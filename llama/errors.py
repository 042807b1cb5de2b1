"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake of the user's: the message says, in one line, what is wrong and what to do."""
