"""What all objectives on stores of utterances have in common (`ctal.training.Objective`)."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

import ctal
from ctal.audio import HOP_LENGTH, SAMPLING_RATE
from ctal.batching import (
    EVALUATION,
    Corpus,
    CorpusFeatures,
    Microbatch,
    PlannedStep,
    Position,
    StepPlan,
    deal,
    plan_from,
)
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.modeling_ctal import CtalPreTrainedModel
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import RunConfig
from ctal.store import Store

Config = TypeVar("Config", bound=RunConfig)
Model = TypeVar("Model", bound=CtalPreTrainedModel)


def open_corpus(stores: Sequence[Path]) -> Corpus:
    """One or several stores as one table; raises `InputError` for a path that is not a store, or is given twice."""
    refuse_twice(stores)
    return Corpus([Store(path) for path in stores])


def refuse_twice(paths: Sequence[Path]) -> None:
    """Raises `InputError` for a path that is given twice."""
    for number, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:number]):
            raise InputError(f"{path}: is given twice; name each store once")


class CorpusObjective(Generic[Model, Config]):
    """Plans steps and held-out batches of some rows of a corpus."""

    def __init__(
        self,
        model: Model,
        processor: CtalProcessor,
        corpus: Corpus,
        config: Config,
        *,
        train_rows: np.ndarray,
        validation_rows: np.ndarray,
        max_frames: int,
    ) -> None:
        """`max_frames` is the longest window that a training utterance is cut to."""
        self.model, self.processor, self.corpus, self.config = model, processor, corpus, config
        self.train_rows, self.validation_rows = train_rows, validation_rows
        self.frames_per_second = frames_per_second(processor)
        self.lengths = frame_counts(corpus, processor, max_frames)

    def plan(self, start: Position, rank: int, ranks: int) -> Iterator[PlannedStep]:
        """See `ctal.training.Objective`, as for the methods below."""
        return plan_from(self.step_plan(), start, rank=rank, ranks=ranks, accumulation=self.config.accumulation)

    def step_plan(self) -> StepPlan:
        return StepPlan(self.train_rows, self.lengths, self.corpus.shards, self.config.batch_frames, self.config.seed)

    def validation_microbatches(self) -> list[Microbatch]:
        return evaluation_microbatches(self.validation_rows, self.lengths, self.config.batch_frames)

    def utterance_ids(self, microbatch: Microbatch) -> list[str]:
        return [self.corpus.read(row).id for row in microbatch.rows]

    def write_model(self, folder: Path) -> None:
        """What `from_pretrained` reads."""
        # Not by the model's own state dict, which of split weights is split, whoever has gathered them.
        weights = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.model.save_pretrained(folder, state_dict=dict(weights))
        self.processor.save_pretrained(folder)

    def provenance(self) -> dict[str, Any]:
        """Where a model comes from, for `run.json`."""
        return {
            "config": self.config.model_dump(),
            "corpus": [store.corpus for store in self.corpus.stores],
            "data_hash": self.corpus.content_hash,
            "store_hashes": [store.content_hash for store in self.corpus.stores],
            "audio_hours": round(float(self.corpus.seconds[self.train_rows].sum()) / 3600, 3),
            **environment(),
        }


def refuse_some_of(model: Path, run: Mapping[str, Any], corpus: Corpus) -> None:
    """Raises `InputError` where `corpus` has some of the stores that the run of `model` had, but is not its corpus."""
    hashes = {store.content_hash for store in corpus.stores}
    of_run = set(run.get("store_hashes", ()))
    if not hashes & of_run:
        return
    if of_run < hashes:
        others = ", ".join(str(store.path) for store in corpus.stores if store.content_hash not in of_run)
        raise InputError(f"{model}: was trained on some of these stores; evaluate it on {others} apart from those")
    raise InputError(
        f"{model}: was trained on some of these stores together with others; give all of them in the order of its run, "
        "so that what it has not heard is known"
    )


def corpus_features(
    corpus: Corpus,
    extractor: CtalFeatureExtractor,
    *,
    mean_rows: np.ndarray | None = None,
    cache_megabytes: int = 0,
) -> CorpusFeatures:
    """The features of `corpus` as `extractor` has them, with the speakers' means where it wants those, over `mean_rows`
    or all."""
    source = extractor.uncentred
    return CorpusFeatures(
        corpus,
        extract=source.features,
        analysis=source.analysis,
        less_speaker_mean=extractor.is_by_speaker,
        mean_rows=mean_rows,
        cache_bytes=cache_megabytes * 2**20,
    )


def frames_per_second(processor: CtalProcessor) -> float:
    return SAMPLING_RATE / HOP_LENGTH[processor.feature_extractor.feature_type]


def frame_counts(corpus: Corpus, processor: CtalProcessor, max_frames: int) -> np.ndarray:
    """(rows,) frames of each utterance as the processor analyses it, at most `max_frames`."""
    lengths = np.ceil(corpus.seconds * frames_per_second(processor)).astype(np.int64)
    return np.minimum(lengths, max_frames)


def evaluation_microbatches(rows: np.ndarray, lengths: np.ndarray, batch_frames: int) -> list[Microbatch]:
    """`rows` dealt to batches of about `batch_frames`; none for no rows."""
    parts = max(1, min(len(rows), int(lengths[rows].sum()) // batch_frames))
    return [Microbatch(EVALUATION, tuple(part.tolist())) for part in deal(rows, lengths, parts)] if len(rows) else []


def environment() -> dict[str, Any]:
    """Versions, and the commit where the package runs from a checkout."""
    import transformers

    versions = {
        "ctal": ctal.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"versions": versions, "commit": _commit_of(Path(__file__).parents[2])}


def _commit_of(checkout: Path) -> str | None:
    """None for a folder that is not one, such as that of an installed package, or where there is no git."""
    if not (checkout / ".git").exists():  # git itself would go on looking further up
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return described.stdout.strip() or None
