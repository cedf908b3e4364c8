"""Test recordings to listen to, with what each task says of them; chosen without a look at that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ctal.audio import load_audio
from ctal.batching import Corpus, CorpusFeatures, digest
from ctal.features import NUM_MEL
from ctal.inference import TaskModel, load_task_model
from ctal.objective import corpus_features
from ctal.report.html import Html, capital, element, join, minus, player, signed
from ctal.report.pictures import SHAPES
from ctal.report.runs import Prediction, TaskRun
from ctal.report.utterance import Attended, attend, attention_explained, attention_picture, attention_scale, brightest
from ctal.text import normalize_transcript

EXAMPLES = 4
"""Recordings to listen to."""

EXAMPLE_SECONDS = 15.0
"""They are no longer than this, if there are such, so that pages stay small."""

ATTENTION_EXAMPLES = 2
"""Of how many of them it is shown which words the models attend to."""

SHOWN_CHANCES = 6
"""Emotions whose probabilities are shown for a recording, at most."""


def examples_section(runs: Mapping[str, TaskRun], corpus: Corpus) -> Html:
    times = Counter(corpus.ids)  # in several stores an id may name several recordings
    row_of = {id: row for row, id in enumerate(corpus.ids) if times[id] == 1}
    chosen = _choose_examples(runs, corpus, row_of)
    heading = element("h2", "Listen for yourself")
    if not chosen:
        why = "None to show: the ids of all test utterances name other recordings of the stores too."
        return join(heading, element("p", why))
    several = ", and of another true emotion while there are such" if _emotions(runs) else ""
    rule = (
        f"{len(chosen)} test utterances, chosen by a hash of their names: each of another speaker{several}, and of "
        f"at most {EXAMPLE_SECONDS:.0f} s if there are so short ones. What was predicted played no part."
    )
    return join(
        heading,
        element("p", rule),
        *(_example(id, runs, corpus, row_of) for id in chosen),
        _attention_section(chosen, runs, corpus, row_of),
    )


def _attention_section(
    chosen: Sequence[str], runs: Mapping[str, TaskRun], corpus: Corpus, row_of: Mapping[str, int]
) -> Html:
    """Which words the models attend to in the first of the recordings."""
    heading = element("h2", "Which words each moment attends to")
    # A run may have been tidied up: what it measured can still be shown.
    models = {name: load_task_model(run.folder / "model") for name, run in runs.items() if run.has_model}
    models = {
        name: loaded
        for name, loaded in models.items()
        if loaded.reads == "both" and loaded.model.config.audio_sees_text
    }
    spoken = [id for id in chosen if normalize_transcript(corpus.read(row_of[id]).text or "")]
    if not models or not spoken:
        why = "none of the recordings has a transcript"
        if not models:
            why = "no model whose audio sees the text lies beside its results"
        return join(heading, element("p", f"Nothing to show: {why}."))
    heard = {name: corpus_features(corpus, loaded.processor.feature_extractor) for name, loaded in models.items()}
    shown = [
        (id, name, *_attended(row_of[id], heard[name], loaded))
        for id in spoken[:ATTENTION_EXAMPLES]
        for name, loaded in models.items()
    ]
    scale_end = brightest(attended for *_, attended, _ in shown)
    several = " Where there are several folds, the model is that of one of them, which may have trained on these."
    folds = any("model_fold" in runs[name].evaluation for name in models)
    return join(
        heading,
        attention_explained(),
        element("p", several, class_="note") if folds else Html(),
        attention_scale(scale_end),
        *(
            element(
                "section",
                element("h3", f"{id}: {capital(name)}"),
                attention_picture(attended, features, id, scale_end=scale_end),
            )
            for id, name, attended, features in shown
        ),
    )


def _attended(row: int, features: CorpusFeatures, loaded: TaskModel) -> tuple[Attended, Tensor]:
    """What the frames of a recording attend to, and their (T, 80) static features."""
    stored = features.corpus.read(row)
    features_TF = features.read(row, stored)[: loaded.max_frames].float()
    return attend(loaded.model, loaded.processor, features_TF, stored.text), features_TF[:, :NUM_MEL]


def _emotions(runs: Mapping[str, TaskRun]) -> Mapping[str, str]:
    """Id → true emotion, of whatever run tells it."""
    named = (run for run in runs.values() if run.classes and not run.task.compares)
    return {each.id: str(each.label) for run in named for each in run.predictions}


def _choose_examples(runs: Mapping[str, TaskRun], corpus: Corpus, row_of: Mapping[str, int]) -> list[str]:
    """Ids that are tested by as many runs as can be, each time the first with what is new."""
    tested = Counter(id for run in runs.values() for id in run.by_id if id in row_of)
    most = max(tested.values(), default=0)
    left = sorted((id for id in tested if tested[id] == most), key=lambda id: (digest("example", id), id))
    left = [id for id in left if corpus.seconds[row_of[id]] <= EXAMPLE_SECONDS] or left
    emotions, chosen, speakers, seen = _emotions(runs), list[str](), set[str | None](), set[str | None]()
    while left and len(chosen) < EXAMPLES:

        def repeats(id: str) -> int:
            """Speakers weigh more than emotions."""
            speaker = corpus.speakers[row_of[id]]
            return 2 * (speaker is not None and speaker in speakers) + (emotions.get(id) in seen)

        id = min(left, key=repeats)
        left.remove(id)
        chosen.append(id)
        speakers.add(corpus.speakers[row_of[id]])
        seen.add(emotions.get(id))
        if emotions and seen >= set(emotions.values()):
            seen.clear()
    return chosen


def _example(id: str, runs: Mapping[str, TaskRun], corpus: Corpus, row_of: Mapping[str, int]) -> Html:
    stored = corpus.read(row_of[id])
    speaker = f", speaker {stored.speaker}" if stored.speaker else ""
    cards = []
    for name, run in runs.items():
        predicted = run.by_id.get(id)
        if predicted is None:
            said: Html = element("p", "Not a test utterance of this run.", class_="note")
        elif run.task.compares:
            said = _nearest_card(predicted, run, corpus, row_of)
        elif run.task.problem_type == "regression":
            said = _score_card(predicted)
        else:
            said = _class_card(predicted)
        cards.append(element("li", element("h4", capital(name)), said))
    return element(
        "section",
        element("h3", f"{id} ({corpus.seconds[row_of[id]]:.1f} s{speaker})"),
        player(load_audio(stored.audio, id)),
        element("p", stored.text or "(no transcript)", class_="transcript"),
        element("ul", *cards, class_="cards"),
        class_="heard",
    )


def _class_card(predicted: Prediction) -> Html:
    is_right = predicted.prediction == predicted.label
    ranked = sorted(predicted.probabilities.items(), key=lambda each: -each[1])
    shown = [each for place, each in enumerate(ranked) if place < SHOWN_CHANCES or each[0] == predicted.label]
    bars = (
        element(
            "li",
            element("span", f"{name} ← true" if name == predicted.label else name),
            element("span", f"{chance:.0%}"),
            class_="right" if name == predicted.prediction else None,
            style=f"--share: {chance:.1%}",
        )
        for name, chance in shown
    )
    return join(
        _verdict(is_right, f"predicted {predicted.prediction}, true: {predicted.label}"),
        element("ol", *bars, class_="bars"),
    )


def _verdict(is_right: bool, text: str) -> Html:
    return element("p", element("b", "✓ " if is_right else "✗ "), text, class_="better" if is_right else "worse")


def _score_card(predicted: Prediction) -> Html:
    truth, score = predicted.label, predicted.prediction
    assert isinstance(truth, int | float)
    assert isinstance(score, int | float)

    def x(value: float) -> float:
        return round(float(10 + (np.clip(value, -3, 3) + 3) / 6 * 180), 1)

    marks = [element("line", x1=x(-3), x2=x(3), y1=16, y2=16, class_="zero")]
    marks += [element("line", x1=x(level), x2=x(level), y1=12, y2=20, class_="grid") for level in range(-3, 4)]
    marks += [element("text", signed(level), x=x(level), y=34, text_anchor="middle") for level in (-3, 0, 3)]
    marks += [
        element("path", d=f"M{x(truth)},16{SHAPES['diamond']}", class_="own-point"),
        element("circle", cx=x(score), cy=16, r=4.5, class_="training-point"),
    ]
    said = f"predicted {minus(f'{score:+.2f}')}, true: {signed(truth)}"
    return join(
        element("p", element("b", "● ", class_="training"), "predicted ", minus(f"{score:+.2f}")),
        element("p", element("b", "◆ ", class_="held-out"), "true ", signed(truth)),
        element("svg", *marks, viewBox="0 0 200 38", role="img", aria_label=said),
    )


def _nearest_card(predicted: Prediction, run: TaskRun, corpus: Corpus, row_of: Mapping[str, int]) -> Html:
    trialled = next(each for each in run.trialled if each.fold == predicted.fold)
    own = next(row for row, each in enumerate(trialled.predictions) if each.id == predicted.id)
    cosines = trialled.unit_NE @ trialled.unit_NE[own]
    cosines[own] = -np.inf
    nearest = int(cosines.argmax())
    other, cosine = trialled.predictions[nearest], float(cosines[nearest])
    is_same = other.speaker is not None and other.speaker == predicted.speaker
    stored = corpus.read(row_of[other.id])
    threshold = ""
    if trialled.at_threshold:
        at = trialled.at_threshold["threshold"]
        taken = "taken for one speaker" if cosine >= at else "taken for two speakers"
        threshold = f"; {taken} at the model's own threshold, {minus(f'{at:.2f}')}"
    whose = f"the same speaker, {other.speaker}" if is_same else f"another speaker, {other.speaker}"
    return join(
        element("p", f"Most similar of the other {len(trialled.predictions) - 1} test recordings: {other.id}"),
        _verdict(is_same, whose),
        player(load_audio(stored.audio, other.id)),
        element("p", f"cosine {minus(f'{cosine:.2f}')}{threshold}", class_="note"),
    )
