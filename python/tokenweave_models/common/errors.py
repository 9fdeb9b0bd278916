"""The one exception that the command line prints as a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can put right; its message says what and how."""
