"""The one error that is the user's to mend: commands print its message on one line and exit with code 2."""


class UserError(ValueError):
    """Says what is wrong, where, and what to do."""
