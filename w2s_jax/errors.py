"""The one exception that means "the user can mend this": printed as one line, exit code 2."""


class UserError(Exception):
    """A bad input. The message is one line: what is wrong, where, and what to do about it."""
