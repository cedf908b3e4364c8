"""A table of recordings: CSV, TSV or JSON lines, with `audio` and whatever else is known.

Columns: `audio` (a path, relative to the manifest or absolute) and optionally `id`, `text`, `speaker`, `split`
(train, validation or test), the labels `emotion` and `sentiment` (a number), and `labels`, an object of further ones.
"""

from __future__ import annotations

import json
import logging
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import SPLITS, csv_rows, find_file, readable
from ctal.errors import InputError, did_you_mean

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_COLUMNS = ("audio", "id", "text", "speaker", "split", "labels", "emotion", "sentiment")

logger = logging.getLogger(__name__)


def prepare(manifest: Path) -> Iterator[Utterance]:
    """The lines of the manifest in their order; without `id`, the path as written, less its suffix, is the id.

    A recording that is missing or broken is left to the store to quarantine; a line that cannot be understood is an
    `InputError` naming it, as are a missing file, a missing `audio` column and a manifest without lines.
    """
    find_file(manifest.parent, [manifest.name], "name a manifest (.csv, .tsv or .jsonl)")
    suffix = manifest.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{manifest}: what kind of manifest is this? Its name must end in .csv, .tsv or .jsonl")
    if suffix in (".csv", ".tsv"):
        lines = _csv_lines(manifest, "," if suffix == ".csv" else "\t")
    else:
        lines = _json_lines(manifest)
    unused: dict[str, None] = {}
    empty = True
    try:
        with readable(manifest):
            for where, line in lines:
                empty = False
                unused |= dict.fromkeys(line.keys() - set(_COLUMNS))
                yield _utterance(manifest.parent, line, where)
    except UnicodeDecodeError:
        raise InputError(f"{manifest}: not UTF-8 text; save it as UTF-8") from None
    if empty:
        raise InputError(f"{manifest}: has no recordings; add a line for each, with `audio`")
    if unused:
        names = ", ".join(sorted(unused))
        logger.warning("%s: columns that are not used: %s (used are: %s)", manifest, names, ", ".join(_COLUMNS))


def _csv_lines(manifest: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for error messages, columns) of each line."""
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        yield from csv_rows(file, manifest, _check_columns, delimiter)


def _json_lines(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with manifest.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"{manifest}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON ({error.msg}); write one object a line") from None
            except (ValueError, RecursionError):
                raise InputError(
                    f"{where}: not JSON that can be read (numbers of thousands of digits, or lists in lists); "
                    "write one object a line"
                ) from None
            if not isinstance(value, dict):
                raise InputError(f'{where}: not an object; write one a line, such as {{"audio": "a.wav"}}')
            _check_columns(list(value), where)
            yield where, value


def _check_columns(names: list[str], where: str) -> None:
    if "audio" not in names:
        marks = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
        if marks:
            mend = "save it with commas, or as .tsv with tabs"
            raise InputError(f"{where}: its fields seem to be separated by {marks[0]!r}; {mend}")
        found = ", ".join(names) or "none"
        raise InputError(
            f"{where}: no column 'audio'{did_you_mean('audio', names)}; rename the one that holds the paths of the "
            f"recordings (columns found: {found})"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{where}: column '{twice[0]}' stands there twice; keep one")


def _utterance(folder: Path, line: Mapping[str, Any], where: str) -> Utterance:
    audio = _text(line, "audio", where)
    if audio is None:
        raise InputError(f"{where}: 'audio' is empty; name the recording or delete the line")
    name = _below(folder, audio)
    if not name.name:
        raise InputError(f"{where}: 'audio' is '{audio}', which names no file; name the recording or delete the line")
    split = _text(line, "split", where)
    if split is not None and split not in SPLITS:
        raise InputError(f"{where}: split '{split}'{did_you_mean(split, SPLITS)}; use train, validation or test")
    return Utterance(
        id=_text(line, "id", where) or name.with_suffix("").as_posix(),
        audio=folder / audio,
        text=_text(line, "text", where),
        speaker=_text(line, "speaker", where),
        split=SPLITS[split] if split else None,
        labels=_labels(line, where),
    )


def _below(folder: Path, audio: str) -> Path:
    """The path below the manifest's folder where it lies there, so that both can move."""
    path = Path(audio)
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    return path


def _text(line: Mapping[str, Any], column: str, where: str) -> str | None:
    value = line.get(column)
    if value is None:
        return None
    if isinstance(value, bool | list | dict | float):
        raise InputError(f"{where}: '{column}' must be text, not {json.dumps(value)}")
    return str(value).strip() or None


def _labels(line: Mapping[str, Any], where: str) -> dict[str, str | float]:
    given = line.get("labels") or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, dict):
        raise InputError(f"""{where}: 'labels' must be an object, such as {{"emotion": "angry"}}""")
    columns = {name: line.get(name) for name in ("emotion", "sentiment") if not _is_blank(line.get(name))}
    return {name: _label(name, value, where) for name, value in (given | columns).items() if not _is_blank(value)}


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _label(name: str, value: object, where: str) -> str | float:
    if name == "sentiment" and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"{where}: sentiment '{value}' is not a number") from None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: label '{name}' must be text or a number")
    if isinstance(value, str):
        return value.strip()
    if not abs(value) <= sys.float_info.max:  # which math.isfinite cannot say of an integer of 400 digits
        shown = reprlib.repr(value)
        raise InputError(f"{where}: label '{name}' is {shown}, not a finite number; leave it empty if it is unknown")
    if name == "sentiment" and not -3 <= value <= 3:
        raise InputError(f"{where}: sentiment {value:g} is not between -3 and 3; bring the scale to that")
    return value


CORPUS = Corpus(
    name="manifest",
    help="FILE: a .csv, .tsv or .jsonl with `audio` (paths, relative to the file or absolute) and optionally `id`, "
    "`text`, `speaker`, `split`, `emotion`, `sentiment`, `labels` for each recording.",
    prepare=prepare,
)
