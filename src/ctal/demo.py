"""The whole journey on an embedded default, as one short script.

Corpus, store, tokenizer, pre-training, the three tasks, what stands beside them, report.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctal.baselines import measure_baselines
from ctal.console import bar
from ctal.corpora import get_corpus
from ctal.corpora.demo import make_demo
from ctal.corpora.demo.card import demo_ceilings
from ctal.files import sha256_of
from ctal.finetune import Evaluation, finetune
from ctal.objective import open_corpus
from ctal.precision import fast_precision
from ctal.pretrain import make_tokenizer, pretrain
from ctal.processes import Terminated, training_pool, usable_cores
from ctal.recipes import (
    FINETUNING,
    HEAD_DEFAULTS,
    MODEL_DEFAULTS,
    PRETRAINING,
    FinetuneConfig,
    PretrainConfig,
    make_config,
)
from ctal.report import Column, ResultTable, Row, write_demo_report
from ctal.store import prepare_store
from ctal.tasks import TASKS
from ctal.training import Progress

SIZE = "mini"

VOCAB_SIZE = 2000
"""Whole words: in 50 minutes of speech a task learns what a word means, but not what its pieces mean together
(docs/results.md)."""

RECIPE: dict[str, Any] = {"steps": 600, "checkpoint_every": 300}

EPOCHS = 2
"""Of every fine-tuning, a minute each on one core: what fits into the demo's twelve minutes, and fewer
than they need (docs/results.md shows what more passes give)."""

COMPARED_TASK = "emotion"
"""The task of which other models are fine-tuned too: it needs both modalities most."""

COMPARISONS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pre-trained, concat": ({}, {"fusion": "concat"}),
    "from scratch, orthogonal": ({"weights": "random"}, {}),
    "from scratch, concat": ({"weights": "random"}, {"fusion": "concat"}),
}
"""Name → settings of the run and of the head that differ from the demo's own, which is pre-trained and orthogonal."""


def run_demo(out: Path, *, steps: int | None, progress: Progress) -> None:
    """Makes `out/corpus`, `out/store`, `out/tokenizer`, `out/pretrain`, a folder for each task and `out/report.html`.

    What is there already is kept; an interrupted training goes on, a finished one is only reported again, unless it was
    of fewer steps. `steps` are updates of every training, for a quick look.
    """
    corpus, store, tokenizer, pretrained = (out / name for name in ("corpus", "store", "tokenizer", "pretrain"))
    with bar("making the synthetic corpus") as show:
        make_demo(corpus, progress=show)
    with bar("preparing the store") as show:
        summary = prepare_store(get_corpus("demo").prepare(corpus), store, corpus="demo", progress=show)
    progress.note(
        f"{store}: {summary.utterances} synthetic utterances, {summary.hours:.2f} h, {summary.speakers} speakers"
    )
    data = open_corpus([store]).content_hash
    if _discard_if(pretrained, lambda run: run["data_hash"] != data):
        progress.note(f"{pretrained}: was trained on another corpus; it is trained anew")
        shutil.rmtree(tokenizer, ignore_errors=True)
    if not (tokenizer / "tokenizer.json").is_file():
        make_tokenizer([store], tokenizer, VOCAB_SIZE)
    fast = {"precision": fast_precision()}
    config = make_config(PretrainConfig, PRETRAINING[SIZE], RECIPE, fast, {} if steps is None else {"steps": steps})
    if _discard_if(pretrained, lambda run: run["steps"] < config.steps):
        progress.note(f"{pretrained}: was a quick look of fewer steps; it is trained anew")
    if (pretrained / "evaluation.json").is_file():
        progress.note(f"{pretrained}: trained already; remove it to train again")
    else:
        try:
            pretrain(
                [store],
                pretrained,
                config,
                size=SIZE,
                architecture=MODEL_DEFAULTS[SIZE],
                tokenizer=tokenizer,
                resume=(pretrained / "config.json").is_file(),
                progress=progress,
            )
        except Terminated as stopped:
            stopped.args = ("stopped; run the same command again to go on",)  # there is no --resume to say here
            raise

    jobs = {task: _Job(task, out / task) for task in TASKS}
    for name, (fields, head) in COMPARISONS.items():
        folder = out / "compared" / name.replace(", ", "-").replace(" ", "-")
        jobs[name] = _Job(COMPARED_TASK, folder, fields, head)
    weights = sha256_of(pretrained / "model" / "model.safetensors")
    for job in jobs.values():
        _discard_if(job.folder, lambda run: (run["data_hash"], run["start_from"]) != (data, weights))
    missing = {name: job for name, job in jobs.items() if not job.is_done}
    if len(missing) < len(jobs):
        progress.note(f"{len(jobs) - len(missing)} models are fine-tuned already; remove their folders to do it again")
    one = partial(_finetune_one, store=store, model=pretrained / "model", steps=steps)
    with bar("fine-tuning") as show:
        _in_parallel({name: partial(one, job) for name, job in missing.items()}, show, progress)
    evaluations = {name: json.loads((job.folder / "evaluation.json").read_text()) for name, job in jobs.items()}
    with bar("fitting baselines") as show:
        baselines = _in_parallel({task: partial(measure_baselines, task, [store]) for task in TASKS}, show, progress)
    ceilings = demo_ceilings(corpus)
    write_demo_report(
        out / "report.html",
        title="CTAL demo",
        pretraining_run=pretrained,
        stores=[store],
        task_runs={task: out / task for task in TASKS},
        tables={"Beside other models": _table(evaluations, baselines, ceilings)},
        ceilings={
            task: {known: values[TASKS[task].selection] for known, values in ceilings.items()}
            for task in ("emotion", "sentiment")
        },
    )


@dataclass(frozen=True)
class _Job:
    """One fine-tuning."""

    task: str
    folder: Path
    fields: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return (self.folder / "evaluation.json").is_file()


def _discard_if(folder: Path, is_other: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Removes a run that was made with something else, such as other data or weights; whether it did."""
    run = folder / "config.json"
    is_there = run.is_file() and is_other(json.loads(run.read_text()))
    if is_there:
        shutil.rmtree(folder)
    return is_there


def _in_parallel(
    calls: Mapping[str, Callable[[], Any]], show: Callable[[int, int], None], progress: Progress
) -> dict[str, Any]:
    """What each call returns; one on each GPU, or in each core, since two threads make one only a little faster."""
    with training_pool(max(1, min(len(calls), torch.cuda.device_count() or usable_cores()))) as submit:
        futures = {submit(call): name for name, call in calls.items()}
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress.note(f"{futures[future]}: done, {done} of {len(calls)}")
            show(done, len(calls))
    return {name: future.result() for future, name in futures.items()}


def _finetune_one(job: _Job, store: Path, model: Path, steps: int | None) -> None:
    """An interrupted run goes on."""
    fast = {"precision": fast_precision()}
    config = make_config(FinetuneConfig, FINETUNING[SIZE], {"epochs": EPOCHS, "workers": 0}, fast, job.fields)
    head = {**HEAD_DEFAULTS[SIZE], **job.head}
    resume = (job.folder / "config.json").is_file()
    finetune(job.task, [store], job.folder, config, start_from=model, head=head, steps=steps, resume=resume)


def _table(
    evaluations: Mapping[str, Evaluation],
    baselines: Mapping[str, Evaluation],
    ceilings: Mapping[str, Mapping[str, float]],
) -> ResultTable:
    """Each task's main metric: of the demo's models, of others, of baselines, and the best that is possible."""

    def values(of: Mapping[str, Mapping[str, float]]) -> list[float | None]:
        return [of.get(name, {}).get(task.selection) for name, task in TASKS.items()]

    simple = {name: {} for task in TASKS for name in baselines[task]["baselines"]}
    for task in TASKS:
        for name, measured in baselines[task]["baselines"].items():
            simple[name][task] = measured["metrics"]
    return ResultTable(
        title="The demo's test part: speakers and sentences that no model was trained on (synthetic; one seed)",
        columns=[
            Column("Emotion UA", "%"),
            Column("Sentiment MAE", "points", higher_is_better=False),
            Column("Verification EER", "%", higher_is_better=False),
        ],
        rows=[
            Row("pre-trained, orthogonal", values({task: evaluations[task]["metrics"] for task in TASKS})),
            *(Row(name, values({COMPARED_TASK: evaluations[name]["metrics"]})) for name in COMPARISONS),
            *(Row(name, values(of), "baseline") for name, of in simple.items()),
            *(
                Row(name, values({"emotion": limits, "sentiment": limits}), "ceiling")
                for name, limits in ceilings.items()
            ),
        ],
        note=f"The rows below the first were fine-tuned for {COMPARED_TASK} alone, with as many steps.",
    )
