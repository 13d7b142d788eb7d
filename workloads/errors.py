"""The one exception a user's mistake ends in."""


class InputError(ValueError):
    """What the user gave cannot work. The message says what was given, what was expected, and the fix.

    Command lines print the message alone (no traceback) and exit with status 2.
    """
