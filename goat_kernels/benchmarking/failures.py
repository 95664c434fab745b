"""What went wrong, in one line: a contender that fails is a row of the results, and the others go on."""

from __future__ import annotations

#: A compiler's message goes on for pages.
_MOST_CHARACTERS = 300


def in_words(failure: BaseException) -> str:
    """What was raised, on one line."""
    return f"raised {type(failure).__name__}: {' '.join(str(failure).split())[:_MOST_CHARACTERS]}".removesuffix(": ")


def too_far(error: float, bound: float) -> str:
    """A wrong contender."""
    return f"{error:.1e} away from float64, allowed is {bound:.0e}; not timed"


def drops_nothing(error: float) -> str:
    """A contender that should drop, and computes what it computes without dropout."""
    return f"with dropout it is {error:.1e} away from what it computes without: it drops nothing; not timed"


def differs(times: float) -> str:
    """A contender that does not repeat what was checked."""
    return f"what it gives differs by {times:.1g} times what is allowed; not timed"
