"""Trained models on one's own recordings: windows of long ones, batches, and one result a recording.

A recording longer than the model's positions (37.5 s of `mel` frames) is cut at pauses into windows, which are judged
one by one; the recording's probabilities, score or embedding is their mean, weighted by duration. A model that
normalises by the speaker (`cmvn=speaker`) is given recordings of the one who speaks; without, the recording stands for
its speaker, and the result's notes say so. A transcript is not
aligned with its recording: where there are several windows its words are dealt to them in proportion to the speech in
each, and the result's notes say so. A recogniser (`asr`) hears window by window, so that its words need no dealing.

On one thread of an AVX-512 CPU, 200 recordings of LibriSpeech (33 min) run at 90 times real time with `mini`, and at
300 with `frame_stack=4` as its recipe has it; bf16 makes that 120 and 380. What a lower precision costs stands in
docs/performance.md; fp32 is the default.

Shapes: N samples, B windows of a batch, C classes, E dimensions of an embedding.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctal.audio import HOP_LENGTH, SAMPLING_RATE, FeatureType, checked_rate, load_audio, num_frames, resample
from ctal.corpora import WITHOUT_RECORDING
from ctal.corpora import folder as recordings_folder
from ctal.corpora import manifest as recordings_manifest
from ctal.errors import InputError, did_you_mean
from ctal.model_folders import architecture_of, load_whole
from ctal.modeling_ctal import (
    CtalForPreTraining,
    CtalForSequenceClassification,
    CtalForXVector,
    CtalTaskOutput,
)
from ctal.precision import autocast, check_precision, for_precision
from ctal.processing_ctal import CtalProcessor, longest_window
from ctal.text import normalize_transcript

Task = Literal["emotion", "sentiment", "verification"]
Inputs = Literal["audio and text", "audio alone", "text alone"]
"""What a result rests on; the last with a model of text, which does not listen."""

Audio = str | Path | np.ndarray | Tensor
"""A file, or samples (N,) in floating point, full scale ±1."""

Recognizer = Callable[[np.ndarray, int], str]
"""(samples (N,) float32, sampling rate in Hz) → transcript."""

BATCH_FRAMES = {"cpu": 6_000, "cuda": 24_000}
"""Most frames of a batch, padding included: 75 s and 5 minutes of `mel`. On a CPU larger ones are slower."""

_SORTED_FRAMES = 96_000
"""Recordings of so many frames are sorted by length together, which bounds memory however many there are."""
_FILES_AHEAD = 16
_SHORT_SECONDS = 0.5
_ENOUGH_OF_SPEAKER = 10
"""Recordings of a speaker that are enough for a model that was trained with the mean over all of them; three are worth
no more than knowing nothing of the speaker, and one less (docs/results.md)."""
_ENERGY_SECONDS = 0.2
_SPEECH_BLOCK = SAMPLING_RATE // 50
_SPEECH_RANGE = 1e-3
"""Blocks within 30 dB of the loud ones count as speech."""


# Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a recording, and what the model says of it."""

    start: float
    """Seconds from the start of the recording."""
    end: float
    text: str | None = None
    """The words that the model read with it."""
    probabilities: Mapping[str, float] | None = None
    """Of emotions; None for other tasks."""
    score: float | None = None
    """Of sentiment; None for other tasks."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every task says of a recording."""

    audio: str | None
    """Path of the file; None for samples."""
    duration: float
    """Seconds."""
    inputs: Inputs
    text: str | None
    """The transcript that was used, given or recognised; None where there was none."""
    windows: tuple[Window, ...]
    """In order and without gaps, the whole recording; one, unless it is longer than the model's maximum."""
    notes: tuple[str, ...] = ()
    """What to know before relying on it, for example that the recording is silent."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, floats rounded to 6 digits; fields that the task does not have are left out."""
        fields = {name: value for name, value in asdict(self).items() if name != "windows"}
        windows = [{name: value for name, value in asdict(each).items() if value is not None} for each in self.windows]
        return _plain(fields | {"windows": windows})


@dataclass(frozen=True, kw_only=True)
class EmotionResult(Result):
    label: str
    """The most probable one."""
    probabilities: Mapping[str, float]
    """By label; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class SentimentResult(Result):
    score: float
    """On the scale of the model's training data."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingResult(Result):
    embedding: np.ndarray
    """(E,) float32 of length 1: the dot product of two is the score that a verification compares."""


@dataclass(frozen=True)
class Verification:
    """Two recordings compared."""

    score: float
    """Cosine of the embeddings, -1 … 1."""
    threshold: float | None
    """The model's `decision_threshold`."""

    @property
    def same_speaker(self) -> bool | None:
        """None where the model has no threshold."""
        return None if self.threshold is None else self.score >= self.threshold


ResultT = TypeVar("ResultT", bound=Result)


# Models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskModel:
    """A model with a task's head, and all that belongs to it."""

    task: Task
    model: CtalForSequenceClassification | CtalForXVector
    processor: CtalProcessor
    reads: Literal["both", "audio", "text"]
    """What it was trained on; with `text` a recording is not listened to, with `audio` its transcript is not read."""
    run: Mapping[str, Any]
    """`run.json`: how it was trained; empty where that is not known."""

    @property
    def max_frames(self) -> int:
        """Longest window in frames."""
        return longest_window(self.processor, self.model.config)


_ARCHITECTURES = {kind.__name__: kind for kind in (CtalForSequenceClassification, CtalForXVector)}
_PRETRAINED = ("CtalForPreTraining", "CtalModel")


@dataclass(frozen=True)
class PretrainedModel:
    """A model with the heads of pre-training, and all that belongs to it."""

    model: CtalForPreTraining
    processor: CtalProcessor
    run: Mapping[str, Any]
    """As `TaskModel.run`."""
    reads: Literal["both"] = "both"

    @property
    def max_frames(self) -> int:
        """Longest window in frames."""
        return longest_window(self.processor, self.model.config)


def load_task_model(folder: str | Path) -> TaskModel:
    """The fine-tuned model in `folder`, on the CPU, in evaluation mode.

    Raises `InputError` for a folder that is missing, no model of ours, a pre-trained model without a task, of an
    unknown architecture, or damaged.
    """
    folder = Path(folder)
    architecture = architecture_of(folder, "give the RUN/model of a `ctal finetune`")
    if architecture in _PRETRAINED:
        raise InputError(f"{folder}: a pre-trained model without a task; fine-tune it first with `ctal finetune`")
    return _load_task_model(folder, architecture)


def load_any_model(folder: str | Path) -> TaskModel | PretrainedModel:
    """The model in `folder`, pre-trained or fine-tuned; else as `load_task_model`."""
    folder = Path(folder)
    architecture = architecture_of(folder, "give the RUN/model of a `ctal pretrain` or `ctal finetune`")
    if architecture == CtalForPreTraining.__name__:
        return PretrainedModel(*load_whole(folder, CtalForPreTraining))
    return _load_task_model(folder, architecture)


def _load_task_model(folder: Path, architecture: str | None) -> TaskModel:
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise InputError(f"{folder}: unknown architecture '{architecture}' in config.json; this version has {known}")
    model, processor, run = load_whole(folder, _ARCHITECTURES[architecture])
    settings = run.get("config", {})
    reads = "text" if model.config.fusion == "text" else settings.get("inputs", "both")
    return TaskModel(_task_of(model), model, processor, reads, run)


def _task_of(model: CtalForSequenceClassification | CtalForXVector) -> Task:
    if isinstance(model, CtalForXVector):
        return "verification"
    return "sentiment" if model.config.problem_type == "regression" else "emotion"


def of_a_stranger(loaded: TaskModel | PretrainedModel) -> str:
    """What to know of what a model with `cmvn=speaker` says without other recordings of the speaker."""
    if _is_for_few(loaded):
        return "the model hears this recording of the speaker alone; with a few others it is surer"
    return "the model wants ten or more recordings of the speaker, and hears this one alone: do not rely on it"


def _is_for_few(loaded: TaskModel | PretrainedModel) -> bool:
    return bool(loaded.run.get("config", {}).get("random_speaker_mean"))


def load_recognizer(name: str) -> Recognizer:
    """A model of transformers' automatic-speech-recognition pipeline: a folder, or an id in the local cache.

    Nothing is downloaded. Raises `InputError` where it is not there or cannot be loaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from transformers import pipeline as make_pipeline

    try:
        folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputError(
            f"asr '{name}': neither a folder nor a model in the local Hugging Face cache; fetch it with `hf download`"
        ) from None
    try:
        recognize = make_pipeline("automatic-speech-recognition", model=folder, chunk_length_s=30)
    except Exception as error:  # whatever a foreign model's code raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"asr '{name}': cannot be loaded ({reason}); give a speech recognition model") from None
    return lambda wave, rate: cast(Any, recognize({"raw": wave, "sampling_rate": rate}))["text"]


# Windows ----------------------------------------------------------------------------------------------------------


def cut_windows(wave: np.ndarray, max_frames: int, feature_type: FeatureType = "mel") -> list[tuple[int, int]]:
    """(start, end) in samples of windows of at most `max_frames` that follow each other and cover (N,) `wave`.

    A cut lies where the 0.2 s around it are quietest, within the last third of the longest possible window, and at
    least 1 s before the end of the recording; of equally quiet places the last. Only a recording that fits into one
    window, or a maximum below 3 s, gives a window below 1 s.
    """
    longest = max_frames * HOP_LENGTH[feature_type] - 1
    last = min(SAMPLING_RATE, longest // 3)
    half = int(_ENERGY_SECONDS / 2 * SAMPLING_RATE)
    windows: list[tuple[int, int]] = []
    start = 0
    while len(wave) - start > longest:
        places = np.arange(start + longest - longest // 3, min(start + longest, len(wave) - last) + 1)
        low, high = np.clip(places - half, 0, None), np.clip(places + half, None, len(wave))
        squares = np.square(wave[low[0] : high[-1]], dtype=np.float64)
        sums = np.concatenate([[0.0], np.cumsum(squares)])
        powers = (sums[high - low[0]] - sums[low - low[0]]) / (high - low)
        cut = int(places[len(places) - 1 - np.argmin(powers[::-1])])
        windows.append((start, cut))
        start = cut
    return [*windows, (start, len(wave))]


def deal_words(text: str, wave: np.ndarray, windows: Sequence[tuple[int, int]]) -> list[str | None]:
    """The words of `text`, in order, a part for each window in proportion to the speech in it.

    Speech is what is within 30 dB of the recording's loud parts; in a silent one, durations count. None for a window
    that gets no word.
    """
    blocks = wave[: len(wave) // _SPEECH_BLOCK * _SPEECH_BLOCK].reshape(-1, _SPEECH_BLOCK)
    powers = np.square(blocks).mean(1)
    is_speech = powers > _SPEECH_RANGE * np.quantile(powers, 0.95)
    shares = np.array([is_speech[start // _SPEECH_BLOCK : end // _SPEECH_BLOCK].sum() for start, end in windows])
    if shares.sum() == 0:
        shares = np.array([end - start for start, end in windows])
    words = text.split()
    ends = np.rint(np.cumsum(shares) / shares.sum() * len(words)).astype(int).tolist()
    return [" ".join(words[low:high]) or None for low, high in zip([0, *ends], ends, strict=False)]


def is_cut(text: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has more tokens than fit; a token is at least a byte."""
    normalized = normalize_transcript(text or "")
    fits = len(normalized.encode()) + 2 <= tokenizer.model_max_length
    return not fits and len(tokenizer(normalized, verbose=False)["input_ids"]) > tokenizer.model_max_length  # pyright: ignore[reportArgumentType]


# The pipeline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What a pipeline is asked to judge."""

    audio: Audio
    text: str | None = None
    sampling_rate: int | None = None
    """Of samples, in Hz; a file knows its own."""
    name: str = "audio"
    """What errors call samples; a file is called by its path."""


Known = Audio | Recording | Sequence[Audio | Recording]
"""What is known of a speaker."""


@dataclass
class _Heard:
    """A recording, decoded and cut, before the model sees it."""

    audio: str | None
    wave: np.ndarray
    spans: list[tuple[int, int]]
    texts: list[str | None]
    text: str | None
    notes: list[str]
    processor: CtalProcessor
    """Of its speaker, where something is known of one."""


class _Head(NamedTuple):
    """What a task makes of the model's outputs."""

    vectors: Callable[[CtalTaskOutput], Tensor]
    """(B, …) whose mean over windows makes sense."""
    window: Callable[[np.ndarray, Mapping[int, str]], dict[str, Any]]
    """Fields of `Window`."""
    result: Callable[[dict[str, Any], np.ndarray, Mapping[int, str]], Result]
    """From the fields of `Result` and the mean."""


def _probabilities(vector: np.ndarray, labels: Mapping[int, str]) -> dict[str, float]:
    return {labels[number]: float(value) for number, value in enumerate(vector)}


def _emotion(fields: dict[str, Any], vector: np.ndarray, labels: Mapping[int, str]) -> EmotionResult:
    label = labels[int(vector.argmax())]
    return EmotionResult(**fields, label=label, probabilities=_probabilities(vector, labels))


def _sentiment(fields: dict[str, Any], vector: np.ndarray, labels: Mapping[int, str]) -> SentimentResult:
    return SentimentResult(**fields, score=float(vector[0]))


def _embedding(fields: dict[str, Any], vector: np.ndarray, labels: Mapping[int, str]) -> EmbeddingResult:
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return EmbeddingResult(**fields, embedding=unit.astype(np.float32))


_HEADS: dict[str, _Head] = {
    "emotion": _Head(
        lambda output: _given(output.logits).softmax(1),
        lambda vector, labels: {"probabilities": _probabilities(vector, labels)},
        _emotion,
    ),
    "sentiment": _Head(
        lambda output: _given(output.logits), lambda vector, labels: {"score": float(vector[0])}, _sentiment
    ),
    "verification": _Head(lambda output: F.normalize(_given(output.embeddings)), lambda vector, labels: {}, _embedding),
}


class Pipeline(Generic[ResultT]):
    """A task's model that takes recordings; made by `pipeline`."""

    def __init__(
        self,
        model: TaskModel,
        *,
        asr: Recognizer | str | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        speaker: Known | None = None,
    ) -> None:
        """See `pipeline`."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_precision(precision, self.device)
        self.task = model.task
        self.config = model.model.config
        self.precision = precision
        self.asr = load_recognizer(asr) if isinstance(asr, str) else asr
        self.unusable: list[InputError] = []
        """Why recordings of the speaker could not be used."""
        self._known: int | None = None
        """How many of the speaker's recordings are used; None where none were given."""
        if speaker is not None:
            model = replace(model, processor=self._of_speaker(model.processor, speaker))
        self._loaded, self._reads = model, model.reads
        moved = model.model.to(self.device)  # pyright: ignore[reportArgumentType] (an overload of transformers)
        self._model = for_precision(moved, precision)
        self._extractor = model.processor.feature_extractor

    @overload
    def __call__(self, audio: Audio, *, text: str | None = None, sampling_rate: int | None = None) -> ResultT: ...
    @overload
    def __call__(
        self, audio: Sequence[Audio], *, text: Sequence[str | None] | None = None, sampling_rate: int | None = None
    ) -> list[ResultT]: ...
    def __call__(
        self,
        audio: Audio | Sequence[Audio],
        *,
        text: str | Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
    ) -> ResultT | list[ResultT]:
        """The result of a recording, or of each of a list.

        `text` is its transcript or a list of them; None or an empty one leaves the model with the audio alone, unless
        the pipeline has an `asr`. `sampling_rate` in Hz is needed with samples. Raises `InputError` for the first
        recording that cannot be used; `each` goes on.
        """
        if isinstance(audio, str | Path | np.ndarray | Tensor):
            if not isinstance(text, str | None):
                raise InputError("text is a list, but audio is one recording; pass a list of recordings too")
            return self._one(Recording(audio, text, sampling_rate))
        if not isinstance(audio, Sequence):
            raise InputError(f"audio is of type {type(audio).__name__}; pass a path, samples, or a list of either")
        texts = [None] * len(audio) if text is None else text
        if isinstance(texts, str) or len(texts) != len(audio):
            number = 1 if isinstance(texts, str) else len(texts)
            raise InputError(f"{number} texts for {len(audio)} recordings; pass None for a missing transcript")
        named = [
            Recording(each, words, sampling_rate, f"audio[{number}]")
            for number, (each, words) in enumerate(zip(audio, texts, strict=True))
        ]
        return [_raised(result) for result in self.each(named)]

    def each(self, recordings: Iterable[Recording]) -> Iterator[ResultT | InputError]:
        """Results in the order of the recordings; for one that cannot be used, the reason in place of its result.

        Files are decoded ahead by threads, and windows of many recordings share a batch.
        """
        chunk: list[_Heard | InputError] = []
        samples = 0
        limit = _SORTED_FRAMES * HOP_LENGTH[self._extractor.feature_type]
        for heard in self._hear(recordings):
            chunk.append(heard)
            samples += 0 if isinstance(heard, InputError) else len(heard.wave)
            if samples >= limit:
                yield from self._judge(chunk)
                chunk, samples = [], 0
        yield from self._judge(chunk)

    def verify(self, a: Audio | Recording, b: Audio | Recording, sampling_rate: int | None = None) -> Verification:
        """Compares the speakers of two recordings; raises `InputError` with a model of another task."""
        if self.task != "verification":
            raise InputError(f"a model of {self.task} does not compare speakers; give one of verification")
        pair = [
            each if isinstance(each, Recording) else Recording(each, None, sampling_rate, name)
            for each, name in ((a, "a"), (b, "b"))
        ]
        one, other = (_raised(result) for result in self.each(pair))
        assert isinstance(one, EmbeddingResult)
        assert isinstance(other, EmbeddingResult)
        return self.compared(one, other)

    def compared(self, one: EmbeddingResult, other: EmbeddingResult) -> Verification:
        """The verdict on two embeddings."""
        score = float(one.embedding.astype(np.float64) @ other.embedding.astype(np.float64))
        return Verification(min(1.0, max(-1.0, score)), self.config.decision_threshold)

    def _one(self, recording: Recording) -> ResultT:
        return _raised(next(self.each([recording])))

    def _of_speaker(self, processor: CtalProcessor, speaker: Known) -> CtalProcessor:
        """The processor for whoever speaks in these recordings, as far as they can be used."""
        is_one = isinstance(speaker, str | Path | np.ndarray | Tensor | Recording)
        listed: Sequence[Audio | Recording] = [speaker] if is_one else speaker
        given = [
            each if isinstance(each, Recording) else Recording(each, name=f"speaker[{number}]")
            for number, each in enumerate(listed)
        ]

        def usable() -> Iterator[np.ndarray]:
            for _, decoded in _decoded_ahead(given):
                try:
                    yield decoded.result()
                except InputError as error:
                    self.unusable.append(error)

        try:
            known = processor.feature_extractor.for_speaker(usable(), SAMPLING_RATE)
        except InputError as error:
            raise (self.unusable[0] if self.unusable else error) from None
        self._known = len(given) - len(self.unusable)
        return CtalProcessor(known, processor.tokenizer)

    def _hear(self, recordings: Iterable[Recording]) -> Iterator[_Heard | InputError]:
        """The decoded recordings, cut, with a transcript for every window."""
        for recording, decoded in _decoded_ahead(recordings):
            try:
                yield self._with_text(recording, decoded.result())
            except InputError as error:
                yield error

    def _with_text(self, recording: Recording, wave: np.ndarray) -> _Heard:
        name = str(recording.audio) if isinstance(recording.audio, str | Path) else None
        notes = []
        if not wave.any():
            notes.append("digital silence: there is nothing to hear")
        elif len(wave) < _SHORT_SECONDS * SAMPLING_RATE:
            notes.append(f"only {len(wave) / SAMPLING_RATE:.2f} s long: too short to rely on")
        if self.unusable:
            notes.append(f"{len(self.unusable)} of the speaker's recordings cannot be used, and are left out")
        text = recording.text
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{name or recording.name}: its transcript cannot be read as UTF-8; mend it")
        if text is not None and not normalize_transcript(text):
            text = None
            notes.append("the transcript has no word, which is the same as none")
        if self._reads == "audio" and text:
            text = None
            notes.append("the model was trained on audio alone: the transcript is not read")
        # A model of text has no use for windows: it reads all words at once.
        spans = [(0, len(wave))]
        if self._reads != "text":
            spans = cut_windows(wave, self._loaded.max_frames, self._extractor.feature_type)
        processor = self._loaded.processor
        if self._reads != "text" and self._known is not None:
            notes.extend(self._of_few(self._known))
        elif self._reads != "text" and self._extractor.is_by_speaker and self._extractor.speaker_mean is None:
            notes.append(of_a_stranger(self._loaded))
            if len(spans) > 1:
                known = self._extractor.for_speaker([wave], SAMPLING_RATE)
                processor = CtalProcessor(known, processor.tokenizer)
        texts: list[str | None] = [None] * len(spans)
        if text and len(spans) == 1:
            texts = [text]
        elif text:
            texts = deal_words(text, wave, spans)
            words = len(text.split())
            notes.append(
                f"{words} words dealt to {len(spans)} windows in proportion to the speech in each, not aligned"
            )
        elif self.asr and self._reads != "audio":
            heard = [self.asr(wave[start:end], SAMPLING_RATE) for start, end in spans]
            texts = [words if words and normalize_transcript(words) else None for words in heard]
            text = " ".join(filter(None, texts)) or None
        tokenizer = self._loaded.processor.tokenizer
        if cut := sum(is_cut(text, tokenizer) for text in texts):
            limit = tokenizer.model_max_length
            notes.append(f"text of more than {limit} tokens in {cut} of {len(spans)} windows: the rest is not read")
        if text is None and self._reads == "text":
            raise InputError(f"{name or recording.name}: the model reads text alone; give a transcript")
        if text is None and self._reads == "both" and self._loaded.run.get("config", {}).get("modality_dropout") == 0:
            notes.append(
                "no transcript, and no modality dropout in training: less reliable if the training data had transcripts"
            )
        return _Heard(name, wave, spans, texts, text, notes, processor)

    def _of_few(self, known: int) -> Iterator[str]:
        """What to know where so many recordings of the speaker are few."""
        if known < _ENOUGH_OF_SPEAKER and not _is_for_few(self._loaded):
            yield (
                f"the model is given {known} of the speaker's recordings, and was trained with all of each speaker's: "
                f"below {_ENOUGH_OF_SPEAKER} it may be worse than one that knows nobody; give more"
            )

    def _judge(self, chunk: Sequence[_Heard | InputError]) -> Iterator[ResultT | InputError]:
        """Runs the model on all windows of the recordings, the longest first."""
        heard_by: dict[CtalProcessor, dict[tuple[int, int], tuple[np.ndarray, str | None]]] = {}
        for number, heard in enumerate(chunk):
            if not isinstance(heard, InputError):
                parts = heard_by.setdefault(heard.processor, {})
                for place, ((start, end), text) in enumerate(zip(heard.spans, heard.texts, strict=True)):
                    parts[number, place] = (heard.wave[start:end], text)
        vectors: dict[tuple[int, int], np.ndarray] = {}
        for processor, parts in heard_by.items():
            keys = list(parts)
            frames = [num_frames(len(wave), self._extractor.feature_type) for wave, _ in parts.values()]
            for batch in like_lengths(frames, BATCH_FRAMES["cpu" if self.device.type == "cpu" else "cuda"]):
                windows = [keys[number] for number in batch]
                waves, texts = zip(*(parts[key] for key in windows), strict=True)
                vectors.update(zip(windows, self._vectors(processor, waves, texts), strict=True))
        for number, heard in enumerate(chunk):
            if isinstance(heard, InputError):
                yield heard
            else:
                yield self._result(heard, np.stack([vectors[number, place] for place in range(len(heard.spans))]))

    def _vectors(
        self, processor: CtalProcessor, waves: Sequence[np.ndarray], texts: Sequence[str | None]
    ) -> np.ndarray:
        """(B, …) float32, what `_Head.vectors` makes of the outputs."""
        audio = None if self._reads == "text" else waves
        inputs = processor(text=texts, audio=audio, sampling_rate=SAMPLING_RATE, truncation=True)
        with torch.inference_mode(), autocast(self.device, self.precision):
            output = self._model(**inputs.to(self.device))
        return _HEADS[self.task].vectors(output).cpu().numpy()

    def _result(self, heard: _Heard, vectors: np.ndarray) -> ResultT:
        head = _HEADS[self.task]
        labels = {int(number): name for number, name in (self.config.id2label or {}).items()}
        seconds = np.array([end - start for start, end in heard.spans]) / SAMPLING_RATE
        windows = tuple(
            Window(start / SAMPLING_RATE, end / SAMPLING_RATE, text, **head.window(vector, labels))
            for (start, end), text, vector in zip(heard.spans, heard.texts, vectors, strict=True)
        )
        inputs: Inputs = "audio and text" if heard.text else "audio alone"
        if self._reads == "text":
            inputs = "text alone"
        fields = {
            "audio": heard.audio,
            "duration": len(heard.wave) / SAMPLING_RATE,
            "inputs": inputs,
            "text": heard.text,
            "windows": windows,
            "notes": tuple(heard.notes),
        }
        return head.result(fields, np.average(vectors, axis=0, weights=seconds), labels)  # pyright: ignore[reportReturnType]


def like_lengths(frames: Sequence[int] | np.ndarray, limit: int) -> Iterator[list[int]]:
    """Numbers of recordings in batches of at most `limit` frames, padding included, or one longer one.

    Longest first, so that neighbours differ little.
    """
    batch: list[int] = []
    for number in np.argsort(-np.asarray(frames), kind="stable").tolist():
        if batch and frames[batch[0]] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@overload
def pipeline(
    task: Literal["emotion"],
    model: str | Path | TaskModel,
    *,
    asr: Recognizer | str | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    speaker: Known | None = None,
) -> Pipeline[EmotionResult]: ...
@overload
def pipeline(
    task: Literal["sentiment"],
    model: str | Path | TaskModel,
    *,
    asr: Recognizer | str | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    speaker: Known | None = None,
) -> Pipeline[SentimentResult]: ...
@overload
def pipeline(
    task: Literal["verification"],
    model: str | Path | TaskModel,
    *,
    asr: Recognizer | str | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Pipeline[EmbeddingResult]: ...
def pipeline(
    task: str,
    model: str | Path | TaskModel,
    *,
    asr: Recognizer | str | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    speaker: Known | None = None,
) -> Pipeline[Any]:
    """A callable that takes recordings and gives results of `task`.

    Args:
        task: `emotion`, `sentiment` or `verification`; the model's own.
        model: A fine-tuned model folder, or what `load_task_model` gave.
        asr: Makes the transcripts that are missing: a function of samples and sampling rate, or a speech recognition
            model of transformers that lies on this machine, by folder or id.
        device: By default the GPU where there is one.
        precision: `bf16` or, on a CPU, `int8` for matrix products, quicker where the machine is good at it and a little
            less exact; what they cost stands in docs/performance.md.
        speaker: For a model that normalises by the speaker (`cmvn=speaker`): recordings of the one who speaks in all
            that the pipeline will hear, these too if you like; samples as a `Recording`, which has their rate. The
            more, the better, and fewer than ten are few, as every result's notes say, unless the model was trained
            with `random_speaker_mean` (docs/results.md); which cannot be used stands in `Pipeline.unusable` and in
            every result's notes.

    Raises:
        InputError: The model cannot be loaded (`load_task_model`) or is of another task; no such precision; no
            recording of the speaker can be used, or the model has no use for any.
    """
    if task not in _HEADS:
        raise InputError(f"unknown task '{task}'{did_you_mean(task, _HEADS)}: choose from {', '.join(_HEADS)}")
    loaded = model if isinstance(model, TaskModel) else load_task_model(model)
    if loaded.task != task:
        where = "the model" if isinstance(model, TaskModel) else str(model)
        verb = "verify" if loaded.task == "verification" else "predict"
        mend = f"use `ctal {verb}`, or pipeline('{loaded.task}')"
        raise InputError(f"{where}: a model of {loaded.task}, not of {task}; {mend}")
    return Pipeline(loaded, asr=asr, device=device, precision=precision, speaker=speaker)


# Files ------------------------------------------------------------------------------------------------------------


def find_recordings(
    paths: Iterable[Path], *, text: str | None = None, transcripts: Path | None = None
) -> list[Recording]:
    """Files, recordings in folders as `ctal prepare folder` finds them, and those that manifests list, in that order.

    The transcript of x.wav is `text`, for a single file; else what the manifest `transcripts` (CSV, TSV or JSON lines
    with `audio` and `text`, as for `ctal prepare manifest`) has for it; without one, what the manifest has that lists
    it, or x.txt beside it. Raises `InputError` for a path that is missing, a folder without recordings, a `text` for
    several recordings, and a manifest that has none of them.
    """
    if text is not None and transcripts:
        raise InputError("--text and --transcripts are both given; leave one out")
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if path.is_dir():
            # The corpus also yields transcripts without a recording, as NAME.*; here nobody asked for those.
            listed = (each for each in recordings_folder.prepare(path) if each.audio.suffix != WITHOUT_RECORDING)
            found.extend((each.audio, each.text) for each in listed)
        elif path.is_file() and path.suffix.lower() in recordings_manifest.SUFFIXES:
            found.extend((each.audio, each.text) for each in recordings_manifest.prepare(path))
        elif path.exists():
            found.append((path, None if text or transcripts else recordings_folder.transcript_beside(path)))
        else:
            raise InputError(f"{path}: no such file or folder; check the path")
    if text is not None and len(found) > 1:
        raise InputError(f"--text is the transcript of one recording, not of {len(found)}; use --transcripts FILE")
    if text is not None:
        found = [(path, text) for path, _ in found]
    elif transcripts:
        known = {each.audio.resolve(): each.text for each in recordings_manifest.prepare(transcripts)}
        found = [(path, known.get(path.resolve())) for path, _ in found]
        if not any(path.resolve() in known for path, _ in found):
            raise InputError(f"{transcripts}: names none of the recordings; its paths are relative to its own folder")
    return [Recording(path, words) for path, words in found]


def _decoded_ahead(recordings: Iterable[Recording]) -> Iterator[tuple[Recording, Future[np.ndarray]]]:
    """Decodes a few recordings ahead, as `_decode` does: soundfile and soxr let other threads run meanwhile."""
    waiting: deque[tuple[Recording, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for recording in recordings:
            waiting.append((recording, pool.submit(_decode, recording)))
            if len(waiting) > _FILES_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _decode(recording: Recording) -> np.ndarray:
    """(N,) float32 at `SAMPLING_RATE`; raises `InputError`."""
    audio, name = recording.audio, recording.name
    if isinstance(audio, str | Path):
        return load_audio(Path(audio))
    if isinstance(audio, Tensor):
        audio = (audio.float() if audio.is_floating_point() else audio).detach().cpu().numpy()
    rate = checked_rate(recording.sampling_rate, name)
    if not isinstance(audio, np.ndarray) or audio.dtype.kind != "f":
        kind = getattr(audio, "dtype", type(audio).__name__)
        raise InputError(f"{name}: {kind} is neither a path nor samples in floating point, scaled to ±1; convert it")
    if audio.ndim != 1 or len(audio) == 0:
        raise InputError(f"{name}: has shape {audio.shape}; pass one channel, (samples,), of at least one")
    if not np.isfinite(audio).all():
        raise InputError(f"{name}: has NaN or infinite samples; leave it out")
    return resample(audio.astype(np.float32), rate)


def _raised(result: ResultT | InputError) -> ResultT:
    if isinstance(result, InputError):
        raise result
    return result


def _given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.float()


def _plain(value: Any) -> Any:
    """Lists, mappings and numbers as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value
