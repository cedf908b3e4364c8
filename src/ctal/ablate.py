"""Ablations: a base, variants that differ from it in a few fields, and seeds; each result is one row.

A workspace holds

    OUT/results.jsonl     a row for each (plan, variant, task, seed); `results-1-of-4.jsonl` of the first of four shards
    OUT/pretraining/KEY/  a pre-training, shared by all that differs in fine-tuning only, of whatever plan
    OUT/finetuning/KEY/   a fine-tuning's evaluation and predictions, without its weights; in `first` those of the
                          task that came before it
    OUT/tokenizer-KEY/    the tokenizer, where none is given

and KEY is a hash of everything that decides the result: data, tokenizer, settings, seeds. So nothing is computed twice,
and what was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.utils.logging import disable_progress_bar

from ctal.batching import Corpus, digest
from ctal.configuration_ctal import HEAD_FIELDS, SIZES, CtalConfig, settable_fields
from ctal.errors import InputError, did_you_mean, first_problem
from ctal.files import file_aside, folder_aside, write_json
from ctal.finetune import check_features, check_folds, check_settings, finetune, protocol_of
from ctal.objective import open_corpus
from ctal.precision import fast_precision
from ctal.pretrain import load_tokenizer, make_tokenizer, new_extractor, new_model, new_processor, pretrain
from ctal.processes import Cost, measured, training_pool, usable_cores
from ctal.recipes import (
    FINETUNING,
    HARMLESS,
    HEAD_DEFAULTS,
    MODEL_DEFAULTS,
    PRETRAINING,
    FinetuneConfig,
    PretrainConfig,
    make_config,
)
from ctal.tasks import TASKS, read_targets
from ctal.training import NonFiniteLoss, Progress

ResultRow = dict[str, Any]
"""One result; `_row` says what it holds."""


class Variant(BaseModel):
    """What differs from the plan's own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    about: str = ""
    """For the report."""
    pretraining: dict[str, Any] = {}
    """Fields of the run and of the model; `steps: 0` is no pre-training."""
    finetuning: dict[str, Any] = {}
    """Fields of the run and of the head."""
    after: str | None = None
    """Another task that it is fine-tuned for first, with the same fields, data and seed (`ctal finetune --from`; Phang
    et al., 2018). Both must be judged on the same part, which a corpus with a split of its own gives."""
    expected: Literal["worse", "better"] | None = None
    """How it should do, compared with the base. In the plans `paper-*` that come with ctal, the paper claims so."""
    tasks: tuple[str, ...] | None = None
    """Those of the plan that it takes part in; None: all."""


class Plan(BaseModel):
    """A base run and its variants."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Of the file, without `.yaml`."""
    about: str = ""
    size: str = "mini"
    """nano, mini, tiny, base or large."""
    vocab_size: int = Field(30_000, ge=256)
    """Of the tokenizer, where none is given."""
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = Field(5, ge=1)
    """How many: 0, 1, …"""
    vary_pretraining: bool = False
    """A seed also varies the pre-training; otherwise there is one, with seed 0."""
    pretraining: dict[str, Any] = {}
    """Fields of all pre-trainings that differ from the recipe of `size`."""
    finetuning: dict[str, Any] = {}
    """Likewise of all fine-tunings."""
    base: str
    """The variant that the others are compared with."""
    variants: dict[str, Variant]

    @model_validator(mode="after")
    def _check_names(self) -> Plan:
        for name, value, known in [
            ("size", self.size, tuple(SIZES)),
            ("base", self.base, tuple(self.variants)),
            *(("tasks", task, tuple(TASKS)) for task in self.tasks),
            *(("tasks", task, self.tasks) for variant in self.variants.values() for task in variant.tasks or ()),
            *(("after", variant.after, tuple(TASKS)) for variant in self.variants.values() if variant.after),
        ]:
            if value not in known:
                raise ValueError(f"{name}: '{value}' is none{did_you_mean(value, known)} of {', '.join(known)}")
        for name, variant in self.variants.items():
            if variant.after in (variant.tasks or self.tasks):
                raise ValueError(
                    f"variant '{name}': is fine-tuned for {variant.after} first, so that cannot be among its tasks; "
                    "list the others in `tasks`"
                )
        return self


def plan_names() -> list[str]:
    """Plans that come with ctal."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _plans().iterdir() if entry.name.endswith(".yaml"))


def load_plan(name: str) -> Plan:
    """A plan that comes with ctal, by its name, or a YAML file; raises `InputError` naming what is wrong in it."""
    file = Path(name)
    if name in plan_names():
        text = (_plans() / f"{name}.yaml").read_text(encoding="utf-8")
    elif file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{file}: not a text file in UTF-8; write the plan in YAML") from None
    else:
        known = plan_names()
        if file.suffix or len(file.parts) > 1:
            raise InputError(f"{file}: no such file; give a plan in YAML, or one of {', '.join(known)}")
        raise InputError(f"plan '{name}'{did_you_mean(name, known)}: give a YAML file, or one of {', '.join(known)}")
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{name}: a plan has the fields {', '.join(Plan.model_fields)}; this is none")
    try:
        plan = Plan(**{"name": file.stem, **fields})
    except ValidationError as error:
        known = (Variant if error.errors()[0]["loc"][:1] == ("variants",) else Plan).model_fields
        raise InputError(f"{name}: {first_problem(error, known)}") from None
    for variant in plan.variants:
        _Settings.of(plan, variant)
    return plan


@dataclass(frozen=True)
class _Settings:
    """Everything that a variant trains with, but seeds and data."""

    pretraining: dict[str, Any]
    """Fields of `PretrainConfig`; `steps` of 0 is no pre-training."""
    architecture: dict[str, Any]
    finetuning: dict[str, Any]
    """Fields of `FinetuneConfig`."""
    head: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan, variant: str) -> _Settings:
        """Raises `InputError` naming plan, variant and field."""
        own = plan.variants[variant]
        steps = {"steps": PretrainConfig.model_fields["steps"].default}
        pretraining = {**steps, **PRETRAINING[plan.size], **plan.pretraining, **own.pretraining}
        finetuning = {**FINETUNING[plan.size], "workers": 0, **plan.finetuning, **own.finetuning}
        architecture = {**MODEL_DEFAULTS.get(plan.size, {}), **_taken(pretraining, settable_fields())}
        head = {**HEAD_DEFAULTS.get(plan.size, {}), **_taken(finetuning, HEAD_FIELDS)}
        try:
            finetuning_fields = FinetuneConfig.model_fields.keys() - {"steps"}  # it follows from `epochs`
            for stage, fields, own_fields, others in (
                ("pretraining", pretraining, PretrainConfig.model_fields.keys(), settable_fields()),
                ("finetuning", finetuning, finetuning_fields, HEAD_FIELDS),
            ):
                if "seed" in fields:
                    raise InputError("seed: a plan counts its seeds; set `seeds`")
                if unknown := next((name for name in fields if name not in own_fields), None):
                    hint = did_you_mean(unknown, [*own_fields, *others])
                    raise InputError(f"{stage}: unknown field '{unknown}'{hint}")
            make_config(PretrainConfig, pretraining, {} if pretraining["steps"] else {"steps": 1})
            make_config(FinetuneConfig, finetuning)
            CtalConfig.of_size(plan.size, **architecture, **head)
        except InputError as error:
            raise InputError(f"plan {plan.name}, variant '{variant}': {error}") from None
        return cls(pretraining, architecture, finetuning, head)


_PRECISION = "precision.txt"
"""Of a workspace: what plans that name no precision are trained in, which is what is fast on the machine that began it;
on any other too, since a result in another precision is another result."""

_FIRST = "first"
"""Folder within a run's, of the task that comes before its own."""


@dataclass(frozen=True)
class _Training:
    """One run in a folder of its own, which is done once what it took is written there."""

    key: str
    folder: Path
    config: dict[str, Any]
    stores: tuple[Path, ...]

    leftovers: ClassVar[tuple[str, ...]] = ("checkpoints",)
    """Folders that nobody needs of a finished run."""

    @property
    def is_done(self) -> bool:
        return (self.folder / "cost.json").is_file()

    def run(self) -> None:
        """Trains, or goes on, unless it is done."""
        with _alone(self.folder):
            if self.is_done:
                return
            was_begun = _is_begun(self.folder) or _is_begun(self.folder / _FIRST)
            _, cost = measured(self.train)
            _write_cost(self.folder, None if was_begun else cost)
            _remove(self.folder, *self.leftovers)

    def train(self) -> object:
        """Leaves in the folder what the run is for, or goes on with it."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Pretraining(_Training):
    """`steps` of 0 is a new model as it starts."""

    size: str
    architecture: dict[str, Any]
    tokenizer: Path

    def train(self) -> object:
        if not self.config["steps"]:
            return self._start()
        return pretrain(
            self.stores,
            self.folder,
            make_config(PretrainConfig, self.config),
            size=self.size,
            architecture=self.architecture,
            tokenizer=self.tokenizer,
            resume=_is_begun(self.folder),
            diagnosed=False,
        )

    def _start(self) -> None:
        disable_progress_bar()
        processor = new_processor(self.tokenizer, self.architecture)
        torch.manual_seed(self.config["seed"])
        model = new_model(self.size, processor, self.architecture)
        with folder_aside(self.folder / "model") as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


@dataclass(frozen=True)
class _Finetuning(_Training):
    task: str
    head: dict[str, Any]
    pretraining: _Pretraining
    after: str | None
    """The task that comes first, in a folder within this run's."""

    leftovers: ClassVar[tuple[str, ...]] = ("model", "checkpoints")
    """Weights of hundreds of runs fill a disk; the same settings make them again."""

    def train(self) -> object:
        config, start = make_config(FinetuneConfig, self.config), self.pretraining.folder / "model"
        if self.after:
            first = self.folder / _FIRST
            if not (first / "evaluation.json").is_file():
                self._finetune(self.after, first, config, start)
            config, start = config.model_copy(update={"weights": "pretrained"}), first / "model"
        return self._finetune(self.task, self.folder, config, start)

    def _finetune(self, task: str, out: Path, config: FinetuneConfig, start: Path) -> object:
        return finetune(task, self.stores, out, config, start_from=start, head=self.head, resume=_is_begun(out))


@dataclass(frozen=True)
class _Result:
    """A row that is wanted, and the run that gives it."""

    variant: str
    seed: int
    run: _Finetuning

    def check(self, corpus: Corpus) -> None:
        """Raises `InputError` where nothing would be measured, or on what a first task has been trained on."""
        config, task = make_config(FinetuneConfig, self.run.config), TASKS[self.run.task]
        targets = read_targets(task, corpus)
        protocol = protocol_of(task, corpus, targets, config)
        if not all(len(fold.test) for fold in protocol.folds):
            raise InputError(
                f"variant '{self.variant}': protocol={config.protocol} has no test part for {task.name}, so there is "
                "nothing to compare; choose another"
            )
        try:
            check_settings(task, corpus, config, self.run.head.get("fusion", CtalConfig.fusion))
            check_features(task, new_extractor(self.run.pretraining.architecture), config)
            check_folds(task, corpus, targets, config, protocol)
        except InputError as error:
            raise InputError(f"variant '{self.variant}': {error}") from None
        if self.run.after is None:
            return
        first = TASKS[self.run.after]
        one = protocol_of(first, corpus, read_targets(first, corpus), config)
        if one.checksum != protocol.checksum or len(one.folds) > 1:
            raise InputError(
                f"variant '{self.variant}': after {first.name}: would be judged for {task.name} on what it has been "
                f"trained on for {first.name}; prepare the corpus with a split of its own, and label all for both"
            )


def run_plan(
    plan: Plan,
    out: Path,
    pretraining_stores: Sequence[Path],
    stores: Mapping[str, Sequence[Path]],
    *,
    tokenizer: Path | None = None,
    jobs: int | None = None,
    shard: tuple[int, int] = (1, 1),
    progress: Progress,
    show: Callable[[int, int], None],
) -> Path:
    """Runs what is missing of `plan` in the workspace `out`; returns the file that its rows are in.

    Args:
        stores: Task → what it is fine-tuned and judged on.
        tokenizer: Its folder; None trains one on `pretraining_stores`.
        jobs: Trainings at a time; None: one on each GPU, or as many as cores and memory have room for.
        shard: (i, n): the i-th of n parts of the fine-tunings, from 1, in an order that mixes variants and seeds.
            Parts that share a workspace share pre-trainings.
        show: Called with (results that are there, results in all).

    Raises:
        InputError: Wrong input, or a disk that is full; rows that are written stay.
        NonFiniteLoss: At the end, where a variant diverged; the others have their rows.
        Terminated: SIGTERM or Ctrl-C; what was running has saved a checkpoint.
    """
    number, parts = shard
    if not 1 <= number <= parts:
        raise InputError(f"--shard {number}/{parts}: give i/n with i from 1 to n")
    with _disk_errors(out):
        file = out / (f"results-{number}-of-{parts}.jsonl" if parts > 1 else "results.jsonl")
        corpora = {task: open_corpus(stores[task]) for task in plan.tasks}
        for task, corpus in corpora.items():  # before anything is trained
            read_targets(TASKS[task], corpus)
        hashes = {task: corpus.content_hash for task, corpus in corpora.items()}
        plan = _trained_in(_precision_of(out), plan)
        results = _results(plan, out, pretraining_stores, stores, hashes, tokenizer)
        for result in results[: len(results) // plan.seeds]:
            result.check(corpora[result.run.task])
        mixed = sorted(results, key=lambda each: digest(each.variant, each.run.task, each.seed))
        own = list(dict.fromkeys(each.run.key for each in mixed))[number - 1 :: parts]
        wanted, rows = [each for each in results if each.run.key in own], _Rows(file)
        rows.drop_outdated(plan, results, hashes)

        def record(run: _Finetuning) -> None:
            for result in wanted:
                if result.run.key == run.key:
                    rows.add(_row(plan, result, corpora[run.task], out))
            show(len(rows.of(plan.name, wanted)), len(wanted))

        missing = {result.run.key: result.run for result in wanted}
        for run in [run for run in missing.values() if run.is_done]:
            record(missing.pop(run.key))
        show(len(rows.of(plan.name, wanted)), len(wanted))
        if missing:
            _run_missing(list(missing.values()), jobs or _room(plan), record, progress)
    return file


def _precision_of(out: Path) -> str:
    """What the workspace was begun in, also by another shard at this moment."""
    file = out / _PRECISION
    with _alone(file):
        if not file.is_file():
            with file_aside(file) as written:
                written.write(f"{fast_precision()}\n".encode())
        return file.read_text().strip()


def _trained_in(precision: str, plan: Plan) -> Plan:
    """The plan, with a precision where it names none."""
    stages = {"pretraining": plan.pretraining, "finetuning": plan.finetuning}
    return plan.model_copy(update={name: {"precision": precision, **fields} for name, fields in stages.items()})


def _run_missing(
    missing: Sequence[_Finetuning], jobs: int, record: Callable[[_Finetuning], None], progress: Progress
) -> None:
    """Each pre-training once, then what builds on it; as soon as a process is free."""
    waiting: dict[str, list[_Finetuning]] = {}
    for run in missing:
        waiting.setdefault(run.pretraining.key, []).append(run)
    first = {run.pretraining.key: run.pretraining for run in missing}
    diverged: list[str] = []
    with training_pool(min(jobs, max(len(missing), 1))) as submit:
        running: dict[Future[None], _Pretraining | _Finetuning] = {}
        for pretraining in first.values():
            if pretraining.is_done:
                running |= {submit(run.run): run for run in waiting.pop(pretraining.key)}
        # After the fine-tunings that can start, so that first results come early.
        running |= {submit(first[key].run): first[key] for key in waiting}
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                try:
                    future.result()
                except NonFiniteLoss as error:
                    diverged.append(f"{job.folder}: {error}")
                    progress.note(f"diverged, and left out: {diverged[-1]}")
                    continue
                if isinstance(job, _Finetuning):
                    record(job)
                else:
                    progress.note(f"{job.folder}: pre-trained")
                    running |= {submit(run.run): run for run in waiting.pop(job.key)}
    if diverged:
        raise NonFiniteLoss(f"{len(diverged)} trainings diverged, for example {diverged[0]}")


def _results(
    plan: Plan,
    out: Path,
    pretraining_stores: Sequence[Path],
    stores: Mapping[str, Sequence[Path]],
    hashes: Mapping[str, str],
    tokenizer: Path | None,
) -> list[_Result]:
    """Every row of the plan, in its order: all of the first seed first, so that a part of a plan is of use."""
    pretraining_hash = open_corpus(pretraining_stores).content_hash
    if tokenizer is None:
        tokenizer = out / f"tokenizer-{_key(pretraining_hash, plan.vocab_size)}"
        made = tokenizer / "tokenizer.json"
        if not made.is_file():
            with _alone(tokenizer):
                if not made.is_file():  # by another shard meanwhile
                    make_tokenizer(pretraining_stores, tokenizer, plan.vocab_size)
    load_tokenizer(tokenizer)
    vocabulary = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    results = []
    for seed in range(plan.seeds):
        for variant in plan.variants:
            settings = _Settings.of(plan, variant)
            config = {**settings.pretraining, "seed": seed if plan.vary_pretraining else 0}
            decides = (plan.size, _deciding(config), settings.architecture, pretraining_hash, vocabulary)
            if not config["steps"]:
                decides = (plan.size, "no pre-training", config["seed"], settings.architecture, vocabulary)
            key = _key(*decides)
            folder = out / "pretraining" / key
            before = _Pretraining(
                key, folder, config, tuple(pretraining_stores), plan.size, settings.architecture, tokenizer
            )
            for task in plan.variants[variant].tasks or plan.tasks:
                tuned = {**settings.finetuning, "seed": seed}
                if not config["steps"]:
                    tuned["weights"] = "random"  # so that the seed varies the encoders' first weights too
                after = plan.variants[variant].after
                own = _key(key, task, _deciding(tuned), settings.head, hashes[task], *([after] if after else []))
                folder = out / "finetuning" / f"{task}-{own}"
                run = _Finetuning(own, folder, tuned, tuple(stores[task]), task, settings.head, before, after)
                results.append(_Result(variant, seed, run))
    return results


def _row(plan: Plan, result: _Result, corpus: Corpus, out: Path) -> ResultRow:
    run, variant = result.run, plan.variants[result.variant]
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    cost, before = _read_cost(run.folder), run.pretraining
    identity = {
        "plan": plan.name,
        "plan_about": plan.about,
        "base": plan.base,
        "varies": "pre-training and fine-tuning" if plan.vary_pretraining else "fine-tuning",
        "variant": result.variant,
        "about": variant.about,
        "after": variant.after,
        "expected": variant.expected,
        "order": list(plan.variants).index(result.variant),
        "task": run.task,
        "seed": result.seed,
    }
    copied = ("metrics", "protocol", "utterances", "corpus", "data_hash", "config", "head", "versions", "commit")
    pretraining = None
    if before.config["steps"]:
        saved = json.loads((before.folder / "model" / "run.json").read_text())
        pretraining = {
            "key": before.key,
            "steps": before.config["steps"],
            "config": {**before.config, **before.architecture},
            "audio_hours": saved["audio_hours"],
            "validation_metrics": saved["metrics"],
            **_read_cost(before.folder),
        }
    return {
        **identity,
        **{name: evaluation[name] for name in copied},
        "validation_metrics": evaluation.get("validation_metrics"),
        "over_speakers": evaluation.get("over_speakers"),
        "synthetic": "demo" in evaluation["corpus"],
        "run": str(run.folder.relative_to(out)),
        "run_key": run.key,
        "pretraining": pretraining,
        "size": plan.size,
        "audio_hours": round(float(corpus.seconds.sum()) / 3600, 3),
        **cost,
    }


class _Rows:
    """A file of rows that survives a kill in the middle of a line, and other plans that write to it meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[ResultRow] = []  # as of the last look

    def _read(self) -> None:
        path, self.rows = self.path, list[ResultRow]()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                raise InputError(f"{path}, line {number}: not a row of results; remove that line") from None
        if whole != text:
            self._rewrite()

    def add(self, row: ResultRow) -> None:
        """Appends what is not there yet."""
        with _alone(self.path):
            self._read()  # with what others have added
            if any(_same(row, other) for other in self.rows):
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.rows.append(row)

    def drop_outdated(self, plan: Plan, results: Iterable[_Result], data: Mapping[str, str]) -> None:
        """Rows of a plan that has been changed since, on the same data; what its variants share stays on disk."""
        keys = {(each.variant, each.run.task, each.seed): each.run.key for each in results}

        def is_current(row: ResultRow) -> bool:
            is_ours = row["plan"] == plan.name and row["data_hash"] == data.get(row["task"])
            return not is_ours or keys.get((row["variant"], row["task"], row["seed"])) == row["run_key"]

        with _alone(self.path):
            self._read()
            kept = [row for row in self.rows if is_current(row)]
            if len(kept) < len(self.rows):
                self.rows = kept
                self._rewrite()

    def _rewrite(self) -> None:
        with file_aside(self.path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in self.rows)

    def of(self, plan: str, results: Iterable[_Result]) -> list[ResultRow]:
        """Those that are there."""
        wanted = {(each.variant, each.run.task, each.seed, each.run.key) for each in results}
        return [
            row
            for row in self.rows
            if row["plan"] == plan and (row["variant"], row["task"], row["seed"], row["run_key"]) in wanted
        ]


def _same(one: ResultRow, other: ResultRow) -> bool:
    return all(one[name] == other[name] for name in ("plan", "variant", "task", "seed", "run_key"))


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What the system refuses in `out`, as one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise InputError(
            f"{where}: {error.strerror or error}; free space or mend its rights, and run it again"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits while another process, of this or of another shard, works in `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: start one process a workspace there
        yield
        return
    with folder.with_suffix(".lock").open("a") as lock:
        # A POSIX lock: one of `flock` would live on in forked loader workers when this process is killed.
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _is_begun(folder: Path) -> bool:
    """Whether a run in it is there to go on with."""
    return any(any(folder.glob(place)) for place in ("config.json", "folds/*"))


def _write_cost(folder: Path, cost: Cost | None) -> None:
    """Marks a run as done; last of all. `cost` is None for a run that was interrupted: nobody knows what it took."""
    known = {"seconds": round(cost.seconds, 1), "peak_memory_mb": round(cost.peak_memory_mb)} if cost else {}
    write_json(folder / "cost.json", {**known, "resumed": cost is None})


def _remove(folder: Path, *names: str) -> None:
    """The folders below `folder` that are called so."""
    for name in names:
        for each in list(folder.rglob(name)):
            shutil.rmtree(each)


def _read_cost(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cost.json").read_text())


def _room(plan: Plan) -> int:
    """How many trainings the machine has room for at a time."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    size = SIZES[plan.size]
    layers, hidden = 2 * size["num_hidden_layers"], size["hidden_size"]
    # Weights, gradients and two moments; some forty values a frame and layer are kept for the backward pass.
    weights = 16 * (12 * layers * hidden**2 + plan.vocab_size * hidden)
    activations = 4 * 40 * layers * hidden * PRETRAINING[plan.size].get("batch_frames", 6_000)
    need = 700 * 2**20 + weights + activations
    return max(1, min(usable_cores(), int(psutil.virtual_memory().available / need)))


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that touch the result."""
    return {name: value for name, value in config.items() if name not in HARMLESS}


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _taken(fields: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Takes what is called so out of `fields`."""
    return {name: fields.pop(name) for name in list(fields) if name in set(names)}


def _plans() -> Any:
    return resources.files("ctal") / "plans"
