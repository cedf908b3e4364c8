"""What several corpora need to read their layout: text of uncertain encoding, tables, files at known places."""

from __future__ import annotations

import csv
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path

from ctal.errors import InputError, did_you_mean

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}
"""What corpora call their splits → what `Utterance.split` calls them."""

_C1_CONTROLS = {
    code: bytes([code]).decode("cp1252") for code in range(0x80, 0xA0) if code not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
"""Controls that no text has: they are Windows-1252 quotes and dashes that someone took for Latin-1."""

_LOST_AND_FOUND = "lost+found"
"""What a file system keeps for itself, and from everyone else, at the top of a disk."""

logger = logging.getLogger(__name__)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises `InputError` where the system refuses to read or to list `path`, or a file or folder in it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror}); check its rights") from None


def read_text(path: Path) -> str:
    """The file's text in UTF-8 or, failing that, Windows-1252. Raises `InputError` where it is neither or missing."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check its rights or unpack the corpus again"
        ) from None
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding).translate(_C1_CONTROLS)
        except UnicodeDecodeError:
            continue
    raise InputError(f"{path}: neither UTF-8 nor Windows-1252 text; unpack the corpus again")


def csv_rows(
    file: Iterable[str], path: Path, check: Callable[[list[str], str], None], delimiter: str = ","
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place for error messages, columns) of each line of `file`, whose first line names the columns.

    `check(names, place)` raises where the names will not do. Raises `InputError` for what is not CSV or
    has a row of several lines.
    """
    rows = _numbered_rows(file, path, delimiter)
    _, names = next(rows, (1, []))
    header = [name.strip() for name in names]
    check(header, f"{path}")
    for number, cells in rows:
        where = f"{path}, line {number}"
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{where}: {len(cells)} fields where the first line has {len(header)}; "
                "put text that holds a comma, a tab or a quote in double quotes"
            )
        yield where, dict(zip(header, cells, strict=True))


def _numbered_rows(file: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line. A row of several lines is refused, though CSV allows it.

    Text that begins with the quote of someone's speech runs on to the next quote, and swallows the recordings between.
    No corpus needs such rows: the published tables of MELD have none, and a segment of MOSEI's transcripts is a line.
    """
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    number = 1
    try:
        for cells in reader:
            if reader.line_num > number:
                raise InputError(
                    f"{path}, lines {number} to {reader.line_num}: text in quotes runs over several lines; put it on "
                    "one line, or take away the quote it begins with where that is part of the text"
                )
            yield number, cells
            number += 1
    except csv.Error as error:
        raise InputError(f"{path}, line {number}: not CSV ({error}); mend its quotes") from None


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """`csv_rows` of a corpus's own CSV, read by `read_text`; `InputError` if it lacks one of `columns`."""

    def check(names: list[str], where: str) -> None:
        for column in columns:
            if column not in names:
                found = ", ".join(names) or "none"
                hint = did_you_mean(column, names)
                raise InputError(f"{where}: no column '{column}'{hint}; is this the corpus's own file? It has {found}")

    return csv_rows(StringIO(read_text(path), newline=""), path, check)


def find_folder(root: Path, places: Sequence[str], mend: str) -> Path:
    """The first of `places` below `root` that is a folder ("" is `root`); else `InputError` with `mend`."""
    return _find(root, places, Path.is_dir, "folder", mend)


def find_file(root: Path, places: Sequence[str], mend: str) -> Path:
    """The first of `places` below `root` that is a file; else `InputError` with `mend`."""
    return _find(root, places, Path.is_file, "file", mend)


def _find(root: Path, places: Sequence[str], is_there: Callable[[Path], bool], kind: str, mend: str) -> Path:
    with readable(root):
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; {mend}")
        for place in places:
            if is_there(root / place):
                return root / place
    raise InputError(f"{root / places[0]}: no such {kind}; {mend}")


def sound_of(folder: Path, name: str) -> Path:
    """`NAME.wav` in `folder`, or `NAME.flac` where only that is there: a missing one is the store's to quarantine."""
    wav, flac = folder / f"{name}.wav", folder / f"{name}.flac"
    with readable(folder):
        return wav if wav.exists() or not flac.exists() else flac


def refuse_videos(sounds: Sequence[Path], root: Path) -> None:
    """`InputError` that says how to extract the sound, where none of `sounds` is there but an .mp4 beside one is."""
    if any(sound.exists() for sound in sounds):
        return
    videos = (sound.with_suffix(".mp4") for sound in sounds)
    if video := next((video for video in videos if video.exists()), None):
        command = 'ffmpeg -nostdin -loglevel error -i "$1" -vn -ac 1 -ar 16000 "${1%.mp4}.wav"'
        raise InputError(
            f"{video}: the clips are videos only; extract the sound beside them: "
            f"find {shlex.quote(str(root))} -name '*.mp4' -exec sh -c '{command}' _ {{}} \\;"
        )


def is_hidden(name: str) -> bool:
    """Such as the `._NAME.wav` that macOS leaves beside each NAME.wav on other file systems, `.Trash`, `lost+found`."""
    return name.startswith(".") or name == _LOST_AND_FOUND


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What is not hidden and matches the glob `pattern` below `folder`, in the order of paths.

    Raises `InputError` for a folder that may not be read, which `Path.glob` takes for an empty one.
    """
    first, slash, rest = pattern.partition("/")
    if slash:
        return [path for subfolder in subfolders(folder, first) for path in listed(subfolder, rest)]
    with readable(folder):
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, first) and not is_hidden(path.name))


def subfolders(folder: Path, pattern: str = "*") -> list[Path]:
    """Those of `listed` that are folders."""
    with readable(folder):
        return [path for path in listed(folder, pattern) if path.is_dir()]


def named_recordings(folder: Path, pattern: str, name: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """WAV and FLAC files that match the glob `pattern`, by name, each with the match of its stem by `name`.

    Those whose stem does not match are counted in a warning. Raises `InputError` if none does.
    """
    found: list[tuple[Path, re.Match[str]]] = []
    others: list[str] = []
    for path in sorted(listed(folder, pattern), key=lambda path: (path.name, path)):
        if path.suffix.lower() not in (".wav", ".flac"):
            continue
        if match := name.fullmatch(path.stem):
            found.append((path, match))
        else:
            others.append(path.name)
    if not found:
        raise InputError(f"{folder / pattern}: no recording named as in the corpus; name the folder it unpacks to")
    if others:
        warn_left_out(folder, "recordings with other names", Counter({f"such as {others[0]}": len(others)}))
    return found


def warn_left_out(root: Path, what: str, counts: Counter[str]) -> None:
    """Say how many of `what` were left out of the corpus at `root`, by kind, if any were."""
    if counts:
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        logger.warning("%s: left out %d %s (%s)", root, counts.total(), what, kinds)
