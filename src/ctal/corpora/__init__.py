"""Corpora: where recordings, transcripts and labels come from.

One file a corpus, and `reading` for what several of them need. Each defines a `Corpus` and has a line in `_MODULES`
below; its `prepare(root)` walks the layout in which the corpus is distributed and yields `Utterance`s, without decoding
audio and in an order that depends only on what is on disk. `ctal.store` turns them into an Arrow store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from ctal.errors import InputError, did_you_mean

PARTS = ("train", "validation", "test")

WITHOUT_RECORDING = ".*"
"""Suffix of the recording that a transcript lacks, whose own could be any."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording with what is known of it."""

    id: str
    """Unique in its corpus and independent of where the corpus lies; random draws are seeded by it."""
    audio: Path
    """The sound file; it may be missing or broken, which the store finds out and quarantines."""
    text: str | None = None
    """The transcript as the corpus gives it, or None where there is none."""
    speaker: str | None = None
    """Name of the speaker, unique in the corpus; splits never share one, except where `Corpus.shares_speakers`."""
    split: str | None = None
    """`train`, `validation` or `test` where the corpus prescribes one."""
    labels: Mapping[str, str | float] = field(default_factory=dict)
    """For example `{"emotion": "angry", "sentiment": -1.5}`; emotions are spelled alike in all corpora."""
    start: float | None = None
    """Where in `audio` the utterance starts, in seconds; None is the start of the file."""
    end: float | None = None
    """Where it ends, in seconds; None is the end of the file."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A kind of corpus that `ctal prepare` can read."""

    name: str
    help: str
    """One or two lines: what `ROOT_OR_FILE` must be, and where a person gets the corpus."""
    prepare: Callable[[Path], Iterator[Utterance]]
    shares_speakers: bool = False
    """True where the splits as published share speakers, so that results on them are not of unseen speakers."""


_MODULES = {
    "librispeech": "librispeech",
    "folder": "folder",
    "manifest": "manifest",
    "demo": "demo",
    "iemocap": "iemocap",
    "iemocap6": "iemocap6",
    "mosei": "mosei",
    "meld": "meld",
    "cremad": "cremad",
    "ravdess": "ravdess",
    "emodb": "emodb",
    "voxceleb1": "voxceleb1",
}
"""Corpus name → module of this package that defines `CORPUS`; one line adds a corpus."""


def all_in(split: str, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
    """`utterances`, all of them in the part called `split`: for corpora whose parts lie in different folders.

    Raises `InputError` for another name than `train`, `validation` or `test`.
    """
    if split not in PARTS:
        raise InputError(f"split '{split}'{did_you_mean(split, PARTS)}: choose from {', '.join(PARTS)}")
    return (replace(utterance, split=split) for utterance in utterances)


def corpus_names() -> tuple[str, ...]:
    """Names that `get_corpus` accepts, in the order in which help shows them."""
    return tuple(_MODULES)


def get_corpus(name: str) -> Corpus:
    """The corpus called `name`; raises `InputError` naming the nearest known one."""
    if name not in _MODULES:
        raise InputError(f"unknown corpus '{name}'{did_you_mean(name, _MODULES)}: choose from {', '.join(_MODULES)}")
    return import_module(f"{__name__}.{_MODULES[name]}").CORPUS
