"""What all pages share: elements that escape, pictures, sound, axes, and the page around them.

Text from data (transcripts, names, tokens) cannot become markup, since `element` escapes whatever is not `Html`.
Pictures of features and attention are stored pixel by pixel; their labels are HTML, so that they stay legible on a
phone. Colours come from perceptually uniform maps and the palette of Okabe and Ito, which colour-blind readers can tell
apart; no meaning hangs on colour alone.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import soundfile
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from ctal.audio import SAMPLING_RATE
from ctal.diagnostics import Interval
from ctal.errors import InputError

VOID = ("br", "col", "img")
"""Elements that have no end."""


class Html(str):
    """Markup, as opposed to text that must be escaped."""


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element; children that are not `Html`, and all attributes, are escaped.

    Names of attributes are written with `_` for `-` and may end with one; those whose value is None are left out.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*parts: Any) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def write_page(out: Path, title: str, body: Html) -> None:
    """Writes a file that needs no other. Raises `InputError` where it cannot be written."""
    page = Template((files("ctal") / "templates" / "report.html").read_text(encoding="utf-8"))
    write_text(out, page.substitute(title=escape(title), body=body))


def write_text(out: Path, text: str) -> None:
    """Missing folders are made. Raises `InputError` where the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another file") from None


def synthetic_warning() -> Html:
    """Stands at the top of every page on the demo corpus."""
    return element(
        "p",
        element("strong", "SYNTHETIC SPEECH. "),
        "The corpus ",
        element("code", "demo"),
        " is spoken by a speech synthesizer. It shows that the software works, and says nothing about how well this "
        "model would do on real recordings.",
        class_="synthetic",
    )


def source(corpora: Sequence[str]) -> str:
    """Where data are from, each corpus once; synthetic ones are called so."""
    return f"of {', '.join(dict.fromkeys(corpora))}" + (" (synthetic)" if "demo" in corpora else "")


def tiles(facts: Iterable[tuple[Any, Any, Any]]) -> Html:
    """A tile for each (name, value, what more there is to say)."""
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value, element("small", more)))
            for name, value, more in facts
        ),
        class_="facts",
    )


def definitions(entries: Mapping[str, Any]) -> Html:
    pairs = (join(element("dt", name), element("dd", str(value))) for name, value in entries.items())
    return element("dl", *pairs, class_="settings")


def unfolding(summary: str, entries: Mapping[str, Any]) -> Html:
    """A list that is unfolded by whom it interests."""
    return element("details", element("summary", summary), definitions(entries))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str | None = None, caption: Any = None) -> Html:
    """Each row begins with its name."""
    header = element("tr", *(element("th", name, scope="col") for name in head))
    body = (
        element("tr", element("th", name, scope="row"), *(element("td", value) for value in values))
        for name, *values in rows
    )
    title = () if caption is None else (element("caption", caption),)
    return element("table", *title, element("thead", header), element("tbody", *body), class_=class_)


def picture(levels: np.ndarray, colours: str, description: str, *, see_through: bool = False) -> Html:
    """(height, width) levels of 0 … 1, the first row on top, in the colours of one of matplotlib's maps.

    With `see_through`, lower levels show more of what lies behind the picture.
    """
    return element("img", src=_data_url("image/png", _png(levels, colours, see_through)), alt=description)


def colour_bar(colours: str, low: str, high: str) -> Html:
    shares = np.linspace(0, 1, 9)
    stops = ", ".join("#" + "".join(f"{round(255 * part):02x}" for part in colormaps[colours](s)[:3]) for s in shares)
    bar = element("div", style=f"background: linear-gradient(to right, {stops})")
    return element("div", element("span", low), bar, element("span", high), class_="colours")


def player(wave: np.ndarray) -> Html:
    """Plays (samples,) at 16 kHz."""
    return element("audio", controls=True, preload="none", src=_data_url("audio/flac", _flac(wave)))


def _png(levels: np.ndarray, colours: str, see_through: bool) -> bytes:
    """A PNG with a palette (PNG specification, third edition, 5 and 11): a third of the size of one in true colour."""
    palette = (colormaps[colours](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    indices = (levels.clip(0, 1) * 255).round().astype(np.uint8)
    height, width = indices.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)  # each row starts with its filter, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette, no interlacing
    chunks = [
        chunk(b"IHDR", header),
        chunk(b"PLTE", palette.tobytes()),
        chunk(b"tRNS", bytes(range(256))) if see_through else b"",
        chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def _flac(wave: np.ndarray) -> bytes:
    """16-bit FLAC of (samples,) at 16 kHz, made softer where it would clip."""
    file = io.BytesIO()
    soundfile.write(file, wave / max(1.0, float(np.abs(wave).max())), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def four_decimals(value: float, sign: str = "-") -> str:
    """Four decimals, no sign at a zero; a dash for what was not measured."""
    if not math.isfinite(value):
        return "–"
    return minus(f"{value:{sign}.4f}") if abs(value) >= 5e-5 else "0.0000"


def minus(text: str) -> str:
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A number of a scale that has two sides: no sign at 0."""
    return minus(f"{value:+g}") if value else "0"


def capital(name: str) -> str:
    """A name at the start of a line; `capitalize` would spoil the rest of it."""
    return name[:1].upper() + name[1:]


def round_ticks(low: float, high: float, intervals: int) -> Sequence[float]:
    """Round numbers that enclose `low` … `high`, in about so many intervals."""
    margin = 0.0 if high > low else abs(high) / 10 or 1.0
    return MaxNLocator(intervals).tick_values(low - margin, high + margin)


def step_label(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value / 1e3:,.0f}k"


def plain_label(value: float) -> str:
    return f"{value:.4g}"


@dataclass(frozen=True)
class Plot:
    """Axes of a chart, drawn at the width of a phone so that its labels need no shrinking there."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_name: str
    x_label: Callable[[float], str] = plain_label
    y_label: Callable[[float], str] = plain_label
    height: int = 220
    x_grid: bool = False

    WIDTH = 360
    LEFT, RIGHT, TOP, BOTTOM = 40, 12, 8, 34

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return round(float(self.LEFT + share * (self.WIDTH - self.LEFT - self.RIGHT)), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return round(float(self.height - self.BOTTOM - share * (self.height - self.TOP - self.BOTTOM)), 1)

    def line(self, points: Iterable[tuple[float, float]]) -> str:
        coordinates = [f"{self.x(x)},{self.y(y)}" for x, y in points]
        return f"M{'L'.join(coordinates)}" if coordinates else ""

    def area(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> str:
        return self.line([*zip(xs, highs, strict=True), *zip(reversed(xs), reversed(lows), strict=True)])

    def svg(self, marks: Iterable[Html], description: str) -> Html:
        parts: list[Html] = []
        right, base = self.WIDTH - self.RIGHT, self.height - self.BOTTOM
        for tick in self.y_ticks:
            y = self.y(tick)
            parts += [
                element("line", x1=self.LEFT, x2=right, y1=y, y2=y, class_="grid"),
                element("text", self.y_label(tick), x=self.LEFT - 6, y=y + 4, text_anchor="end"),
            ]
        for tick in self.x_ticks:
            x = self.x(tick)
            if self.x_grid:
                parts.append(element("line", x1=x, x2=x, y1=self.TOP, y2=base, class_="grid"))
            parts.append(element("text", self.x_label(tick), x=x, y=base + 15, text_anchor="middle"))
        middle = (self.LEFT + right) / 2
        parts.append(element("text", self.x_name, x=middle, y=self.height - 4, text_anchor="middle"))
        box = f"0 0 {self.WIDTH} {self.height}"
        return element("svg", *parts, *marks, viewBox=box, role="img", aria_label=description)


@dataclass(frozen=True)
class Scale:
    """The axis that all rows of a forest plot share."""

    ticks: Sequence[float]
    reference: float | None = 0.0
    """Where a line goes through all rows."""
    label: Callable[[float], str] = "{:.3g}".format

    WIDTH, MARGIN, CHARACTER = 240, 20, 7.5

    def x(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(float(self.MARGIN + share * (self.WIDTH - 2 * self.MARGIN)), 1)

    def bar(self, interval: Interval, description: str, values: Iterable[float] = ()) -> Html:
        """A row: the interval and its mean, and below them the values that they are of."""
        marks = []
        if self.reference is not None:
            zero = self.x(self.reference)
            marks.append(element("line", x1=zero, x2=zero, y1=0, y2=28, class_="zero"))
        if math.isfinite(interval.low):
            left, width = self.x(interval.low), round(self.x(interval.high) - self.x(interval.low), 1)
            marks.append(element("rect", x=left, width=width, y=9, height=10, class_="interval"))
        if math.isfinite(interval.mean):
            marks.append(element("circle", cx=self.x(interval.mean), cy=14, r=4.5, class_="mean"))
        marks += [element("circle", cx=self.x(value), cy=24.5, r=1.8, class_="value") for value in values]
        return element("svg", *marks, viewBox=f"0 0 {self.WIDTH} 28", role="img", aria_label=description)

    def axis(self) -> Html:
        parts = [element("line", x1=self.x(self.ticks[0]), x2=self.x(self.ticks[-1]), y1=1, y2=1, class_="grid")]
        for tick in self.ticks:
            x = self.x(tick)
            parts.append(element("line", x1=x, x2=x, y1=1, y2=5, class_="grid"))
        taken: list[tuple[float, float]] = []
        # 0 first, then the ends, then what there is room for.
        for tick in sorted(self.ticks, key=lambda tick: (tick != 0, tick not in (self.ticks[0], self.ticks[-1]))):
            text = minus(self.label(tick or 0.0))  # there is a -0.0
            x, half = self.x(tick), self.CHARACTER * (len(text) + 1) / 2
            if all(x + half <= low or high <= x - half for low, high in taken):
                taken.append((x - half, x + half))
                parts.append(element("text", text, x=x, y=16, text_anchor="middle"))
        return element("svg", *parts, viewBox=f"0 0 {self.WIDTH} 20", aria_hidden="true")


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """What a run left in a file; `mend` is the command that writes it anew."""
    text = read_text(path, mend)
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"{path}: not JSON; let `{mend}` write it anew") from None


def read_text(path: Path, mend: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder of a run that has ended (`{mend}` ends it)") from None
