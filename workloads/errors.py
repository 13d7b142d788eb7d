"""The one exception a user's mistake ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot work. The message says what was given, what was expected, and the fix.

    Command lines print the message alone (no traceback) and exit with status 2.
    """


class HubUnreachable(InputError):
    """The model hub cannot be reached, or does not give what it has without a token."""


@contextmanager
def one_error(problem: str, fix: str) -> Iterator[None]:
    """Turns whatever is raised inside into an InputError: the problem, its first line in brackets, and the fix.

    For the places where files of others are read: a library raises what it likes for a broken one.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{problem} ({first_line(error)}). {fix}") from error


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is near to, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """``recipe 'convergance' is unknown; did you mean convergence? Known: ...``, the middle only if a name is near."""
    guess = near(name, names := list(known))
    return (
        f"{kind} {name!r} is unknown{f'; did you mean {guess}?' if guess else '.'} Known: {', '.join(names) or 'none'}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """An error's class and its whole message on one line, where the first line may not say what is wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
