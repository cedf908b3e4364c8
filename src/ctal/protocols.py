"""Protocols: which utterances a task trains on, which choose the best epoch, and on which it is judged.

Every protocol is named, said in words and checksummed, and all three stand beside each result. Folds are whole speakers
(or whole sessions), so that no voice is on two sides; where a corpus does not name all speakers, or its published split
shares them or recordings, the description says so. Orders are given by hashes of names: nothing is drawn.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctal.batching import Corpus, digest, shared_speakers, voices_of, without_speaker
from ctal.errors import InputError, did_you_mean
from ctal.trials import read_trial_list

FEW_SPEAKERS = 12
"""With at most so many, each is left out once; with more, a fifth of them at a time."""

FOLDS = 5

TRIAL_RECORDINGS = 1000
TRIAL_RECORDINGS_A_SPEAKER = 20
"""Of a larger set, trials are made from so many recordings at most (`make_trials`)."""


@dataclass(frozen=True)
class Fold:
    """Rows of a corpus."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    """Chooses the epoch; empty where the last one is taken."""
    test: np.ndarray
    """Is reported; empty where everything trains."""

    @property
    def called(self) -> str:
        return self.name if self.name.startswith("fold ") else f"fold {self.name}"


@dataclass(frozen=True)
class Protocol:
    name: str
    description: str
    """One sentence for people."""
    folds: tuple[Fold, ...]
    checksum: str
    """SHA-256 of which utterance is where."""
    tested: str
    """SHA-256 of what each fold tests: results that share it are of the same utterances."""

    def facts(self) -> dict[str, str]:
        """What stands beside a result."""
        return {name: getattr(self, name) for name in ("name", "description", "checksum", "tested")}


def make_protocol(
    name: str, corpus: Corpus, rows: np.ndarray, validation_share: float, *, in_pairs: bool = False
) -> Protocol:
    """The protocol `name` on the labelled `rows` of a corpus.

    Args:
        name: One of `PROTOCOLS`. `auto` is the published split where there is one with a test part, else
            `leave-one-session-out` where utterances have the label `session` and nobody speaks in two of them, else
            `leave-one-speaker-out` of at most 12 speakers, else `5-fold`. `paper` has the folds of `auto` and chooses
            the epoch on the part that is reported. `ge2e` is `auto` for speaker verification, with the authors' measure
            beside ours.
        validation_share: Share of the training utterances that choose the epoch, whole speakers of them, where the
            corpus prescribes none; 0: the last epoch is taken.
        in_pairs: Utterances are judged in pairs, for which one speaker or two are too few: `auto` goes on to `5-fold`.

    Raises:
        InputError: An unknown name, or a corpus without what the protocol needs.
    """
    if name == "ge2e":
        usual = make_protocol("auto", corpus, rows, validation_share, in_pairs=in_pairs)
        said = f"{usual.description}; beside the trials, the authors' draw of 4 speakers x 50 utterances, seeded"
        return replace(usual, name="ge2e", description=said)
    if name not in PROTOCOLS:
        raise InputError(f"protocol '{name}'{did_you_mean(name, PROTOCOLS)}: use {', '.join(PROTOCOLS)}")
    own_parts = [corpus.splits[row] for row in rows]
    if name == "split" and not any(own_parts):
        raise InputError(
            "protocol=split: no utterance is in a part of its own; give the manifest a column `split`, or use "
            "protocol=auto"
        )
    splits = np.array([part or "train" for part in own_parts])
    groups = _Groups(corpus, rows)
    if name == "split" or (name in ("auto", "paper") and (splits == "test").any()):
        return _published_split(corpus, rows, splits, groups, validation_share, in_pairs, on_test=name == "paper")
    if name == "all":
        nothing = rows[:0]
        fold = Fold("all", rows, nothing, nothing)
        return _protocol(corpus, "all", "everything trains, the last epoch is taken, nothing is measured", [fold])
    kind = name if name not in ("auto", "paper") else groups.natural_kind(in_pairs)
    parts = groups.parts(kind)
    if len(parts) < 2:
        raise InputError(f"protocol={kind}: there is one group to leave out, and none to train on; use protocol=all")
    folds = []
    for number, (label, test) in enumerate(parts.items()):
        others = [part for _, part in [*list(parts.items())[number + 1 :], *list(parts.items())[:number]]]
        if name == "paper":
            train, validation = np.concatenate(others), test
        else:
            train, validation = groups.inner_split(np.concatenate(others), validation_share, in_pairs)
        folds.append(Fold(label, rows[np.sort(train)], rows[np.sort(validation)], rows[np.sort(test)]))
    chosen = groups.chosen_by_others if validation_share else _LAST
    said = f"{kind}, {len(folds)} folds; {_ON_TEST if name == 'paper' else chosen}{groups.shared_voices}"
    if kind == "leave-one-session-out" and (shared := groups.in_several_sessions()):
        said += f"; {shared} speakers are in several sessions, so in the training part too"
    return _protocol(corpus, name if name == "paper" else kind, said, folds)


_LAST = "the last epoch is taken"

_ON_TEST = "the epoch is chosen on the part that is reported, as the authors did, which flatters"

PROTOCOLS = ("auto", "split", "leave-one-session-out", "leave-one-speaker-out", "5-fold", "paper", "ge2e", "all")


class _Groups:
    """Positions in `rows`, grouped by who speaks."""

    def __init__(self, corpus: Corpus, rows: np.ndarray) -> None:
        names = [corpus.speakers[row] for row in rows]
        self.owners, self.by_speaker = voices_of(corpus, rows)
        unit = "speakers" if self.by_speaker else "utterances"
        self.chosen_by_others = f"the epoch is chosen on other {unit} of the training part"
        self.shared_voices = without_speaker(corpus, rows)
        if not self.shared_voices and not self.by_speaker:
            self.shared_voices = "; all are by one speaker, who is in every part"
        self.names = names
        self.sessions = [corpus.labels[row].get("session") for row in rows]
        self.have_sessions = None not in self.sessions

    def natural_kind(self, in_pairs: bool) -> str:
        if self.have_sessions and len(set(self.sessions)) > 1 and not in_pairs and not self.in_several_sessions():
            return "leave-one-session-out"
        is_few = self.by_speaker and not in_pairs and len(set(self.owners)) <= FEW_SPEAKERS
        return "leave-one-speaker-out" if is_few else "5-fold"

    def parts(self, kind: str) -> dict[str, np.ndarray]:
        """Name of a fold → positions that it leaves out."""
        if kind == "leave-one-session-out":
            if not self.have_sessions:
                raise InputError("protocol=leave-one-session-out needs the label 'session' of every utterance")
            names: Sequence[str] = [str(name) for name in self.sessions]
        elif kind == "leave-one-speaker-out":
            if not self.by_speaker:
                raise InputError("protocol=leave-one-speaker-out needs named speakers; use protocol=5-fold or all")
            names = self.owners
        else:
            order = sorted(set(self.owners), key=lambda name: (digest(name), name))
            number = {name: position % FOLDS + 1 for position, name in enumerate(order)}
            names = [f"fold {number[name]}" for name in self.owners]
        return {name: np.flatnonzero(np.array(names) == name) for name in sorted(set(names))}

    def in_several_sessions(self) -> int:
        """Speakers who are."""
        pairs = {(name, session) for name, session in zip(self.names, self.sessions, strict=True) if name}
        return sum(count > 1 for count in Counter(name for name, _ in pairs).values())

    def inner_split(self, positions: np.ndarray, share: float, in_pairs: bool) -> tuple[np.ndarray, np.ndarray]:
        """(train, validation) positions: whole owners, by a hash of their names, until `share` is reached; none for 0.

        With `in_pairs` until there are pairs of one owner and of two as well, where anyone has two recordings.
        """
        if not share:
            return positions, positions[:0]
        owners = [self.owners[position] for position in positions]
        count = Counter(owners)
        in_pairs = in_pairs and max(count.values()) > 1
        order = sorted(set(owners), key=lambda name: (digest(name), name))
        if len(order) < 2:
            raise InputError("one speaker is left to train on and none to choose the epoch by; use protocol=all")
        held: set[str] = set()
        for name in order[:-1]:
            held.add(name)
            has_pairs = len(held) > 1 and max(count[owner] for owner in held) > 1
            if sum(count[owner] for owner in held) >= share * len(owners) and (has_pairs or not in_pairs):
                break
        is_held = np.array([owner in held for owner in owners])
        return positions[~is_held], positions[is_held]


def _published_split(
    corpus: Corpus,
    rows: np.ndarray,
    splits: np.ndarray,
    groups: _Groups,
    validation_share: float,
    in_pairs: bool,
    *,
    on_test: bool,
) -> Protocol:
    """`on_test`: the test part, which is there, chooses the epoch."""
    parts = {name: np.flatnonzero(splits == name) for name in ("train", "validation", "test")}
    if not len(parts["train"]):
        raise InputError("protocol=split: no labelled utterance is in the training part; add it to the store")
    said = "the corpus's own split"
    in_train = Counter(groups.owners[position] for position in parts["train"])
    if on_test:
        parts["validation"] = parts["test"]
        said += f"; {_ON_TEST}"
    elif not len(parts["validation"]) and not validation_share:
        said += f"; {_LAST}"
    elif in_pairs and not len(parts["validation"]) and len(parts["test"]) and max(in_train.values()) == 1:
        said += f"; {_LAST}, for nobody in the training part has two recordings to choose it by"
    elif not len(parts["validation"]):
        parts["train"], parts["validation"] = groups.inner_split(parts["train"], validation_share, in_pairs)
        said += f"; {groups.chosen_by_others}"
    if not len(parts["test"]) and not len(parts["validation"]):
        said += "; it has no test part, so nothing is measured"
    elif not len(parts["test"]):
        parts["test"] = parts["validation"]
        said += "; it has no test part, so the part that chose the epoch is reported, which flatters"
        said += groups.shared_voices
    else:
        trained = parts["train"] if on_test else np.concatenate([parts["train"], parts["validation"]])
        are = "test speakers are in the training part too"
        said += shared_speakers(corpus, rows[parts["test"]], rows[trained], are) + groups.shared_voices
        recordings = corpus.recordings[rows]
        if twice := int(np.isin(recordings[parts["test"]], recordings[trained]).sum()):
            said += f"; {twice} of its {len(parts['test'])} recordings are in the training part too, which flatters"
    fold = Fold("test", *(rows[parts[name]] for name in ("train", "validation", "test")))
    return _protocol(corpus, "paper" if on_test else "split", said, [fold])


def _protocol(corpus: Corpus, name: str, description: str, folds: Sequence[Fold]) -> Protocol:
    content, tested = hashlib.sha256(), hashlib.sha256()
    for fold in folds:
        for part in (fold.train, fold.validation, fold.test):
            content.update(_named(corpus, fold, part))
        tested.update(_named(corpus, fold, fold.test))
    return Protocol(name, description, tuple(folds), content.hexdigest(), tested.hexdigest())


def _named(corpus: Corpus, fold: Fold, part: np.ndarray) -> bytes:
    return "\n".join([fold.name, *(corpus.ids[row] for row in part), ""]).encode()


class Trials(NamedTuple):
    """Pairs of recordings to compare."""

    first: np.ndarray
    """(M,) positions among the recordings."""
    second: np.ndarray
    is_target: np.ndarray
    """(M,) bool: both are the same speaker's."""


def make_trials(ids: Sequence[str], speakers: Sequence[str | None]) -> Trials:
    """All pairs of different recordings, by order of their ids.

    Of more than 1,000 recordings only some take part: speakers in the order of a hash of their names, of each at most
    20 recordings in the order of a hash of their ids, until 1,000 are reached. Recordings without a speaker never do.
    Raises `InputError` for an id that is there twice: a written list could not name it.
    """
    if twice := _repeated(ids):
        raise InputError(_ambiguous(min(twice)))
    named = [position for position, speaker in enumerate(speakers) if speaker]
    if len(named) > TRIAL_RECORDINGS:
        by_speaker: dict[str, list[int]] = {}
        for position in sorted(named, key=lambda position: (digest(ids[position]), ids[position])):
            by_speaker.setdefault(str(speakers[position]), []).append(position)
        chosen: list[int] = []
        for name in sorted(by_speaker, key=lambda name: (digest(name), name)):
            chosen += by_speaker[name][:TRIAL_RECORDINGS_A_SPEAKER]
            if len(chosen) >= TRIAL_RECORDINGS:
                break
        named = chosen
    named.sort(key=lambda position: ids[position])
    left, right = np.triu_indices(len(named), 1)
    first, second = np.array(named, dtype=np.int64)[left], np.array(named, dtype=np.int64)[right]
    names = np.array([str(speaker) for speaker in speakers])
    return Trials(first, second, names[first] == names[second])


def read_trials(path: Path, ids: Sequence[str]) -> Trials:
    """A written list (`ctal.trials`) with labels; a name may end in a suffix that the recording's id does not have.

    Raises `InputError` naming the line that has no label, or names a recording that is not in `ids` or is twice.
    """
    position = {id: number for number, id in enumerate(ids)}
    twice = _repeated(ids)
    rows = []
    for number, trial in read_trial_list(path).items():
        if trial.is_target is None:
            raise InputError(f"{path}, line {number}: has no label; write `1 A B` for the same speaker or `0 A B`")
        pair = []
        for name in (trial.a, trial.b):
            written = Path(name)  # whose name is empty where it is `.` or `/`
            id = str(written.with_suffix("")) if name not in position and written.name else name
            if id not in position:
                raise InputError(f"{path}, line {number}: '{name}' is not in the store; prepare the corpus it is from")
            if id in twice:
                raise InputError(f"{path}, line {number}: {_ambiguous(id)}")
            pair.append(position[id])
        rows.append((*pair, trial.is_target))
    first, second, is_target = (np.array(column) for column in zip(*rows, strict=True))
    return Trials(first, second, is_target)


def _repeated(ids: Sequence[str]) -> set[str]:
    """Only several stores have an id twice."""
    return {id for id, count in Counter(ids).items() if count > 1}


def _ambiguous(id: str) -> str:
    return f"'{id}' is in several of the stores; prepare one of them anew, with other ids"


def write_trials(path: Path, trials: Trials, ids: Sequence[str]) -> str:
    """Writes the list that `read_trials` reads; returns its SHA-256."""
    space = "\t" if any(len(id.split()) > 1 for id in ids) else " "
    rows = zip(trials.first.tolist(), trials.second.tolist(), trials.is_target.tolist(), strict=True)
    lines = (f"{int(same)}{space}{ids[a]}{space}{ids[b]}\n" for a, b, same in rows)
    content = "".join(lines)
    path.write_text(content, encoding="utf-8")
    return hashlib.sha256(content.encode()).hexdigest()
