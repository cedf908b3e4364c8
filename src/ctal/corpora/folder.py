"""Any folder of recordings, with a transcript in a same-named `.txt` file beside each, or none.

Speakers, splits and labels are not guessed from names or sub-folders: a manifest states them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ctal.audio import UNREADABLE
from ctal.corpora import WITHOUT_RECORDING, Corpus, Utterance
from ctal.corpora.reading import find_folder, is_hidden, readable, warn_left_out
from ctal.errors import InputError

_READABLE = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"}
_READABLE |= {".rf64", ".w64", ".sph", ".nist"}


def prepare(root: Path) -> Iterator[Utterance]:
    """Recordings below `root` in the order of their paths; an id is the path below `root` without its suffix.

    A `.txt` without a recording is yielded as the recording `NAME.*`, for the store to quarantine. Other files and
    hidden folders are counted in a warning. A transcript that cannot be read as UTF-8 has surrogates, which the store
    quarantines. Raises `InputError` if `root` is missing, has no recording or a folder that cannot be read.
    """
    find_folder(root, [""], "name a folder of recordings (WAV, FLAC, OGG, MP3, …)")
    recordings: list[Path] = []
    texts: set[Path] = set()
    ignored: Counter[str] = Counter()
    for path in _files(root):
        suffix = path.suffix.lower()
        hidden = is_hidden(path.name)
        # What is not read is quarantined by the store, so that nobody misses it.
        if suffix in _READABLE | UNREADABLE and not hidden:
            recordings.append(path)
        elif suffix == ".txt" and not hidden:
            texts.add(path)
        else:
            ignored["hidden" if hidden else suffix or "no suffix"] += 1
    if not recordings:
        raise InputError(f"{root}: no recording in it (WAV, FLAC, OGG, MP3, …); name the folder that holds them")
    warn_left_out(root, "files or folders that are not recordings", ignored)

    transcripts = {path.with_suffix(""): path for path in texts}
    stems = {audio.with_suffix("") for audio in recordings}
    alone = [stem.with_name(stem.name + WITHOUT_RECORDING) for stem in transcripts.keys() - stems]
    for audio in sorted(recordings + alone):
        stem = audio.with_suffix("")
        text = _read(transcripts[stem]) if stem in transcripts else None
        yield Utterance(stem.relative_to(root).as_posix(), audio, text=text)


def transcript_beside(audio: Path) -> str | None:
    """What the same-named `.txt` says, if there is one; with surrogates where it cannot be read as UTF-8."""
    path = audio.with_suffix(".txt")
    return _read(path) if path.is_file() or path.is_symlink() else None


def _files(root: Path) -> Iterator[Path]:
    """All files below `root`, through links to folders too, though into no folder twice; hidden folders themselves.

    What is in a hidden folder was deleted (.Trash-1000) or is of some program's (.git), and often not to be read.
    """
    seen: set[tuple[int, int]] = set()
    with readable(root):
        for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            hidden = [name for name in subfolders if is_hidden(name)]
            subfolders[:] = sorted(set(subfolders) - set(hidden))
            yield from (Path(folder, name) for name in names + hidden)


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape").strip() or None
    except OSError:  # a link to nothing, or no right to read it
        return "\udcff"


CORPUS = Corpus(
    name="folder",
    help="ROOT: a folder of recordings of any kind (WAV, FLAC, OGG, MP3, …), at any depth; the transcript of x.wav "
    "is x.txt beside it, or missing.",
    prepare=prepare,
)
