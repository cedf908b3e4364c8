"""The controlled experiment inside the demo corpus: one table, two rules, four styles, and the best possible scores.

An utterance has a word class c (-2 … 2: polarity and strength of its key words), a marker m (in the words or not)
and a speaking style s. `CELLS` gives P(c, m, s); `emotion` and `sentiment` are functions of (c, m, s). So the best
accuracy of anyone who knows only the words (c, m), only the sound (s), or both, is a finite sum, computed here and
printed on the corpus card.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

STYLES: Final = ("neutral", "happy", "angry", "sad")
"""Speaking styles, and the emotions too."""

WORD_CLASSES: Final = (-2, -1, 0, 1, 2)


class Cell(NamedTuple):
    """What is drawn for an utterance before anything else."""

    word_class: int
    """Polarity and strength of the key words, -2 … 2."""
    marker: bool
    style: str


_TABLE: Final = {
    # c: marker absent (neutral, happy, angry, sad), marker present (the same); in thousandths.
    -2: ((18, 13, 70, 25), (8, 5, 30, 11)),
    -1: ((20, 14, 78, 28), (8, 6, 34, 12)),
    0: ((94, 25, 24, 25), (40, 11, 10, 11)),
    1: ((25, 78, 17, 20), (11, 34, 7, 8)),
    2: ((23, 70, 15, 18), (10, 30, 6, 8)),
}

CELLS: Final[dict[Cell, float]] = {
    Cell(word_class, marker, style): thousandths / 1000
    for word_class, halves in _TABLE.items()
    for marker, row in zip((False, True), halves, strict=True)
    for style, thousandths in zip(STYLES, row, strict=True)
}
"""P(c, m, s): the one table from which everything about the labels follows. It sums to 1."""

_EMOTION_WITH_MARKER: Final = {
    # polarity of c: emotion for style neutral, happy, angry, sad. With the identity these rows are a Latin square:
    # with a marker, no style and no polarity gives the emotion away. The most frequent style of each polarity becomes
    # "sad", so that bag-of-words models, which add up evidence, can come near the ceiling of the text.
    1: ("angry", "sad", "happy", "neutral"),
    0: ("sad", "angry", "neutral", "happy"),
    -1: ("happy", "neutral", "sad", "angry"),
}


def emotion(cell: Cell) -> str:
    """The style itself without a marker; with one, a fixed table of the polarity of the words and the style."""
    if not cell.marker:
        return cell.style
    return _EMOTION_WITH_MARKER[_sign(cell.word_class)][STYLES.index(cell.style)]


def sentiment(cell: Cell) -> int:
    """-3 … 3: the word class c without a marker; with one, c as the style changes it.

    Neutral is ironic (-c), happy is one higher, angry is negative and stronger (-|c| - 1), sad is one lower.
    """
    c = cell.word_class
    if not cell.marker:
        return c
    return {"neutral": -c, "happy": c + 1, "angry": -abs(c) - 1, "sad": c - 1}[cell.style]


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def draw_cells(count: int, generator: np.random.Generator) -> list[Cell]:
    """`count` cells in random order, each cell within 1 of its expected number (largest remainders).

    Quotas instead of independent draws keep the best possible scores of a split of a few hundred utterances within
    a few thousandths of the table's.
    """
    expected = count * np.array(list(CELLS.values()))
    numbers = np.floor(expected).astype(int)
    remainders = expected - numbers
    numbers[np.argsort(-remainders, kind="stable")[: count - numbers.sum()]] += 1
    cells = [cell for cell, number in zip(CELLS, numbers, strict=True) for _ in range(number)]
    return [cells[i] for i in generator.permutation(count)]


class Ceiling(NamedTuple):
    """The best anyone can do who knows one view of an utterance; each is the best of its own decision rule."""

    accuracy: float
    """Emotion, weighted accuracy (WA): Σ_x max_y P(y, x)."""
    ua: float
    """Emotion, mean recall (UA): Σ_x max_y P(y, x) / P(y), divided by the number of emotions."""
    mae: float
    """Sentiment, mean absolute error of the conditional medians."""


VIEWS: Final[dict[str, Callable[[Cell], tuple]]] = {
    "text alone": lambda cell: (cell.word_class, cell.marker),
    "audio alone": lambda cell: (cell.style,),
    "both": tuple,
    "neither": lambda _: (),
}


def ceilings() -> dict[str, Ceiling]:
    """View → exact ceilings, sums over `CELLS`; "neither" is the score of the best constant answer."""
    return {name: _ceiling(view) for name, view in VIEWS.items()}


def _ceiling(view: Callable[[Cell], tuple]) -> Ceiling:
    prior = {y: sum(p for cell, p in CELLS.items() if emotion(cell) == y) for y in STYLES}
    accuracy = recall = error = 0.0
    for cells in _grouped(view):
        joint = {y: sum(CELLS[cell] for cell in cells if emotion(cell) == y) for y in STYLES}
        accuracy += max(joint.values())
        recall += max(joint[y] / prior[y] for y in STYLES)
        # A conditional median has the least mean absolute error of all answers, and one of the labels is a median.
        error += min(sum(CELLS[cell] * abs(sentiment(cell) - guess) for cell in cells) for guess in range(-3, 4))
    return Ceiling(accuracy, recall / len(STYLES), error)


def _grouped(view: Callable[[Cell], tuple]) -> Iterator[list[Cell]]:
    groups: dict[tuple, list[Cell]] = {}
    for cell in CELLS:
        groups.setdefault(view(cell), []).append(cell)
    yield from groups.values()


class Prosody(NamedTuple):
    """The four continuous parameters of a style; for speakers and jitter the same as deviations."""

    rate: float
    """log of the speaking rate, relative to `BASE_WORDS_PER_MINUTE`."""
    pitch: float
    """log of the fundamental frequency, relative to the pitch of the speaker's sex."""
    pitch_range: float
    """log of the width of the intonation contour, relative to `BASE_PITCH_RANGE`."""
    word_gap: float
    """Pause between words in espeak-ng's unit, 10 ms at its normal speed."""


BASE_WORDS_PER_MINUTE: Final = 215.0
BASE_PITCH_HERTZ: Final = {"male": 105.0, "female": 195.0}
BASE_PITCH_RANGE: Final = 0.36
"""Width of the contour as log(highest / lowest); espeak-ng's own default voice has the same (82 to 118 Hz)."""

STYLE_MEANS: Final = {
    "neutral": Prosody(rate=0.00, pitch=0.00, pitch_range=0.00, word_gap=2.5),
    "happy": Prosody(rate=0.08, pitch=0.24, pitch_range=0.80, word_gap=1.5),
    "angry": Prosody(rate=0.36, pitch=0.08, pitch_range=0.10, word_gap=0.5),
    "sad": Prosody(rate=-0.26, pitch=-0.12, pitch_range=-0.70, word_gap=7.0),
}
SPEAKER_DEVIATION: Final = Prosody(rate=0.05, pitch=0.12, pitch_range=0.10, word_gap=0.5)
"""Standard deviations between speakers (of one sex, for pitch)."""
JITTER_DEVIATION: Final = Prosody(rate=0.06, pitch=0.05, pitch_range=0.12, word_gap=0.8)
"""Standard deviations between utterances of one speaker in one style."""


@dataclass(frozen=True, slots=True)
class StyleOverlap:
    """Error of the best classifier of the style from the exact prosody of one utterance, over 4 styles."""

    unknown_speaker: float
    """The speaker is new: the deviations of speakers, and the two sexes, are integrated out."""
    known_speaker: float
    """The speaker's own parameters are known."""
    standard_error: float
    """Of `unknown_speaker`."""
    draws: int


def style_overlap(draws: int = 200_000, seed: int = 0) -> StyleOverlap:
    """Bayes error of the style by Monte Carlo over the continuous parameters.

    Prosody is Gaussian given style, sex and (or not) speaker, so posteriors are exact; only the mean of
    1 - max posterior is estimated. What is synthesised, rounded and recorded in noise can only tell less than these
    parameters.
    """
    generator = np.random.default_rng(seed)
    prior = np.array([sum(p for cell, p in CELLS.items() if cell.style == style) for style in STYLES])
    speaker, jitter = np.array(SPEAKER_DEVIATION), np.array(JITTER_DEVIATION)
    half_gap = np.log(BASE_PITCH_HERTZ["female"] / BASE_PITCH_HERTZ["male"]) / 2
    means_S4 = np.array([STYLE_MEANS[style] for style in STYLES])

    def errors(components_SK4: np.ndarray, deviation_4: np.ndarray) -> np.ndarray:
        """1 - max posterior of each draw; styles S, each an even mixture of K components."""
        style_N = generator.choice(len(STYLES), draws, p=prior)
        component_N = generator.integers(components_SK4.shape[1], size=draws)
        prosody_N4 = generator.normal(components_SK4[style_N, component_N], deviation_4)
        distance_NSK = (((prosody_N4[:, None, None] - components_SK4) / deviation_4) ** 2).sum(-1)
        joint_NS = prior * np.exp(-distance_NSK / 2).mean(-1)
        return 1 - joint_NS.max(-1) / joint_NS.sum(-1)

    sexes_K4 = np.array([[0, -half_gap, 0, 0], [0, half_gap, 0, 0]])
    unknown_N = errors(means_S4[:, None] + sexes_K4, np.hypot(speaker, jitter))
    known_N = errors(means_S4[:, None], jitter)
    return StyleOverlap(float(unknown_N.mean()), float(known_N.mean()), float(unknown_N.std() / np.sqrt(draws)), draws)
