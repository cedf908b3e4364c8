"""What pre-training left: its curves, what it is better than, and held-out utterances that it fills in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ctal.audio import SAMPLING_RATE, load_audio
from ctal.batching import EVALUATION, collate
from ctal.diagnostics import Comparison, Interval
from ctal.errors import InputError
from ctal.features import NUM_MEL
from ctal.masking import IGNORED
from ctal.modeling_ctal import CtalForPreTraining
from ctal.objective import frames_per_second, open_corpus
from ctal.pretrain import PretrainingObjective
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import PretrainConfig
from ctal.report.html import (
    Html,
    Plot,
    Scale,
    element,
    four_decimals,
    join,
    player,
    read_json,
    read_text,
    round_ticks,
    source,
    step_label,
    synthetic_warning,
    tiles,
    unfolding,
    write_page,
)
from ctal.report.utterance import (
    BLIND,
    Attended,
    Word,
    attention_explained,
    attention_picture,
    attention_scale,
    brightest,
    runs,
    spectrogram,
    spectrogram_scale,
    starts_word,
    times,
    words_of,
)
from ctal.text import SPECIAL_TOKENS

MEND = "ctal pretrain … --resume"
"""Writes anew what a run lacks."""

LISTENING = "masked frames: another transcript"
"""How the name of the comparison starts that says whether the audio listens to the text."""

EXAMPLES = 3
"""Utterances shown."""

EXAMPLE_SECONDS = 8.0
"""Utterances shown are as near to this length as can be, or to the median one where that is shorter."""

GUESSES = 3
"""Predictions shown for each masked token."""

CURVE_POINTS = 60
"""A training curve has at most so many points, each the mean of neighbouring log entries, so that pages stay small."""


@dataclass(frozen=True)
class _Loss:
    key: str
    name: str
    unit: str


LOSSES = (
    _Loss("text_loss", "Masked words (MLM)", "cross-entropy, nats a masked token"),
    _Loss("audio_loss", "Masked sound (MCAM)", "L1, a dimension of a masked frame"),
)


SMALLEST_REACH = 5e-4
"""The axis of gains reaches at least so far to both sides."""


@dataclass(frozen=True)
class PretrainingContent:
    """What a page says of a pre-training run."""

    corpora: Sequence[str]
    introduction: Html
    """One paragraph."""
    sections: Html

    @property
    def is_synthetic(self) -> bool:
        return "demo" in self.corpora


@dataclass(frozen=True)
class MaskedUtterance:
    """An utterance of which parts were masked, and what the model makes of it; T frames, L tokens."""

    name: str
    ids: list[int]
    """L original tokens."""
    shown_ids: list[int]
    """L tokens as the model saw them."""
    is_predicted: list[bool]
    """L, true at masked tokens."""
    probabilities: Tensor
    """(L, V)."""
    original: Tensor
    """(T, 80) static features, as all three."""
    masked: Tensor
    reconstructed: Tensor
    """The reconstruction in masked spans, the original elsewhere."""
    is_masked: np.ndarray
    """(T,) bool."""
    frame_rate: float
    """Frames a second."""
    words: Sequence[Word]
    attended: Attended | None
    """By the masked utterance; None where the model's audio does not see the text."""
    error: float
    """L1, a dimension (of all, static, delta and pitch) of a masked frame."""


@dataclass(frozen=True)
class _Example:
    """One held-out utterance."""

    id: str
    speaker: str | None
    wave: np.ndarray
    """(samples,) at 16 kHz."""
    masked: MaskedUtterance

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLING_RATE


def write_pretraining_report(run: Path, stores: Sequence[Path], out: Path, *, title: str) -> None:
    """Writes one self-contained HTML file on a pre-training run: curves, comparisons and held-out utterances.

    Args:
        run: Folder of the run, with `metrics.jsonl`, `evaluation.json` and `model`.
        stores: The run's own stores, in its order.
        out: The file to write; missing folders are made.
        title: Heading of the page.

    Raises:
        InputError: A file of the run is missing or damaged, `stores` are not those of the run, or `out` cannot be
            written.
    """
    content = pretraining_content(run, stores)
    warning = synthetic_warning() if content.is_synthetic else Html()
    write_page(out, title, join(element("h1", title), content.introduction, warning, content.sections))


def pretraining_content(run: Path, stores: Sequence[Path]) -> PretrainingContent:
    """Reads a run and shows held-out utterances to its model; raises as `write_pretraining_report`."""
    metrics = _read_metrics(run / "metrics.jsonl")
    evaluation = read_json(run / "evaluation.json", MEND)
    provenance = read_json(run / "model" / "run.json", MEND)
    try:
        comparisons, measured_step = [_comparison(entry) for entry in evaluation["comparisons"]], evaluation["step"]
    except (KeyError, TypeError):
        raise InputError(f"{run / 'evaluation.json'}: not the form of this version; run `ctal pretrain` anew") from None
    try:
        config = PretrainConfig(**provenance["config"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run / 'model' / 'run.json'}: no settings of a pre-training run; give such a run") from None

    disable_progress_bar()
    corpus = open_corpus(stores)
    if corpus.content_hash != provenance["data_hash"]:
        raise InputError(
            f"{', '.join(map(str, stores))}: not the data of {run}; give its own stores, in the same order"
        )
    model = CtalForPreTraining.from_pretrained(run / "model")
    processor = CtalProcessor.from_pretrained(run / "model")
    objective = PretrainingObjective(model, processor, corpus, config)
    examples = [_example(objective, row) for row in _choose_examples(objective)]

    sections = join(
        _facts(model, provenance, metrics, _training_minutes(run / "tensorboard")),
        _curves_section(metrics, provenance["step"]),
        _comparisons_section(comparisons, measured_step),
        _listening_section(comparisons, objective),
        _examples_section(examples, processor.tokenizer),
    )
    return PretrainingContent(provenance["corpus"], INTRODUCTION, sections)


# What a run left


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of the log, of which one at least is a validation."""
    rows = []
    for number, line in enumerate(read_text(path, MEND).splitlines(), start=1):
        row = _log_entry(line)
        if row is None:
            raise InputError(f"{path}: line {number} is damaged; `{MEND}` mends it")
        rows.append(row)
    if not any(row["kind"] == "validation" for row in rows):
        raise InputError(f"{path}: no validation in it; give the folder of a run that has come to its first one")
    return rows


def _log_entry(line: str) -> dict[str, Any] | None:
    """The entry, or None where the line is not one."""
    try:
        row = json.loads(line)
        numbers = [row[name] for name in ("step", *(loss.key for loss in LOSSES))]
        return row if row["kind"] in ("train", "validation") and all(map(math.isfinite, numbers)) else None
    except (KeyError, TypeError, ValueError):
        return None


def _comparison(entry: Mapping[str, Any]) -> Comparison:
    intervals = {name: Interval(**entry[name]) for name in ("model", "reference", "gain")}
    return Comparison(**{**entry, **intervals})


def _training_minutes(log: Path) -> float | None:
    """Minutes that TensorBoard's log covers, one file for each time that the run was started; None without a log."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seconds = 0.0
    for file in log.glob("events.out.tfevents.*"):
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        seconds += max(times, default=0.0) - min(times, default=0.0)
    return seconds / 60 if seconds else None


# The held-out utterances


def _choose_examples(objective: PretrainingObjective) -> list[int]:
    """Rows of held-out utterances, chosen by length alone: with a transcript, a masked token, and no need to crop."""
    corpus, rows = objective.corpus, objective.split.validation
    rows = rows[corpus.has_text[rows] & (corpus.frames[rows] <= objective.max_frames)]
    if not len(rows):
        return []
    target = min(EXAMPLE_SECONDS * objective.frames_per_second, float(np.median(corpus.frames[rows])))
    chosen = []
    for row in rows[np.argsort(np.abs(corpus.frames[rows] - target), kind="stable")].tolist():
        labels = objective.dataset.utterance(row, EVALUATION)["labels"]
        if bool((labels != IGNORED).any()):
            chosen.append(row)
            if len(chosen) == EXAMPLES:
                break
    return chosen


def _example(objective: PretrainingObjective, row: int) -> _Example:
    stored = objective.corpus.read(row)
    utterance = objective.dataset.utterance(row, EVALUATION)
    masked = fill_in(objective.model, objective.processor, utterance, stored.id)
    return _Example(stored.id, stored.speaker, load_audio(stored.audio, stored.id), masked)


@torch.no_grad()
def fill_in(
    model: CtalForPreTraining, processor: CtalProcessor, utterance: Mapping[str, Tensor], name: str
) -> MaskedUtterance:
    """What `model`, in evaluation mode, makes of a `masked_utterance`."""
    output = model(**collate([utterance]), output_hidden_states=True, output_attentions=True)
    truth, is_masked = utterance["feature_labels"].float(), utterance["mask_time_indices"]
    labels, shown_ids = utterance["labels"], utterance["input_ids"]
    ids = torch.where(labels == IGNORED, shown_ids, labels).tolist()
    words, rate = words_of(ids, processor.tokenizer), frames_per_second(processor)
    return MaskedUtterance(
        name=name,
        ids=ids,
        shown_ids=shown_ids.tolist(),
        is_predicted=(labels != IGNORED).tolist(),
        probabilities=output.logits[0].softmax(-1),
        original=truth[:, :NUM_MEL],
        masked=utterance["input_features"][:, :NUM_MEL].float(),
        reconstructed=torch.where(is_masked[:, None], output.reconstruction[0], truth)[:, :NUM_MEL],
        is_masked=is_masked.numpy(),
        frame_rate=rate,
        words=words,
        attended=Attended.of(output.cross_attentions, words, len(truth), model.config.audio.frame_stack, rate)
        if model.config.audio_sees_text
        else None,
        error=output.audio_loss.item(),
    )


def _token_text(token_id: int, tokenizer: PreTrainedTokenizerBase, *, inside_word: bool) -> str:
    """A token as people read it: "…" before one that goes on with a word."""
    text = str(tokenizer.decode([token_id])).strip() or "(space)"
    if "\N{REPLACEMENT CHARACTER}" in text or not text.isprintable():
        text = "(a byte)"  # part of a character, or one that cannot be shown
    return f"…{text}" if inside_word else text


# Sections


INTRODUCTION = element(
    "p",
    "A CTAL model reads a recording of speech together with its transcript. To learn how, it had to guess "
    "words and stretches of sound that were masked, that is, hidden from it. This page shows how well it "
    "guesses on recordings that it was not trained on.",
)


def _facts(
    model: CtalForPreTraining,
    provenance: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    minutes: float | None,
) -> Html:
    config = model.config
    speeds = [row["audio_seconds_per_second"] for row in metrics if row["kind"] == "train"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = f"{config.text.num_hidden_layers} text + {config.audio.num_hidden_layers} audio layers"
    last_step, hours = metrics[-1]["step"], provenance["audio_hours"]
    facts = [
        ("Model", f"{parameters / 1e6:,.1f} M", f"parameters; {layers}, hidden size {config.hidden_size}"),
        (
            "Training data",
            f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min",
            source(provenance["corpus"]),
        ),
        ("Training", f"{last_step:,} steps", f"of {provenance['config']['steps']:,} planned"),
        ("Shown here", f"step {provenance['step']:,}", "the best one on held-out data"),
    ]
    if minutes is not None:
        facts.append(("Time", f"{minutes:.0f} min", "validation included"))
    if speeds:
        facts.append(("Speed", f"{np.median(speeds):,.0f} ×", "seconds of audio a second, waiting for data left out"))
    settings = {
        "held out": provenance["validation"],
        "data hash": provenance["data_hash"],
        "commit": provenance["commit"] or "unknown (not run from a checkout)",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        "frames joined": config.audio.frame_stack,
        "audio self-attention": "causal" if config.audio_is_causal else "bidirectional",
        **provenance["config"],
    }
    return join(tiles(facts), unfolding("Where it comes from: data, versions, commit, all settings", settings))


def _curves_section(metrics: Sequence[Mapping[str, Any]], best_step: int) -> Html:
    train = [row for row in metrics if row["kind"] == "train"]
    validation = [row for row in metrics if row["kind"] == "validation"]
    neighbours = _bin_size(len(train))
    key = element(
        "p",
        element("span", element("b", "━ ", class_="training"), "training"),
        element("span", element("b", "╍● ", class_="held-out"), "held-out"),
        element("span", element("b", "○ ", class_="held-out"), f"the model shown here, step {best_step:,}"),
        class_="key",
    )
    training_line = "Training points are single batches as they came, with dropout"
    if neighbours > 1:
        training_line = f"The training line is the mean of {neighbours} neighbouring log entries, its shade their range"
    return join(
        element("h2", "How it learned"),
        element("p", "Lower is better, in both."),
        key,
        element("div", *(_curve(loss, train, validation, best_step) for loss in LOSSES), class_="curves"),
        element(
            "p",
            f"{training_line}; batches without a masked word count for the sound alone. "
            "Held-out values are over the same masks every time, without dropout.",
            class_="note",
        ),
        _final_figures(train, validation, best_step),
    )


def _bin_size(entries: int) -> int:
    return max(1, math.ceil(entries / CURVE_POINTS))


def _curve(
    loss: _Loss, train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], best_step: int
) -> Html:
    # A loss of exactly 0 is what the loop records where nothing was masked, and no measurement.
    train = [row for row in train if row[loss.key] != 0]
    validation = [row for row in validation if row[loss.key] != 0]
    heading = join(element("strong", loss.name), element("br"), element("span", loss.unit, class_="note"))
    if not validation:
        return element("figure", element("figcaption", heading), element("p", "Nothing that is held out was masked."))
    bins = np.array_split(np.arange(len(train)), math.ceil(len(train) / _bin_size(len(train)))) if train else []
    steps = [float(np.mean([train[i]["step"] for i in part])) for part in bins]
    values = [[train[i][loss.key] for i in part] for part in bins]
    held_out = [(row["step"], row[loss.key]) for row in validation]

    everything = [value for part in values for value in part] + [value for _, value in held_out]
    low, high = min(everything), max(everything)
    from_zero = low < high / 2
    y_ticks = round_ticks(0.0 if from_zero else low, high, 5)
    plot = Plot(round_ticks(0, max(1, validation[-1]["step"], *steps), 4), y_ticks, "step", step_label)
    marks = [
        element("path", d=plot.area(steps, list(map(min, values)), list(map(max, values))), class_="range"),
        element("path", d=plot.line(zip(steps, map(np.mean, values), strict=True)), class_="training"),
        element("path", d=plot.line(held_out), class_="held-out"),
    ]
    for step, value in held_out:
        is_best = step == best_step
        place = {"cx": plot.x(step), "cy": plot.y(value), "r": 4.5 if is_best else 2.5}
        marks.append(element("circle", **place, class_="held-out best" if is_best else "held-out"))
    first, last = held_out[0], held_out[-1]
    description = (
        f"{loss.name}, {loss.unit}: on held-out data from {first[1]:.3f} at step {first[0]} "
        f"to {last[1]:.3f} at step {last[0]}."
    )
    axis = "" if from_zero else "The vertical axis does not start at 0."
    return element(
        "figure", element("figcaption", heading), plot.svg(marks, description), element("p", axis, class_="note")
    )


def _final_figures(train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], best_step: int) -> Html:
    """A table of held-out losses at the start, of the model shown, and at the end, beside training's at the end."""
    moments = {row["step"]: f"held out, step {row['step']:,}" for row in (validation[0], validation[-1])}
    moments[best_step] = f"held out, step {best_step:,} (the model shown here)"
    # As in the curves, 0 is no measurement.
    figures = [
        (moments[row["step"]], [row[loss.key] or math.nan for loss in LOSSES])
        for row in validation
        if row["step"] in moments
    ]
    ending = train[-_bin_size(len(train)) :]
    measured = [[row[loss.key] for row in ending if row[loss.key] != 0] for loss in LOSSES]
    figures.append(("training, at the end", [float(np.mean(each)) if each else math.nan for each in measured]))
    header = element("tr", element("th", "Loss"), *(element("th", loss.name, scope="col") for loss in LOSSES))
    rows = (
        element("tr", element("th", name, scope="row"), *(element("td", four_decimals(value)) for value in values))
        for name, values in figures
    )
    return element("table", element("thead", header), element("tbody", *rows))


def _comparisons_section(comparisons: Sequence[Comparison], step: int) -> Html:
    shown = [each for each in comparisons if not each.name.startswith(LISTENING)]
    units = dict.fromkeys(each.unit for each in shown)
    return join(
        element("h2", "Better than what needs no learning?"),
        element(
            "p",
            f"The model of step {step:,} and a simple reference guess the same masked words and frames of the held-out "
            "utterances. The gain is the reference's error minus the model's, utterance by utterance: right of 0 the "
            "model is better. Bars are 95% intervals of the mean over utterances.",
        ),
        *(_comparison_table([each for each in shown if each.unit == unit], unit) for unit in units),
    )


def _listening_section(comparisons: Sequence[Comparison], objective: PretrainingObjective) -> Html:
    heading = element("h2", "Does the audio listen to the text?")
    listening = [each for each in comparisons if each.name.startswith(LISTENING)]
    if not listening:
        why = "no two held-out utterances have transcripts of the same length"
        if objective.corpus.has_text[objective.split.validation].sum() < 2:
            why = "fewer than two held-out utterances have a transcript"
        if not objective.config.audio_mask_ratio:
            why = "audio_mask_ratio is 0"
        return join(heading, element("p", f"Not measured: {why}."))
    return join(
        heading,
        element(
            "p",
            "The same masked frames are guessed twice: once with the utterance's own transcript, once with the "
            "transcript of another utterance of the same length. A gain above 0 says that the model uses the words to "
            "guess the sound.",
        ),
        _comparison_table(listening, listening[0].unit),
    )


def _comparison_table(comparisons: Sequence[Comparison], unit: str) -> Html:
    ends = [end for each in comparisons for end in (each.gain.low, each.gain.high, each.gain.mean)]
    finite = [0.0, *filter(math.isfinite, ends)]
    # Gains that round to 0 must not fill the axis.
    smallest = SMALLEST_REACH if max(map(abs, finite)) < SMALLEST_REACH else 0.0
    scale = Scale(round_ticks(min(*finite, -smallest), max(*finite, smallest), 3))
    names = ("What is masked, and the reference", "Model", "Reference", "Gain")
    header = element("tr", *(element("th", name, scope="col") for name in names), element("th", class_="plot"))
    rows = []
    for each in comparisons:
        verdict, sentence = _verdict(each)
        rows.append(
            element(
                "tr",
                element("th", each.name, element("small", sentence, class_=verdict), scope="row"),
                element("td", four_decimals(each.model.mean), data_label="Model"),
                element("td", four_decimals(each.reference.mean), data_label="Reference"),
                element("td", *_interval(each.gain), data_label="Gain"),
                element("td", scale.bar(each.gain, sentence), class_=f"plot {verdict}"),
            )
        )
    footer = element("tr", element("td", colspan=4), element("td", scale.axis(), class_="plot"))
    return element(
        "table",
        element("caption", {"L1": "Error: L1, a dimension", "nats": "Error: nats a masked token"}.get(unit, unit)),
        element("colgroup", *(element("col", class_=kind) for kind in ("", "number", "number", "gain", "plot"))),
        element("thead", header),
        element("tbody", *rows),
        element("tfoot", footer),
        class_="comparisons",
    )


def _verdict(comparison: Comparison) -> tuple[str, str]:
    """What the interval of the gain says, as one word and as one sentence."""
    gain, count = comparison.gain, f"{comparison.utterances} utterances"
    share = abs(gain.mean / comparison.reference.mean) if comparison.reference.mean else math.nan
    if gain.low > 0:
        return "better", f"▲ Better: {share:.1%} less error, and the interval leaves out 0 ({count})."
    if gain.high < 0:
        return "worse", f"▼ Worse: {share:.1%} more error, and the interval leaves out 0 ({count})."
    if math.isnan(gain.low):
        return "undecided", f"◆ Undecided: too few utterances for an interval ({count})."
    return "undecided", f"◆ Undecided: the interval includes 0 ({count})."


def _interval(interval: Interval) -> tuple[str, Html]:
    ends = f"{four_decimals(interval.low, '+')} … {four_decimals(interval.high, '+')}"
    return four_decimals(interval.mean, "+"), element("small", ends)


MASKS_EXPLAINED = (
    "Pictures show sound over time, low to high frequency from bottom to top, as the model gets it: normalised, in "
    "standard deviations. White lines below an orange bar mark the masked stretches; of their frames "
    "80% are blanked, 10% swapped for another frame and 10% kept."
)


def _examples_section(examples: Sequence[_Example], tokenizer: PreTrainedTokenizerBase) -> Html:
    heading = element("h2", "Held-out utterances")
    if not examples:
        why = "None to show: no held-out utterance has a transcript, a masked token and a length that the model takes."
        return join(heading, element("p", why))
    attended = [each.masked.attended for each in examples if each.masked.attended]
    scale_end = brightest(attended)
    attention = [attention_explained(), attention_scale(scale_end)] if attended else [element("p", BLIND)]
    return join(
        heading,
        element(
            "p",
            f"{len(examples)} utterances, chosen by length before anything was predicted, of speakers or recordings "
            f"that were not in the training data. {MASKS_EXPLAINED}",
        ),
        spectrogram_scale(),
        *attention,
        element("p", "Marked words were masked, in whole or in part.", class_="note"),
        *(_example_section(each, tokenizer, scale_end) for each in examples),
    )


def _example_section(example: _Example, tokenizer: PreTrainedTokenizerBase, scale_end: float) -> Html:
    speaker = f", speaker {example.speaker}" if example.speaker else ""
    masked, name = example.masked, f"{example.id} ({example.seconds:.1f} s{speaker})"
    marked = [any(masked.is_predicted[position] for position in word.positions) for word in masked.words]
    return element(
        "section",
        element("h3", name),
        player(example.wave),
        filled_in(masked, tokenizer),
        attention_picture(
            masked.attended,
            masked.masked,
            example.id,
            scale_end=scale_end,
            is_masked=masked.is_masked,
            marked=marked,
        )
        if masked.attended
        else Html(),
        class_="utterance",
    )


def filled_in(masked: MaskedUtterance, tokenizer: PreTrainedTokenizerBase) -> Html:
    """The transcript, the guesses of masked words, and the sound before, masked, and after."""
    pictures = {
        "as it was": masked.original,
        "as the model saw it": masked.masked,
        "as the model filled it in": masked.reconstructed,
    }
    error = f"L1 in its masked frames: {masked.error:.3f} a dimension."
    return join(
        _transcript(masked, tokenizer),
        _guesses(masked, tokenizer),
        *(spectrogram(each, caption, masked.name, masked.is_masked) for caption, each in pictures.items()),
        times(len(masked.is_masked), masked.frame_rate),
        element("p", error if masked.is_masked.any() else "None of its frames was masked.", class_="note"),
    )


def _transcript(example: MaskedUtterance, tokenizer: PreTrainedTokenizerBase) -> Html:
    """The words, masked tokens marked."""
    parts: list[Html] = []
    for word in example.words:
        if word.is_end:
            continue
        parts.append(Html(" "))
        # Tokens can end inside a character, so neighbours that share a mark are decoded together.
        for is_predicted, first, end in runs([example.is_predicted[position] for position in word.positions]):
            tokens = [example.ids[position] for position in word.positions[first:end]]
            parts.append(element("mark" if is_predicted else "span", str(tokenizer.decode(tokens)).strip()))
    return element("p", *parts, class_="transcript")


def _guesses(example: MaskedUtterance, tokenizer: PreTrainedTokenizerBase) -> Html:
    """A card for each masked token: what it was, what the model saw instead, and what it thinks it was."""
    cards = []
    for word in example.words:
        for position in word.positions:
            if not example.is_predicted[position]:
                continue
            truth, seen = example.ids[position], example.shown_ids[position]
            inside = position != word.positions[0]
            whole = f"in “{word.text}”, " if len(word.positions) > 1 else ""
            if seen == truth:
                shown = "left as it was"
            elif seen == SPECIAL_TOKENS.index("<mask>"):
                shown = "seen as <mask>"
            else:
                shown = f"swapped for “{_token_text(seen, tokenizer, inside_word=False)}”"
            best = example.probabilities[position].topk(GUESSES)
            guesses = [
                _guess(_guessed_text(guess, tokenizer), probability, guess == truth)
                for guess, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            own = f"{example.probabilities[position, truth].item():.1%} for the right one"
            title = element("mark", _token_text(truth, tokenizer, inside_word=inside))
            cards.append(
                element(
                    "li",
                    element("p", title, element("small", whole + shown)),
                    element("ol", *guesses),
                    element("small", own),
                )
            )
    return join(element("h4", "Masked words, and the model's guesses"), element("ul", *cards, class_="guesses"))


def _guessed_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    is_whole = token_id < len(SPECIAL_TOKENS) or starts_word(token_id, tokenizer)
    return _token_text(token_id, tokenizer, inside_word=not is_whole)


def _guess(text: str, probability: float, is_right: bool) -> Html:
    return element(
        "li",
        element("span", f"{text} ✓" if is_right else text),
        element("span", f"{probability:.1%}"),
        class_="right" if is_right else None,
        style=f"--share: {probability:.1%}",
    )
