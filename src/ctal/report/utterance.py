"""One utterance as pictures: its sound over time, and which words each moment of it attends to.

How words get times: the weights with which frames attend to tokens are averaged over all layers and heads and added up
into words. A word's curve over time is smoothed, and its span is the stretch around the curve's highest point that
stays above the middle between that point and the curve's median. That always gives a span, so it comes with a contrast:
how many times the curve's mean the highest point is. It is attention, and no alignment: nothing in training says when a
word is spoken.

Shape suffixes: T frames, W words; `<s>` and `</s>`, the ends of the text, are among the words. F
dimensions of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import uniform_filter1d
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctal.audio import SAMPLING_RATE
from ctal.features import NUM_MEL, mel_filters
from ctal.modeling_ctal import CtalForPreTraining, CtalForSequenceClassification, CtalForXVector
from ctal.objective import frames_per_second
from ctal.processing_ctal import CtalProcessor
from ctal.report.html import Html, colour_bar, element, join, picture
from ctal.text import SPECIAL_TOKENS, encode_transcript

FEATURE_RANGE = 2.5
"""Features beyond ± this many standard deviations get the outermost colours."""

SMOOTHING_SECONDS = 0.1
"""A word's curve is a moving mean over so long: below it, neighbouring frames differ by chance."""

CLEAR_CONTRAST = 1.25
"""From so many times its mean on, a word's highest point is called clear. Untrained models stay below."""

BLIND = "Nothing to show of attention between sound and words: this model's audio does not see the text."


# Words


@dataclass(frozen=True)
class Word:
    text: str
    positions: Sequence[int]
    """Its tokens."""
    is_end: bool
    """Whether it is `<s>` or `</s>`."""


def words_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Word]:
    """Tokens merged into words; `<s>` and `</s>` stand alone."""
    groups: list[list[int]] = []
    for position, token_id in enumerate(ids):
        is_special = token_id < len(SPECIAL_TOKENS)
        if is_special or position == 0 or ids[position - 1] < len(SPECIAL_TOKENS) or starts_word(token_id, tokenizer):
            groups.append([])
        groups[-1].append(position)
    return [
        Word(str(tokenizer.decode([ids[i] for i in group])).strip(), group, ids[group[0]] < len(SPECIAL_TOKENS))
        for group in groups
    ]


def starts_word(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Byte-level BPE writes the space before a word as "Ġ", the first character of the word's first token."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return isinstance(token, str) and token.startswith("Ġ")


# Attention


@dataclass(frozen=True)
class Span:
    """The frames `first` … `end` - 1 on which a word is attended to most."""

    first: int
    end: int
    contrast: float
    """The highest point of its curve, in means of the curve."""

    @property
    def is_clear(self) -> bool:
        return self.contrast >= CLEAR_CONTRAST


@dataclass(frozen=True)
class Attended:
    """What the frames of an utterance attend to."""

    words: Sequence[Word]
    shares_TW: np.ndarray
    """Each frame's attention, which adds up to 1."""
    frame_rate: float
    """Frames a second."""

    @classmethod
    def of(
        cls,
        cross_attentions: Sequence[Tensor],
        words: Sequence[Word],
        frames: int,
        frame_stack: int,
        frame_rate: float,
    ) -> Attended:
        """From a layer's (1, heads, ceil(T / frame_stack), L) weights each, of the only utterance of a batch."""
        weights = torch.stack([layer[0].mean(0) for layer in cross_attentions]).mean(0)
        weights = weights.repeat_interleave(frame_stack, dim=0)[:frames]
        shares_TW = torch.stack([weights[:, word.positions].sum(1) for word in words], dim=1)
        return cls(words, shares_TW.double().numpy(), frame_rate)

    @cached_property
    def relative_TW(self) -> np.ndarray:
        """Attention in means of the word's own curve, so that words that get much everywhere do not hide the rest."""
        return self.shares_TW / np.maximum(self.shares_TW.mean(0), 1e-12)

    @cached_property
    def spans(self) -> Sequence[Span | None]:
        """One a word; None for `<s>` and `</s>`."""
        width = 2 * round(SMOOTHING_SECONDS * self.frame_rate / 2) + 1
        smooth_TW = uniform_filter1d(self.relative_TW, width, axis=0, mode="nearest")
        return [None if word.is_end else _span(smooth_TW[:, place]) for place, word in enumerate(self.words)]


def _span(curve_T: np.ndarray) -> Span:
    top = int(curve_T.argmax())
    is_low = curve_T < (curve_T[top] + np.median(curve_T)) / 2
    before, after = np.flatnonzero(is_low[:top]), np.flatnonzero(is_low[top:])
    first = int(before[-1]) + 1 if len(before) else 0
    end = top + int(after[0]) if len(after) else len(curve_T)
    return Span(first, end, float(curve_T[top]))


@torch.no_grad()
def attend(
    model: CtalForPreTraining | CtalForSequenceClassification | CtalForXVector,
    processor: CtalProcessor,
    features_TF: Tensor,
    text: str | None,
) -> Attended:
    """What the frames of an utterance attend to in its text, which the audio sees; `model` is in evaluation mode."""
    ids = encode_transcript(text, processor.tokenizer)
    output = model.ctal(input_ids=torch.tensor([ids]), input_features=features_TF[None], output_attentions=True)
    words, stack = words_of(ids, processor.tokenizer), model.config.audio.frame_stack
    return Attended.of(output.cross_attentions, words, len(features_TF), stack, frames_per_second(processor))


def attention_explained() -> Html:
    """Stands once on a page, above its first picture of attention."""
    return element(
        "p",
        "Each frame of the sound divides its attention among the words. Colour shows where a word gets more of it than "
        "on average over the recording, on a scale of square roots (mean of all layers and heads; tokens added up into "
        "words; ",
        element("code", "<s>"),
        " and ",
        element("code", "</s>"),
        " are the ends of the text). Behind it lies the sound, in grey. Framed is where a word is attended to most: "
        f"the stretch around the highest point of its curve, smoothed over {SMOOTHING_SECONDS} s, down to the middle "
        f"between that point and the curve's median; dotted where the highest point is below {CLEAR_CONTRAST} times "
        "the average, which says little. ",
        element("strong", "This is attention and not an alignment: "),
        "nothing taught the model when a word is spoken.",
    )


def brightest(attended: Iterable[Attended]) -> float:
    """The end of a scale for several utterances, in a word's averages; never so near that noise would shine."""
    return max([CLEAR_CONTRAST, *(float(each.relative_TW.max()) for each in attended)])


def attention_scale(end: float) -> Html:
    """`end` is what `brightest` gives."""
    return colour_bar("inferno", "its average or less", f"{end:.2f} × a word's average")


def attention_picture(
    attended: Attended,
    features: Tensor,
    name: str,
    *,
    scale_end: float,
    is_masked: np.ndarray | None = None,
    marked: Sequence[bool] | None = None,
) -> Html:
    """Words over time, on the (T, 80) features that the model heard; `marked` words are those that were masked."""
    count = len(attended.words)
    levels = ((attended.relative_TW.T - 1) / (scale_end - 1)).clip(0, 1) ** 0.5
    labels = [
        element("li", element("mark", word.text) if marked and marked[row] else word.text, title=word.text)
        for row, word in enumerate(attended.words)
    ]
    frames = [
        element(
            "div",
            class_="word-span" if span.is_clear else "word-span vague",
            style=f"{_across(span.first, span.end, len(features))}; top: {row / count:.3%}; height: {1 / count:.3%}",
        )
        for row, span in enumerate(attended.spans)
        if span
    ]
    description = (
        f"Attention of each frame of {name} to each word of its transcript, relative to the word's average; the "
        f"brightest place has {attended.relative_TW.max():.2f} times the average."
    )
    behind = picture(0.55 * _levels(features), "gray", f"Log-mel spectrogram of {name}, behind the attention.")
    return join(
        element(
            "figure",
            element("figcaption", "words attended to by each frame"),
            element("ul", *labels, class_="scale words"),
            element(
                "div",
                behind,
                picture(levels, "inferno", description, see_through=True),
                *frames,
                *mask_marks(is_masked),
                class_="picture words",
                style=f"--rows: {count}",
            ),
            class_="panel",
        ),
        times(len(features), attended.frame_rate),
    )


# Sound


def spectrogram(features: Tensor, caption: str, name: str, is_masked: np.ndarray | None = None) -> Html:
    """A picture of (T, 80) features, low frequencies at the bottom."""
    centres_hz = mel_filters(SAMPLING_RATE, 2048, NUM_MEL).numpy().argmax(0) * SAMPLING_RATE / 2048
    ticks = []
    for kilohertz in (0.5, 1, 2, 4):
        height = (np.interp(1000 * kilohertz, centres_hz, np.arange(NUM_MEL)) + 0.5) / NUM_MEL
        ticks.append(element("span", f"{kilohertz:g} kHz", style=f"bottom: {height:.1%}"))
    description = f"Log-mel spectrogram of {name}, {caption}."
    return element(
        "figure",
        element("figcaption", caption),
        element("div", *ticks, class_="scale", aria_hidden="true"),
        element("div", picture(_levels(features), "viridis", description), *mask_marks(is_masked), class_="picture"),
        class_="panel",
    )


def spectrogram_scale() -> Html:
    return colour_bar("viridis", f"≤ −{FEATURE_RANGE}", f"≥ {FEATURE_RANGE} standard deviations")


def _levels(features: Tensor) -> np.ndarray:
    return ((features.numpy().T[::-1] / FEATURE_RANGE + 1) / 2).clip(0, 1)


def mask_marks(is_masked: np.ndarray | None) -> list[Html]:
    """Marks of the stretches where (T,) `is_masked`."""
    return (
        [
            element("div", class_="span", style=_across(first, end, len(is_masked)))
            for is_span, first, end in runs(is_masked.tolist())
            if is_span
        ]
        if is_masked is not None
        else []
    )


def _across(first: int, end: int, frames: int) -> str:
    return f"left: {first / frames:.2%}; width: {(end - first) / frames:.2%}"


def times(frames: int, frame_rate: float) -> Html:
    """The time axis below a picture of so many frames."""
    seconds = frames / frame_rate
    ticks = [tick for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, seconds) if tick <= 0.96 * seconds]
    labels = (
        element("span", f"{tick:g} s" if tick == ticks[-1] else f"{tick:g}", style=f"left: {tick / seconds:.1%}")
        for tick in ticks
    )
    return element("div", element("div", *labels, class_="times"), class_="panel", aria_hidden="true")


def runs(values: Iterable[bool]) -> list[tuple[bool, int, int]]:
    """(value, first, end) of each stretch of equal neighbours."""
    values = list(values)
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return [(values[first], first, end) for first, end in zip(starts, [*starts[1:], len(values)], strict=True)]
