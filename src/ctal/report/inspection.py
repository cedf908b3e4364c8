"""Looking inside a model: what it does with one recording, and what it takes to be like it.

B utterances of a batch, E dimensions of an embedding, N utterances of a store, T frames.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ctal.audio import HOP_LENGTH, SAMPLING_RATE, load_audio
from ctal.batching import Corpus, digest, masked_utterance
from ctal.corpora import manifest as recordings_manifest
from ctal.errors import InputError
from ctal.features import NUM_MEL
from ctal.inference import (
    BATCH_FRAMES,
    PretrainedModel,
    TaskModel,
    cut_windows,
    deal_words,
    find_recordings,
    is_cut,
    like_lengths,
    load_any_model,
    of_a_stranger,
)
from ctal.objective import frames_per_second, open_corpus
from ctal.recipes import PretrainConfig, make_config
from ctal.report.html import (
    Html,
    definitions,
    element,
    join,
    minus,
    player,
    signed,
    synthetic_warning,
    tiles,
    write_page,
)
from ctal.report.pretraining import MASKS_EXPLAINED, fill_in, filled_in
from ctal.report.utterance import (
    BLIND,
    Attended,
    Span,
    attend,
    attention_explained,
    attention_picture,
    attention_scale,
    brightest,
    spectrogram,
    spectrogram_scale,
    times,
)
from ctal.store import StoredUtterance
from ctal.text import SPECIAL_TOKENS, encode_transcript, normalize_transcript

NEIGHBOURS = 5
"""Utterances of the store that are shown."""

SEARCHED_SECONDS = 2 * 3600.0
"""So much of a store is listened to at most: a minute for `mini` on two cores, ten for `base`."""

PLAYED_SECONDS = 20.0
"""Longer neighbours have no player, so that pages stay small."""

Model = TaskModel | PretrainedModel


@dataclass(frozen=True)
class _Window:
    """What a model gets of a recording: its first window, and the words that are dealt to it."""

    recording: np.ndarray
    """(samples,) at 16 kHz, the whole of it."""
    wave: np.ndarray
    """The window."""
    text: str | None
    windows: int
    """Of the whole recording."""


def write_inspection(
    model: Path,
    audio: Path,
    out: Path,
    *,
    text: str | None = None,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes one self-contained HTML file on what `model` does with a recording.

    It shows the words that each frame attends to, with the words' spans; with a pre-trained model, how masked stretches
    and words are filled in; with a store, its utterances with the nearest embeddings; and the model's card.

    Args:
        model: A model folder, pre-trained or fine-tuned.
        audio: The recording; of one that is longer than the model's window the first window is looked at.
        out: The file to write; missing folders are made.
        text: The transcript; None: what the same-named `.txt` says, if there is one.
        store: Where neighbours are looked for.
        progress: Gets (done, total) in utterances of the store.

    Returns:
        What a reader should know of the page, which says it too: what was left out and why.

    Raises:
        InputError: `model` is no model folder, `audio` not a recording, `store` not a store, a model of text has no
            text, or `out` cannot be written.
    """
    if audio.is_dir():
        raise InputError(f"{audio}: a folder; name one recording")
    if audio.is_file() and audio.suffix.lower() in recordings_manifest.SUFFIXES:
        raise InputError(f"{audio}: a list of recordings; name one recording")
    (recording,) = find_recordings([audio], text=text)
    wave = load_audio(audio)
    corpus = open_corpus([store]) if store else None
    loaded = load_any_model(model)
    window = _first_window(loaded, wave, recording.text)
    notes = _notes(loaded, recording.text, window)
    if loaded.reads == "text" and window.text is None:
        raise InputError(f"{audio}: the model reads text alone; give a transcript with --text")

    name = audio.name
    sections = [_heard(window, loaded, name), _filled_in_section(loaded, window, name)]
    if corpus is not None and store is not None:
        sections.append(_neighbours_section(loaded, window, corpus, store, progress or (lambda done, total: None)))
    body = join(
        element("h1", f"Looking inside: {name}"),
        element("p", _introduction(loaded, model)),
        synthetic_warning() if "demo" in loaded.run.get("corpus", ()) else Html(),
        *(element("p", element("b", "Note: "), f"{note}.") for note in notes),
        _facts(loaded, window),
        *sections,
        _card_section(model),
    )
    write_page(out, f"Looking inside: {name}", body)
    return notes


# What the model gets


def _first_window(loaded: Model, wave: np.ndarray, text: str | None) -> _Window:
    """Cut and dealt as `ctal predict` does it; a model of audio gets no words, one of text gets all."""
    if text is not None and (loaded.reads == "audio" or not normalize_transcript(text)):
        text = None
    spans = [(0, len(wave))]
    if loaded.reads != "text":
        spans = cut_windows(wave, loaded.max_frames, loaded.processor.feature_extractor.feature_type)
    if text and len(spans) > 1:
        text = deal_words(text, wave, spans)[0]
    return _Window(wave, wave[: spans[0][1]], text, len(spans))


def _notes(loaded: Model, text: str | None, window: _Window) -> list[str]:
    notes = []
    seconds, tokenizer = len(window.recording) / SAMPLING_RATE, loaded.processor.tokenizer
    if loaded.processor.feature_extractor.is_by_speaker and loaded.reads != "text":
        notes.append(of_a_stranger(loaded))
    if not window.recording.any():
        notes.append("the recording is digital silence: there is nothing to hear")
    if window.windows > 1:
        notes.append(
            "the recording is longer than the model's window: only its first "
            f"{len(window.wave) / SAMPLING_RATE:.1f} of {seconds:.1f} s are looked at"
            + ("; they get words in proportion to the speech in them, not aligned" if window.text else "")
        )
    if text is None:
        notes.append("no transcript, so only what needs none is shown; give one with --text, or as a .txt beside it")
    elif not normalize_transcript(text):
        notes.append("the transcript has no word, which is the same as none")
    elif loaded.reads == "audio":
        notes.append("the model was trained on audio alone: the transcript is not read")
    elif window.text is None:
        notes.append("no word of the transcript falls into that window")
    elif is_cut(window.text, tokenizer):
        notes.append(f"the text has more than {tokenizer.model_max_length} tokens: the rest is not read")
    return notes


def _inputs(loaded: Model, windows: Sequence[_Window]) -> Any:
    """A batch of `forward`'s arguments."""
    audio = None if loaded.reads == "text" else [each.wave for each in windows]
    texts = [each.text for each in windows]
    return loaded.processor(text=texts, audio=audio, sampling_rate=SAMPLING_RATE, truncation=True)


# The page


def _introduction(loaded: Model, folder: Path) -> str:
    kind = f"fine-tuned for {loaded.task}" if isinstance(loaded, TaskModel) else "pre-trained"
    return (
        f"A CTAL model reads a recording of speech together with its transcript. This page shows what one of them, "
        f"{kind} ({folder}), does with one recording."
    )


def _facts(loaded: Model, window: _Window) -> Html:
    config = loaded.model.config
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    layers = f"{config.text.num_hidden_layers} text + {config.audio.num_hidden_layers} audio layers"
    seconds, shown = len(window.recording) / SAMPLING_RATE, len(window.wave) / SAMPLING_RATE
    words = len(normalize_transcript(window.text or "").split())
    return tiles(
        [
            ("Recording", f"{seconds:.2f} s", "all of it" if shown == seconds else f"its first {shown:.2f} s"),
            ("Transcript", f"{words} words" if words else "none", "as the model reads it"),
            ("Model", f"{parameters / 1e6:,.1f} M", f"parameters; {layers}, hidden size {config.hidden_size}"),
            (
                "A position of the audio",
                f"{config.audio.frame_stack / frames_per_second(loaded.processor):.4g} s",
                f"{config.audio.frame_stack} frames joined",
            ),
        ]
    )


def _heard(window: _Window, loaded: Model, name: str) -> Html:
    """The sound, and where each word is attended to."""
    features_TF = loaded.processor.feature_extractor.features(window.wave)
    static, rate = features_TF[:, :NUM_MEL], frames_per_second(loaded.processor)
    axes = (
        "Sound over time, low to high frequency from bottom to top, as the model gets it: normalised, in standard "
        "deviations."
    )
    sound = join(
        element("h2", "The recording"),
        player(window.wave),
        element("p", window.text or "(no transcript)", class_="transcript"),
        element("p", axes),
        spectrogram_scale(),
        spectrogram(static, "log-mel spectrogram", name),
        times(len(static), rate),
    )
    heading = element("h2", "Which words each moment attends to")
    if loaded.reads == "text":
        return join(sound, heading, element("p", "Nothing to show: the model reads text alone and does not listen."))
    if window.text is None:
        return join(sound, heading, element("p", "Nothing to show: the model has no words to attend to."))
    if not loaded.model.config.audio_sees_text:
        return join(sound, heading, element("p", BLIND))
    attended = attend(loaded.model, loaded.processor, features_TF, window.text)
    scale_end = brightest([attended])
    clear = sum(span.is_clear for span in attended.spans if span)
    words = sum(span is not None for span in attended.spans)
    legend = (
        f"{clear} of {words} words have a clear highest point. Below each span: that point, in averages of the word, "
        "and the share of all attention that the word gets on average."
    )
    return join(
        sound,
        heading,
        attention_explained(),
        attention_scale(scale_end),
        attention_picture(attended, static, name, scale_end=scale_end),
        element("h3", "The words' spans"),
        element("p", legend, class_="note"),
        element("ul", *_span_items(attended, len(window.wave) / SAMPLING_RATE), class_="word-spans"),
    )


def _span_items(attended: Attended, seconds: float) -> Iterator[Html]:
    shares = attended.shares_TW.mean(0)
    for word, span, share in zip(attended.words, attended.spans, shares, strict=True):
        if span:
            start, end = span_seconds(span, len(attended.shares_TW), seconds)
            yield element(
                "li",
                element("b", word.text),
                element("span", f"{start:.2f}–{end:.2f} s"),
                element("small", f"{span.contrast:.2f} × · {share:.1%}"),
                class_=None if span.is_clear else "vague",
            )


def span_seconds(span: Span, frames: int, seconds: float) -> tuple[float, float]:
    """Start and end in a recording of so many frames and seconds."""
    return span.first / frames * seconds, span.end / frames * seconds


# Reconstruction


def _filled_in_section(loaded: Model, window: _Window, name: str) -> Html:
    heading = element("h2", "Masked stretches, filled in")
    if isinstance(loaded, TaskModel):
        why = (
            f"Nothing to show: a model that was fine-tuned for {loaded.task} has no reconstruction head. Look inside "
            "the pre-trained model that it started from."
        )
        return join(heading, element("p", why))
    tokenizer = loaded.processor.tokenizer
    utterance = masked_utterance(
        torch.tensor(encode_transcript(window.text, tokenizer)),
        loaded.processor.feature_extractor.features(window.wave),
        make_config(PretrainConfig, loaded.run.get("config", {})),
        vocab_size=len(tokenizer),
        mask_id=SPECIAL_TOKENS.index("<mask>"),
        special_ids=len(SPECIAL_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    masked = fill_in(loaded.model, loaded.processor, utterance, name)
    if not masked.is_masked.any():
        return join(heading, element("p", "Nothing to show: the recording is too short to mask a part of it."))
    return join(
        heading,
        element("p", f"Words and stretches of sound were masked at random, as in pre-training. {MASKS_EXPLAINED}"),
        filled_in(masked, tokenizer),
    )


# Neighbours


@dataclass(frozen=True)
class Neighbours:
    """Utterances of a store, the nearest first."""

    rows: list[int]
    cosines: np.ndarray
    """One a row."""
    compared: int
    median: float
    """Of the cosines of all that were compared."""


def _neighbours_section(
    loaded: Model, window: _Window, corpus: Corpus, store: Path, progress: Callable[[int, int], None]
) -> Html:
    heading = element("h2", "Nearest in the store")
    found = nearest(loaded, window, corpus, progress)
    if not found.rows:
        why = f"Nothing to show: no utterance of {store} has a transcript, and the model reads nothing else."
        return join(heading, element("p", why))
    if isinstance(loaded, TaskModel):
        how = "Compared by the cosine of the model's embeddings, the fused vectors before its classifier"
    elif window.text is None:
        how = "Compared by the cosine of the mean of the audio's last states"
    else:
        how = (
            "Compared by the cosine of the mean of the audio's last states and that of the text's, averaged: a model "
            "that was only pre-trained has no embedding of its own"
        )
    alone = "" if window.text else " The transcripts of the store are withheld too, so that like is compared with like."
    part = "all" if found.compared == len(corpus) else f"{found.compared:,} (chosen by a hash of their names) of"
    compared = (
        f"Of {part} {len(corpus):,} utterances of {store}; half of them have a cosine below "
        f"{minus(f'{found.median:.3f}')}."
    )
    neighbours = (
        _neighbour(rank, corpus.read(row), float(corpus.seconds[row]), cosine, window)
        for rank, (row, cosine) in enumerate(zip(found.rows, found.cosines.tolist(), strict=True), 1)
    )
    return join(
        heading,
        element("p", f"{how}.{alone} {compared}"),
        element("ol", *neighbours, class_="cards"),
    )


def _neighbour(rank: int, stored: StoredUtterance, seconds: float, cosine: float, window: _Window) -> Html:
    wave = load_audio(stored.audio, stored.id)
    is_itself = np.array_equal(wave, window.recording)
    said = {"speaker": stored.speaker, **stored.labels, "part": stored.split}
    facts = [
        f"{name}: {signed(value) if isinstance(value, float) else value}"
        for name, value in said.items()
        if value is not None
    ]
    return element(
        "li",
        element("h4", f"{rank}. {stored.id} ({seconds:.1f} s)"),
        element("p", f"cosine {minus(f'{cosine:.3f}')}", element("b", ", the recording itself") if is_itself else ""),
        element("p", stored.text or "(no transcript)"),
        element("p", ", ".join(facts), class_="note"),
        player(wave) if seconds <= PLAYED_SECONDS else element("p", "Too long to be played here.", class_="note"),
    )


def nearest(
    loaded: Model, window: _Window, corpus: Corpus, progress: Callable[[int, int], None] = lambda done, total: None
) -> Neighbours:
    """The utterances of `corpus` whose embeddings have the largest cosines with that of `window`."""
    rows = _searched(loaded, window, corpus)
    with_text = window.text is not None
    own_E = _embed(loaded, [window], with_text=with_text)[0]
    cosines, done = np.full(len(corpus), -np.inf), 0
    frames = np.ceil(np.minimum(corpus.seconds[rows], _longest_seconds(loaded)) * frames_per_second(loaded.processor))
    for numbers in like_lengths(frames + 1, BATCH_FRAMES["cpu"]):
        batch = rows[numbers]
        windows = [_stored_window(loaded, corpus.read(row), with_text=with_text) for row in batch]
        cosines[batch] = _embed(loaded, windows, with_text=with_text) @ own_E
        done += len(batch)
        progress(done, len(rows))
    order = rows[np.argsort(-cosines[rows], kind="stable")][:NEIGHBOURS]
    return Neighbours(
        order.tolist(), cosines[order], len(rows), float(np.median(cosines[rows])) if len(rows) else float("nan")
    )


def _searched(loaded: Model, window: _Window, corpus: Corpus) -> np.ndarray:
    """Rows that are listened to: at first those that are as long, since the recording may be among them."""
    rows = np.flatnonzero(corpus.has_text) if loaded.reads == "text" else np.arange(len(corpus))
    seconds = len(window.recording) / SAMPLING_RATE
    is_other = np.abs(corpus.seconds[rows] - seconds) > 1 / SAMPLING_RATE
    hashes = np.array([digest("inspect", corpus.ids[row]) for row in rows], dtype=np.int64)
    rows = rows[np.lexsort((hashes, is_other))]
    heard = np.cumsum(np.minimum(corpus.seconds[rows], _longest_seconds(loaded)))
    return rows[heard - heard[:1] <= SEARCHED_SECONDS]


def _longest_seconds(loaded: Model) -> float:
    return loaded.max_frames * HOP_LENGTH[loaded.processor.feature_extractor.feature_type] / SAMPLING_RATE


def _stored_window(loaded: Model, stored: StoredUtterance, *, with_text: bool) -> _Window:
    return _first_window(loaded, load_audio(stored.audio, stored.id), stored.text if with_text else None)


@torch.inference_mode()
def _embed(loaded: Model, windows: Sequence[_Window], *, with_text: bool) -> np.ndarray:
    """(B, E) of length 1."""
    inputs = _inputs(loaded, windows)
    if isinstance(loaded, TaskModel):
        embeddings = loaded.model(**inputs).embeddings
        assert embeddings is not None
        return F.normalize(embeddings).numpy()
    output = loaded.model.ctal(**inputs)
    states = [output.audio_hidden_state, output.text_hidden_state] if with_text else [output.audio_hidden_state]
    # A sum points where the mean does, and padding is 0.
    return F.normalize(torch.cat([F.normalize(each.sum(1)) for each in states], dim=1)).numpy()


# The card


def _card_section(folder: Path) -> Html:
    heading = element("h2", "The model's card")
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return join(heading, element("p", f"{folder} has no card (README.md)."))
    facts = card_facts(card)
    if not facts:
        return join(heading, element("p", f"The card of {folder} (README.md) has no table of facts."))
    return join(heading, definitions(facts))


def card_facts(card: str) -> Mapping[str, str]:
    """Rows of two columns of the tables in a model card, in Markdown."""
    rows = (re.fullmatch(r"\| *([^|]*?) *\| *([^|]*?) *\|", line.strip()) for line in card.splitlines())
    pairs = ((row[1], row[2].replace("`", "")) for row in rows if row)
    return {name: value for name, value in pairs if name.strip("-: ")}
