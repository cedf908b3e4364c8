"""Results in a table: of models, of what needs none, and of what is possible at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctal.diagnostics import Interval
from ctal.report.html import Html, element, join, minus

Kind = Literal["model", "baseline", "ceiling"]

KINDS: Mapping[str, str] = {"model": "", "baseline": "baseline", "ceiling": "best possible"}


@dataclass(frozen=True)
class Column:
    """What a result table measures."""

    name: str
    unit: str = ""
    """`%` shows fractions as percent; anything else stands below the name."""
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    name: str
    values: Sequence[float | Interval | None]
    """One a column; None where it was not measured."""
    kind: Kind = "model"


@dataclass(frozen=True)
class ResultTable:
    """Several models' results beside baselines and what is possible at best."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(f"row '{row.name}' has {len(row.values)} values for {len(self.columns)} columns")


@dataclass(frozen=True)
class Metric:
    name: str
    meaning: str
    is_share: bool = True
    higher_is_better: bool = True

    def shown(self, value: float) -> str:
        return f"{value:.1%}" if self.is_share else minus(f"{value:.3f}")


METRICS = {
    "ua": Metric("UA", "unweighted accuracy: mean over emotions of the share that is right"),
    "wa": Metric("WA", "weighted accuracy: share of all recordings that is right"),
    "mae": Metric("MAE", "mean absolute error, in points of the scale", is_share=False, higher_is_better=False),
    "corr": Metric("Correlation", "Pearson's, with the truth", is_share=False),
    "acc2_nonzero": Metric("2 classes", "positive or negative, zeros left out"),
    "f1_nonzero": Metric("F1, 2 classes", "weighted, zeros left out"),
    "acc2_nonneg": Metric("2 classes, ≥ 0", "negative, or not"),
    "f1_nonneg": Metric("F1, ≥ 0", "weighted; negative, or not"),
    "acc7": Metric("7 classes", "rounded, −3 … 3"),
    "acc5": Metric("5 classes", "rounded, −2 … 2"),
    "eer": Metric("EER", "equal error rate", higher_is_better=False),
    "min_dcf": Metric("minDCF", "least detection cost, p = 0.01", is_share=False, higher_is_better=False),
    "ge2e_eer": Metric("EER, GE2E", "as the authors measure it, which flatters", higher_is_better=False),
}


def kind_mark(kind: Kind) -> list[Html]:
    return [element("em", KINDS[kind], class_=f"kind {kind}")] if KINDS[kind] else []


def result_table(results: ResultTable) -> Html:
    best = [_best(results, position) for position in range(len(results.columns))]
    arrows = ("↑" if column.higher_is_better else "↓" for column in results.columns)
    units = (column.unit if column.unit != "%" else "" for column in results.columns)
    head = element(
        "tr",
        element("th", "", scope="col"),
        *(
            element("th", f"{column.name} {arrow}", element("small", unit), scope="col")
            for column, arrow, unit in zip(results.columns, arrows, units, strict=True)
        ),
    )
    rows = []
    for row in results.rows:
        cells = (
            _result_cell(column, value, is_best=row.kind == "model" and value is not None and _mean(value) == top)
            for column, value, top in zip(results.columns, row.values, best, strict=True)
        )
        name = element("th", row.name, *kind_mark(row.kind), scope="row")
        rows.append(element("tr", name, *cells, class_=row.kind))
    note = f"↑ higher is better, ↓ lower. Bold: the best of the models. {results.note}".strip()
    return join(
        element(
            "table",
            element("caption", results.title),
            element("thead", head),
            element("tbody", *rows),
            class_="results",
        ),
        element("p", note, class_="note"),
    )


def _best(results: ResultTable, position: int) -> float | None:
    values = [row.values[position] for row in results.rows if row.kind == "model"]
    known = [_mean(value) for value in values if value is not None]
    choose = max if results.columns[position].higher_is_better else min
    return choose(known, default=None)


def _mean(value: float | Interval) -> float:
    return value.mean if isinstance(value, Interval) else value


def _result_cell(column: Column, value: float | Interval | None, *, is_best: bool) -> Html:
    def shown(number: float) -> str:
        return f"{number:.1%}" if column.unit == "%" else minus(f"{number:.3f}")

    label = f"{column.name}\N{NO-BREAK SPACE}{'↑' if column.higher_is_better else '↓'}"
    if value is None:
        return element("td", "–", data_label=label)
    ends: list[Html] = []
    if isinstance(value, Interval) and np.isfinite(value.low):
        ends = [element("small", f"{shown(value.low)} … {shown(value.high)}")]
    mean = shown(_mean(value))
    return element("td", element("strong", mean) if is_best else mean, *ends, data_label=label)
