"""The page of ablations: a table, a picture, costs and provenance for each plan, task and data set.

HTML and Markdown are written from the same `_Section`s, so that they cannot say different things. Neither holds a date:
the same rows give the same files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctal.configuration_ctal import HEAD_FIELDS, CtalConfig
from ctal.diagnostics import Interval
from ctal.errors import InputError
from ctal.report.comparisons import Ablation, Effect, Line, Result, compare, read_results
from ctal.report.html import (
    Html,
    Scale,
    capital,
    definitions,
    element,
    four_decimals,
    join,
    minus,
    round_ticks,
    synthetic_warning,
    tiles,
    write_page,
    write_text,
)
from ctal.report.published import Published, read_published
from ctal.report.results import Metric
from ctal.tasks import TASKS

TITLE = "CTAL ablations"

FORMATS = (".html", ".md")

MARKS: Mapping[Effect, str] = {"better": "▲ better", "worse": "▼ worse", "undecided": "◆ not told apart"}

VERDICT_EFFECTS: Mapping[str, Effect] = {"confirmed": "better", "contradicted": "worse", "undecided": "undecided"}
"""Verdict → the effect whose colour it has."""


def write_ablation_report(results: Sequence[Path], outs: Sequence[Path], published: Path | None = None) -> list[str]:
    """Writes what `ctal ablate` found as tables, with pictures in HTML.

    Args:
        results: results*.jsonl files, or folders that hold them, for example one a shard.
        outs: Files to write, `.html` or `.md`; missing folders are made.
        published: Figures of others (`ctal.report.published`), for the tables on real speech.

    Returns:
        Notes on rows that were left out, and on published figures of no row; they stand in the report too.

    Raises:
        InputError: Results are missing, damaged or contradict each other, a file of `outs` cannot be written, or
            `published` is not such a file.
    """
    for out in outs:
        if out.suffix not in FORMATS:
            raise InputError(f"{out}: the name of a report ends with {' or '.join(FORMATS)}")
    beside = read_published(published) if published else None
    rows, notes = read_results(results)
    ablations = compare(rows)
    if beside:
        notes = [*notes, *_unplaced(beside, ablations)]
    sections = [_section(each, ablations, beside) for each in ablations]
    reading = _how_to_read(ablations)
    for out in outs:
        if out.suffix == ".md":
            write_text(out, _markdown(sections, reading, notes))
        else:
            write_page(out, TITLE, _page(sections, reading, notes, rows))
    return notes


# What is said, in HTML and Markdown alike


@dataclass(frozen=True)
class _Cell:
    text: str
    more: str = ""
    """Ends of an interval, for example."""
    said: str = ""
    effect: Effect | None = None
    """That of `said`."""


@dataclass(frozen=True)
class _Sheet:
    """A table with a row a variant."""

    caption: str
    head: Sequence[str]
    """Names of all columns but the first."""
    rows: Sequence[tuple[Line, Sequence[_Cell]]]


@dataclass(frozen=True)
class _Section:
    title: str
    ablation: Ablation
    headline: str
    findings: _Sheet
    notes: Sequence[str]
    costs: _Sheet
    changes: Mapping[str, str]
    """Variant → how its settings differ from the base's."""
    provenance: Mapping[str, str]


def _section(ablation: Ablation, among: Sequence[Ablation], published: Published | None) -> _Section:
    figures = _figures_for(ablation, published)
    source = [f"Published: {published.source}."] if published and figures else []
    return _Section(
        _title(ablation, among),
        ablation,
        _headline(ablation),
        _findings(ablation, figures),
        [*source, *_notes(ablation)],
        _costs(ablation),
        _changes(ablation),
        _provenance(ablation),
    )


def _figures_for(ablation: Ablation, published: Published | None) -> Mapping[str, float]:
    """Variant → published figure. None beside synthetic speech, which nobody else has measured."""
    known = published.of(ablation.first.task) if published and not ablation.is_synthetic else {}
    return {line.name: known[line.name] for line in ablation.lines if line.name in known}


def _unplaced(published: Published, ablations: Sequence[Ablation]) -> list[str]:
    placed = {(each.first.task, name) for each in ablations for name in _figures_for(each, published)}
    return [
        f"Published figure of {task}, {name}: stands nowhere, since no table on real speech has such a variant."
        for task in TASKS
        for name in published.of(task)
        if (task, name) not in placed
    ]


def _title(ablation: Ablation, among: Sequence[Ablation]) -> str:
    """Data and protocol are told apart by their hashes where a name does not do."""
    first = ablation.first
    rivals = [each for each in among if each is not ablation and _name(each) == _name(ablation)]
    data = f", data {first.data_hash[:8]}" if any(each.first.data_hash != first.data_hash for each in rivals) else ""
    own = first.protocol.checksum
    protocol = f", protocol {own[:8]}" if any(each.first.protocol.checksum != own for each in rivals) else ""
    return f"{_name(ablation)}{data}{protocol}"


def _name(ablation: Ablation) -> str:
    return f"{capital(ablation.first.task)}, {ablation.first.plan}: {_data(ablation)}"


def _data(ablation: Ablation) -> str:
    return f"{', '.join(ablation.corpora)} ({'synthetic' if ablation.is_synthetic else 'real'} speech)"


def _how_to_read(ablations: Sequence[Ablation]) -> list[str]:
    comparisons = sum(len(each.compared) for each in ablations)
    said = [
        "A mean is over seeds, with its 95% t-interval. A difference is the variant's minus the base's, seed by seed, "
        f"on the seeds that both have. “{MARKS['better']}” and “{MARKS['worse']}” say that its 95% t-interval leaves "
        f"out 0; “{MARKS['undecided']}” says that it does not, which does not mean that both are equal.",
        "What the paper says, or the plan expects, is confirmed where the interval lies wholly on that side, "
        "contradicted where it lies wholly on the other one, and undecided otherwise, on the data and at the size that "
        "are named.",
        "Seeds move the training alone: all are judged on the same test utterances, so that no interval says what "
        "other speakers would change.",
    ]
    if comparisons:
        said.append(
            f"Each interval is for one comparison, and none is corrected for their number ({comparisons} here): if no "
            f"variant made any difference, about {comparisons / 20:.1f} of them would be marked by chance."
        )
    return said


def _headline(ablation: Ablation) -> str:
    counts = {verdict: ablation.verdicts(verdict) for verdict in ("confirmed", "contradicted", "undecided")}
    if total := sum(counts.values()):
        judged = _counted(total, "claim") + " of the paper" if ablation.is_of_paper else _counted(total, "expectation")
        return f"{judged}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."
    apart = sum(line.effect != "undecided" for line in ablation.lines)
    variants = sum(not line.is_base for line in ablation.lines)
    return f"{apart} of {_counted(variants, 'variant')} told apart from the base."


def _findings(ablation: Ablation, published: Mapping[str, float]) -> _Sheet:
    metric, secondary, base = ablation.metric, ablation.secondary, ablation.first.base
    is_judged = any(line.verdict for line in ablation.lines)
    head = [_with_arrow(metric), "Difference"]
    head += ["The paper says" if ablation.is_of_paper else "Expected"] if is_judged else []
    head += ["Published"] if published else []
    head += [_with_arrow(secondary), "Seeds"]
    rows = []
    for line in ablation.lines:
        cells = [_Cell(metric.shown(line.mean.mean), _ends(line.mean, metric.shown)), _difference(line, metric)]
        cells += [_expectation(line)] if is_judged else []
        cells += [_Cell(metric.shown(published[line.name]) if line.name in published else "–")] if published else []
        cells += [_Cell(secondary.shown(line.secondary)), _Cell(str(len(line.results)))]
        rows.append((line, cells))
    caption = f"{metric.name} ({metric.meaning}), and its difference to that of {base}"
    return _Sheet(caption + (" in percentage points" if metric.is_share else ""), head, rows)


def _with_arrow(metric: Metric) -> str:
    return f"{metric.name}\N{NO-BREAK SPACE}{'↑' if metric.higher_is_better else '↓'}"


def _difference(line: Line, metric: Metric) -> _Cell:
    if line.difference is None:
        return _Cell("–")
    shown = partial(_shown_difference, metric)
    has_interval = np.isfinite(line.difference.low)
    said = MARKS[line.effect] if has_interval else "one seed: no interval"
    return _Cell(shown(line.difference.mean), _ends(line.difference, shown), said, line.effect)


def _shown_difference(metric: Metric, value: float) -> str:
    """Of shares in percentage points."""
    if not metric.is_share:
        return four_decimals(value, "+")
    return minus(f"{100 * value:+.2f}") if abs(value) >= 5e-5 else "0.00"


def _ends(interval: Interval, shown: Any) -> str:
    return f"{shown(interval.low)} … {shown(interval.high)}" if np.isfinite(interval.low) else ""


def _expectation(line: Line) -> _Cell:
    if line.verdict is None or line.expected is None:
        return _Cell("–")
    return _Cell(line.expected, said=f"→ {line.verdict}", effect=VERDICT_EFFECTS[line.verdict])


def _notes(ablation: Ablation) -> list[str]:
    first, seeds, base = ablation.first, ablation.seeds, ablation.base
    notes = [f"A seed varies {_varies(ablation)}."]
    if single := _with_single_pretraining(ablation):
        notes.append(
            f"A single pre-training is behind all seeds of the base or of {', '.join(single)}, where these differ in "
            "it: those intervals leave out what another pre-training would change."
        )
    if len(seeds) == 1:
        notes.append("There is one seed, hence no interval: nothing here can be told apart from chance.")
    for line in ablation.lines:
        if missing := sorted(set(seeds) - {each.seed for each in line.results}):
            notes.append(f"{line.name} lacks {_counted(len(missing), 'seed')}: {', '.join(map(str, missing))}.")
        if base and not line.is_base and len(line.differences) not in (0, len(line.results)):
            notes.append(f"The difference of {line.name} is over the {len(line.differences)} that the base has too.")
        if base and not line.is_base and not len(line.differences):
            notes.append(f"{line.name} shares no seed with the base, hence no difference.")
        if line.is_same_for_all_seeds:
            notes.append(f"{line.name}: the difference is the same for all seeds, so its interval decides nothing.")
        if len(line.expectations) > 1:
            notes.append(f"{line.name}: its rows name different expectations, so none is judged.")
    if base is None:
        notes.append(f"The base, {first.base}, has no result on these test utterances, hence no differences.")
    if over_speakers := _over_speakers(ablation):
        notes.append(over_speakers)
    if resumed := sum(each.known_seconds is None for each in ablation.results):
        notes.append(
            f"{resumed} of {len(ablation.results)} results are of runs that were interrupted and went on: their "
            "seconds are not known, and left out of all means."
        )
    return notes


def _over_speakers(ablation: Ablation) -> str | None:
    """Intervals over the test part's speakers, of the variants whose results all have one."""
    name, shown = TASKS[ablation.first.task].selection, ablation.metric.shown
    said = []
    for line in ablation.lines:
        known = [each.over_speakers[name] for each in line.results if each.over_speakers]
        if len(known) == len(line.results):
            low, high = np.mean([(each.low, each.high) for each in known], axis=0).tolist()
            said.append(f"{line.name} {shown(low)} … {shown(high)}")
    if not said:
        return None
    return (
        f"{ablation.metric.name} if the test part had other speakers (95% bootstrap intervals, ends averaged over the "
        f"seeds): {'; '.join(said)}."
    )


def _varies(ablation: Ablation) -> str:
    return " or ".join(dict.fromkeys(each.varies for each in ablation.results))


def _with_single_pretraining(ablation: Ablation) -> list[str]:
    """Variants whose difference lies in the pre-training, and whose interval does not know how much that varies."""
    if ablation.base is None:
        return []
    base = _pretrainings(ablation.base)
    return [
        line.name
        for line in ablation.compared
        if _pretrainings(line) != base and 1 in (len(_pretrainings(line)), len(base))
    ]


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _costs(ablation: Ablation) -> _Sheet:
    rows = []
    for line in ablation.lines:
        # Several seeds can start from the same one.
        before = list({each.pretraining.key: each.pretraining for each in line.results if each.pretraining}.values())
        runs = [
            _cost(
                [each.known_seconds for each in line.results],
                [each.audio_hours for each in line.results],
                [each.peak_memory_mb for each in line.results],
            ),
            _cost(
                [each.seconds for each in before],
                [each.audio_hours for each in before],
                [each.peak_memory_mb for each in before],
            ),
        ]
        rows.append((line, runs))
    caption = "Cost of one run: mean time; hours of audio in its data, and the most memory"
    return _Sheet(caption, ["Fine-tuning", "Pre-training"], rows)


def _cost(seconds: Sequence[float | None], hours: Sequence[float], megabytes: Sequence[float | None]) -> _Cell:
    if not hours:
        return _Cell("none")
    times = [each for each in seconds if each is not None]
    most = max((each for each in megabytes if each is not None), default=None)
    memory = f", {most:,.0f} MB" if most else ""
    return _Cell(_duration(float(np.mean(times))) if times else "–", f"{np.mean(hours):.2f} h of audio{memory}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _total_cost(results: Iterable[Result]) -> str:
    """Each run counts once, however many rows it serves."""
    runs: dict[tuple[str, str], float | None] = {}
    for each in results:
        runs["fine-tuning", each.run_key] = each.known_seconds
        if each.pretraining:
            runs["pre-training", each.pretraining.key] = each.pretraining.seconds
    known = [seconds for seconds in runs.values() if seconds is not None]
    unknown = len(runs) - len(known)
    said = f"{_duration(sum(known))} for {_counted(len(known), 'run')}"
    return said + (f", and {_counted(unknown, 'run')} whose time an interruption hides" if unknown else "")


def _settings(result: Result) -> dict[str, str]:
    """All but the seed, which is no setting of a variant."""
    before = result.pretraining
    said = f"{before.steps:,} steps on {before.audio_hours:.2f} h" if before else "none"
    config = {name: value for name, value in result.config.items() if name != "seed"}
    earlier = before.config if before else {}
    fields = {f"pre-training {name}": value for name, value in earlier.items() if name not in ("seed", "steps")}
    first = {"first task": result.after} if result.after else {}
    given = {"size": result.size, "pre-training": said, **fields, **first, **config, **result.head}
    return {name: _said(value) for name, value in given.items()}


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_UNSAID = {"first task": "none", **{name: _said(getattr(CtalConfig, name)) for name in HEAD_FIELDS}}
"""What settings are that a row does not name, for one of an earlier version has no field for them."""


def _setting(settings: Mapping[str, str], name: str) -> str:
    return settings.get(name, _UNSAID.get(name, "not set"))


def _values(results: Iterable[Result], name: str) -> str:
    """Of a setting; several where seeds differ in it."""
    return " or ".join(dict.fromkeys(_setting(_settings(each), name) for each in results))


def _shared(results: Sequence[Result]) -> tuple[dict[str, str], list[str]]:
    """Settings that all results share, and names of the others."""
    settings = [_settings(each) for each in results]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: {_setting(each, name) for each in settings} for name in names}
    shared = {name: next(iter(one)) for name, one in values.items() if len(one) == 1}
    return shared, [name for name in names if name not in shared]


def _changes(ablation: Ablation) -> dict[str, str]:
    _, differing = _shared(ablation.results)
    base = ablation.base
    changes = {}
    for line in ablation.lines:
        own = {name: _values(line.results, name) for name in differing}
        if base and not line.is_base:
            own = {name: value for name, value in own.items() if value != _values(base.results, name)}
        if not any(each.pretraining for each in line.results):
            own = {name: value for name, value in own.items() if not name.startswith("pre-training ")}
        listed = ", ".join(f"{name} {value}" for name, value in own.items())
        if base and not listed and _pretrainings(line) != _pretrainings(base):
            listed = "another pre-training"  # rows do not hold its settings
        changes[line.name] = "; ".join(filter(None, [line.about, listed])) or "–"
    return changes


def _pretrainings(line: Line) -> set[str]:
    return {each.pretraining.key for each in line.results if each.pretraining}


def _provenance(ablation: Ablation) -> dict[str, str]:
    first, results = ablation.first, ablation.results
    shared, _ = _shared(results)
    commits = Counter(each.commit or "unknown (not run from a checkout)" for each in results)
    versions = dict.fromkeys(", ".join(f"{name} {each}" for name, each in row.versions.items()) for row in results)
    protocols = dict.fromkeys(
        f"{each.protocol.name}: {each.protocol.description}; checksum {each.protocol.checksum}" for each in results
    )
    return {
        "data": f"{_data(ablation)}, hash {first.data_hash}",
        "protocol": "; or ".join(protocols),
        "test utterances": f"{first.utterances:,}",
        "a seed varies": _varies(ablation),
        "seeds": ", ".join(map(str, ablation.seeds)),
        "versions": " or ".join(versions),
        "commit": ", ".join(
            name if len(commits) == 1 else f"{name} ({_counted(count, 'result')})" for name, count in commits.items()
        ),
        "cost in all": _total_cost(results),
        "settings of all rows": ", ".join(f"{name} {value}" for name, value in shared.items()),
    }


# HTML


def _page(sections: Sequence[_Section], reading: Sequence[str], notes: Sequence[str], rows: Sequence[Result]) -> Html:
    anchors = {each.title: f"table-{number}" for number, each in enumerate(sections, start=1)}
    contents = (
        element("li", element("a", each.title, href=f"#{anchors[each.title]}"), element("small", f" {each.headline}"))
        for each in sections
    )
    by_kind = {kind: [each for each in sections if each.ablation.is_synthetic is kind] for kind in (False, True)}
    is_mixed = all(by_kind.values())
    facts = [
        ("Results", f"{len(rows):,}", f"in {_counted(len(sections), 'table')}"),
        ("Computing", _total_cost(rows).split(" for ")[0], _total_cost(rows).split(" for ")[1]),
    ]
    return join(
        element("h1", TITLE),
        element("p", "What each part of the model and of its training is worth: a base, variants of it, and seeds."),
        synthetic_warning() if not by_kind[False] else Html(),
        tiles(facts),
        element("ul", *contents) if len(sections) > 1 else Html(),
        element("h2", "How to read this"),
        *(element("p", each) for each in reading),
        *(element("p", each, class_="note") for each in notes),
        element("h2", "Real speech", class_="part") if is_mixed else Html(),
        *(_section_html(each, anchors[each.title]) for each in by_kind[False]),
        join(element("h2", "Synthetic speech", class_="part"), synthetic_warning()) if is_mixed else Html(),
        *(_section_html(each, anchors[each.title]) for each in by_kind[True]),
    )


def _section_html(section: _Section, anchor: str) -> Html:
    return join(
        element("h2", section.title, id=anchor),
        element("p", section.ablation.first.plan_about) if section.ablation.first.plan_about else Html(),
        element("p", section.headline, class_="headline"),
        _sheet_html(section.findings),
        *(element("p", each, class_="note") for each in section.notes),
        _forests(section.ablation),
        _sheet_html(section.costs),
        element("h3", "What a variant changes"),
        definitions(section.changes),
        element("h3", "Where it comes from"),
        definitions(section.provenance),
    )


def _sheet_html(sheet: _Sheet) -> Html:
    rows = []
    for line, cells in sheet.rows:
        mark = [element("em", "base", class_="kind")] if line.is_base else []
        cells_html = (
            element(
                "td",
                cell.text,
                *([element("small", cell.more)] if cell.more else []),
                *([element("small", cell.said, class_=cell.effect)] if cell.said else []),
                data_label=name,
            )
            for name, cell in zip(sheet.head, cells, strict=True)
        )
        rows.append(element("tr", element("th", line.name, *mark, scope="row"), *cells_html))
    return element(
        "table",
        element("caption", sheet.caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in ("Variant", *sheet.head)))),
        element("tbody", *rows),
        class_="results ablation",
    )


def _forests(ablation: Ablation) -> Html:
    """Means, and differences to the base, a row a variant."""
    metric, base = ablation.metric, ablation.base
    shown = partial(_shown_difference, metric)

    def level(value: float) -> str:
        return f"{100 * value:.3g}%" if metric.is_share else f"{value:.3g}"

    def points(value: float) -> str:
        return f"{100 * value if metric.is_share else value:.3g}"

    means = [
        (line, line.mean, line.values, "training", _described(line, line.mean, metric.shown)) for line in ablation.lines
    ]
    reference = base.mean.mean if base else None
    better = "higher is better" if metric.higher_is_better else "lower is better"
    figures = [_forest(f"{metric.name}, {better}", means, _scale(means, reference, level))]
    differences = [
        (line, line.difference, line.differences, line.effect, _described(line, line.difference, shown))
        for line in ablation.lines
        if line.difference
    ]
    if differences:
        sides = ("← worse", "better →") if metric.higher_is_better else ("← better", "worse →")
        unit = ", percentage points" if metric.is_share else ""
        caption = f"Difference to {ablation.first.base}{unit}"
        figures.append(_forest(caption, differences, _scale(differences, 0.0, points), sides))
    key = "Bars are 95% intervals, large dots means, small dots single seeds. The line is the base."
    return join(element("div", *figures, class_="curves"), element("p", key, class_="note"))


_Bar = tuple[Line, Interval, np.ndarray, str, str]
"""Variant, its interval, the values that this is of, class, and what it says in words."""


def _described(line: Line, interval: Interval, shown: Any) -> str:
    ends = _ends(interval, shown)
    return f"{line.name}: {shown(interval.mean)}" + (f", 95% interval {ends}" if ends else "")


def _scale(bars: Sequence[_Bar], reference: float | None, label: Any) -> Scale:
    shown = [] if reference is None else [reference]
    for _, interval, values, _, _ in bars:
        shown += [each for each in (interval.low, interval.high) if np.isfinite(each)] + values.tolist()
    return Scale(round_ticks(min(shown), max(shown), 4), reference, label)


def _forest(caption: str, bars: Sequence[_Bar], scale: Scale, sides: Sequence[str] = ()) -> Html:
    rows = [
        element("li", element("span", line.name), scale.bar(interval, description, values), class_=class_)
        for line, interval, values, class_, description in bars
    ]
    rows.append(element("li", element("span"), scale.axis()))
    if sides:
        rows.append(element("li", element("span"), element("div", *(element("small", each) for each in sides))))
    return element("figure", element("figcaption", element("strong", caption)), element("ul", *rows, class_="forest"))


# Markdown


def _markdown(sections: Sequence[_Section], reading: Sequence[str], notes: Sequence[str]) -> str:
    parts = [f"# {TITLE}", *map(_plain, reading), *map(_plain, notes)]
    for each in sections:
        if each.ablation.first.plan_about:
            parts += [f"## {_plain(each.title)}", _plain(each.ablation.first.plan_about)]
        else:
            parts += [f"## {_plain(each.title)}"]
        parts += [f"**{_plain(each.headline)}**", _sheet_markdown(each.findings)]
        parts += map(_plain, each.notes)
        parts += [_sheet_markdown(each.costs), _list_markdown("What a variant changes", each.changes)]
        parts += [_list_markdown("Where it comes from", each.provenance)]
    return "\n\n".join(parts) + "\n"


def _sheet_markdown(sheet: _Sheet) -> str:
    head = ["", *sheet.head]
    names = [f"{line.name} (base)" if line.is_base else line.name for line, _ in sheet.rows]
    rows = [[name, *map(_cell_text, cells)] for name, (_, cells) in zip(names, sheet.rows, strict=True)]
    lines = [" | ".join(map(_plain, row)) for row in (head, *rows)]
    lines.insert(1, " | ".join("---" for _ in head))
    return f"{_plain(sheet.caption)}:\n\n" + "\n".join(f"| {line} |" for line in lines)


def _cell_text(cell: _Cell) -> str:
    return " ".join(filter(None, [cell.text, f"[{cell.more}]" if cell.more else "", cell.said]))


def _list_markdown(name: str, entries: Mapping[str, str]) -> str:
    return "\n".join([f"{name}:", "", *(f"- {_plain(key)}: {_plain(value)}" for key, value in entries.items())])


def _plain(text: str) -> str:
    """Text that is no markup in Markdown, and stays in its line."""
    escaped = "".join(f"\\{each}" if each in "\\`*|<#" else each for each in text)
    return " ".join(escaped.replace("](", "]\\(").split())
