"""The one exception that a user's mistake raises, and the one warning.

The command line prints either as one line. An exception comes without a traceback, and ends it with exit code 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class InputError(ValueError):
    """Wrong input or usage. The message is one line that names the file or field and the mend."""


class CtalWarning(UserWarning):
    """What works, but hardly as it was meant. The message is one line that names the field and the mend."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `name`, or `""` when none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def first_problem(error: ValidationError, known: Iterable[str]) -> str:
    """The first field that pydantic refuses, and why; of an unknown one, which of `known` it may have meant."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"]]
    hint = did_you_mean(where[-1], known) if problem["type"] == "extra_forbidden" else ""
    return f"{': '.join([*where, problem['msg']])}{hint}"
