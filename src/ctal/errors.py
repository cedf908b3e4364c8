"""The one exception that a user's mistake raises.

The command line prints it as one line, without a traceback, and exits with code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Wrong input or usage. The message is one line that names the file or field and the mend."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name nearest to `name`, or `""` when none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
