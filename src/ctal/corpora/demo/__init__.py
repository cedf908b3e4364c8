"""The demo corpus: SYNTHETIC emotional speech that `ctal demo` makes itself, as a controlled experiment.

Real speech with emotion and sentiment labels cannot be shipped. This corpus can be made anywhere in under a minute,
and what can be known of its labels from the words, from the sound, and from both is known exactly:

- `experiment`: the table of probabilities, the rules of the labels, the speaking styles and the best possible scores;
- `lexicon`, `grammar`: the sentences;
- `synthesis`: espeak-ng, speakers, rooms and noise;
- `card`: the corpus card, which says all this with numbers.

Layout of a corpus in `root`: `card.md`, `card.json`, `utterances.jsonl` (one object an utterance, with the cell and
the prosody it was made from) and `audio/<split>/<speaker>/<id>.flac`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import numpy as np

from ctal.corpora import Corpus, Utterance
from ctal.corpora.demo import card, experiment, grammar, lexicon, synthesis
from ctal.corpora.demo.experiment import JITTER_DEVIATION, STYLE_MEANS, Cell, Prosody, draw_cells, emotion, sentiment
from ctal.corpora.demo.grammar import sentence
from ctal.corpora.demo.synthesis import (
    Job,
    Speaker,
    draw_speaker,
    espeak_version,
    make_file,
    require_espeak,
)
from ctal.errors import InputError
from ctal.files import ASIDE, file_aside
from ctal.processes import follow_parent

_AUDIO = "audio"
_UTTERANCES = "utterances.jsonl"
_CARD = "card.md"
_CARD_JSON = "card.json"
_MARK = ".ctal-demo"
"""Holds the fingerprint of the corpus that is made or being made here; without it a folder is not ours."""
_OURS = {_MARK, _AUDIO, *(f"{name}{suffix}" for name in (_UTTERANCES, _CARD, _CARD_JSON) for suffix in ("", ASIDE))}


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Size and seed of a demo corpus; the default is the corpus of `ctal demo`, about an hour."""

    train_speakers: int = 64
    validation_speakers: int = 16
    test_speakers: int = 32
    train_utterances: int = 22
    """Utterances of each training speaker."""
    heldout_utterances: int = 10
    """Utterances of each validation and test speaker."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < (0 if name == "seed" else 1):
                raise InputError(f"demo corpus: {name} is {value}, it must be at least {int(name != 'seed')}")

    def splits(self) -> dict[str, tuple[int, int]]:
        """Split → (number of speakers, utterances of each)."""
        return {
            "train": (self.train_speakers, self.train_utterances),
            "validation": (self.validation_speakers, self.heldout_utterances),
            "test": (self.test_speakers, self.heldout_utterances),
        }


@dataclass(frozen=True, slots=True)
class PlannedUtterance:
    """All that is decided of an utterance before anything is synthesised."""

    id: str
    split: str
    text: str
    cell: Cell
    speaker: Speaker
    prosody: Prosody
    """Style and jitter, without the speaker's deviation."""

    @property
    def audio(self) -> str:
        """Path of the sound file in the corpus."""
        return f"{_AUDIO}/{self.split}/{self.speaker.name}/{self.id}.flac"


def plan(config: DemoConfig) -> list[PlannedUtterance]:
    """The utterances of the corpus in their order, a pure function of `config`.

    Every speaker and every utterance has a random stream of its own, so that a change in one moves no other.
    """
    planned = []
    speakers_so_far = 0
    for split, (speakers, utterances) in config.splits().items():
        cells = iter(draw_cells(speakers * utterances, _generator(config, "cells", split)))
        for number in range(speakers_so_far, speakers_so_far + speakers):
            name = f"demo{number:03d}"
            speaker = draw_speaker(name, ("male", "female")[number % 2], _generator(config, "speaker", name))
            for index in range(utterances):
                id, cell = f"{name}-{index:03d}", next(cells)
                generator = _generator(config, "utterance", id)
                text = sentence(split, cell.word_class, cell.marker, generator)
                prosody = generator.normal(STYLE_MEANS[cell.style], JITTER_DEVIATION)
                planned.append(PlannedUtterance(id, split, text, cell, speaker, Prosody(*prosody.tolist())))
        speakers_so_far += speakers
    return planned


def make_demo(root: Path, config: DemoConfig | None = None, progress: Callable[[int, int], None] | None = None) -> None:
    """Makes the corpus in `root`, or returns at once when the same corpus is there already.

    An interrupted making goes on where it stopped. A corpus of another configuration or version is replaced.

    Args:
        root: a folder that is empty, absent, or holds a demo corpus.
        config: size and seed; None is the default corpus.
        progress: called with (files done, files in all) after each file.

    Raises:
        InputError: `root` holds anything else, or espeak-ng is not installed.
    """
    root = Path(root)
    config = config or DemoConfig()
    fingerprint = _fingerprint(config)
    if _is_complete(root, fingerprint):
        return
    require_espeak()
    _claim(root, fingerprint)

    utterances = plan(config)
    missing = [u for u in utterances if not (root / u.audio).exists()]
    done = len(utterances) - len(missing)
    # espeak-ng has global state, so it must be alone in its process; and a fork of a process with threads may hang.
    count = min(cpu_count() or 1, 16, len(utterances))
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=follow_parent) as workers:
        version = workers.submit(espeak_version)
        futures = [workers.submit(make_file, _job(u, root, config)) for u in missing]
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                if progress is not None:
                    progress(done, len(utterances))
        except BaseException:
            workers.shutdown(wait=True, cancel_futures=True)
            raise
        espeak = version.result()

    lines = [json.dumps(_record(u), ensure_ascii=False) for u in utterances]
    _write(root / _UTTERANCES, "\n".join(lines) + "\n")
    files = [(u.split, u.speaker.name, root / u.audio) for u in utterances]
    facts = card.facts(asdict(config), fingerprint, espeak, files)
    _write(root / _CARD, card.markdown(facts))
    # Last: a corpus is complete when this file is there.
    _write(root / _CARD_JSON, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def prepare(root: Path) -> Iterator[Utterance]:
    """The utterances of the demo corpus in `root`, whatever its configuration; where none is, the default one is made.

    Yields:
        id, FLAC file (16 kHz, mono, 16 bit), text, speaker, split (`train`, `validation`, `test`), and the labels
        `emotion` (neutral, happy, angry, sad) and `sentiment` (-3 … 3).

    Raises:
        InputError: as `make_demo`.
    """
    if not (Path(root) / _CARD_JSON).is_file():
        make_demo(root)
    yield from read_demo(root)


def read_demo(root: Path) -> Iterator[Utterance]:
    """The utterances of the demo corpus that lies in `root`, whatever its configuration."""
    root = Path(root)
    if not (root / _CARD_JSON).exists():
        raise InputError(f"{root} holds no complete demo corpus: make one with 'ctal prepare demo {root} STORE'")
    for line in (root / _UTTERANCES).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield Utterance(
            id=record["id"],
            audio=root / record["audio"],
            text=record["text"],
            speaker=record["speaker"],
            split=record["split"],
            labels={"emotion": record["emotion"], "sentiment": record["sentiment"]},
        )


CORPUS = Corpus(
    "demo",
    "ROOT is a folder in which the synthetic demo corpus is made with espeak-ng (pip install 'ctal[demo]'), about an "
    "hour of speech with emotion, sentiment and speaker labels; a later call only reads it.",
    prepare,
)


def _generator(config: DemoConfig, *names: str) -> np.random.Generator:
    return np.random.default_rng(_seed(config, *names))


def _seed(config: DemoConfig, *names: str) -> tuple[int, ...]:
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return (config.seed, int.from_bytes(digest[:8], "little"))


def _job(utterance: PlannedUtterance, root: Path, config: DemoConfig) -> Job:
    return Job(
        path=root / utterance.audio,
        text=utterance.text,
        speaker=utterance.speaker,
        prosody=utterance.prosody,
        seed=_seed(config, "recording", utterance.id),
    )


def _record(utterance: PlannedUtterance) -> dict[str, object]:
    return {
        "id": utterance.id,
        "audio": utterance.audio,
        "text": utterance.text,
        "speaker": utterance.speaker.name,
        "split": utterance.split,
        "emotion": emotion(utterance.cell),
        "sentiment": float(sentiment(utterance.cell)),
        **utterance.cell._asdict(),
        "prosody": utterance.prosody._asdict(),
    }


def _fingerprint(config: DemoConfig) -> str:
    """Of the configuration and of the code and words that make the corpus: a change in any makes another corpus."""
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    for path in (__file__, experiment.__file__, grammar.__file__, lexicon.__file__, synthesis.__file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _is_complete(root: Path, fingerprint: str) -> bool:
    try:
        return json.loads((root / _CARD_JSON).read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    except FileNotFoundError:
        return False
    except (NotADirectoryError, ValueError, KeyError, TypeError):
        raise InputError(f"{root} is not a demo corpus: give a new or an empty folder") from None


def _claim(root: Path, fingerprint: str) -> None:
    """Makes `root` ours, empty but for sound files of this same corpus; refuses a folder with anything foreign."""
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file: the demo corpus needs a new or an empty folder")
    root.mkdir(parents=True, exist_ok=True)
    mark = root / _MARK
    present = {path.name for path in root.iterdir()}
    if present and (_MARK not in present or present - _OURS):
        name = min(present - _OURS or present)
        raise InputError(f"{root} holds '{name}', which is not of a demo corpus: give a new or an empty folder")
    if present and mark.read_text(encoding="utf-8") != fingerprint:
        # The card goes first, so that a removal that is interrupted leaves no corpus that looks complete.
        for name in (_CARD_JSON, _CARD, _UTTERANCES):
            (root / name).unlink(missing_ok=True)
        if (root / _AUDIO).exists():
            shutil.rmtree(root / _AUDIO)
    mark.write_text(fingerprint, encoding="utf-8")


def _write(path: Path, text: str) -> None:
    with file_aside(path) as file:
        file.write(text.encode())
