"""The paper from raw corpora to its tables, in stages of which each goes on where it was interrupted.

Stores of the three corpora, a tokenizer, then the plans `paper-claims` (the three tasks), `paper-pretraining` and
`paper-fusion` (the two ablations) at the paper's size and length, and one report on all rows. OUT holds `stores/`,
`ablations/` (the tokenizer too; see `ctal.ablate`) and the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
from rich.table import Table

from ctal.ablate import Plan, load_plan, run_plan
from ctal.configuration_ctal import SIZES, CtalConfig
from ctal.console import bar
from ctal.corpora import Utterance, get_corpus
from ctal.costs import (
    FP32,
    FRAMES_A_SECOND,
    Machine,
    Positions,
    Precision,
    Weights,
    count_weights,
    expected_positions,
    finetuning_operations,
    machine_at_hand,
    pretraining_operations,
    step_seconds,
)
from ctal.errors import InputError, did_you_mean
from ctal.masking import MaskingConfig
from ctal.precision import fast_precision
from ctal.recipes import FINETUNING, MODEL_DEFAULTS, PRETRAINING, FinetuneConfig, PretrainConfig, RunConfig, make_config
from ctal.report.comparisons import PAPER_PLANS as PLANS
from ctal.store import prepare_store
from ctal.training import Progress

TASK_CORPORA = {"emotion": "iemocap", "sentiment": "mosei", "verification": "librispeech"}
"""Task → the corpus that it is fine-tuned and judged on; pre-training is on LibriSpeech."""

SIZES_OF_RECIPES = {"paper-base": "base", "paper-large": "large"}

VOCAB_SIZE = 30_000
"""Section 4.1."""


@dataclass(frozen=True)
class Scale:
    """How much of the paper is done; the defaults are all of it."""

    size: str
    steps: int = 1_000_000
    """Of each pre-training."""
    epochs: int = 20
    """Of each fine-tuning."""
    seeds: int = 5
    """Of each fine-tuning; a pre-training of a million steps is done once."""
    vocab_size: int = VOCAB_SIZE

    @classmethod
    def of(cls, recipe: str, size: str | None = None, **smaller: int | None) -> Scale:
        """A recipe, or less of it. Raises `InputError` for an unknown recipe or size."""
        if recipe not in SIZES_OF_RECIPES:
            known = tuple(SIZES_OF_RECIPES)
            raise InputError(f"recipe '{recipe}'{did_you_mean(recipe, known)}: choose from {', '.join(known)}")
        if size is not None and size not in SIZES:
            raise InputError(f"--size {size}: unknown{did_you_mean(size, SIZES)}; choose from {', '.join(SIZES)}")
        given = {name: value for name, value in smaller.items() if value is not None}
        return cls(size or SIZES_OF_RECIPES[recipe], **given)

    def plans(self) -> list[Plan]:
        """The plans that come with ctal, whose own lengths are those of the demo corpus, at this scale."""
        own: dict[str, Any] = {
            "size": self.size,
            "vocab_size": self.vocab_size,
            "seeds": self.seeds,
            "vary_pretraining": False,
            "pretraining": {"steps": self.steps, "checkpoint_every": max(1, min(10_000, self.steps // 4))},
            "finetuning": {"epochs": self.epochs},
        }
        return [load_plan(name).model_copy(update=own) for name in PLANS]


def reproduce(scale: Scale, roots: Mapping[str, Path], out: Path, *, progress: Progress) -> Path:
    """Everything from the raw corpora in `roots` (corpus → folder) to the folder with the rows of results.

    Raises `InputError` for a corpus that cannot be read, or where no utterance is left of it.
    """
    stores = {}
    for corpus, root in roots.items():
        stores[corpus] = out / "stores" / corpus
        with bar(f"preparing {corpus}") as show:
            summary = prepare_store(get_corpus(corpus).prepare(root), stores[corpus], corpus=corpus, progress=show)
        left_out = f", {len(summary.quarantined)} left out (quarantine.jsonl)" if summary.quarantined else ""
        progress.note(f"{stores[corpus]}: {summary.utterances} utterances, {summary.hours:.2f} h{left_out}")
    for plan in scale.plans():
        with bar(f"{plan.name}: results") as show:
            run_plan(
                plan,
                out / "ablations",
                [stores["librispeech"]],
                {task: [stores[corpus]] for task, corpus in TASK_CORPORA.items()},
                progress=progress,
                show=show,
            )
        progress.note(f"{plan.name}: done")
    return out / "ablations"


def dry_run(scale: Scale, roots: Mapping[str, Path]) -> Table:
    """The stages as a table: audio hours, trainings, steps, disk and hours of computing.

    From the headers of the recordings, and for the last column from the cost model of docs/scaling.md.
    """
    clock = Clock.of(scale.size, scale.vocab_size)
    table = Table("stage", "what", "audio", "disk", "hours", caption=clock.note, caption_justify="left")
    hours, folds, lengths = {}, {}, {}
    for corpus, root in roots.items():
        found = list(get_corpus(corpus).prepare(root))
        lengths[corpus] = [_seconds(each) for each in found]
        hours[corpus] = sum(lengths[corpus]) / 3600
        folds[corpus] = len({each.labels["session"] for each in found if "session" in each.labels}) or 1
        size = sum(path.stat().st_size for path in {each.audio for each in found} if path.is_file())
        table.add_row("prepare", f"{corpus}: {len(found):,} utterances", _hours(hours[corpus]), _bytes(size), "")
    table.add_row("tokenizer", f"{scale.vocab_size:,} entries, of LibriSpeech's training part", "", "", "")
    plans = scale.plans()
    trained = {
        _together(variant.pretraining)
        for plan in plans
        for variant in plan.variants.values()
        if variant.pretraining.get("steps", scale.steps)
    }
    tuned = {_together(variant.pretraining, variant.finetuning) for plan in plans for variant in plan.variants.values()}
    recipe = PRETRAINING[scale.size]
    frames = recipe.get("batch_frames", RunConfig.model_fields["batch_frames"].default)
    model = clock.weights.total * FP32
    checkpoints = 3 * (RunConfig.model_fields["keep_checkpoints"].default + 1) * model  # with both moments
    table.add_row(
        "pre-train",
        f"{len(trained)} {scale.size} models of {scale.steps:,} steps of {frames:,} frames",
        f"{_hours(scale.steps * frames / FRAMES_A_SECOND / 3600)} each, with repetitions",
        f"{_bytes(len(trained) * model)}, {_bytes(checkpoints)} while one trains",
        _hours(len(trained) * clock.pretraining(lengths["librispeech"], scale.steps, frames)),
    )
    finetuning = make_config(FinetuneConfig, FINETUNING[scale.size])
    for task, corpus in TASK_CORPORA.items():
        trainings = len(tuned) * scale.seeds * folds[corpus]
        table.add_row(
            "fine-tune",
            f"{task}: {len(tuned)} variants x {scale.seeds} seeds x {folds[corpus]} folds of {scale.epochs} epochs",
            f"at most {_hours(scale.epochs * hours[corpus])} each",
            f"{_bytes(checkpoints)} while one trains",
            f"at most {_hours(trainings * clock.finetuning(lengths[corpus], scale.epochs, finetuning))}",
        )
    table.add_row("report", "the three tables and both ablations", "", "", "")
    return table


@dataclass(frozen=True)
class Clock:
    """How many hours the machine at hand is estimated to train, one training at a time."""

    machine: Machine
    precision: Precision
    config: CtalConfig
    weights: Weights

    @classmethod
    def of(cls, size: str, vocab_size: int) -> Clock:
        """Measures the machine for a moment, unless it is known."""
        precision = fast_precision()  # as plans are trained
        config = CtalConfig.of_size(size, vocab_size=vocab_size, **MODEL_DEFAULTS.get(size, {}))
        return cls(machine_at_hand(precision), precision, config, count_weights(config))

    @property
    def note(self) -> str:
        """What the hours are, for whoever reads them."""
        return (
            f"hours: estimated by the cost model of docs/scaling.md, {self.machine.name}, {self.precision}, otherwise "
            "idle, one training at a time, a loader that keeps up; without preparation, validation and checkpoints"
        )

    def pretraining(self, lengths: Sequence[float], steps: int, frames: int) -> float:
        """Hours of `steps` with `frames` each, of recordings as long as `lengths` (seconds)."""
        masking = make_config(PretrainConfig, PRETRAINING[self.config.size])
        positions, seconds = self._sample(lengths, masking)
        share = frames / FRAMES_A_SECOND / seconds
        return self._hours(steps, share * pretraining_operations(self.config, positions))

    def finetuning(self, lengths: Sequence[float], epochs: int, config: FinetuneConfig) -> float:
        """Hours of `epochs` over all of `lengths`; the classifier is too small to count."""
        positions, seconds = self._sample(lengths, make_config(PretrainConfig))
        steps = epochs * sum(lengths) * FRAMES_A_SECOND / config.batch_frames
        share = config.batch_frames / FRAMES_A_SECOND / seconds
        return self._hours(steps, share * finetuning_operations(self.config, positions, outputs=1))

    def _sample(self, lengths: Sequence[float], masking: MaskingConfig) -> tuple[list[Positions], float]:
        """Of at most about a thousand recordings, what each takes of the model, and their seconds."""
        some = lengths[:: len(lengths) // 1000 + 1]
        return [expected_positions(self.config, each, masking) for each in some], max(sum(some), 1.0)

    def _hours(self, steps: float, operations: float) -> float:
        """Of `steps` with so many operations each."""
        return steps * step_seconds(self.machine, self.weights, operations, self.precision).total / 3600


def _seconds(utterance: Utterance) -> float:
    if utterance.start is not None and utterance.end is not None:
        return utterance.end - utterance.start
    try:
        return soundfile.info(utterance.audio).duration
    except soundfile.LibsndfileError:
        return 0.0  # `prepare` will say so


def _together(*fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
