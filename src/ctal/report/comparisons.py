"""Rows that `ctal ablate` wrote, read, merged and compared: one `Ablation` for each table of the report.

Only what may be compared shares a table: the same plan, task, data and protocol, so that synthetic speech never stands
beside real speech. A variant is compared with the base on the seeds that both have, since what a seed decides (the
order of the data, first weights) moves both alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.report.results import METRICS, Metric
from ctal.tasks import TASKS, get_task

Effect = Literal["better", "worse", "undecided"]
Verdict = Literal["confirmed", "contradicted", "undecided"]

SECONDARY = {"emotion": "wa", "sentiment": "corr", "verification": "min_dcf"}
"""Task → the metric that stands beside the main one."""

PAPER_PLANS = ("paper-claims", "paper-pretraining", "paper-fusion")
"""Plans that come with ctal whose expectations are claims of the paper; those of any other are whoever's wrote it."""

SAME = 1e-9
"""Differences that vary by less are equal but for rounding."""


class PretrainingRun(BaseModel):
    """What a result's encoders come from."""

    model_config = ConfigDict(frozen=True)

    key: str
    steps: int
    config: Mapping[str, Any] = {}
    """Fields of the run and of the model."""
    audio_hours: float
    seconds: float | None = None
    """None for a run that was interrupted: nobody knows what it took."""
    peak_memory_mb: float | None = None


class Protocol(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    checksum: str
    tested: str = ""
    """Of what is tested alone; rows of earlier versions do not say."""


class Ends(BaseModel):
    model_config = ConfigDict(frozen=True)

    low: float
    high: float


class Result(BaseModel):
    """One row; `ctal.ablate` says what it holds."""

    model_config = ConfigDict(frozen=True)

    plan: str
    plan_about: str
    base: str
    varies: str
    variant: str
    about: str
    after: str | None = None
    """The task that it was fine-tuned for first."""
    expected: Literal["worse", "better"] | None
    order: int
    task: str
    seed: int
    metrics: Mapping[str, float]
    over_speakers: Mapping[str, Ends] | None = None
    """Metric → its interval over the speakers of the test part."""
    protocol: Protocol
    utterances: int
    corpus: tuple[str, ...]
    synthetic: bool
    data_hash: str
    run_key: str
    pretraining: PretrainingRun | None
    config: Mapping[str, Any]
    head: Mapping[str, Any]
    size: str
    audio_hours: float
    seconds: float | None = None
    peak_memory_mb: float | None = None
    resumed: bool
    versions: Mapping[str, str]
    commit: str | None

    @model_validator(mode="after")
    def _check_metrics(self) -> Result:
        task = get_task(self.task)
        for name in (task.selection, SECONDARY[task.name]):
            if not math.isfinite(self.metrics.get(name, math.nan)):
                raise ValueError(f"metrics: {name} is not a number")
        return self

    @property
    def known_seconds(self) -> float | None:
        """None where an interruption hides how long it took."""
        return None if self.resumed else self.seconds


# Reading


def read_results(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """All results in files and folders, each once, and notes on what was left out.

    Raises:
        InputError: There is nothing to read, a line is damaged, or two results of one variant and seed differ in
            settings.
    """
    notes: list[str] = []
    kept: dict[tuple[Any, ...], tuple[str, Result]] = {}
    conflicts: list[str] = []
    for path in {each.resolve(): each for each in _files(paths)}.values():
        for place, result in _read_file(path, notes):
            identity = (result.plan, result.variant, result.task, result.seed, result.data_hash)
            first, other = kept.setdefault(identity, (place, result))
            if other.run_key != result.run_key:
                said = f"plan '{result.plan}', variant '{result.variant}', {result.task}, seed {result.seed}"
                conflicts.append(f"{first} and {place}: two results of {said}, from different settings")
            elif other.metrics != result.metrics:
                notes.append(f"{place}: the run of {first} once more, with other metrics; the first one counts")
    if conflicts:
        more = f" ({len(conflicts) - 1} more like this)" if len(conflicts) > 1 else ""
        raise InputError(f"{conflicts[0]}{more}; remove the lines that are out of date")
    if not kept:
        raise InputError(f"{', '.join(map(str, paths))}: no results yet; `ctal ablate` writes them")
    return [result for _, result in kept.values()], notes


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(path.glob("results*.jsonl"))
        if not found:
            raise InputError(f"{path}: no results*.jsonl in this folder; give the one that `ctal ablate` writes to")
        yield from found


def _read_file(path: Path, notes: list[str]) -> Iterator[tuple[str, Result]]:
    """Where each result stands, and the result."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a results.jsonl or its folder") from None
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield place, Result.model_validate(json.loads(line.decode()))
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"])) or "row"
            said = problem["msg"].removeprefix("Value error, ")
            raise InputError(
                f"{place}: not a row of this version's `ctal ablate` ({field}: {said}); remove it"
            ) from None
        except ValueError:
            # Every whole line ends with a line break, so this one is still being written, or its writer was killed.
            if number == len(lines) and line.startswith(b"{"):
                notes.append(f"{place}: torn, left out; `ctal ablate` writes it anew")
                continue
            raise InputError(
                f"{place}: not JSON; remove that line, or give the file that `ctal ablate` wrote"
            ) from None


# Comparing


@dataclass(frozen=True)
class Line:
    """A variant: its results, and how it differs from the base."""

    results: Sequence[Result]
    """In the order of their seeds."""
    base: Sequence[Result]
    """None of them where the base was not run, or is this variant."""

    @property
    def name(self) -> str:
        return self.results[0].variant

    @property
    def is_base(self) -> bool:
        return self.name == self.results[0].base

    @property
    def about(self) -> str:
        return self.results[0].about

    @property
    def expectations(self) -> set[Literal["worse", "better"] | None]:
        """What the plan expects of it; several where the plan was changed between two results."""
        return {each.expected for each in self.results}

    @property
    def expected(self) -> Literal["worse", "better"] | None:
        return next(iter(self.expectations)) if len(self.expectations) == 1 else None

    @property
    def values(self) -> np.ndarray:
        """(n,) main metric, one a seed."""
        return _values(self.results, TASKS[self.results[0].task].selection)

    @cached_property
    def mean(self) -> Interval:
        return Interval.of(self.values)

    @property
    def secondary(self) -> float:
        return float(_values(self.results, SECONDARY[self.results[0].task]).mean())

    @cached_property
    def differences(self) -> np.ndarray:
        """(n,) main metric, minus the base's with the same seed."""
        name = TASKS[self.results[0].task].selection
        base = {each.seed: each.metrics[name] for each in self.base}
        return np.array([each.metrics[name] - base[each.seed] for each in self.results if each.seed in base])

    @cached_property
    def difference(self) -> Interval | None:
        """None where no seed is shared."""
        return Interval.of(self.differences) if len(self.differences) else None

    @property
    def is_same_for_all_seeds(self) -> bool:
        """An interval without width says that the seeds decide nothing, and not that the difference is certain."""
        return len(self.differences) > 1 and float(np.ptp(self.differences)) < SAME

    @property
    def effect(self) -> Effect:
        """Better or worse where the interval of the difference leaves out 0."""
        difference = self.difference
        if difference is None or self.is_same_for_all_seeds or not (difference.low > 0 or difference.high < 0):
            return "undecided"
        rises = difference.mean > 0
        return "better" if rises == TASKS[self.results[0].task].higher_is_better else "worse"

    @property
    def verdict(self) -> Verdict | None:
        """On what is expected; None where nothing is."""
        if self.expected is None or self.is_base:
            return None
        if self.effect == "undecided":
            return "undecided"
        return "confirmed" if self.effect == self.expected else "contradicted"


@dataclass(frozen=True)
class Ablation:
    """What one table shows: results of a plan and a task on the same test utterances of the same data."""

    lines: Sequence[Line]
    """In the plan's order."""

    @property
    def results(self) -> list[Result]:
        return [result for line in self.lines for result in line.results]

    @property
    def first(self) -> Result:
        """For what all results share."""
        return self.lines[0].results[0]

    @property
    def metric(self) -> Metric:
        return METRICS[TASKS[self.first.task].selection]

    @property
    def secondary(self) -> Metric:
        return METRICS[SECONDARY[self.first.task]]

    @property
    def base(self) -> Line | None:
        return next((line for line in self.lines if line.is_base), None)

    @property
    def seeds(self) -> list[int]:
        return sorted({each.seed for each in self.results})

    @property
    def corpora(self) -> list[str]:
        return list(dict.fromkeys(self.first.corpus))

    @property
    def is_synthetic(self) -> bool:
        return self.first.synthetic

    @property
    def is_of_paper(self) -> bool:
        """Whether what is expected is what the paper claims."""
        return self.first.plan in PAPER_PLANS

    @property
    def compared(self) -> list[Line]:
        """Variants whose difference has an interval."""
        return [line for line in self.lines if len(line.differences) > 1]

    def verdicts(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.lines)


def compare(results: Iterable[Result]) -> list[Ablation]:
    """Real speech first, then by plan, task, data and what is tested.

    Raises `InputError` where a plan has two bases.
    """
    tables: dict[tuple[Any, ...], list[Result]] = {}
    bases: dict[str, str] = {}
    for each in results:
        if bases.setdefault(each.plan, each.base) != each.base:
            raise InputError(
                f"plan '{each.plan}': its rows name two bases, '{bases[each.plan]}' and '{each.base}'; "
                "report the rows of one version of the plan"
            )
        # The order of tasks is that of the paper.
        task = list(TASKS).index(each.task)
        tested = each.protocol.tested or each.protocol.checksum
        key = (each.synthetic, each.plan, task, each.corpus, each.data_hash, tested)
        tables.setdefault(key, []).append(each)
    return [_ablation(tables[key]) for key in sorted(tables)]


def _ablation(results: Sequence[Result]) -> Ablation:
    variants: dict[str, list[Result]] = {}
    for each in sorted(results, key=lambda each: (each.order, each.variant, each.seed)):
        variants.setdefault(each.variant, []).append(each)
    base = variants.get(results[0].base, [])
    return Ablation([Line(own, [] if own is base else base) for own in variants.values()])


def _values(results: Sequence[Result], metric: str) -> np.ndarray:
    return np.array([each.metrics[metric] for each in results])
