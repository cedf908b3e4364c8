"""Pictures of what was predicted of all test utterances, one kind a task.

N test utterances, E dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import norm

from ctal.batching import digest
from ctal.metrics import det_curve
from ctal.report.html import Html, Plot, element, join, minus, round_ticks, signed, step_label, table
from ctal.report.results import METRICS
from ctal.report.runs import TaskRun, Trialled

SHOWN_CLASSES = 12
"""A confusion matrix has at most so many rows; rarer classes share the last one, so that it fits a phone."""

SHOWN_SPEAKERS = 8
"""So many speakers have a colour and a shape of their own."""

SHOWN_POINTS = 1500
"""Points of a scatter plot at most, chosen by a hash of their names."""

OTHERS = "(all others)"


def _confusion(run: TaskRun) -> Html:
    names = _shown_classes(run)
    place = {name: position for position, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for each in run.predictions:
        counts[place.get(str(each.label), len(names) - 1), place.get(str(each.prediction), len(names) - 1)] += 1
    head = element(
        "tr",
        element("th", "true ↓ predicted →", scope="col"),
        *(element("th", element("span", name), scope="col") for name in names),
    )
    rows = []
    for true, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = int(row.sum())
        cells = (
            _confusion_cell(int(count), total, is_right=position == true and name != OTHERS)
            for position, count in enumerate(row)
        )
        rows.append(element("tr", element("th", name, element("small", f"{total}"), scope="row"), *cells))
    caption = "Emotions, true and predicted: utterances, and their share of the row. Framed: right."
    return element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *rows),
        class_="confusion many" if len(names) > 4 else "confusion",
    )


def _shown_classes(run: TaskRun) -> list[str]:
    names = list(run.classes)
    if len(names) <= SHOWN_CLASSES:
        return names
    seen = Counter(str(each.label) for each in run.predictions)
    kept = sorted(names, key=lambda name: -seen[name])[: SHOWN_CLASSES - 1]
    return [*(name for name in names if name in kept), OTHERS]


def _confusion_cell(count: int, total: int, *, is_right: bool) -> Html:
    share = count / total if total else 0.0
    return element(
        "td",
        count,
        element("small", f"{share:.0%}" if total else "–"),
        class_="right" if is_right else None,
        style=f"--share: {0.6 * share:.0%}",
    )


def _levels(run: TaskRun) -> Html:
    """Predicted over true sentiment, with the mean at each whole number."""
    shown = sorted(run.predictions, key=lambda each: digest(each.id))[:SHOWN_POINTS]
    truth = np.array([each.label for each in run.predictions], dtype=np.float64)
    predicted = np.array([each.prediction for each in run.predictions], dtype=np.float64)
    low, high = min(-3.0, float(predicted.min())), max(3.0, float(predicted.max()))
    plot = Plot(
        np.arange(-3.5, 4, 1).tolist(),
        round_ticks(low, high, 6),
        "true sentiment",
        x_label=lambda value: "",
        y_label=signed,
        height=300,
    )
    is_whole = bool((truth == np.round(truth)).all())
    marks = [element("path", d=plot.line([(-3, -3), (3, 3)]), class_="diagonal")]
    for each in shown:
        # Whole numbers would lie upon one another.
        jitter = (digest("jitter", each.id) % 1000 / 1000 - 0.5) * 0.5 if is_whole else 0.0
        assert isinstance(each.label, int | float)
        assert isinstance(each.prediction, int | float)
        x = plot.x(float(np.clip(each.label, -3, 3)) + jitter)
        marks.append(element("circle", cx=x, cy=plot.y(each.prediction), r=2.2, class_="point"))
    rows, means = [], []
    for level in range(-3, 4):
        own = predicted[np.clip(np.round(truth), -3, 3) == level]
        label = signed(level)
        marks.append(element("text", label, x=plot.x(level), y=plot.height - plot.BOTTOM + 15, text_anchor="middle"))
        if not len(own):
            continue
        left, right, y = plot.x(level - 0.36), plot.x(level + 0.36), plot.y(float(own.mean()))
        marks += [element("line", x1=left, x2=right, y1=y, y2=y, class_=kind) for kind in ("halo", "level")]
        middle = [minus(f"{value:+.2f}") for value in (own.mean(), *np.percentile(own, [10, 90]))]
        rows.append([label, f"{len(own)}", middle[0], f"{middle[1]} … {middle[2]}"])
        means.append(f"{middle[0]} at {label}")
    key = element(
        "p",
        element("span", element("b", "● ", class_="training"), "an utterance"),
        element("span", element("b", "━ ", class_="held-out"), "mean of a level"),
        element("span", "╌ predicted = true"),
        class_="key",
    )
    caption = "Predicted sentiment (upwards) over the true one (to the right)"
    less = f"{len(shown):,} of {len(truth):,} utterances, chosen by a hash of their names."
    some = element("p", less, class_="note") if len(shown) < len(truth) else Html()
    spread = "To the right, points are spread a little at random." if is_whole else "Means are of rounded levels."
    return join(
        element(
            "figure",
            element("figcaption", caption),
            key,
            plot.svg(marks, f"Mean predicted sentiment at each true one: {', '.join(means)}."),
            element("p", spread, class_="note"),
            some,
            class_="chart",
        ),
        element(
            "details",
            element("summary", "The same in numbers"),
            table(["True", "Utterances", "Mean predicted", "Middle 80%"], rows),
        ),
    )


def _speakers(run: TaskRun) -> Html:
    shown = next(each for each in run.trialled if each.fold == run.evaluation.get("model_fold", each.fold))
    return element("div", _det(run), _projection(shown, several=len(run.trialled) > 1), class_="curves")


DET_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Error rates that axes may name."""


def _det(run: TaskRun) -> Html:
    """Both error rates at all thresholds, on normal deviates, so that Gaussian scores give a straight line."""
    ticks = _det_ticks(run.trialled)
    plot = Plot(
        ticks, ticks, "strangers accepted, %", *(lambda z: f"{100 * norm.cdf(z):.3g}",) * 2, height=350, x_grid=True
    )
    marks = [element("path", d=plot.line([(ticks[0], ticks[0]), (ticks[-1], ticks[-1])]), class_="diagonal")]
    said = []
    for each in run.trialled:
        marks.append(element("path", d=_det_line(plot, each), class_="training"))
        x = y = _deviate(each.eer, ticks)
        marks.append(element("circle", cx=plot.x(x), cy=plot.y(y), r=5, class_="held-out best"))
        said.append(f"equal error rate {each.eer:.1%}")
        if each.at_threshold:
            accepted, rejected = each.at_threshold["false_acceptance"], each.at_threshold["false_rejection"]
            x, y = plot.x(_deviate(accepted, ticks)), plot.y(_deviate(rejected, ticks))
            marks.append(element("path", d=f"M{x},{y}{SHAPES['triangle']}", class_="operating"))
            said.append(f"its own threshold accepts {accepted:.1%} and rejects {rejected:.1%}")
    rows = []
    for each in run.trialled:
        own = each.at_threshold
        at = f"{own['false_acceptance']:.1%} / {own['false_rejection']:.1%}" if own else "–"
        rows.append([each.fold, f"{len(each.scores):,}", f"{each.eer:.1%}", at])
    has_threshold = any(each.at_threshold for each in run.trialled)
    own_key = element("span", element("b", "▲ ", class_="own"), "the model's own threshold", *_only(run, _own_rates))
    key = element(
        "p",
        element("span", element("b", "━ ", class_="training"), "all thresholds"),
        element("span", element("b", "○ ", class_="held-out"), "EER", *_only(run, lambda each: f" {each.eer:.1%}")),
        own_key if has_threshold else Html(),
        class_="key",
    )
    caption = join(
        element("strong", "Errors at every threshold (DET)"),
        element("br"),
        element("span", "upwards: the same speaker rejected, %; nearer to the lower left is better", class_="note"),
    )
    several = table(["Fold", "Pairs", "EER", "At its threshold"], rows) if len(rows) > 1 else Html()
    own = (
        "The model's own threshold is where both errors were equal on the validation part. Its errors here: strangers "
        "accepted / the same speaker rejected."
        if has_threshold
        else "No part was held out to choose a threshold by, so the model has none of its own."
    )
    return element(
        "figure",
        element("figcaption", caption),
        key,
        plot.svg(marks, f"DET curve: {'; '.join(said)}."),
        element("p", own, class_="note"),
        several,
        class_="chart",
    )


def _only(run: TaskRun, say: Callable[[Trialled], str]) -> list[str]:
    return [say(run.trialled[0])] if len(run.trialled) == 1 else []


def _own_rates(each: Trialled) -> str:
    own = each.at_threshold
    return f": {own['false_acceptance']:.1%} / {own['false_rejection']:.1%}" if own else " (none)"


def _det_ticks(trialled: Sequence[Trialled]) -> list[float]:
    """Normal deviates of the rates that the axes name, around all that is marked."""
    marked = [each.eer for each in trialled]
    marked += [each.at_threshold[name] for each in trialled if each.at_threshold for name in _OWN_RATES]
    low = max([rate for rate in DET_RATES if rate <= min(0.01, min(marked) / 2)], default=DET_RATES[0])
    high = min([rate for rate in DET_RATES if rate >= max(0.4, 1.5 * max(marked))], default=DET_RATES[-1])
    return [float(norm.ppf(rate)) for rate in DET_RATES if low <= rate <= high]


_OWN_RATES = ("false_acceptance", "false_rejection")


def _deviate(rate: float, ticks: Sequence[float]) -> float:
    """Rates of 0 or 1 have no finite place, and are drawn at the edge."""
    return float(np.clip(norm.ppf(rate), ticks[0], ticks[-1]))


def _det_line(plot: Plot, trialled: Trialled) -> str:
    """The part of the curve that lies within the axes, without points too near to be told apart."""
    curve = det_curve(trialled.scores, trialled.trials.is_target)
    with np.errstate(divide="ignore"):
        xs, ys = norm.ppf(curve.false_acceptance), norm.ppf(curve.false_rejection)
    low, high = plot.x_ticks[0], plot.x_ticks[-1]
    # One point beyond each end, drawn at the edge, leads the curve out of the picture.
    inside = np.flatnonzero((xs <= high) & (xs >= low) & (ys <= high) & (ys >= low))
    if not len(inside):
        return ""
    around = range(max(0, inside[0] - 1), min(len(xs), inside[-1] + 2))
    points = [(float(np.clip(xs[i], low, high)), float(np.clip(ys[i], low, high))) for i in around]
    kept = points[:1]
    for point in points[1:-1]:
        moved = abs(plot.x(point[0]) - plot.x(kept[-1][0])) + abs(plot.y(point[1]) - plot.y(kept[-1][1]))
        if moved >= 1:
            kept.append(point)
    return plot.line([*kept, *points[-1:]])


SHAPES = {
    "circle": "m-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "square": "m-4,-4h8v8h-8z",
    "triangle": "m0,-5.5l5.2,9h-10.4z",
    "diamond": "m0,-5.8l5,5.8l-5,5.8l-5,-5.8z",
    "plus": "m-1.7,-5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z",
    "triangle down": "m0,5.5l5.2,-9h-10.4z",
    "bar": "m-5.5,-1.9h11v3.8h-11z",
    "hourglass": "m-4.6,-4.6h9.2l-9.2,9.2h9.2z",
}
"""Paths around a point, one a speaker."""


def _projection(trialled: Trialled, *, several: bool) -> Html:
    """Embeddings of some speakers on the two directions in which those of all test recordings vary most (PCA)."""
    centred_NE = trialled.unit_NE - trialled.unit_NE.mean(0)
    _, spreads, directions = np.linalg.svd(centred_NE, full_matrices=False)
    points_N2 = centred_NE @ directions[:2].T
    points_N2 = np.pad(points_N2, ((0, 0), (0, 2 - points_N2.shape[1])))
    # SVD leaves the signs open, so that machines would give mirrored pictures.
    points_N2 *= np.where(points_N2[np.abs(points_N2).argmax(0), [0, 1]] < 0, -1, 1)
    covered = float((spreads[:2] ** 2).sum() / max(float((spreads**2).sum()), 1e-12))
    counts = Counter(str(each.speaker) for each in trialled.predictions if each.speaker)
    names = sorted((name for name in counts if counts[name] > 1), key=lambda name: (digest(name), name))
    names = sorted(names[:SHOWN_SPEAKERS])
    shapes = dict(zip(names, SHAPES.values(), strict=False))
    rows = [row for row, each in enumerate(trialled.predictions) if each.speaker in shapes]
    reach = float(np.abs(points_N2[rows]).max()) * 1.08 if rows else 1.0
    plot = Plot([-reach, 0, reach], [-reach, 0, reach], "", *(lambda value: "",) * 2, height=350, x_grid=True)
    marks = []
    for row in rows:
        each = trialled.predictions[row]
        x, y = plot.x(points_N2[row, 0]), plot.y(points_N2[row, 1])
        number = names.index(str(each.speaker)) + 1
        title = element("title", f"{each.id}, speaker {each.speaker}")
        marks.append(element("path", title, d=f"M{x},{y}{shapes[str(each.speaker)]}", class_=f"dot dot-{number}"))
    same = trialled.trials.is_target
    alike, apart = float(trialled.scores[same].mean()), float(trialled.scores[~same].mean())
    key = element(
        "ul", *(_shape_key(name, number, shapes[name]) for number, name in enumerate(names, 1)), class_="shapes"
    )
    caption = join(
        element("strong", "Recordings by speaker"),
        element("br"),
        element(
            "span", "each mark a test recording, near to others that the model takes to sound alike", class_="note"
        ),
    )
    note = (
        f"{len(names)} speakers, by a hash of their names. The plane holds {covered:.0%} of the variance (PCA of all "
        f"{len(trialled.predictions)} test recordings), so groups can be further apart than they look. Mean cosine of "
        f"two recordings: {minus(f'{alike:.2f}')} of one speaker, {minus(f'{apart:.2f}')} of two."
    )
    fold = f" Of {trialled.fold} alone, since each fold has its own model." if several else ""
    return element(
        "figure",
        element("figcaption", caption),
        key,
        plot.svg(marks, f"Embeddings of {len(rows)} recordings of {len(names)} speakers in two dimensions."),
        element("p", note + fold, class_="note"),
        class_="chart",
    )


def _shape_key(name: str, number: int, shape: str) -> Html:
    drawn = element("path", d=f"M7,7{shape}", class_=f"dot dot-{number}")
    return element("li", element("svg", drawn, viewBox="0 0 14 14", aria_hidden="true"), name)


PICTURES: Mapping[str, Callable[[TaskRun], Html]] = {
    "emotion": _confusion,
    "sentiment": _levels,
    "verification": _speakers,
}


def learning(run: TaskRun) -> Html:
    """The main metric on the validation part over the steps, a line a fold."""
    curves = {fold: points for fold, points in run.curves.items() if points}
    if not curves:
        return Html()
    metric = METRICS[run.task.selection]
    everything = [point for points in curves.values() for point in points]
    values = [value for _, value in everything]
    plot = Plot(
        round_ticks(0, max(1, *(step for step, _ in everything)), 4),
        round_ticks(min(values), max(values), 5),
        "step",
        step_label,
        y_label=lambda value: f"{100 * value:.4g}%" if metric.is_share else minus(f"{value:.3g}"),
    )
    marks = []
    for points in curves.values():
        marks.append(element("path", d=plot.line(points), class_="held-out"))
        marks += [element("circle", cx=plot.x(x), cy=plot.y(y), r=2.5, class_="held-out") for x, y in points]
    better = "higher is better" if metric.higher_is_better else "lower is better"
    description = f"{metric.name} on the validation part, from {metric.shown(values[0])} to {metric.shown(values[-1])}."
    caption = f"{metric.name} on the validation part, {better}" + (", a line a fold" if len(curves) > 1 else "")
    figure = element("figure", element("figcaption", caption), plot.svg(marks, description), class_="chart")
    return element("details", element("summary", "How it learned"), figure)
