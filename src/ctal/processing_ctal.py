"""`CtalProcessor`: recordings and transcripts to the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ctal.configuration_ctal import CtalConfig
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor, Padding, Wave, check_padding
from ctal.text import normalize_transcript


class CtalProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer, saved and loaded together."""

    feature_extractor: CtalFeatureExtractor
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, feature_extractor: CtalFeatureExtractor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(feature_extractor, tokenizer)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (two modalities of the base class's four)
        self,
        text: str | Sequence[str | None] | None = None,
        audio: Wave | Sequence[Wave] | None = None,
        sampling_rate: int | None = None,
        padding: Padding = True,
        truncation: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A batch of the model's inputs from transcripts, recordings or both, one of each or lists of equal length.

        Returns `input_ids` and `attention_mask` (B, L) int64 and, with audio, `input_features` (B, T, D) float32 and
        `feature_attention_mask` (B, T) int64. Transcripts are normalised by `normalize_transcript`; one that is None
        is `<s></s>`, and so are all when there is only audio. Raises `InputError` when there is neither, when the
        numbers differ, when a transcript is longer than the tokenizer's `model_max_length` (510) unless `truncation`
        cuts it, and as `CtalFeatureExtractor` does.
        """
        if text is None and audio is None:
            raise InputError("neither text nor audio is given; pass one of them or both")
        inputs: dict[str, Any] = {}
        if audio is not None:
            inputs.update(self.feature_extractor(audio, sampling_rate, padding, truncation, return_tensors))
        num_recordings = len(inputs["input_features"]) if audio is not None else None
        if text is None:
            texts = [None] * (num_recordings or 0)
        else:
            texts = [text] if isinstance(text, str) else list(text)
        if num_recordings not in (None, len(texts)):
            raise InputError(f"{len(texts)} texts for {num_recordings} recordings; pass None for a missing transcript")
        return BatchFeature(self._tokenize(texts, padding, truncation, return_tensors) | inputs)

    def _tokenize(
        self, texts: Sequence[str | None], padding: Padding, truncation: bool, return_tensors: str
    ) -> dict[str, Any]:
        if not texts:
            raise InputError("text is an empty list; pass at least one transcript, or None for a missing one")
        check_padding(padding)
        normalized = ["" if text is None else normalize_transcript(text) for text in texts]
        encoded = self.tokenizer(normalized, truncation=truncation, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        limit = self.tokenizer.model_max_length
        if max(lengths) > limit:
            i = lengths.index(max(lengths))
            raise InputError(f"text[{i}] has {lengths[i]} tokens, more than {limit}; split it or pass truncation=True")
        if not padding and len(set(lengths)) > 1:
            raise InputError("transcripts of different lengths do not fit into one tensor; pass padding=True")
        padded = self.tokenizer.pad(encoded, return_tensors=return_tensors, verbose=False)
        return {name: padded[name] for name in self.tokenizer.model_input_names}


AutoProcessor.register(CtalConfig, CtalProcessor, exist_ok=True)


def longest_window(processor: CtalProcessor, architecture: CtalConfig) -> int:
    """Frames of a recording that a model takes at once; in training the recipe may cut to fewer."""
    return min(processor.feature_extractor.max_frames, architecture.audio.max_frames)
