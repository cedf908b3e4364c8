"""The corpus card: what the demo corpus is, how large, and the best scores that anyone can reach on it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import soundfile

import ctal
from ctal.corpora.demo.experiment import (
    CELLS,
    JITTER_DEVIATION,
    SPEAKER_DEVIATION,
    STYLE_MEANS,
    STYLES,
    WORD_CLASSES,
    Cell,
    Prosody,
    ceilings,
    emotion,
    sentiment,
    style_overlap,
)
from ctal.errors import InputError

COMMAND: Final = "ctal prepare demo ROOT STORE"


def facts(
    config: Mapping[str, int], fingerprint: str, espeak: str, files: Iterable[tuple[str, str, Path]]
) -> dict[str, Any]:
    """The card as JSON-ready data. `files` are (split, speaker, sound file); lengths are read from their headers."""
    sizes: dict[str, dict] = {}
    speakers: dict[str, set[str]] = {}
    for split, speaker, path in files:
        size = sizes.setdefault(split, {"speakers": 0, "utterances": 0, "seconds": 0.0})
        speakers.setdefault(split, set()).add(speaker)
        size["utterances"] += 1
        size["seconds"] += soundfile.info(path).duration
    for split, size in sizes.items():
        size["speakers"] = len(speakers[split])
        size["seconds"] = round(size["seconds"], 1)
    return {
        "name": "ctal demo corpus",
        "synthetic": True,
        "command": COMMAND,
        "config": dict(config),
        "fingerprint": fingerprint,
        "ctal": ctal.__version__,
        "espeak_ng": espeak,
        "sizes": sizes,
        "table": [
            {**cell._asdict(), "probability": p, "emotion": emotion(cell), "sentiment": sentiment(cell)}
            for cell, p in CELLS.items()
        ],
        "ceilings": {view: ceiling._asdict() for view, ceiling in ceilings().items()},
        "style_overlap": asdict(style_overlap()),
        "styles": {style: mean._asdict() for style, mean in STYLE_MEANS.items()},
        "deviations": {"speaker": SPEAKER_DEVIATION._asdict(), "utterance": JITTER_DEVIATION._asdict()},
    }


def demo_ceilings(card: Path | None = None) -> dict[str, dict[str, float]]:
    """View ("text alone", "audio alone", "both", "neither") → the best possible `wa`, `ua` and `mae`, for reports.

    The names are those of `ctal.metrics`; accuracies are fractions. From the table of this version, or as the corpus
    says that `card` is of: its folder or its `card.json`.
    """
    if card is None:
        table = {view: ceiling._asdict() for view, ceiling in ceilings().items()}
    else:
        file = card / "card.json" if card.is_dir() else card
        try:
            table = json.loads(file.read_text(encoding="utf-8"))["ceilings"]
        except (OSError, ValueError, KeyError):
            raise InputError(f"{file}: not the card of a demo corpus; make one with `{COMMAND}`") from None
    return {view: {"wa": best["accuracy"], "ua": best["ua"], "mae": best["mae"]} for view, best in table.items()}


def markdown(facts: Mapping[str, Any]) -> str:
    """The card as a person reads it, made from `facts` alone."""
    sizes, overlap = facts["sizes"], facts["style_overlap"]
    minutes = sum(size["seconds"] for size in sizes.values()) / 60
    total = sum(size["utterances"] for size in sizes.values())
    size_rows = [
        [split, size["speakers"], size["utterances"], f"{size['seconds'] / 60:.1f}"] for split, size in sizes.items()
    ]
    ceiling_rows = [
        [view, f"{100 * c['accuracy']:.1f}", f"{100 * c['ua']:.1f}", f"{c['mae']:.3f}"]
        for view, c in facts["ceilings"].items()
    ]
    table_rows = [
        [c, "yes" if marker else "no", *(_cell(Cell(c, marker, style)) for style in STYLES)]
        for c in WORD_CLASSES
        for marker in (False, True)
    ]
    prosody_rows = [
        [name, *(f"{value:+.2f}" for value in values.values())]
        for name, values in {
            **facts["styles"],
            "between speakers, ±": facts["deviations"]["speaker"],
            "between utterances, ±": facts["deviations"]["utterance"],
        }.items()
    ]
    return f"""\
# The ctal demo corpus: SYNTHETIC speech

**Nobody speaks here.** espeak-ng {facts["espeak_ng"]} reads {total} sentences of a template grammar
({minutes:.0f} minutes), and the emotions and sentiments are labels of a table, not of people. The corpus shows that
software works and that a model combines words and sound. **It says nothing about real speech; never put its results
into one table with results on real corpora.**

Made by `{facts["command"]}` with ctal {facts["ctal"]}, configuration
`{json.dumps(facts["config"])}`,
fingerprint `{facts["fingerprint"][:16]}`. The same configuration gives the same texts, labels, speakers and splits;
espeak-ng does not promise the same samples.

## Size

{_table(["split", "speakers", "utterances", "minutes"], size_rows)}

No speaker is in two splits. The sentence templates of `validation` and `test` do not occur in `train`; the words do.
Audio is FLAC, 16 kHz, mono, 16 bit. Speakers differ in espeak-ng variant, pitch, rate, pitch range, formants and
spectral tilt; every utterance has its own channel, room, noise (20 to 35 dB) and level.

## The experiment

An utterance has a word class c (−2 … 2: polarity and strength of its key words), a marker m (an opening such as
"oh sure", or a plain one such as "by then") and a speaking style s. In the table: 1000 · P(c, m, s), then the emotion
and the sentiment that follow.

{_table(["c", "marker", *STYLES], table_rows)}

Without a marker the emotion is the style and the sentiment is c. With one, the emotion is another than the style and
depends on the polarity of c too; and the sentiment is ironic (neutral: −c), one higher (happy), negative and stronger
(angry: −|c| − 1) or one lower (sad).

## The best possible scores

Exact sums over the table. Emotion: accuracy (WA) and mean recall (UA), in %, each of its own best rule; sentiment:
mean absolute error (MAE) of the conditional medians.

{_table(["known", "WA", "UA", "MAE"], ceiling_rows)}

"Text alone" knows c and m, "audio alone" knows s. A model that hears audio alone *and recognises words in it* is not
bound by the second line. Cells are dealt to each split in their exact proportions, to the nearest utterance.

## The styles

Logarithms of rate, pitch and pitch range, and the pause between words in units of about 10 ms; all Gaussian.

{_table(["", *(name.replace("_", " ") for name in Prosody._fields)], prosody_rows)}

There is no cue in the volume. The styles overlap a little: the best classifier of the style from these four numbers
errs in {100 * overlap["unknown_speaker"]:.2f} % (standard error {100 * overlap["standard_error"]:.2f}) of the
utterances of an unknown speaker (Monte Carlo, {overlap["draws"]} draws), {100 * overlap["known_speaker"]:.3f} % when
the speaker is known. By so much, at most, the lines "audio alone" and "both" promise too much accuracy.
"""


def _cell(cell: Cell) -> str:
    return f"{1000 * CELLS[cell]:.0f} {emotion(cell)} {sentiment(cell):+d}"


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(entry) for entry in line) + " |" for line in lines)
