"""The one exception for what a user can put right."""


class InputError(ValueError):
    """Bad input, told in one line: what was given, what was expected, what to do.

    The command line prints the line and exits with code 2; everything else is a bug and keeps its traceback.
    """
