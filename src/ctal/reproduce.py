"""The paper from raw corpora to its tables, in stages of which each goes on where it was interrupted.

Stores of the three corpora, a tokenizer, then the plans `paper-claims` (the three tasks), `paper-pretraining` and
`paper-fusion` (the two ablations) at the paper's size and length, and one report on all rows. OUT holds `stores/`,
`tokenizer/`, `ablations/` (see `ctal.ablate`) and the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
from rich.table import Table

from ctal.ablate import Plan, load_plan, run_plan
from ctal.configuration_ctal import SIZES, CtalConfig
from ctal.console import bar
from ctal.corpora import Utterance, get_corpus
from ctal.errors import InputError, did_you_mean
from ctal.pretrain import make_tokenizer
from ctal.recipes import PRETRAINING, RunConfig
from ctal.store import prepare_store
from ctal.training import Progress

TASK_CORPORA = {"emotion": "iemocap", "sentiment": "mosei", "verification": "librispeech"}
"""Task → the corpus that it is fine-tuned and judged on; pre-training is on LibriSpeech."""

SIZES_OF_RECIPES = {"paper-base": "base", "paper-large": "large"}

PLANS = ("paper-claims", "paper-pretraining", "paper-fusion")

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
    tokenizer = out / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        make_tokenizer(stores["librispeech"], tokenizer, scale.vocab_size)
    for plan in scale.plans():
        with bar(f"{plan.name}: results") as show:
            run_plan(
                plan,
                out / "ablations",
                [stores["librispeech"]],
                {task: [stores[corpus]] for task, corpus in TASK_CORPORA.items()},
                tokenizer=tokenizer,
                progress=progress,
                show=show,
            )
        progress.note(f"{plan.name}: done")
    return out / "ablations"


def dry_run(scale: Scale, roots: Mapping[str, Path]) -> Table:
    """The stages as a table: audio hours, trainings, steps and disk, from the headers of the recordings alone."""
    table = Table("stage", "what", "audio", "disk")
    hours, folds = {}, {}
    for corpus, root in roots.items():
        found = list(get_corpus(corpus).prepare(root))
        hours[corpus] = sum(_seconds(each) for each in found) / 3600
        folds[corpus] = len({each.labels["session"] for each in found if "session" in each.labels}) or 1
        size = sum(path.stat().st_size for path in {each.audio for each in found} if path.is_file())
        table.add_row("prepare", f"{corpus}: {len(found):,} utterances", _hours(hours[corpus]), _bytes(size))
    table.add_row("tokenizer", f"{scale.vocab_size:,} entries, of LibriSpeech's training part", "", "")
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
    model = _weights(scale) * 4
    checkpoints = 3 * (RunConfig.model_fields["keep_checkpoints"].default + 1) * model  # with both moments
    table.add_row(
        "pre-train",
        f"{len(trained)} {scale.size} models of {scale.steps:,} steps of {frames:,} frames",
        f"{_hours(scale.steps * frames / 80 / 3600)} each, with repetitions",
        f"{_bytes(len(trained) * model)}, {_bytes(checkpoints)} while one trains",
    )
    for task, corpus in TASK_CORPORA.items():
        table.add_row(
            "fine-tune",
            f"{task}: {len(tuned)} variants x {scale.seeds} seeds x {folds[corpus]} folds of {scale.epochs} epochs",
            f"at most {_hours(scale.epochs * hours[corpus])} each",
            f"{_bytes(checkpoints)} while one trains",
        )
    table.add_row("report", "the three tables and both ablations", "", "")
    return table


def _seconds(utterance: Utterance) -> float:
    if utterance.start is not None and utterance.end is not None:
        return utterance.end - utterance.start
    try:
        return soundfile.info(utterance.audio).duration
    except soundfile.LibsndfileError:
        return 0.0  # `prepare` will say so


def _weights(scale: Scale) -> int:
    """About: matrices of the layers and the embeddings of words."""
    config = CtalConfig.of_size(scale.size)
    hidden, layers = config.hidden_size, config.text.num_hidden_layers
    text = layers * (4 * hidden**2 + 2 * hidden * config.text.intermediate_size)
    return 2 * text + layers * 4 * hidden**2 + scale.vocab_size * hidden


def _together(*fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
