"""Pre-training: masked language modelling and masked cross-modal acoustic modelling on stores of utterances."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ctal.batching import Corpus, PretrainingDataset, digest, hold_out
from ctal.configuration_ctal import CtalAudioConfig, CtalConfig
from ctal.diagnostics import diagnose
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.files import folder_aside, sha256_of, write_json
from ctal.heard import Heard
from ctal.masking import IGNORED
from ctal.model_folders import WEIGHTS, architecture_of, load_whole, loading
from ctal.modeling_ctal import CtalForPreTraining
from ctal.objective import CorpusObjective, corpus_features, environment, open_corpus, refuse_some_of, refuse_twice
from ctal.processing_ctal import CtalProcessor, longest_window
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store
from ctal.text import SPECIAL_TOKENS, encode_transcript, train_tokenizer
from ctal.training import Batch, Forward, Metrics, Progress, Silence, evaluation_device, process_state, train

_OF_FEATURES = ("cmvn", "pitch")
"""Architecture fields that say how a new model's features are made."""

Evaluation = dict[str, Any]
"""What `evaluation.json` holds: `step`, `held_out`, `comparisons` (see `ctal.diagnostics.Comparison`), provenance."""


def pretrain(
    stores: Sequence[Path],
    out: Path,
    config: PretrainConfig,
    *,
    size: str = "base",
    architecture: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    start_from: Path | None = None,
    resume: bool = False,
    diagnosed: bool = True,
    progress: Progress | None = None,
) -> Evaluation | None:
    """Pre-trains on `stores`; leaves `out/model` and what `ctal.training.train` leaves.

    Args:
        size: A name of `ctal.configuration_ctal.SIZES`.
        architecture: Fields of the model that differ from `size`.
        tokenizer: Folder of a tokenizer, for a new model.
        start_from: A `from_pretrained` folder whose weights, tokenizer and features are continued; then `size`,
            `architecture` and `tokenizer` are its own.
        diagnosed: Also measure what the best model, the one in `out/model`, has learned.

    Returns:
        What that model has learned (`evaluate_model`), written to `out/evaluation.json` too; None where it is not
        measured, and on other processes than the main one.

    Raises:
        InputError: Something given is missing or does not fit, or nothing can be masked; else as `ctal.training.train`.
    """
    disable_progress_bar()
    corpus = open_corpus(stores)
    if start_from is None:
        if tokenizer is None:
            if resume:
                raise InputError("--resume: repeat the command that began the run, with its --tokenizer or --from")
            raise InputError("--tokenizer is missing: train one with `ctal tokenizer STORE... TOKENIZER`")
        processor = new_processor(tokenizer, architecture or {})
        torch.manual_seed(config.seed)
        model = new_model(size, processor, architecture or {})
    else:
        processor, model = load_model(start_from)
    objective = PretrainingObjective(model, processor, corpus, config, start_from)
    objective.refuse_to_learn_nothing()
    if config.cuda_graphs:
        _check_recordable(config)
        model.record_passes()
    progress = progress or Silence()
    for note in objective.notes():
        progress.note(note)
    train(objective, config, out, resume=resume, progress=progress)
    model.forget_passes()
    evaluation = evaluate_model(stores, out / "model") if diagnosed else None
    if evaluation is not None:
        write_json(out / "evaluation.json", evaluation)
    return evaluation


def _check_recordable(config: PretrainConfig) -> None:
    if config.gradient_checkpointing:
        raise InputError("cuda_graphs=true and gradient_checkpointing=true do not go together: leave one out")
    state = process_state()
    if state.num_processes > 1:
        raise InputError(f"cuda_graphs=true is for one process, and there are {state.num_processes}: leave it out")
    if state.device is None or state.device.type != "cuda":
        raise InputError(f"cuda_graphs=true is for a GPU, and the model is on {state.device}: leave it out")


def evaluate_model(stores: Sequence[Path], folder: Path) -> Evaluation | None:
    """Measures the model in `folder` on the held-out part of `stores`: `ctal.diagnostics`, as JSON.

    What is held out, and under which masks, is what the run that made the model held out. On other data it is what such
    a run would hold out; how much of either has been trained on is said in `held_out`. A model from elsewhere is
    measured with the default settings. Only the main process measures; others get None. Raises `InputError` for only
    some of a run's stores: another part of them would be held out.
    """
    if not process_state().is_main_process:
        return None
    processor, model = load_model(folder)
    run = folder / "run.json"
    saved = json.loads(run.read_text()) if run.is_file() else {"config": {}, "step": 0}
    corpus = open_corpus(stores)
    is_own = saved.get("data_hash") == corpus.content_hash
    if not is_own:
        refuse_some_of(folder, saved, corpus)
    objective = PretrainingObjective(model, processor, corpus, make_config(PretrainConfig, saved["config"]), folder)
    is_known = is_own or len(objective.heard.sounds)
    extractor = processor.feature_extractor
    model.to(evaluation_device())  # pyright: ignore[reportArgumentType]
    comparisons = diagnose(
        model,
        objective.dataset,
        objective.split.train,
        objective.split.validation,
        parts=extractor.parts,
    )
    return {
        "step": saved["step"],
        "held_out": objective.split.rule if is_known else f"{objective.split.rule}; training may have heard it",
        "data_hash": objective.corpus.content_hash,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        **environment(),
    }


def load_model(folder: Path) -> tuple[CtalProcessor, CtalForPreTraining]:
    """A pre-trained model with its processor; raises `InputError` where `folder` does not hold both."""
    architecture = architecture_of(folder)
    if architecture != CtalForPreTraining.__name__:
        raise InputError(
            f"{folder}: a {architecture}, which has no heads of pre-training; give the RUN/model of a `ctal pretrain`"
        )
    model, processor, _ = load_whole(folder, CtalForPreTraining)
    return processor, model


def size_of(folder: Path) -> str:
    """The name in `ctal.configuration_ctal.SIZES` that the model in `folder` is nearest to."""
    architecture_of(folder)  # says what is wrong with a folder that is not a model's
    return CtalConfig.from_pretrained(folder).size


def make_tokenizer(sources: Sequence[Path], out: Path, vocab_size: int) -> int:
    """Trains a tokenizer on the transcripts of stores, their test parts left out, and on the lines of text files.

    Returns its size. Raises `InputError` where one of `sources` is neither, or is given twice, or `out` exists and is
    not empty.
    """
    refuse_twice(sources)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose another folder")
    tokenizer = train_tokenizer(chain.from_iterable([_lines_of(source) for source in sources]), vocab_size)
    with folder_aside(out) as folder:
        tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _lines_of(source: Path) -> Iterable[str]:
    """Raises `InputError` at once where `source` is neither a store nor a text file."""
    if source.is_file():
        try:
            return source.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{source}: not a text file in UTF-8; give a store or a text file") from None
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    if not source.exists():
        raise InputError(f"{source}: no such store or text file")
    store = Store(source)
    rows = [row for row, split in enumerate(store.index.splits) if split in (None, "train")]
    return (text for row in rows if (text := store.read(row).text))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; raises `InputError` where there is none, or its special ids are not ours."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer there; train one with `ctal tokenizer STORE... TOKENIZER`")
    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for expected, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.convert_tokens_to_ids(token) != expected:
            raise InputError(f"{folder}: {token} must have id {expected}; train a tokenizer with `ctal tokenizer`")
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal where a text has the same ids."""
    # Without what a call leaves behind in it: how it pads and cuts.
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]


def new_processor(tokenizer: Path, architecture: Mapping[str, Any]) -> CtalProcessor:
    """What makes the inputs of a model of that architecture; raises `InputError` where there is no tokenizer."""
    return CtalProcessor(new_extractor(architecture), load_tokenizer(tokenizer))


def new_extractor(architecture: Mapping[str, Any]) -> CtalFeatureExtractor:
    """Raises `InputError` for a `cmvn` or a `pitch` that there is not."""
    asked = CtalAudioConfig(**{name: architecture[name] for name in _OF_FEATURES if name in architecture})
    return CtalFeatureExtractor(**{name: getattr(asked, name) for name in _OF_FEATURES})


def new_model(size: str, processor: CtalProcessor, architecture: Mapping[str, Any]) -> CtalForPreTraining:
    """A model with fresh weights that fits the processor, whose inputs from then on fit the model."""
    extractor = processor.feature_extractor
    fitted = {name: getattr(extractor, name) for name in ("feature_size", *_OF_FEATURES)}
    fitted["vocab_size"] = len(processor.tokenizer)
    config = CtalConfig.of_size(size, **{**architecture, **fitted})
    extractor.max_frames = longest_window(processor, config)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, config.text.max_tokens)
    return CtalForPreTraining(config)


class PretrainingObjective(CorpusObjective[CtalForPreTraining, PretrainConfig]):
    """MLM + MCAM on the training part of a corpus, validated on the held-out part."""

    def __init__(
        self,
        model: CtalForPreTraining,
        processor: CtalProcessor,
        corpus: Corpus,
        config: PretrainConfig,
        start_from: Path | None = None,
    ) -> None:
        """`start_from` is the folder that the weights come from, where they are not new."""
        self.split = hold_out(corpus, config.validation_share)
        if config.train_share < 1:
            order = sorted(self.split.train.tolist(), key=lambda row: digest("train_share", corpus.ids[row]))
            kept = order[: max(1, round(config.train_share * len(order)))]
            self.split = self.split._replace(train=np.sort(np.array(kept)))
        self.max_frames = min(config.max_frames, model.config.audio.max_frames)
        rows = {"train_rows": self.split.train, "validation_rows": self.split.validation}
        super().__init__(model, processor, corpus, config, **rows, max_frames=self.max_frames)
        self.dataset = make_dataset(corpus, processor, config, max_frames=self.max_frames, seed=config.seed)
        self.start = {"path": str(start_from), "sha256": sha256_of(start_from / WEIGHTS)} if start_from else None
        self.heard = Heard.of(start_from) if start_from else Heard()
        if len(self.heard.sounds):
            known = int(np.isin(corpus.recordings[self.split.validation], self.heard.sounds).sum())
            said = f"; {known} of their utterances were trained on before" if known else ""
            self.split = self.split._replace(rule=self.split.rule + said)

    def refuse_to_learn_nothing(self) -> None:
        """Raises `InputError` where nothing of the training part can be masked."""
        if self.config.audio_mask_ratio:
            return
        if not self.config.text_mask_ratio:
            raise InputError(
                "text_mask_ratio=0, audio_mask_ratio=0: nothing is masked, and so nothing learned; raise one of them"
            )
        if not self.corpus.has_text[self.split.train].any():
            raise InputError(
                "audio_mask_ratio=0: words alone are masked, and no training utterance has a transcript; raise it, or "
                "add a store with transcripts"
            )

    def identity(self) -> dict[str, Any]:
        """See `ctal.training.Objective`, as for all methods that it has."""
        return {
            **({"start_from": self.start["sha256"]} if self.start else {}),
            "data_hash": self.corpus.content_hash,
            "held_out": f"{digest(*self.split.validation.tolist()):016x}",
            "tokenizer": tokenizer_hash(self.processor.tokenizer),
            "features": self.processor.feature_extractor.analysis,
            **self.model.config.architecture(),
        }

    def score(self, metrics: Metrics) -> float:
        """The product of both losses, as its logarithm: a per cent of either counts as much.

        In their sum nats outweigh L1: a text encoder that begins to learn few transcripts by heart would end the
        progress of the audio.
        """
        # No masked word at all is a loss of 0; one that is not a number must not be the best.
        return sum(math.log(metrics[name]) for name in ("text_loss", "audio_loss") if metrics[name] != 0)

    def rate_scale(self, parameter: str) -> float:
        return 1.0

    def notes(self) -> list[str]:
        """What the user should know of the data."""
        hours = [float(self.corpus.seconds[rows].sum()) / 3600 for rows in self.split[:2]]
        notes = [
            f"{len(self.split.train)} utterances ({hours[0]:.2f} h) to train on, {len(self.split.validation)} "
            f"({hours[1]:.2f} h) to validate on: {self.split.rule}"
        ]
        if without := int((~self.corpus.has_text[self.split.train]).sum()):
            notes.append(f"{without} utterances without a transcript take part in acoustic modelling only")
        seconds = self.max_frames / self.frames_per_second
        if longer := int((self.corpus.seconds[self.split.train] > seconds).sum()):
            notes.append(
                f"{longer} recordings are longer than {seconds:.1f} s: of each a random window is used in every epoch, "
                f"with the first {self.model.config.text.max_tokens} tokens of its transcript"
            )
        return notes + self.dataset.features.notes()

    def counts(self, batch: Batch) -> Tensor:
        """Masked tokens and masked frames."""
        return torch.stack([(batch["labels"] != IGNORED).sum(), batch["mask_time_indices"].sum()])

    def losses(self, model: Forward, batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        output = model(**batch, token_count=counts[0], frame_count=counts[1])
        return {"loss": output.loss, "text_loss": output.text_loss, "audio_loss": output.audio_loss}

    def evaluate(self, model: Forward, batches: Iterator[Batch], reduce: Callable[[Tensor], Tensor]) -> Metrics:
        """Both losses over all held-out tokens and frames, and their sum."""
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            counts = self.counts(batch)
            sums = self.losses(model, batch, torch.ones_like(counts))
            totals += torch.stack([sums["text_loss"], sums["audio_loss"], *counts]).double().cpu()
        text, audio, tokens, frames = reduce(totals.float()).tolist()
        text_loss, audio_loss = text / max(tokens, 1), audio / max(frames, 1)
        return {"loss": text_loss + audio_loss, "text_loss": text_loss, "audio_loss": audio_loss}

    def save_model(self, folder: Path, step: int, metrics: Metrics) -> None:
        self.write_model(folder)
        self.heard.and_sounds(self.corpus.recordings[self.split.train]).save(folder)
        provenance = {
            "task": "pretraining",
            "step": step,
            "metrics": metrics,
            "validation": self.split.rule,
            "start_from": self.start,
            **self.provenance(),
        }
        write_json(folder / "run.json", provenance)
        (folder / "README.md").write_text(model_card(self.model, provenance))


def make_dataset(
    corpus: Corpus, processor: CtalProcessor, config: PretrainConfig, *, max_frames: int, seed: int
) -> PretrainingDataset:
    """Masked utterances of `corpus`, tokenized and analysed by `processor`."""
    return PretrainingDataset(
        corpus,
        encode=partial(encode_transcript, tokenizer=processor.tokenizer),
        features=corpus_features(corpus, processor.feature_extractor, cache_megabytes=config.cache_megabytes),
        masking=config,
        vocab_size=len(processor.tokenizer),
        mask_id=SPECIAL_TOKENS.index("<mask>"),
        special_ids=len(SPECIAL_TOKENS),
        max_frames=max_frames,
        seed=seed,
    )


def model_card(model: CtalForPreTraining, provenance: Mapping[str, Any]) -> str:
    """A model card in the hub's form: what the model is, what it learned from, how good it is, how to use it."""
    config, metrics = model.config, provenance["metrics"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    corpora = ", ".join(provenance["corpus"])
    synthetic = "\nTrained on synthetic speech: good for trying things out, not for real recordings.\n"
    return f"""---
library_name: ctal
pipeline_tag: feature-extraction
tags: [speech, text, multimodal, ctal]
---

# CTAL, pre-trained on {corpora}

A joint encoder of speech and its transcript (Li et al., EMNLP 2021), pre-trained with masked language modelling and
masked cross-modal acoustic modelling.
{synthetic if "demo" in provenance["corpus"] else ""}
| | |
|---|---|
| parameters | {parameters:,} |
| layers | {config.text.num_hidden_layers} text + {config.audio.num_hidden_layers} audio, hidden {config.hidden_size} |
| frames joined | {config.audio.frame_stack} |
| audio self-attention | {"causal" if config.audio_is_causal else "bidirectional"} |
| training audio | {provenance["audio_hours"]} h of {corpora}, data hash `{provenance["data_hash"][:16]}` |
| held out | {provenance["validation"]} |
| step | {provenance["step"]} of {provenance["config"]["steps"]} |
| held-out MLM cross-entropy | {_measured(metrics["text_loss"], "nats a masked token")} |
| held-out MCAM L1 | {_measured(metrics["audio_loss"], "a dimension of a masked frame")} |
| software | {", ".join(f"{name} {version}" for name, version in provenance["versions"].items())} |

```python
from ctal import CtalModel, CtalProcessor

processor = CtalProcessor.from_pretrained("this folder")
model = CtalModel.from_pretrained("this folder")
states = model(**processor(text=["hello"], audio=[wave], sampling_rate=16000))
```

All settings of the run are in `run.json`. What the weights may be used for follows from the terms of the recordings
that they learned from.
"""


def _measured(loss: float, unit: str) -> str:
    """Exactly 0 is the sum over no masked token or frame, not the loss of a perfect model."""
    return f"{loss:.4f} {unit}" if loss else "not measured: nothing was masked"
