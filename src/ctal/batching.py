"""From a store to batches: which utterances form a step, and what a microbatch holds.

A plan is a pure function of the index, the seed and the epoch; a step's utterances depend neither on the number of
ranks nor on accumulation, which only decide how the step is dealt out. Every random draw of an utterance (crop, masks)
is seeded by (seed, epoch, utterance id). So any number of workers gives the same data, and resuming is a jump.

Utterances of a step are drawn at random, whatever their lengths: the model packs them, so unequal lengths cost nothing,
and steps of like lengths would be steps of like utterances (short ones, untranscribed ones). What must be even is the
work of the ranks, and a step is dealt out so that their frames are.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import parent_process
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ctal.audio import load_audio
from ctal.errors import InputError
from ctal.features import FrameSums
from ctal.masking import IGNORED, MaskingConfig, mask_blocks, mask_frames, mask_tokens
from ctal.store import Store, StoredUtterance
from ctal.stored_features import Extract, open_features, other_analyses, rounded

SHARDS_A_GROUP = 64
"""Shards whose utterances are mixed; other groups follow one another, so that remote shards are read once an epoch."""

PREFETCHED = 4
"""Batches that each worker makes ahead of time."""

MAX_HELD_OUT = 3600 * 80
"""Frames (an hour) that are held out at most: more would make validation slow, not better."""


def seeded_generator(*parts: object) -> torch.Generator:
    """A generator whose draws depend on `parts` alone, for example seed, epoch and utterance id."""
    return torch.Generator().manual_seed(digest(*parts))


def digest(*parts: object) -> int:
    """63 bits that depend on `parts` alone, on any machine."""
    content = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(content, "little") >> 1


@dataclass(frozen=True)
class StepPlan:
    """Which rows of an index form the steps of an epoch."""

    rows: np.ndarray
    """The utterances that take part."""
    frames: np.ndarray
    """Row → length, cropped as it will be."""
    shards: np.ndarray
    """Row → number of the shard that holds it."""
    batch_frames: int
    """A step holds at most so many frames, or one longer utterance; the last of a group up to half as many more."""
    seed: int

    def steps(self, epoch: int) -> Iterator[np.ndarray]:
        """Rows of each step of `epoch`: every row once."""
        rng = np.random.default_rng([self.seed, epoch])
        shards = self.shards[self.rows]
        by_shard = np.argsort(shards, kind="stable")
        members = np.split(by_shard, np.unique(shards[by_shard], return_index=True)[1])[1:]
        numbers = rng.permutation(len(members))
        for start in range(0, len(numbers), SHARDS_A_GROUP):
            group = np.concatenate([members[number] for number in numbers[start : start + SHARDS_A_GROUP]])
            yield from self._cut(rng.permutation(self.rows[np.sort(group)]))

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Consecutive rows up to `batch_frames`; a rest below half of that joins the step before it."""
        steps, first, total = [], 0, 0
        for position, length in enumerate(self.frames[rows].tolist()):
            if total and total + length > self.batch_frames:
                steps.append(rows[first:position])
                first, total = position, 0
            total += length
        if steps and total < self.batch_frames / 2:
            steps[-1] = np.concatenate([steps[-1], rows[first:]])
        else:
            steps.append(rows[first:])
        return steps


def deal(rows: np.ndarray, frames: np.ndarray, parts: int) -> list[np.ndarray]:
    """Deals a step out to `parts` microbatches with nearly equal frames: the longest first, to the emptiest.

    Of fewer utterances than parts, the last parts are empty.
    """
    loads = np.zeros(parts, dtype=np.int64)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for row in rows[np.argsort(-frames[rows], kind="stable")].tolist():
        emptiest = int(np.argmin(loads))
        dealt[emptiest].append(row)
        # An empty part must be served before any other, even when utterances without frames exist.
        loads[emptiest] += max(int(frames[row]), 1)
    return [np.array(part, dtype=np.int64) for part in dealt]


@dataclass(frozen=True)
class Position:
    """Where training stands in the data."""

    epoch: int = 0
    step: int = 0
    """Steps of the epoch that are done."""


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass sees: the key by which a worker makes it."""

    epoch: int
    rows: tuple[int, ...]
    weight: int = 1
    """Of its losses and counts. 0: its utterance stands in where a step has none left to deal out, and counts for
    nothing, since every rank takes part in every pass."""


@dataclass(frozen=True)
class PlannedStep:
    after: Position
    """Where training stands when the step is done."""
    microbatches: tuple[Microbatch, ...]
    """This rank's, one an accumulation."""


def plan_from(plan: StepPlan, start: Position, *, rank: int, ranks: int, accumulation: int) -> Iterator[PlannedStep]:
    """This rank's share of every step from `start` on, epoch after epoch, without end.

    A step of a few long utterances may have too few for all; raises `InputError` at once where most have, so that
    ranks would stand idle all the time.
    """
    parts = ranks * accumulation
    each = len(plan.rows) / sum(1 for _ in plan.steps(0))
    if each < parts:
        raise InputError(
            f"a step holds {each:.1f} utterances on average, too few for {parts} microbatches (processes x "
            "accumulation): raise batch_frames or lower accumulation"
        )
    return _dealt_out(plan, start, rank, ranks, parts)


def _dealt_out(plan: StepPlan, start: Position, rank: int, ranks: int, parts: int) -> Iterator[PlannedStep]:
    epoch, done = start.epoch, start.step
    while True:
        for number, rows in enumerate(plan.steps(epoch)):
            if number >= done:
                shortest = int(rows[np.argmin(plan.frames[rows])])
                microbatches = tuple(
                    Microbatch(epoch, tuple(part.tolist())) if len(part) else Microbatch(epoch, (shortest,), weight=0)
                    for part in deal(rows, plan.frames, parts)[rank::ranks]
                )
                yield PlannedStep(Position(epoch, number + 1), microbatches)
        epoch, done = epoch + 1, 0


class Corpus:
    """One or several stores, as one table of utterances. Columns are (rows,) arrays or lists."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self._starts = np.cumsum([0] + [len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def frames(self) -> np.ndarray:
        """Length of each recording, in frames of 12.5 ms."""
        return np.concatenate([store.index.frames for store in self.stores])

    @cached_property
    def seconds(self) -> np.ndarray:
        return np.concatenate([store.index.seconds for store in self.stores])

    @cached_property
    def shards(self) -> np.ndarray:
        """Number of the shard that holds each, unique over all stores."""
        counts = [int(store.index.shards.max(initial=-1)) + 1 for store in self.stores]
        first = np.cumsum([0, *counts])
        return np.concatenate([store.index.shards + start for store, start in zip(self.stores, first, strict=False)])

    @cached_property
    def has_text(self) -> np.ndarray:
        return np.concatenate([store.index.has_text for store in self.stores])

    @cached_property
    def ids(self) -> list[str]:
        return [name for store in self.stores for name in store.index.ids]

    @cached_property
    def speakers(self) -> list[str | None]:
        """A name is one person's in a corpus; that of another corpus than the first begins with its corpus's name."""
        return [
            name if name is None or store.corpus == self.stores[0].corpus else f"{store.corpus}/{name}"
            for store in self.stores
            for name in store.index.speakers
        ]

    @cached_property
    def splits(self) -> list[str | None]:
        return [name for store in self.stores for name in store.index.splits]

    @cached_property
    def labels(self) -> list[dict[str, str | float]]:
        return [labels for store in self.stores for labels in store.labels()]

    @cached_property
    def recordings(self) -> np.ndarray:
        """64 bits of the hash of each stored recording: equal for the same one, whatever it is called."""
        hashes = [each for store in self.stores for each in store.audio_hashes()]
        return np.array([int(each[:16], 16) for each in hashes], dtype=np.uint64).view(np.int64)

    def place(self, row: int) -> tuple[int, int]:
        """Which store holds a row, and as which of its utterances."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    def read(self, row: int) -> StoredUtterance:
        number, place = self.place(row)
        return self.stores[number].read(place)

    @property
    def content_hash(self) -> str:
        """Equal for equal data in the same order."""
        return hashlib.sha256("".join(store.content_hash for store in self.stores).encode()).hexdigest()


class Split(NamedTuple):
    train: np.ndarray
    """Rows of a corpus."""
    validation: np.ndarray
    rule: str
    """How they were told apart, in words."""


def voices_of(corpus: Corpus, rows: np.ndarray) -> tuple[list[str], bool]:
    """Whose voice each utterance is, and whether that is by speakers: where two at least are named.

    An utterance without a speaker counts as one; so do all that are the same recording, and where one of them has a
    speaker, the others are by that speaker too.
    """
    names = [corpus.speakers[row] for row in rows]
    by_speaker = len({name for name in names if name}) > 1
    if by_speaker and all(names):  # else the shards are asked which recording it is
        return [str(name) for name in names], True
    if not by_speaker:
        names = [None] * len(rows)
    recordings = corpus.recordings[rows].tolist()
    voice_of: dict[int, str] = {each: name for each, name in zip(recordings, names, strict=True) if name}
    voices = [
        name or voice_of.setdefault(recording, f"utterance {corpus.ids[row]}")
        for row, recording, name in zip(rows, recordings, names, strict=True)
    ]
    return voices, by_speaker


def shared_speakers(corpus: Corpus, held: np.ndarray, trained: np.ndarray, are: str) -> str:
    """How many speakers of the rows `held` are among those of `trained`, in words, of which the last are `are`; nothing
    where none is."""
    speakers = {corpus.speakers[row] for row in held} - {None}
    shared = len(speakers & {corpus.speakers[row] for row in trained})
    return f"; {shared} of its {len(speakers)} {are}" if shared else ""


def without_speaker(corpus: Corpus, rows: np.ndarray) -> str:
    """How many of the rows are by nobody who is named, in words; nothing where none is."""
    unnamed = sum(not corpus.speakers[row] for row in rows)
    return f"; {unnamed} of {len(rows)} utterances have no speaker, so voices may be shared" if unnamed else ""


def hold_out(corpus: Corpus, share: float) -> Split:
    """Rows for training and for validation, which share no speaker unless the corpus has it so, which the rule says.

    The corpus's own split where it has a validation part (its test part is left alone). Else whole speakers are held
    out, in an order given by a hash of their names, until `share` of the frames is reached, or about an hour; among
    those who have transcripts if anyone has, so that untranscribed recordings can join without changing what is held
    out. Who has more than twice as much is trained on; if all have, who has the least is held out. Where fewer than two
    speakers are named, an utterance counts as a speaker (`voices_of`). Raises `InputError` for fewer than two
    utterances.
    """
    splits = np.array([name or "train" for name in corpus.splits])
    if (splits == "validation").any():
        if not (splits == "train").any():
            raise InputError("the corpus has a validation part but nothing to train on: add its training part")
        train, validation = (np.flatnonzero(splits == part) for part in ("train", "validation"))
        shared = shared_speakers(corpus, validation, train, "validation speakers are in the training part too")
        return Split(train, validation, f"the corpus's own split{shared}")
    usable = np.flatnonzero(splits == "train")
    voices, by_speaker = voices_of(corpus, usable)
    owners = np.array(voices)
    if len(set(owners.tolist())) < 2:
        raise InputError(
            "one utterance is too few: one is needed for training and one, of another speaker, to validate"
        )
    has_text = corpus.has_text[usable]
    candidates = has_text if has_text.any() and len(set(owners[has_text].tolist())) > 1 else np.ones(len(usable), bool)
    unique, owner_of = np.unique(owners, return_inverse=True)
    frames = np.bincount(owner_of, np.where(candidates, corpus.frames[usable], 0), len(unique))
    order = [number for number in np.argsort([digest(name) for name in unique]) if frames[number]]
    wanted = min(share * frames.sum(), MAX_HELD_OUT)
    small = [number for number in order if frames[number] <= 2 * wanted]
    before = np.cumsum(frames[small]) - frames[small]
    held = [number for number, reached in zip(small, before, strict=True) if reached < wanted]
    held = held[: len(order) - 1] or [min(order, key=lambda number: int(frames[number]))]  # someone is left to train on
    is_held = np.isin(owner_of, held)
    unit = "speakers" if by_speaker else "utterances"
    rule = f"{len(held)} {unit} held out, by a hash of their names"
    if by_speaker:
        rule += without_speaker(corpus, usable)
    return Split(usable[~is_held], usable[is_held], rule)


SPEAKER_FRAMES = 24_000
"""Frames of recordings that a speaker's mean is taken over, about, where there are more: five minutes tell it, and
every process that makes batches takes it anew."""


class CorpusFeatures:
    """The features of a corpus's recordings; lives in the loader's workers.

    `extract` turns (samples,) at 16 kHz into (T, F) features; `analysis` is its name, by which stored features are
    found. Features are float16, half of what has to be copied.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        extract: Extract,
        analysis: str,
        less_speaker_mean: bool = False,
        mean_rows: np.ndarray | None = None,
        cache_bytes: int = 0,
    ) -> None:
        """`less_speaker_mean` takes away the mean over what the corpus has of the speaker, at most `SPEAKER_FRAMES`, or
        over the recording where its speaker is not known. Speakers' means are over `mean_rows` alone where they are
        given."""
        self.corpus, self.extract, self.analysis = corpus, extract, analysis
        self.less_speaker_mean, self.mean_rows = less_speaker_mean, mean_rows
        self._stored = [open_features(store, analysis) for store in corpus.stores]
        self._cache: dict[int, Tensor] = {}
        self._cache_bytes_left = cache_bytes
        self._means: dict[str, Tensor] = {}
        self._sums: dict[str, FrameSums] = {}

    def read(self, row: int, stored: StoredUtterance, generator: torch.Generator | None = None) -> Tensor:
        """(T, F) float16 of the whole recording; with a `generator`, less the mean over a random number of the
        speaker's other recordings, or over itself, where it would be that over all."""
        features = self._as_extracted(row, stored)
        if not self.less_speaker_mean:
            return features
        mean_F = None
        if speaker := self.corpus.speakers[row]:
            mean_F = self._random_mean(speaker, row, generator) if generator else self.mean_of(speaker)
        features = features.float()
        return rounded(features - (features.mean(0) if mean_F is None else mean_F))

    @cached_property
    def speaker_rows(self) -> dict[str, np.ndarray]:
        """The rows over which the mean of each speaker who is named is taken: all, or as many as `SPEAKER_FRAMES`
        wants; speakers by name."""
        rows = np.arange(len(self.corpus)) if self.mean_rows is None else self.mean_rows
        names, speaker_of = np.unique([self.corpus.speakers[row] or "" for row in rows], return_inverse=True)
        parts = np.split(rows[np.argsort(speaker_of, kind="stable")], np.cumsum(np.bincount(speaker_of))[:-1])
        return {name: self._enough_of(part) for name, part in zip(names.tolist(), parts, strict=True) if name}

    def _enough_of(self, rows: np.ndarray) -> np.ndarray:
        wanted = math.ceil(SPEAKER_FRAMES / self.corpus.frames[rows].mean())
        # Evenly over all that there are, since a store may have them in the order of their labels.
        return rows[np.linspace(0, len(rows) - 1, min(len(rows), wanted)).round().astype(int)]

    def mean_of(self, speaker: str) -> Tensor:
        """(F,) float32, over the frames of the speaker's recordings, before anything is taken away from them."""
        if speaker not in self._means:
            self._means[speaker] = self._sums_of(speaker).mean()
        return self._means[speaker]

    def _random_mean(self, speaker: str, row: int, generator: torch.Generator) -> Tensor | None:
        """(F,) float32, over a random number, whose logarithm is uniform, of the speaker's recordings other than `row`;
        None over none."""
        if speaker not in self._sums:
            self._sums[speaker] = self._sums_of(speaker)
        others = np.flatnonzero(self.speaker_rows[speaker] != row)
        count = int((len(others) + 2) ** float(torch.rand((), generator=generator))) - 1
        if not count:
            return None
        return self._sums[speaker].mean(others[torch.randperm(len(others), generator=generator)[:count].numpy()])

    def _sums_of(self, speaker: str) -> FrameSums:
        rows = self.speaker_rows[speaker].tolist()
        sums = FrameSums.of(self._as_extracted(row, self.corpus.read(row)) for row in rows)
        assert sums is not None
        return sums

    def notes(self) -> list[str]:
        """What the user should know of where they come from."""
        others = {store.path: other_analyses(store, self.analysis) for store in self.corpus.stores}
        notes = [
            f"{path}: has features of {', '.join(names)} only; those of {self.analysis} are computed as they are "
            "needed, unless `ctal features` with --model, --cmvn or --pitch stores them"
            for path, names in others.items()
            if names
        ]
        unknown = sum(not speaker for speaker in self.corpus.speakers) if self.less_speaker_mean else 0
        if unknown:
            notes.append(f"{unknown} of {len(self.corpus)} utterances have no speaker: each is less its own mean")
        return notes

    def _as_extracted(self, row: int, stored: StoredUtterance) -> Tensor:
        """Stored ones, or else computed and kept while there is room; nothing is evicted, since all that are trained on
        are wanted as often."""
        number, place = self.corpus.place(row)
        if (features_of := self._stored[number]) is not None:
            return features_of.read(place)
        if row in self._cache:
            return self._cache[row]
        features = rounded(self.extract(load_audio(stored.audio, stored.id)))
        if features.nbytes <= self._cache_bytes_left:
            self._cache[row] = features
            self._cache_bytes_left -= features.nbytes
        return features


class UtteranceDataset(Dataset):
    """Makes microbatches of utterances; lives in the loader's workers.

    `encode` turns a transcript (or None) into token ids with `<s>` and `</s>`. It and `features` come from the
    processor; this module knows neither tokenizers nor models.
    """

    def __init__(
        self, corpus: Corpus, *, encode: Callable[[str | None], list[int]], features: CorpusFeatures, seed: int
    ) -> None:
        self.corpus, self.encode, self.features, self.seed = corpus, encode, features, seed

    def __getitem__(self, microbatch: Microbatch) -> dict[str, Tensor]:
        return collate([self.utterance(row, microbatch.epoch) for row in microbatch.rows])

    def utterance(self, row: int, epoch: int) -> dict[str, Tensor]:
        """One utterance as it is in `epoch`: `input_ids` (L,), `input_features` (T, F) and what a task adds."""
        raise NotImplementedError

    def generator(self, stored: StoredUtterance, epoch: int) -> torch.Generator:
        """From which everything random of this utterance in this epoch is drawn."""
        return seeded_generator(self.seed, epoch, stored.id)


def random_window(features: Tensor, max_frames: int, generator: torch.Generator) -> Tensor:
    """(T, F) → at most `max_frames` frames of it, anywhere."""
    if len(features) <= max_frames:
        return features
    first = int(torch.randint(len(features) - max_frames + 1, (), generator=generator))
    return features[first : first + max_frames]


class PretrainingDataset(UtteranceDataset):
    """Masked utterances."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        masking: MaskingConfig,
        vocab_size: int,
        mask_id: int,
        special_ids: int,
        max_frames: int,
        **how: Any,
    ) -> None:
        """`how` is what `UtteranceDataset` takes."""
        super().__init__(corpus, **how)
        self.masking, self.max_frames = masking, max_frames
        self.vocab_size, self.mask_id, self.special_ids = vocab_size, mask_id, special_ids

    def utterance(self, row: int, epoch: int) -> dict[str, Tensor]:
        """One masked utterance: `input_ids` (L,), `labels`, `input_features` (T, F), `feature_labels`,
        `mask_time_indices` (T,)."""
        stored = self.corpus.read(row)
        generator = self.generator(stored, epoch)
        features = random_window(self.features.read(row, stored), self.max_frames, generator)
        ids = torch.tensor(self.encode(stored.text))
        tokens = {"vocab_size": self.vocab_size, "mask_id": self.mask_id, "special_ids": self.special_ids}
        return masked_utterance(ids, features, self.masking, generator=generator, **tokens)


def masked_utterance(
    input_ids: Tensor,
    features: Tensor,
    masking: MaskingConfig,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Both proxy tasks on (L,) token ids and (T, F) features: what `PretrainingDataset.utterance` gives."""
    tokens = mask_tokens(
        input_ids,
        vocab_size=vocab_size,
        mask_id=mask_id,
        special_ids=special_ids,
        ratio=masking.text_mask_ratio,
        generator=generator,
    )
    frames = mask_frames(
        features,
        ratio=masking.audio_mask_ratio,
        min_span=masking.min_span,
        max_span=masking.max_span,
        short_masking=masking.short_masking,
        generator=generator,
    )
    return {
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "input_features": frames.features,
        "feature_labels": features,
        "mask_time_indices": frames.is_masked,
    }


EVALUATION = -1
"""The epoch of data that is only looked at: nothing is dropped or distorted, and always the same window is used."""

Modality = Literal["both", "audio", "text"]


class TaskDataset(UtteranceDataset):
    """Labelled utterances for fine-tuning, and for evaluation (in the epoch `EVALUATION`)."""

    def __init__(
        self,
        corpus: Corpus,
        targets: np.ndarray,
        *,
        inputs: Modality,
        train_frames: int,
        max_frames: int,
        modality_dropout: float,
        time_masks: int,
        frequency_masks: int,
        random_speaker_mean: bool,
        speaker_swap: float,
        feature_size: int,
        **how: Any,
    ) -> None:
        """`how` is what `UtteranceDataset` takes.

        Args:
            targets: Row → class number or score.
            inputs: What is given to the model; of `audio` every transcript is empty, of `text` no recording is.
            train_frames: Longest window in training.
            max_frames: Longest window in evaluation.
            modality_dropout: Probability that a training utterance loses one of its modalities, either as often.
            time_masks: Stretches of a training utterance that are blanked.
            frequency_masks: Bands of a training utterance that are blanked.
            random_speaker_mean: Whether a training utterance is less the mean over some of its speaker's other
                recordings, where features are less a speaker's mean.
            speaker_swap: Probability that the mean of a training utterance's speaker gives way to that of any whose
                mean `features` has.
            feature_size: Dimensions of a frame.
        """
        super().__init__(corpus, **how)
        self.targets, self.inputs = targets, inputs
        self.train_frames, self.max_frames = train_frames, max_frames
        self.modality_dropout, self.time_masks, self.frequency_masks = modality_dropout, time_masks, frequency_masks
        self.random_speaker_mean, self.speaker_swap = random_speaker_mean, speaker_swap
        self.no_frames = torch.zeros(0, feature_size, dtype=torch.float16)

    def utterance(self, row: int, epoch: int) -> dict[str, Tensor]:
        """`input_ids` (L,), `input_features` (T, F; no frame where the recording is withheld), `utterance_frames` () of
        the whole recording, `labels` (), `rows`."""
        stored = self.corpus.read(row)
        generator = self.generator(stored, epoch)
        is_training = epoch != EVALUATION
        ids, has_audio = self.encode(stored.text if self.inputs != "audio" else None), self.inputs != "text"
        of_speaker = generator if is_training and self.random_speaker_mean else None
        features = self.features.read(row, stored, of_speaker) if has_audio else self.no_frames
        if is_training and has_audio and self.speaker_swap and (speaker := self.corpus.speakers[row]):
            features = self._in_some_voice(features, speaker, generator)
        whole = len(features)
        features = random_window(features, self.train_frames if is_training else self.max_frames, generator)
        if is_training:
            dice = torch.rand(2, generator=generator)
            # Without a word, between `<s>` and `</s>`, the recording is all that there is.
            if self.inputs == "both" and dice[0] < self.modality_dropout and len(ids) > 2:
                has_audio = bool(dice[1] >= 0.5)
                ids = self.encode(None) if has_audio else ids
            features = mask_blocks(features, self.time_masks, self.frequency_masks, generator)
        return {
            "input_ids": torch.tensor(ids),
            "input_features": features if has_audio else self.no_frames,
            "utterance_frames": torch.tensor(whole),
            "labels": torch.tensor(self.targets[row]),
            "rows": torch.tensor(row),
        }

    def _in_some_voice(self, features: Tensor, speaker: str, generator: torch.Generator) -> Tensor:
        """(T, F), whose mean over the speaker's recordings gives way, now and then, to that over another's."""
        voices = list(self.features.speaker_rows)
        other = voices[int(torch.randint(len(voices), (), generator=generator))]
        if torch.rand((), generator=generator) >= self.speaker_swap:
            return features
        return rounded(features.float() + (self.features.mean_of(other) - self.features.mean_of(speaker)))


PADDING: Mapping[str, float] = {"input_ids": 1, "labels": IGNORED}
"""What stands behind the end of what is padded; else 0."""


def collate(utterances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch with the arguments of a model's `forward`.

    Frames are those of all utterances one behind the other, without padding, (N, F), and of their labels only those of
    masked frames are in it, (M, F). Everything else is small, and padded on the right.
    """
    columns = {name: [each[name] for each in utterances] for name in utterances[0]}
    batch = {
        "attention_mask": _mask([len(each) for each in columns["input_ids"]]),
        "feature_attention_mask": _mask([len(each) for each in columns["input_features"]]),
    }
    for name, values in columns.items():
        if name == "feature_labels":
            values = [each[mask] for each, mask in zip(values, columns["mask_time_indices"], strict=True)]
        if name in ("input_features", "feature_labels"):
            batch[name] = torch.cat(values)
        elif values[0].ndim == 0:
            batch[name] = torch.stack(values)
        else:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=PADDING.get(name, 0))
    return batch


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


class Parcel(NamedTuple):
    """A batch on its way from a worker, in one piece: each tensor that crosses costs half a millisecond, whatever its
    size."""

    content: Tensor
    """(bytes,) uint8."""
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]
    """Name, type and shape of each tensor, in order."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Parcel:
        # The widest types first, so that each begins at a multiple of its size.
        names = sorted(batch, key=lambda name: -batch[name].element_size())
        content = torch.cat([batch[name].reshape(-1).view(torch.uint8) for name in names])
        return cls(content, [(name, batch[name].dtype, tuple(batch[name].shape)) for name in names])

    def opened(self) -> dict[str, Tensor]:
        """The batch; its tensors are views of `content`."""
        batch, start = {}, 0
        for name, dtype, shape in self.layout:
            end = start + math.prod(shape) * dtype.itemsize
            batch[name] = self.content[start:end].view(dtype).view(shape)
            start = end
        return batch


def _leave_signals_to_parent(worker: int) -> None:
    """`timeout`, Slurm and systemd signal a whole group: the parent needs its workers until its step is done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # torch's own watch begins only now: of a parent that was killed while this process started it would never know.
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def load(dataset: Dataset, microbatches: Iterator[Microbatch], workers: int) -> Generator[dict[str, Tensor]]:
    """The batches of `microbatches`, in order, made by `workers` processes ahead of time (0: in this one).

    Raises what making one raised, also in a worker. Close it (`contextlib.closing`), or its workers, which ignore
    SIGTERM and SIGINT, may stay.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=microbatches,  # type: ignore[arg-type]  # an iterator serves; its length is never asked for
        collate_fn=Parcel.of,  # type: ignore[arg-type]  # without a batch size it is given what the data set gives
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=PREFETCHED if workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )
    try:
        for parcel in loader:
            yield parcel.opened()
    except BaseException as error:
        if workers:
            # Its traceback would keep them, and a process that ends would wait for them without end.
            traceback.clear_frames(error.__traceback__)
        if not isinstance(error, InputError):
            raise
        # A worker's comes with its traceback as its message, of which the last line is ours.
        message = str(error).strip().splitlines()[-1]
        raise InputError(message.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
