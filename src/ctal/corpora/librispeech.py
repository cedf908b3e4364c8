"""LibriSpeech (V. Panayotov et al., ICASSP 2015) as its archives unpack: SUBSET/SPEAKER/CHAPTER/ID.flac.

Transcripts stand in SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, one `ID TEXT` a line. Where training subsets lie
beside others, their names are the split: train-*, dev-* (validation) and test-*. Otherwise there is none, and which
speakers are held out is decided where training starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ctal.corpora import Corpus, Utterance
from ctal.corpora.reading import SPLITS, find_folder, listed, readable, subfolders
from ctal.errors import InputError

_SUFFIXES = (".flac", ".wav")


def prepare(root: Path) -> Iterator[Utterance]:
    """Utterances of every subset below `root`, or of the subset `root` itself, by subset, speaker, chapter and id.

    A recording without a line in the transcripts has text None; a line without a recording is yielded too, for
    the store to quarantine. Raises `InputError` if `root` is missing or has no chapter.
    """
    find_folder(root, [""], "name the one that holds train-clean-100, dev-clean … or one of these")
    subsets = [root] if _numbered(root) else subfolders(root)
    chapters = [chapter for subset in subsets for speaker in _numbered(subset) for chapter in _numbered(speaker)]
    if not chapters:
        raise InputError(
            f"{root}: no SPEAKER/CHAPTER folders as in LibriSpeech; name the folder that holds train-clean-100, "
            "dev-clean … or one of these, or use `ctal prepare folder` for recordings in any order"
        )
    parts = {subset.name: SPLITS.get(subset.name.partition("-")[0]) for subset in subsets}
    is_split = {"train"} < {part for part in parts.values() if part}
    for chapter in chapters:
        yield from _utterances(chapter, parts[chapter.parent.parent.name] if is_split else None)


def _utterances(chapter: Path, split: str | None) -> Iterator[Utterance]:
    speaker = chapter.parent.name
    transcripts = _transcripts(chapter)
    recordings = [path for path in listed(chapter) if path.suffix.lower() in _SUFFIXES]
    for audio in recordings:
        yield Utterance(audio.stem, audio, text=transcripts.get(audio.stem), speaker=speaker, split=split)
    for id in sorted(transcripts.keys() - {audio.stem for audio in recordings}):
        yield Utterance(id, chapter / f"{id}.flac", text=transcripts[id], speaker=speaker, split=split)


def _transcripts(chapter: Path) -> dict[str, str | None]:
    texts: dict[str, str | None] = {}
    for path in listed(chapter, "*.trans.txt"):
        try:
            with readable(path):
                lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: not UTF-8 text; unpack it again") from None
        for line in filter(str.strip, lines):
            id, _, text = line.strip().partition(" ")
            texts[id] = text.strip() or None
    return texts


def _numbered(parent: Path) -> list[Path]:
    """Folders named by a number, as those of speakers and chapters are."""
    return [path for path in subfolders(parent) if path.name.isdecimal()]


CORPUS = Corpus(
    name="librispeech",
    help="ROOT: an unpacked LibriSpeech folder (holding train-clean-100, dev-clean, …) or one subset of it. "
    "From https://www.openslr.org/12 (CC BY 4.0).",
    prepare=prepare,
)
