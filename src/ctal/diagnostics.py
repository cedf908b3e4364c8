"""What pre-training has learned, measured on held-out utterances against what needs no learning.

Three questions, each answered by a paired comparison with a 95 % t-interval over utterances: are masked frames
predicted better than by the training median, and than by drawing a line across the gap; are masked tokens predicted
better than by how often they occur; and does the audio listen to the text, that is, does an utterance's own transcript
help more than another one of the same length?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ctal.batching import PretrainingDataset, collate, deal
from ctal.masking import IGNORED
from ctal.modeling_ctal import CtalForPreTraining
from ctal.training import to_device

DRAWS = 4
"""Masks drawn for each held-out utterance, to measure the utterance rather than the mask."""

SMOOTHING = 0.1
"""Added to every token's count in the unigram model; 0.01–1 move its cross-entropy by less than 2 %."""

HELD_OUT_UTTERANCES = 500
"""Held-out utterances that are looked at, at most: a fixed sample."""

MEDIAN_UTTERANCES = 500
"""Training utterances from which medians are taken at most."""


@dataclass(frozen=True)
class Interval:
    """A mean over utterances with its 95 % t-interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        """Of (n,) values, one an utterance; NaN where an utterance has none."""
        values = values[~np.isnan(values)]
        if len(values) < 2:
            mean = float(values.mean()) if len(values) else float("nan")
            return cls(mean, float("nan"), float("nan"))
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return cls(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


@dataclass(frozen=True)
class Comparison:
    """A model's loss beside a reference's on the same utterances."""

    name: str
    unit: str
    model: Interval
    reference: Interval
    gain: Interval
    """Reference minus model, paired by utterance: above 0 where the model is better."""
    utterances: int

    @classmethod
    def of(cls, name: str, unit: str, model: np.ndarray, reference: np.ndarray) -> Comparison:
        valid = ~(np.isnan(model) | np.isnan(reference))
        model, reference = model[valid], reference[valid]
        return cls(
            name, unit, Interval.of(model), Interval.of(reference), Interval.of(reference - model), int(valid.sum())
        )


def diagnose(
    model: CtalForPreTraining,
    dataset: PretrainingDataset,
    train_rows: np.ndarray,
    held_out_rows: np.ndarray,
    *,
    parts: Mapping[str, slice],
) -> list[Comparison]:
    """All comparisons for `model`, on its device, in evaluation mode. The references are made from `train_rows`.

    Where the features have several `parts` (name → dimensions), each is compared apart too.
    """
    model.eval()
    medians = training_medians(dataset, train_rows)
    unigram = unigram_log_probabilities(dataset, train_rows)
    # Neighbours are of few speakers.
    rows = np.sort(np.random.default_rng(0).permutation(held_out_rows)[:HELD_OUT_UTTERANCES]).tolist()
    count = len(rows)
    parts = {"all": slice(None), **(parts if len(parts) > 1 else {})}
    audio = {(who, part): np.zeros((DRAWS, count)) for who in ("model", "median", "line") for part in parts}
    text = {who: np.zeros((DRAWS, count)) for who in ("model", "unigram")}
    for draw in range(DRAWS):
        for number, utterance, logits, reconstruction in _predict(model, dataset, rows, draw):
            truth, is_masked = utterance["feature_labels"].float(), utterance["mask_time_indices"]
            is_zeroed = is_masked & (utterance["input_features"] == 0).all(1)
            guesses = {
                "model": reconstruction,
                "median": medians.expand_as(truth),
                "line": interpolated(truth, ~is_masked),
            }
            for who, guess in guesses.items():
                for part, dimensions in parts.items():
                    errors = (guess - truth)[is_zeroed][:, dimensions].abs()
                    audio[who, part][draw, number] = errors.mean().item() if len(errors) else np.nan
            labels = utterance["labels"]
            chosen = labels != IGNORED
            text["model"][draw, number] = _mean(-logits.log_softmax(-1)[chosen, labels[chosen]])
            text["unigram"][draw, number] = _mean(-unigram[labels[chosen]])
    with np.errstate(invalid="ignore"):
        audio_means = {key: _mean_of_draws(values) for key, values in audio.items()}
        text_means = {key: _mean_of_draws(values) for key, values in text.items()}
    references = {"median": "training median of each dimension", "line": "straight line across the gap"}
    comparisons = [
        Comparison.of(
            f"zeroed frames, {part} dimensions: {description}", "L1", audio_means["model", part], audio_means[who, part]
        )
        for who, description in references.items()
        for part in parts
    ]
    comparisons.append(
        Comparison.of("masked tokens: smoothed unigram model", "nats", text_means["model"], text_means["unigram"])
    )
    listening = listening_test(model, dataset, rows)
    # One utterance has no interval; none, where nothing has a transcript, not even a mean.
    return [each for each in [*comparisons, listening] if each is not None and each.utterances > 1]


def listening_test(model: CtalForPreTraining, dataset: PretrainingDataset, rows: Sequence[int]) -> Comparison | None:
    """MCAM loss with an utterance's own transcript, and with that of another utterance as long (± 1 token).

    Audio masks are the same for both, and neither transcript is masked. None where no two transcripts are as long.
    """
    texts = [tuple(dataset.encode(dataset.corpus.read(row).text)) for row in rows]
    partners = {number: partner for number in range(len(rows)) if (partner := _partner(texts, number)) is not None}
    if len(partners) < 2:
        return None
    own, other = np.full((2, DRAWS, len(rows)), np.nan)
    for draw in range(DRAWS):
        for losses, swap in ((own, False), (other, True)):
            replaced = {number: texts[partners[number] if swap else number] for number in partners}
            for number, utterance, _, reconstruction in _predict(model, dataset, rows, draw, replaced):
                is_masked = utterance["mask_time_indices"]
                errors = (reconstruction - utterance["feature_labels"])[is_masked].abs()
                losses[draw, number] = _mean(errors.mean(1))
    return Comparison.of(
        "masked frames: another transcript of the same length", "L1", _mean_of_draws(own), _mean_of_draws(other)
    )


def training_medians(dataset: PretrainingDataset, rows: np.ndarray) -> Tensor:
    """(F,) median of each feature dimension over the training data, or a fixed sample of it."""
    sample = np.random.default_rng(0).permutation(rows)[:MEDIAN_UTTERANCES]
    frames = torch.cat([dataset.utterance(row, 0)["feature_labels"] for row in sample.tolist()])
    return frames.float().median(0).values


def unigram_log_probabilities(dataset: PretrainingDataset, rows: np.ndarray) -> Tensor:
    """(V,) log frequency of each token in the training transcripts, smoothed; special tokens are not counted."""
    counts = torch.full((dataset.vocab_size,), SMOOTHING, dtype=torch.float64)
    for row in rows.tolist():
        ids = torch.tensor(dataset.encode(dataset.corpus.read(row).text)[1:-1], dtype=torch.long)
        counts += torch.bincount(ids, minlength=dataset.vocab_size)
    counts[: dataset.special_ids] = 0
    return (counts / counts.sum()).log()


def interpolated(features: Tensor, is_known: Tensor) -> Tensor:
    """(T, F) features with a straight line between the known frames beside each gap; constant at the ends."""
    known = np.flatnonzero(is_known.numpy())
    if not len(known):
        return torch.zeros_like(features)
    times = np.arange(len(features))
    lines = [np.interp(times, known, values) for values in features.numpy()[known].T]
    return torch.from_numpy(np.stack(lines, axis=1)).to(features)


@torch.no_grad()
def _predict(
    model: CtalForPreTraining,
    dataset: PretrainingDataset,
    rows: Sequence[int],
    draw: int,
    texts: dict[int, tuple[int, ...]] | None = None,
) -> Iterator[tuple[int, dict[str, Tensor], Tensor, Tensor]]:
    """Number, utterance, logits (L, V) and reconstruction (T, F) of each row, under the masks of `draw`.

    With `texts`, only the utterances that it has, with those token ids.
    """
    numbers = np.array(sorted(texts) if texts is not None else range(len(rows)))
    lengths = dataset.corpus.frames[np.array(rows)]
    for part in deal(numbers, lengths, max(1, len(numbers) // 16)):
        utterances = [dataset.utterance(rows[number], -1 - draw) for number in part]
        if texts is not None:
            for number, utterance in zip(part.tolist(), utterances, strict=True):
                utterance["input_ids"] = torch.tensor(texts[number])
                utterance["labels"] = torch.full((len(texts[number]),), IGNORED)
        batch = to_device(collate(utterances), model.device)
        output = model(**batch, output_hidden_states=True)
        for position, (number, utterance) in enumerate(zip(part.tolist(), utterances, strict=True)):
            tokens, frames = len(utterance["input_ids"]), len(utterance["input_features"])
            logits, reconstruction = output.logits[position, :tokens], output.reconstruction[position, :frames]
            yield number, utterance, logits.cpu(), reconstruction.cpu()


def _partner(texts: Sequence[tuple[int, ...]], number: int) -> int | None:
    """The next utterance, in a circle, whose transcript is another one as long ± 1 token; empty ones do not count."""
    own = texts[number]
    if len(own) <= 2:
        return None
    for step in range(1, len(texts)):
        other = (number + step) % len(texts)
        if len(texts[other]) > 2 and abs(len(texts[other]) - len(own)) <= 1 and texts[other] != own:
            return other
    return None


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else np.nan


def _mean_of_draws(values: np.ndarray) -> np.ndarray:
    """(draws, n) → (n,), over the draws that have a value."""
    has_value = ~np.isnan(values)
    counts = has_value.sum(0)
    return np.where(counts, np.where(has_value, values, 0).sum(0) / np.maximum(counts, 1), np.nan)
