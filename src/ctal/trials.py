"""Lists of trials as people write them: pairs of recordings to compare, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ctal.errors import InputError


class Trial(NamedTuple):
    """A line of a trial list."""

    is_target: bool | None
    """Whether it is the same speaker; None where the list does not say."""
    a: str
    b: str


def read_trial_list(path: Path) -> dict[int, Trial]:
    """Line number → trial of `LABEL A B` lines, 1 for the same speaker and 0 for another, as VoxCeleb's, or of `A B`
    lines. Names may hold spaces where tabs stand between the columns; blank lines are passed over.

    Raises `InputError` for a list that is missing or empty, and naming a line of another form than that or than the
    lines before it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a list of trials, `A B` a line") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give a list of trials, `A B` a line") from None
    trials: dict[int, Trial] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match line.split("\t") if "\t" in line else line.split():
            case [a, b] if a and b:
                trial = Trial(None, a, b)
            case ["0" | "1" as label, a, b] if a and b:
                trial = Trial(label == "1", a, b)
            case _:
                raise InputError(f"{path}, line {number}: write `A B`, or `1 A B` for the same speaker and `0 A B`")
        first = next(iter(trials.values()), trial)
        if (trial.is_target is None) != (first.is_target is None):
            raise InputError(
                f"{path}, line {number}: some lines have a label and some have none; give all lines one or none"
            )
        trials[number] = trial
    if not trials:
        raise InputError(f"{path}: has no trials; write `A B` a line")
    return trials
