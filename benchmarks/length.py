"""How time and memory of a step grow with the length of an utterance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, Report, Spread, Table, is_timed, significant
from benchmarks.pretraining_step import AUTHORS, OURS, OURS_BF16, measure

SECONDS = (5.0, 10.0, 20.0, 37.5)
PLOT = ROOT / "docs" / "length.png"


def main(quick: bool) -> Report:
    """Size tiny, one utterance a step; `quick`: nano, short ones."""
    report = Report("length")
    size, scale, rounds = ("nano", 0.05, 2) if quick else ("tiny", 1.0, 2)
    lengths = [scale * each for each in SECONDS]
    names = {
        "authors' recipe": AUTHORS,
        "ours, fp32": OURS,
        **({"ours, bf16": OURS_BF16} if is_timed("bf16", quick) else {}),
    }
    rows = {
        (name, length): replace(row, name=f"{name}, {length:g} s", seconds=(length,), has_memory=not quick)
        for length in lengths
        for name, row in names.items()
    }
    seconds, memory, _ = measure(size, list(rows.values()), rounds)
    times = {key: Spread.of(seconds[row]) for key, row in rows.items() if row in seconds}
    peaks = {key: memory[row] for key, row in rows.items() if row in memory}
    nothing = Spread.of([float("nan")])
    lines = [
        (
            f"{length:g} s",
            *(str(times.get((name, length), nothing)) for name in names),
            *(significant(peaks.get((name, length), float("nan"))) for name in names),
        )
        for length in lengths
    ]
    columns = ("", *(f"{name}: s a step" for name in names), *(f"{name}: GB" for name in names))
    report.tables.append(Table(f"One utterance, `{size}`", columns, lines))
    report.measured = {row.name: {"seconds": seconds.get(row), "memory_gb": memory.get(row)} for row in rows.values()}
    plot(size, lengths, list(names), times, peaks, RESULTS / "length-quick.png" if quick else PLOT)
    return report


def plot(
    size: str,
    lengths: list[float],
    names: list[str],
    times: dict[tuple[str, float], Spread],
    peaks: dict[tuple[str, float], float],
    path: Path,
) -> None:
    """Medians of time and peaks of memory against the length."""
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        left.plot(lengths, [times[name, x].median if (name, x) in times else None for x in lengths], "o-", label=name)
        right.plot(lengths, [peaks.get((name, x)) for x in lengths], "o-", label=name)
    left.set_ylabel("seconds a step")
    right.set_ylabel("peak memory of the process, GB")
    for axes in (left, right):
        axes.set_xlabel("length of the utterance, s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"A step of pre-training, {size}, one utterance")
    figure.savefig(path, dpi=120)
