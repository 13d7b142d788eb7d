"""The one exception a user's mistake ends in."""


class InputError(ValueError):
    """What the user gave cannot work. The message says what was given, what was expected, and the fix.

    Command lines print the message alone (no traceback) and exit with status 2.
    """


def reason(error: BaseException) -> str:
    """A library's error in one line, for the message of an :class:`InputError`: its class and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
