"""Fine-tuning a pre-trained model for a task, and judging it by a named protocol.

Each fold of a protocol is a run of `ctal.training` of its own, with its own model; a protocol with one fold is that
run. Leaves in a run:

    RUN/model            the best epoch by the validation part (of several folds: the one whose validation was best,
                         or the first where none was held out)
    RUN/model/heard.safetensors  what it was trained or chosen by (`ctal.heard`)
    RUN/evaluation.json  metrics of the test part, protocol with checksum, settings, versions, commit
    RUN/predictions.jsonl  what was predicted of each test utterance
    RUN/trials.txt       verification: the list of trials
    RUN/folds/NAME/      of several folds: each one's run
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate.utils import reduce as reduce_over_ranks
from torch import Tensor
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ctal.batching import Corpus, Modality, TaskDataset, load, shared_speakers
from ctal.configuration_ctal import CtalConfig
from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.files import sha256_of, write_json
from ctal.heard import Heard
from ctal.inference import load_task_model
from ctal.metrics import GE2E_SPEAKERS, ge2e_eer
from ctal.model_folders import WEIGHTS, load_processor, loading, run_of
from ctal.modeling_ctal import CtalTaskOutput
from ctal.objective import (
    CorpusObjective,
    corpus_features,
    environment,
    evaluation_microbatches,
    frame_counts,
    open_corpus,
    refuse_some_of,
)
from ctal.precision import check_precision, for_precision, forward_in
from ctal.processing_ctal import CtalProcessor, longest_window
from ctal.protocols import Fold, Protocol, Trials, make_protocol, make_trials, read_trials, write_trials
from ctal.recipes import FinetuneConfig, check_same, make_config
from ctal.tasks import (
    Targets,
    Task,
    TaskModel,
    Truth,
    eer_over_speakers,
    get_task,
    narrowed,
    read_targets,
    trial_scores,
)
from ctal.text import encode_transcript, spelling_of_tokens
from ctal.training import Batch, Forward, Metrics, Progress, Silence, evaluation_device, process_state, to_device, train

Evaluation = dict[str, Any]
"""What `evaluation.json` holds."""

GE2E_SEED = 0

MEASURED_UTTERANCES = 1_000
"""By which pools are standardised: that many tell a mean and a deviation to 3 %."""

FEW_UPDATES = 300
"""Below this a new head has hardly begun to learn (docs/results.md, emotions of EmoDB)."""


def finetune(
    task_name: str,
    stores: Sequence[Path],
    out: Path,
    config: FinetuneConfig,
    *,
    start_from: Path,
    head: Mapping[str, Any] | None = None,
    steps: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Evaluation | None:
    """Fine-tunes the model in `start_from` on `stores` and judges it.

    Args:
        task_name: A name of `ctal.tasks.TASKS`.
        config: `steps` in it is replaced by what `epochs` makes of the data.
        start_from: A `from_pretrained` folder of a pre-trained model with its processor, or of another task's; of its
            head, what does not fit starts anew.
        head: Fields of `ctal.configuration_ctal.HEAD_FIELDS`.
        steps: Updates of each fold instead of `config.epochs`.
        resume: Go on where an interrupted run in `out` stopped; finished folds are kept.

    Returns:
        What `out/evaluation.json` holds; None on other processes than the main one.
    """
    disable_progress_bar()
    set_verbosity_error()  # that a new head is new needs no warning
    progress = progress or Silence()
    task = get_task(task_name)
    corpus = open_corpus(stores)
    targets = read_targets(task, corpus)
    heard = Heard.of(start_from) if config.weights == "pretrained" else Heard()
    protocol = _protocol(task, corpus, targets, config, start_from, heard)
    progress.note(f"{task.name}: {len(targets.rows)} labelled utterances; {protocol.description}")
    one = len(protocol.folds) == 1
    runs = [out if one else _fold_folder(out, *numbered) for numbered in enumerate(protocol.folds, start=1)]
    if not one and out.is_dir() and any(out.iterdir()) and not resume:
        is_run = (out / "folds").is_dir()
        holds = (
            "holds a run already; add --resume to go on, or" if is_run else "is not empty and holds no run of folds;"
        )
        raise InputError(f"{out}: {holds} choose another --out")
    if resume and not one and not (out / "folds").is_dir():
        raise InputError(f"{out}: no run to resume; leave --resume out to start one")
    if one and (out / "folds").is_dir():
        raise InputError(f"{out}: holds a run of several folds; choose another --out")
    for fold, run in zip(protocol.folds, runs, strict=True):
        objective = _make_objective(task, corpus, fold, targets, config, start_from, heard, head or {}, steps, protocol)
        if resume and (run / "evaluation.json").is_file():
            saved = json.loads((run / "config.json").read_text())
            check_same(saved, objective.config, objective.identity())
            progress.note(f"{fold.name}: done already")
            continue
        if run == runs[0]:
            for note in objective.notes():
                progress.note(note)
        if not one:
            progress.note(f"{fold.called}: {len(fold.train)} utterances to train on, {len(fold.test)} to test")
        going_on = resume and (run / "config.json").is_file() if not one else resume
        if objective.model.head.has_constants and not _has_its_constants(start_from, objective):
            # Also when it goes on: the constants are those of the first weights, which are the same again.
            _measure_pools(objective)
        train(objective, objective.config, run, resume=going_on, progress=progress)
        evaluation = _judge(task, corpus, fold, protocol, run)
        if process_state().is_main_process:
            _write(run, evaluation)
    if not process_state().is_main_process:
        return None
    return json.loads((runs[0] / "evaluation.json").read_text()) if one else _combine(task, protocol, runs, out)


def evaluate_task(
    task_name: str,
    stores: Sequence[Path],
    model_folder: Path,
    *,
    trials: Path | None = None,
    inputs: str | None = None,
    scores: Path | None = None,
    precision: str | None = None,
) -> Evaluation | None:
    """Judges the model in `model_folder` on `stores`.

    On the data it was trained on, the test part of its own fold; elsewhere every labelled utterance, or the published
    test part, without those that it was trained on. With `trials`, what the list names, wherever it is.

    Args:
        trials: Verification: a written list instead of all pairs.
        inputs: `both`, `audio` or `text`: what is given to the model; None: what it was trained with.
        scores: A file to write the predictions to, one a line.
        precision: fp32, bf16 or int8; None: that of the run.

    Returns:
        Metrics and provenance; None on other processes than the main one.
    """
    disable_progress_bar()
    task = get_task(task_name)
    if inputs is not None and inputs not in get_args(Modality):
        raise InputError(f"--inputs {inputs}: use {', '.join(get_args(Modality))}")
    if trials is not None and not task.compares:
        raise InputError(f"--trials: {task.name} has no trials, only verification")
    model, processor, saved = load_model_for(task, model_folder)
    config = make_config(FinetuneConfig, saved.get("config", {}))
    check_precision(precision or config.precision, evaluation_device())
    corpus = open_corpus(stores)
    own = saved.get("data_hash") == corpus.content_hash
    if trials is not None and not own:  # the list says who is who
        targets = Targets(np.arange(len(corpus)), np.full(len(corpus), -1), ())
    else:
        targets = read_targets(task, corpus, None if task.compares else class_names(model.config))
    pairs, checksum = None, None
    known = Heard.of(model_folder)
    if own:
        protocol = protocol_of(task, corpus, targets, config)
        fold = {fold.name: fold for fold in protocol.folds}[saved["fold"]]
        heard = np.concatenate([fold.train, fold.validation])
        rows = fold.test
        said, checksum = f"the test part of the model's own fold ({saved['protocol']})", protocol.checksum
    else:
        heard = np.flatnonzero(np.isin(corpus.recordings, known.recordings))
        is_test = np.array([corpus.splits[row] == "test" for row in targets.rows])
        rows = targets.rows[is_test] if is_test.any() else targets.rows
        said = "the test part of the corpus" if is_test.any() else "every labelled utterance"
        rows, said = _unheard(corpus, rows, heard, said)
    if trials is not None:
        rows, pairs = _named_by(trials, corpus, heard)
        said, checksum = f"the trials of {trials}", None
    elif not own:
        refuse_some_of(model_folder, saved, corpus)
    if not len(rows):
        raise InputError("everything in these stores that could be tested was trained on: evaluate on another store")
    _check_modality(model.config.fusion, inputs or config.inputs, corpus)
    if trials is not None or not own:
        said += _heard_before(corpus, rows, known)
    if not own:
        said += _less_speaker_mean(processor.feature_extractor, inputs or config.inputs, corpus, rows)
    if scores is not None and not scores.absolute().parent.is_dir():
        raise InputError(f"--scores {scores}: its folder does not exist; make it first")
    if scores is not None and (scores.is_dir() or not os.access(scores.absolute().parent, os.W_OK)):
        raise InputError(f"--scores {scores}: cannot be written; name a file in a folder that can")
    judged = judge_rows(
        task,
        model,
        processor,
        corpus,
        targets,
        rows,
        inputs=inputs or config.inputs,
        config=config,
        trials=pairs,
        precision=precision,
    )
    if not process_state().is_main_process:
        return None
    if scores is not None:
        scores.write_text("".join(json.dumps(line) + "\n" for line in judged.pop("predictions")))
    judged.pop("predictions", None)
    return {
        "task": task.name,
        "model": str(model_folder),
        "measured_on": said,
        "protocol_checksum": checksum,
        "data_hash": corpus.content_hash,
        **judged,
        **environment(),
    }


def _unheard(corpus: Corpus, rows: np.ndarray, heard: np.ndarray, said: str) -> tuple[np.ndarray, str]:
    """`rows` without those of `heard`, and in words what is left."""
    left = rows[~np.isin(rows, heard)]
    if len(left) < len(rows):
        said += f", without {len(rows) - len(left)} that the model was trained on"
        said += shared_speakers(corpus, left, heard, "speakers were trained on too")
    return left, said


def _named_by(path: Path, corpus: Corpus, heard: np.ndarray) -> tuple[np.ndarray, Trials]:
    """The rows that a list of trials names, and the trials as pairs of these."""
    trials = read_trials(path, corpus.ids)
    rows = np.unique([trials.first, trials.second])
    known = rows[np.isin(rows, heard)]
    if len(known):
        raise InputError(
            f"{path}: names {len(known)} recordings that the model was trained on, such as '{corpus.ids[known[0]]}'; "
            "leave them out, or evaluate a model that was not"
        )
    pairs = Trials(np.searchsorted(rows, trials.first), np.searchsorted(rows, trials.second), trials.is_target)
    return rows, pairs


def load_model_for(task: Task, folder: Path) -> tuple[TaskModel, CtalProcessor, dict[str, Any]]:
    """A fine-tuned model, its processor and its `run.json`; raises `InputError` where `folder` holds another thing."""
    loaded = load_task_model(folder)
    if loaded.task != task.name:
        raise InputError(f"{folder}: a model for {loaded.task}, not for {task.name}; use `ctal finetune {task.name}`")
    return loaded.model, loaded.processor, dict(loaded.run)


def class_names(config: CtalConfig) -> tuple[str, ...]:
    """Names of a model's classes, by number; none for a regression."""
    if config.problem_type == "regression":
        return ()
    return tuple(name for _, name in sorted((config.id2label or {}).items()))


class FinetuneObjective(CorpusObjective[TaskModel, FinetuneConfig]):
    """A task on one fold."""

    def __init__(
        self,
        task: Task,
        model: TaskModel,
        processor: CtalProcessor,
        corpus: Corpus,
        config: FinetuneConfig,
        fold: Fold,
        targets: Targets,
        protocol: Protocol,
        start: Mapping[str, Any],
        heard: Heard,
    ) -> None:
        """`start` says where the weights come from, `heard` what made them."""
        max_frames = min(config.max_frames, longest_window(processor, model.config))
        rows = {"train_rows": fold.train, "validation_rows": fold.validation}
        super().__init__(model, processor, corpus, config, **rows, max_frames=max_frames)
        self.task, self.fold, self.protocol, self.targets, self.start = task, fold, protocol, targets, start
        # Of those who are swapped in, nothing is heard that is not trained on.
        how = {"inputs": config.inputs, "mean_rows": fold.train if config.speaker_swap else None}
        self.dataset = make_dataset(corpus, processor, config, targets, model.config, **how)
        self.truth = truth_of(task, corpus, targets, fold.validation) if len(fold.validation) else None
        self.class_weights = self._class_weights() if config.class_weights == "balanced" else None
        used = corpus.recordings[np.concatenate([fold.train, fold.validation])]
        self.heard = heard.and_recordings(used)
        self.layers = {
            "text": model.config.text.num_hidden_layers,
            "audio": model.config.audio.num_hidden_layers,
        }

    def _class_weights(self) -> Tensor:
        counts = np.bincount(self.targets.values[self.train_rows], minlength=len(self.targets.classes))
        present = np.maximum(counts, 1)
        return torch.tensor(len(self.train_rows) / (present * (counts > 0).sum()), dtype=torch.float32)

    def identity(self) -> dict[str, Any]:
        """See `ctal.training.Objective`, as for all methods that it has."""
        return {
            "task": self.task.name,
            "data_hash": self.corpus.content_hash,
            "fold": self.fold.name,
            "start_from": self.start["sha256"],
            **self.model.config.architecture(),
            **self.model.config.head(),
        }

    def notes(self) -> list[str]:
        """What the user should know before it begins."""
        updates = self.config.steps
        few = f"only {updates} updates: on few recordings more passes are worth it (--epochs, --steps)"
        notes = [few] * (updates < FEW_UPDATES) + self.dataset.features.notes()
        used = {self.config.inputs, self.model.config.fusion}
        without = int((~self.corpus.has_text[self.train_rows]).sum())
        if without and "audio" not in used:
            left = "nothing is left" if "text" in used else "the sound alone is left"
            notes.append(f"{without} of {len(self.train_rows)} training utterances have no transcript: of these {left}")
        return notes

    def score(self, metrics: Metrics) -> float:
        return self.task.score(metrics) if self.truth else 0.0

    def rate_scale(self, parameter: str) -> float:
        """Layer-wise decay from the head down; embeddings lie below the first layer."""
        if not parameter.startswith("ctal."):
            return self.config.head_rate
        _, encoder, *rest = parameter.split(".")
        modality = encoder.removesuffix("_encoder")
        fusion = self.model.head.fusion
        is_idle = modality == "audio" and not fusion.uses_audio
        is_idle |= modality == "text" and not (fusion.uses_text or self.model.config.audio_sees_text)
        if is_idle or self.config.frozen in (modality, "both"):
            return 0.0
        depth = int(rest[1]) if rest[0] == "layers" else -1
        return self.config.layer_decay ** (self.layers[modality] - 1 - depth)

    def counts(self, batch: Batch) -> Tensor:
        """Utterances."""
        return torch.tensor([len(batch["labels"])], device=batch["labels"].device)

    def losses(self, model: Forward, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "rows"}
        weights = self.class_weights.to(batch["labels"].device) if self.class_weights is not None else None
        output = model(**inputs, class_weights=weights, utterance_count=counts[0])
        return {
            "loss": output.loss,
            "task_loss": output.task_loss,
            "orthogonality_loss": output.orthogonality_loss,
        }

    def evaluate(self, model: Forward, batches: Iterator[Batch], reduce: Callable[[Tensor], Tensor]) -> Metrics:
        """The task's metrics on the validation part; none where there is none."""
        outputs = collect_outputs(self.task, model, batches, self.validation_rows, reduce)
        return self.task.measure(outputs, self.truth) if self.truth else {}

    def save_model(self, folder: Path, step: int, metrics: Metrics) -> None:
        if self.task.compares:
            self.model.config.decision_threshold = metrics.get("threshold")
        self.write_model(folder)
        self.heard.save(folder)
        saved = {
            "task": self.task.name,
            "step": step,
            "metrics": metrics,
            "fold": self.fold.name,
            "protocol": self.protocol.description,
            "protocol_checksum": self.protocol.checksum,
            "start_from": self.start,
            "head": self.model.config.head(),
            **self.provenance(),
        }
        write_json(folder / "run.json", saved)
        (folder / "README.md").write_text(task_card(self.task, self.model.config, saved))


def make_dataset(
    corpus: Corpus,
    processor: CtalProcessor,
    config: FinetuneConfig,
    targets: Targets,
    architecture: CtalConfig,
    *,
    inputs: str,
    mean_rows: np.ndarray | None = None,
) -> TaskDataset:
    """`mean_rows` are those over which speakers' means are taken, if not all."""
    extractor = processor.feature_extractor
    longest = longest_window(processor, architecture)
    return TaskDataset(
        corpus,
        targets.values,
        inputs=inputs,  # pyright: ignore[reportArgumentType] (checked where it is declared)
        train_frames=min(config.max_frames, longest),
        max_frames=longest,
        modality_dropout=config.modality_dropout,
        time_masks=config.time_masks,
        frequency_masks=config.frequency_masks,
        random_speaker_mean=config.random_speaker_mean,
        speaker_swap=config.speaker_swap,
        feature_size=extractor.feature_size,
        encode=partial(encode_transcript, tokenizer=processor.tokenizer),
        features=corpus_features(corpus, extractor, mean_rows=mean_rows, cache_megabytes=config.cache_megabytes),
        seed=config.seed,
    )


def truth_of(task: Task, corpus: Corpus, targets: Targets, rows: np.ndarray, trials: Trials | None = None) -> Truth:
    """What the utterances of `rows` are judged by; `trials` are given pairs of them instead of all."""
    if task.compares and trials is None:
        trials = make_trials([corpus.ids[row] for row in rows], [corpus.speakers[row] for row in rows])
    return Truth(targets.values[rows], len(targets.classes), trials)


@torch.no_grad()
def collect_outputs(
    task: Task,
    model: Callable[..., CtalTaskOutput],
    batches: Iterator[Batch],
    rows: np.ndarray,
    reduce: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """(N, K) outputs of all `rows`, in their order, from this rank's batches of them; nothing is counted twice."""
    place = {row: position for position, row in enumerate(rows.tolist())}
    parts = []
    for batch in batches:
        outputs = task.outputs(model(**_inputs(batch)))
        assert outputs is not None
        parts.append(([place[row] for row in batch["rows"].tolist()], outputs.float().cpu()))
    # A rank may have no batch, so the width is what the others say.
    own = [float(parts[0][1].shape[1]), 1.0] if parts else [0.0, 0.0]
    widths, sharing = reduce(torch.tensor(own)).tolist()
    gathered = torch.zeros(len(rows), int(widths / max(sharing, 1)))
    for positions, outputs in parts:
        gathered[positions] = outputs
    return reduce(gathered).cpu().numpy()


def judge_rows(
    task: Task,
    model: TaskModel,
    processor: CtalProcessor,
    corpus: Corpus,
    targets: Targets,
    rows: np.ndarray,
    *,
    inputs: str,
    config: FinetuneConfig,
    trials: Trials | None = None,
    precision: str | None = None,
) -> Evaluation:
    """Metrics of `model` on `rows`, and what it predicted of each; all ranks take part and get the same.

    Unless another is asked for, the precision is that of the run: its validation part, which chose the epoch and the
    threshold, was judged so too, and a test in another precision would be of another model by as much as the roundings
    differ.
    """
    precision = precision or config.precision
    state, device = process_state(), evaluation_device()
    asked = for_precision(model.to(device).eval(), precision)  # pyright: ignore[reportArgumentType]
    dataset = make_dataset(corpus, processor, config, targets, model.config, inputs=inputs)
    lengths = frame_counts(corpus, processor, longest_window(processor, model.config))
    mine = evaluation_microbatches(rows, lengths, config.batch_frames)[state.process_index :: state.num_processes]

    def reduce(values: Tensor) -> Tensor:
        reduced = reduce_over_ranks(values.to(device), "sum")
        assert isinstance(reduced, Tensor)
        return reduced

    with closing(load(dataset, iter(mine), config.workers)) as batches:
        moved = (to_device(batch, device) for batch in batches)
        outputs = collect_outputs(task, forward_in(precision, device, asked), moved, rows, reduce)
    truth = truth_of(task, corpus, targets, rows, trials)
    metrics = task.measure(outputs, truth)
    judged: Evaluation = {
        "inputs": inputs,
        "fusion": model.config.fusion,
        "precision": precision,
        "metrics": metrics,
        "utterances": len(rows),
        "speakers": len({corpus.speakers[row] for row in rows} - {None}),
        "predictions": list(_predictions(task, corpus, rows, outputs, targets)),
    }
    if truth.trials is not None:
        metrics.pop("threshold")  # of the test part itself: it must not be used
        scores = trial_scores(outputs, truth.trials)
        threshold = model.config.decision_threshold
        judged["trials"] = {"count": len(scores), "targets": int(truth.trials.is_target.sum())}
        if threshold is not None:
            accepted = scores >= threshold
            judged["at_threshold"] = {
                "threshold": threshold,
                "false_acceptance": float(accepted[~truth.trials.is_target].mean()),
                "false_rejection": float((~accepted[truth.trials.is_target]).mean()),
            }
        speakers = [corpus.speakers[row] for row in rows]
        if interval := eer_over_speakers(scores, truth.trials, speakers):
            judged["over_speakers"] = {"eer": interval}
        if config.protocol == "ge2e" and judged["speakers"] >= GE2E_SPEAKERS:
            metrics["ge2e_eer"] = ge2e_eer(outputs, [str(speaker) for speaker in speakers], GE2E_SEED)
    return judged


def _predictions(
    task: Task, corpus: Corpus, rows: np.ndarray, outputs: np.ndarray, targets: Targets
) -> Iterator[dict[str, Any]]:
    for row, output in zip(rows.tolist(), outputs, strict=True):
        known = {"id": corpus.ids[row], "speaker": corpus.speakers[row], "label": task.label(corpus, row)}
        if task.compares:
            # In full, since rounding can change which of two nearly equal cosines is the larger.
            yield {**known, "embedding": output.tolist()}
        elif task.problem_type == "regression":
            yield {**known, "prediction": round(float(output[0]), 5)}
        else:
            chances = torch.from_numpy(output).softmax(0).tolist()
            named = {name: round(chance, 5) for name, chance in zip(targets.classes, chances, strict=True)}
            yield {**known, "prediction": targets.classes[int(output.argmax())], "probabilities": named}


def protocol_of(task: Task, corpus: Corpus, targets: Targets, config: FinetuneConfig) -> Protocol:
    """What `config` asks for, on the utterances that are labelled for the task."""
    return make_protocol(config.protocol, corpus, targets.rows, config.validation_share, in_pairs=task.compares)


def _protocol(
    task: Task, corpus: Corpus, targets: Targets, config: FinetuneConfig, start_from: Path, heard: Heard
) -> Protocol:
    """The protocol of a run, checked before anything is trained (`check_folds`).

    Raises `InputError` also where the weights to start from have learned labels of what would be judged.
    """
    protocol = protocol_of(task, corpus, targets, config)
    start = run_of(start_from) if config.weights == "pretrained" else {}
    is_own = "fold" in start and start["data_hash"] == corpus.content_hash
    judged = np.concatenate([rows for fold in protocol.folds for rows in (fold.validation, fold.test)])
    if is_own:
        has_learned_it = start["protocol_checksum"] != protocol.checksum or len(protocol.folds) > 1
    else:
        has_learned_it = np.isin(corpus.recordings[judged], heard.recordings).any()
    if has_learned_it and len(judged):
        raise InputError(
            f"--from {start_from}: was fine-tuned on utterances that would be judged here; "
            "start from the pre-trained model"
        )
    said = protocol.description
    if "fold" in start and not is_own:
        which = "of other recordings" if len(heard.recordings) else "whose recordings are not known"
        said += f"; started from a model for {start['task']}, {which}"
    said += _heard_before(corpus, np.concatenate([fold.test for fold in protocol.folds]), heard)
    extractor = load_processor(start_from).feature_extractor
    check_features(task, extractor, config)
    said += _less_speaker_mean(extractor, config.inputs, corpus, targets.rows)
    check_folds(task, corpus, targets, config, protocol)
    return replace(protocol, description=said)


def _heard_before(corpus: Corpus, rows: np.ndarray, heard: Heard) -> str:
    """What is said of a test of which pre-training has heard something; nothing of another."""
    if not np.isin(corpus.recordings[rows], heard.sounds).any():
        return ""
    return "; pre-training has heard the test part's audio, without labels"


def _less_speaker_mean(extractor: CtalFeatureExtractor, inputs: str, corpus: Corpus, rows: np.ndarray) -> str:
    """What a protocol says of a model that so knows those it is tested on; nothing of another."""
    if not extractor.is_by_speaker or inputs == "text":
        return ""
    said = "; features less each speaker's mean, over what the stores have of them, without labels"
    if unknown := sum(not corpus.speakers[row] for row in rows):
        said += f" ({unknown} of {len(rows)} utterances, whose speaker is not known, less their own)"
    return said


def check_features(task: Task, extractor: CtalFeatureExtractor, config: FinetuneConfig) -> None:
    """Raises `InputError` where features are made from what is to be found out, or not as `config` has it."""
    if task.compares and extractor.is_by_speaker:
        raise InputError(
            f"{task.name}: features less each speaker's mean (cmvn=speaker) need speakers that are known already; "
            "pre-train with another cmvn to tell them apart"
        )
    if config.random_speaker_mean and not extractor.is_by_speaker:
        raise InputError(
            f"random_speaker_mean: the model's features are not less a speaker's mean (its cmvn is {extractor.cmvn}); "
            "pre-train with cmvn=speaker, or leave it out"
        )
    if config.speaker_swap and task.compares:
        raise InputError(f"speaker_swap: exchanges what {task.name} is to tell apart; leave it out")
    if config.speaker_swap and extractor.cmvn not in ("fixed", "level"):
        raise InputError(
            f"speaker_swap: exchanges speakers' means, which the model's features have lost (its cmvn is "
            f"{extractor.cmvn}); pre-train with cmvn=fixed or level, or leave it out"
        )


def check_folds(task: Task, corpus: Corpus, targets: Targets, config: FinetuneConfig, protocol: Protocol) -> None:
    """Raises `InputError` where a part has no pairs of both kinds, nothing but neutral sentiment, or no speakers to
    swap."""
    for fold in protocol.folds:
        voices = len({name for row in fold.train if (name := corpus.speakers[row])})
        if config.speaker_swap and voices < 2:
            raise InputError(f"speaker_swap: {fold.called} trains on {voices} speakers that are named; leave it out")
        speakers = len({corpus.speakers[row] for row in fold.test} - {None})
        if task.compares and config.protocol == "ge2e" and speakers < GE2E_SPEAKERS:
            raise InputError(
                f"protocol=ge2e: {fold.called} tests {speakers} speakers, and it draws {GE2E_SPEAKERS}; "
                "add speakers, or use protocol=auto"
            )
        for name, rows in (("validation", fold.validation), ("test", fold.test)):
            truth = truth_of(task, corpus, targets, rows)
            if len(rows) and task.problem_type == "regression" and not truth.targets.any():
                raise InputError(
                    f"{fold.called}: every label of its {name} part is 0, which leaves two classes undefined; "
                    "use --set protocol=5-fold, or give more utterances"
                )
            if len(rows) and truth.trials and (truth.trials.is_target.all() or not truth.trials.is_target.any()):
                or_none = ", choose no epoch with validation_share=0" if name == "validation" else ""
                raise InputError(
                    f"{fold.called}: its {name} part lacks pairs of one speaker or pairs of two; give several "
                    f"recordings of at least ten speakers, a part of their own to those to test{or_none}, or train on "
                    "all with protocol=all"
                )


def _fold_folder(out: Path, number: int, fold: Fold) -> Path:
    """Numbered, since names may differ in what a folder's name cannot hold."""
    return out / "folds" / f"{number:02d}-{re.sub('[^a-zA-Z0-9]+', '-', fold.name)}"


def check_settings(task: Task, corpus: Corpus, config: FinetuneConfig, fusion: str) -> None:
    """Raises `InputError` for settings that do not go together, or not with the task or the corpus."""
    _check_modality(fusion, config.inputs, corpus)
    if config.modality_dropout and fusion in ("text", "audio"):
        raise InputError(f"fusion={fusion} with modality_dropout: is for fusions of both; drop one of the two")
    if config.class_weights == "balanced" and (task.compares or task.problem_type == "regression"):
        raise InputError(f"class_weights=balanced: {task.name} has no classes to balance; leave it out")


def _check_modality(fusion: str, inputs: str, corpus: Corpus) -> None:
    """The pools of one modality alone need that modality, and words have to be there to be read."""
    if {fusion, inputs} == {"audio", "text"}:
        raise InputError(f"fusion={fusion} with inputs={inputs}: nothing would be left to judge by; change one of them")
    if "text" in (fusion, inputs) and not corpus.has_text.any():
        raise InputError(
            f"fusion={fusion} with inputs={inputs}: reads transcripts alone, and nothing in the stores has one; "
            "prepare them with transcripts, or let the model listen"
        )


def _make_objective(
    task: Task,
    corpus: Corpus,
    fold: Fold,
    targets: Targets,
    config: FinetuneConfig,
    start_from: Path,
    heard: Heard,
    head: Mapping[str, Any],
    steps: int | None,
    protocol: Protocol,
) -> FinetuneObjective:
    processor = load_processor(start_from)
    targets = narrowed(targets, corpus, task, fold.train)
    classes = targets.classes or ("score",)
    if len(targets.classes) == 1 and task.compares:
        raise InputError(
            f"{fold.called}: one speaker is left to train on, '{classes[0]}'; give more, or choose no epoch with "
            "validation_share=0, which leaves all others to training"
        )
    if len(targets.classes) == 1:
        raise InputError(f"every utterance has the {task.name} '{classes[0]}': there is nothing to tell apart")
    fields = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "problem_type": task.problem_type,
        "decision_threshold": None,
        **head,
    }
    # Through the constructor, which checks: `from_pretrained` would set fields behind its back.
    architecture = CtalConfig.from_dict({**CtalConfig.from_pretrained(start_from).to_dict(), **fields})
    check_settings(task, corpus, config, architecture.fusion)
    torch.manual_seed(config.seed)
    if config.weights == "random":
        model = task.model(architecture)
    else:
        model = _started(task, architecture, start_from)
    start = {"path": str(start_from), "sha256": sha256_of(start_from / WEIGHTS)}
    objective = FinetuneObjective(task, model, processor, corpus, config, fold, targets, protocol, start, heard)
    per_epoch = sum(1 for _ in objective.step_plan().steps(0))
    total = steps or config.epochs * per_epoch
    # An epoch is a natural place to look at the validation part, but not ten times a minute.
    every = max(1, min(total, config.checkpoint_every, max(per_epoch, total // 10)))
    objective.config = config.model_copy(update={"steps": total, "checkpoint_every": every})
    return objective


def _started(task: Task, architecture: CtalConfig, start_from: Path) -> TaskModel:
    """A model with the weights in `start_from`; of its head, what is not there, does not fit or is of other classes is
    new. Raises `InputError` where anything of the encoders is lacking."""
    with loading(start_from):
        # Typed as if it gave the model alone.
        model, info = task.model.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            start_from, config=architecture, ignore_mismatched_sizes=True, output_loading_info=True
        )
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if lacking := sorted(name for name in new if name.startswith(f"{model.base_model_prefix}.")):
        # transformers would go on with random numbers in their place.
        raise InputError(f"--from {start_from}: {WEIGHTS} lacks {lacking[0]}; copy it again from where it was trained")
    if "classifier.weight" not in new and CtalConfig.from_pretrained(start_from).id2label != architecture.id2label:
        model._init_weights(model.classifier)
    return model


def _has_its_constants(start_from: Path, objective: FinetuneObjective) -> bool:
    """Whether the run starts from a model whose pools are standardised, and are made of the same."""
    if objective.config.weights == "random":
        return False
    fields = ("standardise_pools", "fusion", "audio_pooling", "use_weighted_layer_sum")
    before, now = CtalConfig.from_pretrained(start_from), objective.model.config
    inputs = run_of(start_from).get("config", {}).get("inputs")
    return inputs == objective.config.inputs and all(getattr(before, each) == getattr(now, each) for each in fields)


def _measure_pools(objective: FinetuneObjective) -> None:
    """Takes the constants of the head from training utterances, in each process the same."""
    rng = np.random.default_rng(objective.config.seed)
    rows = rng.permutation(objective.train_rows)[:MEASURED_UTTERANCES]
    device = evaluation_device()
    wanted = iter(evaluation_microbatches(rows, objective.lengths, objective.config.batch_frames))
    with closing(load(objective.dataset, wanted, objective.config.workers)) as batches:
        model = objective.model.eval()
        model.to(device)  # pyright: ignore[reportArgumentType]
        if model.head.prosody is not None:
            model.head.prosody.count_letters(*spelling_of_tokens(objective.processor.tokenizer))
        model.measure_pools(_inputs(to_device(batch, device)) for batch in batches)


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("rows", "labels")}


def _judge(task: Task, corpus: Corpus, fold: Fold, protocol: Protocol, run: Path) -> Evaluation:
    """The test part of a fold, by the best model of its run."""
    model, processor, saved = load_model_for(task, run / "model")
    config = make_config(FinetuneConfig, saved["config"])
    evaluation: Evaluation = {
        "task": task.name,
        "protocol": protocol.facts(),
        "fold": fold.name,
        "step": saved["step"],
        "steps": config.steps,
        "validation_metrics": saved["metrics"],
    }
    if len(fold.test):
        targets = read_targets(task, corpus, None if task.compares else class_names(model.config))
        judge = partial(judge_rows, task, model, processor, corpus, targets, fold.test, config=config)
        evaluation |= judge(inputs=config.inputs)
        if config.modality_dropout and config.inputs == "both":
            left = ("audio", "text") if corpus.has_text[targets.rows].all() else ("audio",)
            evaluation["missing_modality"] = {each: judge(inputs=each)["metrics"] for each in left}
    keys = ("start_from", "head", "config", "corpus", "data_hash", "audio_hours", "versions", "commit")
    return {**evaluation, **{name: saved[name] for name in keys}}


def _write(run: Path, evaluation: Evaluation) -> None:
    """Also tells the model's card what was measured."""
    predictions = evaluation.pop("predictions", None)
    if predictions is not None:
        (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
    if "trials" in evaluation:
        ids = [line["id"] for line in predictions or []]
        trials = make_trials(ids, [line["speaker"] for line in predictions or []])
        evaluation["trials"]["checksum"] = write_trials(run / "trials.txt", trials, ids)
    folder = run / "model"
    saved = json.loads((folder / "run.json").read_text())
    saved |= {name: evaluation[name] for name in ("missing_modality",) if name in evaluation}
    saved |= {"test_metrics": evaluation.get("metrics")}
    write_json(folder / "run.json", saved)
    task = get_task(evaluation["task"])
    (folder / "README.md").write_text(task_card(task, CtalConfig.from_pretrained(folder), saved))
    write_json(run / "evaluation.json", evaluation)


def _combine(task: Task, protocol: Protocol, runs: Sequence[Path], out: Path) -> Evaluation:
    """All folds: metrics of each with mean and interval over folds, and of all test utterances together."""
    each = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    names = list(each[0]["metrics"])
    chosen_by = [fold["validation_metrics"] for fold in each]
    best = int(np.argmin([task.score(metrics) for metrics in chosen_by])) if all(chosen_by) else 0
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(runs[best] / "model", out / "model")
    lines = [
        {"fold": fold["fold"], **json.loads(line)}
        for fold, run in zip(each, runs, strict=True)
        for line in (run / "predictions.jsonl").read_text().splitlines()
    ]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ("task", "protocol", "inputs", "fusion", "start_from", "head")
    shared += ("config", "corpus", "data_hash", "versions", "commit")
    evaluation: Evaluation = {name: each[0][name] for name in shared}
    evaluation |= {
        "model_fold": each[best]["fold"],
        "metrics": {name: float(np.mean([fold["metrics"][name] for fold in each])) for name in names},
        "over_folds": {name: asdict(Interval.of(np.array([fold["metrics"][name] for fold in each]))) for name in names},
        "folds": {fold["fold"]: fold["metrics"] for fold in each},
        "utterances": len(lines),
    }
    for name in ("missing_modality", "at_threshold"):
        if name in each[0]:
            evaluation[name] = _mean_of([fold[name] for fold in each])
    if not task.compares:
        evaluation["pooled_metrics"] = _pooled(task, lines)
    means = {"mean over the test parts of all folds": evaluation["metrics"]}
    means |= {f"the same, {given} alone": each for given, each in evaluation.get("missing_modality", {}).items()}
    saved = json.loads((out / "model" / "run.json").read_text()) | {"over_folds": means}
    write_json(out / "model" / "run.json", saved)
    (out / "model" / "README.md").write_text(task_card(task, CtalConfig.from_pretrained(out / "model"), saved))
    write_json(out / "evaluation.json", evaluation)
    return evaluation


def _mean_of(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of mappings of them entry by entry."""
    if isinstance(values[0], Mapping):
        return {name: _mean_of([value[name] for value in values]) for name in values[0]}
    return float(np.mean(values))


def _pooled(task: Task, lines: Sequence[Mapping[str, Any]]) -> Metrics:
    """Metrics over all folds' test utterances as one set."""
    if task.problem_type == "regression":
        outputs = np.array([[line["prediction"]] for line in lines])
        return task.measure(outputs, Truth(np.array([line["label"] for line in lines]), 1, None))
    classes = list(lines[0]["probabilities"])
    outputs = np.array([[line["probabilities"][name] for name in classes] for line in lines])
    labels = np.array([classes.index(line["label"]) for line in lines])
    return task.measure(outputs, Truth(labels, len(classes), None))


def task_card(task: Task, config: CtalConfig, saved: Mapping[str, Any]) -> str:
    """A model card in the hub's form."""
    corpora = ", ".join(saved["corpus"])
    synthetic = "\nTrained on synthetic speech: good for trying things out, not for real recordings.\n"

    def listed(metrics: Mapping[str, float] | None) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in (metrics or {}).items()) or "not measured"

    rows = [
        ("task", task.help),
        (
            "classes",
            f"{config.num_labels} training speakers" if task.compares else ", ".join(class_names(config)) or "-3 … 3",
        ),
        ("fusion", config.fusion),
        (
            "given to the model",
            {"both": "audio and text"}.get(saved["config"]["inputs"], f"{saved['config']['inputs']} alone"),
        ),
        ("training audio", f"{saved['audio_hours']} h of {corpora}, data hash `{saved['data_hash'][:16]}`"),
        ("protocol", f"{saved['protocol']}, checksum `{saved['protocol_checksum'][:16]}`"),
        ("fold", f"{saved['fold']}, step {saved['step']} of {saved['config']['steps']}"),
        *([("validation part (chose the epoch)", listed(saved["metrics"]))] if saved["metrics"] else []),
        ("test part", listed(saved.get("test_metrics"))),
    ]
    for withheld, metrics in saved.get("missing_modality", {}).items():
        rows.append((f"test part, {withheld} alone", listed(metrics)))
    rows += [(name, listed(metrics)) for name, metrics in saved.get("over_folds", {}).items()]
    if task.compares and config.decision_threshold is not None:
        rows.append(("threshold", f"{config.decision_threshold:.4f}: EER of the validation part"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    usage = "ctal verify a.wav b.wav" if task.compares else "ctal predict a.wav --text 'what is said'"
    usage += " --speaker 'recordings of who speaks'" if config.audio.cmvn == "speaker" else ""
    return f"""---
library_name: ctal
tags: [speech, text, multimodal, ctal, {task.name}]
---

# CTAL, fine-tuned for {task.name} on {corpora}
{synthetic if "demo" in saved["corpus"] else ""}
| | |
|---|---|
{table}

```
{usage} --model 'this folder'
```

All settings of the run are in `run.json`. What the weights may be used for follows from the terms of the recordings
that they learned from.
"""
