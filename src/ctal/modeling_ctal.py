"""The CTAL model: a RoBERTa text encoder, and an audio encoder that attends to the text.

Source: Li et al., "CTAL: Pre-training Cross-modal Transformer for Audio-and-Language Representations", EMNLP 2021,
section 3.1 (encoders), 3.2–3.3 (heads of pre-training) and 3.5 (heads of tasks, with `ctal.fusion`).

Inside the model the utterances of a batch stand one behind the other, without padding: it is removed on the way in,
where there is any, and put back only in outputs that a caller gets. Query, key and value are one matrix product. Where
only the losses are wanted, the last audio layer computes queries and feed-forward for the masked frames alone, and the
heads run on masked positions alone.

Shape suffixes: B utterances, L tokens and T frames of the longest one; N packed positions of all utterances, S selected
ones of those, M masked frames; D hidden size, F dimensions of a frame, V vocabulary, C classes. With `frame_stack` k a
position of the audio encoder stands for k frames, and there are ceil(T/k) of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForAudioXVector,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from ctal.attention import Lengths, attention_weights, packed_attention
from ctal.configuration_ctal import CtalAudioConfig, CtalConfig, CtalTextConfig
from ctal.dropout import Dropout
from ctal.errors import InputError
from ctal.features import NUM_PITCH
from ctal.fusion import (
    FUSIONS,
    Fused,
    OrthogonalNorm,
    Pools,
    PoolStandardisation,
    segment_attend,
    segment_max,
    segment_statistics,
)
from ctal.gelu import is_plain, linear_of_gelu
from ctal.masking import IGNORED
from ctal.packing import (
    FramesToPredict,
    Packed,
    PretrainingBatch,
    Selection,
    TokensToPredict,
    fill,
    pack,
    places_of,
    stack_frames,
    stack_mask,
    unstack_frames,
)
from ctal.prosody import NUM_FUNCTIONALS, Prosody
from ctal.recording import RecordedPasses, can_record

SCORES = tuple(half / 2 for half in range(-6, 7))
"""Of `regression_loss="histogram"`: -3 … 3, half a point apart."""


@dataclass
class CtalModelOutput(ModelOutput):
    """Last states of both encoders."""

    text_hidden_state: Tensor | None = None
    """(B, L, D); zero at padding."""
    audio_hidden_state: Tensor | None = None
    """(B, ceil(T / frame_stack), D); zero at padding; None without audio."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """With `output_attentions`: a layer each, (B, heads, ceil(T / frame_stack), L); zero at padding."""


@dataclass
class CtalForPreTrainingOutput(ModelOutput):
    """Losses, and without labels or with `output_hidden_states=True` everything else."""

    loss: Tensor | None = None
    """`text_loss + audio_loss` (paper, section 3.4)."""
    text_loss: Tensor | None = None
    """Cross-entropy in nats, a masked token."""
    audio_loss: Tensor | None = None
    """L1, a dimension of a masked frame."""
    logits: Tensor | None = None
    """(B, L, V)."""
    reconstruction: Tensor | None = None
    """(B, T, F)."""
    text_hidden_state: Tensor | None = None
    audio_hidden_state: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class CtalTaskOutput(ModelOutput):
    """What a head says of each utterance."""

    loss: Tensor | None = None
    """`task_loss + orthogonality_weight · orthogonality_loss`."""
    logits: Tensor | None = None
    """(B, C); scores of a regression are (B, 1)."""
    embeddings: Tensor | None = None
    """(B, 2·D), the fused vector before the classifier."""
    task_loss: Tensor | None = None
    """Cross-entropy in nats, or `regression_loss` of a score, an utterance."""
    orthogonality_loss: Tensor | None = None
    """Sum of |cos| between the pools of text and audio, an utterance (paper, section 3.5)."""


class SelfAttention(nn.Module):
    """Multi-head self-attention, post-norm."""

    def __init__(self, config: CtalTextConfig | CtalAudioConfig, causal: bool = False) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.causal = causal
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Residual(config.hidden_size, config)

    def forward(self, states_ND: Tensor, lengths: Lengths, selected: Selection | None = None) -> Tensor:
        """(N, D) → (N, D), or with `selected` queries → (S, D)."""
        dropout = self.attention_dropout if self.training else 0.0
        # A causal query among selected ones no longer stands at its own position, so all are computed; likewise where
        # the layer is another than its weight tells, such as an adapter.
        if selected is None or self.causal or not is_plain(self.query_key_value):
            query, key, value = self._heads(self.query_key_value(states_ND), 3)
            attended = packed_attention(query, key, value, lengths, lengths, causal=self.causal, dropout=dropout)
            if selected is None:
                return self.output(attended.flatten(1), states_ND)
            attended = attended.index_select(0, selected.index)
        else:
            weight, bias, width = self.query_key_value.weight, self.query_key_value.bias, states_ND.shape[1]
            key, value = self._heads(F.linear(states_ND, weight[width:], bias[width:]), 2)
            states_SD = states_ND.index_select(0, selected.index)
            (query,) = self._heads(F.linear(states_SD, weight[:width], bias[:width]), 1)
            attended = packed_attention(query, key, value, selected.lengths, lengths, dropout=dropout)
        return self.output(attended.flatten(1), states_ND.index_select(0, selected.index))

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        return projected.unflatten(1, (parts, self.heads, -1)).unbind(1)


class CrossAttention(nn.Module):
    """Multi-head attention from frames to the last text state, post-norm."""

    def __init__(self, config: CtalAudioConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.output = Residual(config.hidden_size, config)

    def forward(
        self, states_ND: Tensor, lengths: Lengths, text: Packed, weights: list[list[Tensor]] | None = None
    ) -> Tensor:
        """(N, D) → (N, D); appends each utterance's attention weights to `weights` where a list is given."""
        query = self.query(states_ND).unflatten(1, (self.heads, -1))
        key, value = self.key_value(text.values).unflatten(1, (2, self.heads, -1)).unbind(1)
        dropout = self.attention_dropout if self.training else 0.0
        if weights is not None:
            weights.append(attention_weights(query, key, lengths, text.lengths))
        attended = packed_attention(query, key, value, lengths, text.lengths, dropout=dropout)
        return self.output(attended.flatten(1), states_ND)


class Residual(nn.Module):
    """LayerNorm(x + Dropout(Linear(y))), which ends every sub-layer."""

    def __init__(self, width: int, config: CtalTextConfig | CtalAudioConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, update: Tensor, states: Tensor) -> Tensor:
        return self.add(self.dense(update), states)

    def add(self, projected: Tensor, states: Tensor) -> Tensor:
        """The same behind the linear layer."""
        return self.norm(states + self.dropout(projected))


class FeedForward(nn.Module):
    """Linear → GELU → linear, post-norm."""

    def __init__(self, config: CtalTextConfig | CtalAudioConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, states: Tensor) -> Tensor:
        return self.output.add(linear_of_gelu(self.dense(states), self.output.dense), states)


class TextLayer(GradientCheckpointingLayer):
    def __init__(self, config: CtalTextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states_ND: Tensor, lengths: Lengths) -> Tensor:
        return self.feed_forward(self.attention(states_ND, lengths))


class AudioLayer(GradientCheckpointingLayer):
    def __init__(self, config: CtalAudioConfig, causal: bool, sees_text: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(config, causal)
        self.cross_attention = CrossAttention(config) if sees_text else None
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        states_ND: Tensor,
        lengths: Lengths,
        text: Packed,
        selected: Selection | None = None,
        weights: list[list[Tensor]] | None = None,
    ) -> Tensor:
        states = self.attention(states_ND, lengths, selected)
        if self.cross_attention is not None:
            states = self.cross_attention(states, selected.lengths if selected else lengths, text, weights)
        return self.feed_forward(states)


class TextEncoder(nn.Module):
    """RoBERTa (Liu et al., 2019)."""

    def __init__(self, config: CtalTextConfig) -> None:
        super().__init__()
        self.first_position = config.pad_token_id + 1
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens: Packed, layers: list[Tensor] | None = None) -> Packed:
        """(N,) ids → (N, D) states; appends those of every layer to `layers` where a list is given."""
        positions_N = tokens.index % tokens.shape[1] + self.first_position
        embedded = self.word_embeddings(tokens.values) + self.token_type_embedding
        states_ND = self.dropout(self.norm(embedded + self.position_embeddings(positions_N)))
        for layer in self.layers:
            states_ND = layer(states_ND, tokens.lengths)
            if layers is not None:
                layers.append(states_ND)
        return tokens.with_values(states_ND)


class AudioEncoder(nn.Module):
    """Frames, attending to each other and, with `sees_text`, to the last state of the text."""

    def __init__(self, config: CtalAudioConfig, causal: bool, sees_text: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(config.feature_size * config.frame_stack, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(AudioLayer(config, causal, sees_text) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        frames: Packed,
        text: Packed,
        selected: Selection | None = None,
        weights: list[list[Tensor]] | None = None,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """(N, F·frame_stack) → (N, D) states, or with `selected` positions → (S, D).

        Appends what each layer attends to to `weights`, and its states to `layers`, where lists are given.
        """
        embedded = self.dense(frames.values) + self.token_type_embedding
        positions_N = frames.index % frames.shape[1]
        states_ND = self.dropout(self.norm(embedded + self.position_embeddings(positions_N)))
        for layer in self.layers:
            last = layer is self.layers[-1]
            states_ND = layer(states_ND, frames.lengths, text, selected if last else None, weights)
            if layers is not None:
                layers.append(states_ND)
        return states_ND


class PredictionHead(nn.Module):
    """Dense → GELU → LayerNorm, then a linear decoder."""

    def __init__(self, config: CtalTextConfig | CtalAudioConfig, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, outputs)

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(states))))


class CtalPreTrainedModel(PreTrainedModel):
    """Initialisation and the interface of transformers' models."""

    config_class = CtalConfig
    config: CtalConfig
    base_model_prefix = "ctal"
    main_input_name = "input_features"
    supports_gradient_checkpointing = True

    def compile_layers(self) -> None:
        """Has torch compile every encoder layer when it is first used, for any lengths: faster on a GPU only."""
        # Text and audio, every position or masked ones, with gradients or without: more kinds than torch allows.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for module in self.modules():
            if isinstance(module, TextLayer | AudioLayer):
                module.compile(dynamic=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights with `initializer_range` (RoBERTa), zero biases, identity norms; positions by `position_init`.

        Positions that are small and random beside features, as RoBERTa's are, leave it to chance how soon the audio
        finds the words that it is about.
        """
        std = self.config.text.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, WeightedLayerSum):
            nn.init.zeros_(module.weight)
        elif isinstance(module, PoolStandardisation):
            module.mean_4D.zero_()
            module.deviation_4D.fill_(1.0)
        elif isinstance(module, Prosody):
            module.initialize()  # behind its linear layer, since transformers visits children first
        elif isinstance(module, TextEncoder | AudioEncoder):
            nn.init.normal_(module.token_type_embedding, std=std)
            if self.config.position_init == "sinusoidal":
                # transformers visits children first, so these take the place of normal ones.
                inputs = module.dense.in_features if isinstance(module, AudioEncoder) else 1
                positions = module.position_embeddings.weight
                positions.copy_(std * inputs**0.5 * sinusoids(*positions.shape))


def sinusoids(positions: int, width: int) -> Tensor:
    """(positions, width) of Vaswani et al. (2017, section 3.5), scaled to a mean square of 1."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width] * 2**0.5


class CtalModel(CtalPreTrainedModel):
    """Both encoders, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^(text_head|audio_head|head|classifier)\."]  # noqa: RUF012 (of any other)

    def __init__(self, config: CtalConfig) -> None:
        super().__init__(config)
        self.text_encoder = TextEncoder(config.text)
        self.audio_encoder = AudioEncoder(config.audio, config.audio_is_causal, config.audio_sees_text)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> CtalModelOutput:
        """Encodes a batch of utterances.

        Args:
            input_ids: (B, L) token ids, `<s>` … `</s>`. None stands for an empty transcript, `<s></s>`.
            attention_mask: (B, L), 1 at tokens, 0 at padding, which is on the right. None: no padding.
            input_features: (B, T, F) normalised features, or (N, F), those of all utterances one behind the other,
                without padding. None: the audio encoder is not run.
            feature_attention_mask: (B, T), likewise; a row of zeros is an utterance without a recording. Of features
                without padding it tells whose they are.
            output_attentions: Also return what each frame attends to in the text.

        Raises:
            InputError: A shape, length or missing input that the model cannot take.
        """
        text, frames = self.pack_inputs(input_ids, attention_mask, input_features, feature_attention_mask)
        text = self.text_encoder(text)
        if frames is None:
            return CtalModelOutput(text_hidden_state=text.padded())
        weights: list[list[Tensor]] | None = [] if output_attentions else None
        frames = self.stacked(frames)
        audio = frames.with_values(self.audio_encoder(frames, text, weights=weights))
        return CtalModelOutput(
            text_hidden_state=text.padded(),
            audio_hidden_state=audio.padded(),
            cross_attentions=_padded_weights(weights, audio, text) if weights is not None else None,
        )

    def pack_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
    ) -> tuple[Packed, Packed | None]:
        """Inputs → packed tokens (N,) and packed frames (N, F), not yet `stacked`; checks both."""
        if input_ids is None:
            if input_features is None:
                raise InputError("neither input_ids nor input_features given: a batch needs one of them")
            ends = torch.tensor([self.config.text.bos_token_id, self.config.text.eos_token_id])
            recordings = _padded_shape(input_features, feature_attention_mask)[0]
            input_ids = ends.to(input_features.device).expand(recordings, 2)
        _check_dimensions("input_ids", input_ids, "(B, L)")
        tokens = pack(input_ids, _sizes("attention_mask", attention_mask, input_ids))
        if tokens.lengths.longest > self.config.text.max_tokens:
            raise InputError(
                f"input_ids has {tokens.lengths.longest} tokens, more than the model's {self.config.text.max_tokens}"
            )
        if input_features is None:
            return tokens, None
        frames = self._pack_features(input_features, feature_attention_mask)
        if frames.shape[0] != len(input_ids):
            raise InputError(f"{len(input_ids)} texts but {frames.shape[0]} recordings: give the same number")
        return tokens, frames

    def stacked(self, frames: Packed) -> Packed:
        """Packed frames (N, F) as the audio encoder takes them, (N, F·frame_stack)."""
        return stack_frames(frames, self.config.audio.frame_stack)

    def _pack_features(self, features: Tensor, mask: Tensor | None) -> Packed:
        """(B, T, F) or (N, F) features → packed (N, F)."""
        audio = self.config.audio
        if features.ndim == 2:
            if mask is None:
                raise InputError(
                    "input_features has two dimensions: it must be (B, T, F), or (N, F) with a feature_attention_mask"
                )
            if mask.ndim != 2:
                raise InputError(f"feature_attention_mask has shape {tuple(mask.shape)}: it must be (B, T)")
            sizes = _sizes("feature_attention_mask", mask, mask, may_be_empty=True)
            frames = places_of(sizes, mask.shape, features.device).with_values(features)
            if len(features) != len(frames.index):
                raise InputError(
                    f"input_features has {len(features)} frames without padding, but feature_attention_mask has "
                    f"{len(frames.index)} ones: there must be one for each frame"
                )
        else:
            _check_dimensions("input_features", features, "(B, T, F)")
            frames = pack(features, _sizes("feature_attention_mask", mask, features[..., 0], may_be_empty=True))
        if features.shape[-1] != audio.feature_size:
            raise InputError(
                f"input_features has {features.shape[-1]} dimensions a frame, "
                f"the model takes {audio.feature_size}: use the model's own feature extractor"
            )
        if frames.lengths.longest > audio.max_frames:
            raise InputError(
                f"input_features has {frames.lengths.longest} frames, more than the model's {audio.max_frames}: "
                "cut the recording"
            )
        return frames.with_values(frames.values.to(self.dtype))


class CtalForPreTraining(CtalPreTrainedModel):
    """CTAL with masked language modelling and masked cross-modal acoustic modelling (paper, sections 3.2 and 3.3)."""

    accepts_loss_kwargs = False
    """Tells transformers' `Trainer` to average the losses of accumulated batches: `forward` does not know its counts,
    and the `**_` would make it believe so."""
    _tied_weights_keys = {"text_head.decoder.weight": "ctal.text_encoder.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: CtalConfig) -> None:
        super().__init__(config)
        self.ctal = CtalModel(config)
        self._recorded: RecordedPasses | None = None
        self.text_head = PredictionHead(config.text, config.text.vocab_size)
        self.audio_head = PredictionHead(config.audio, config.audio.feature_size * config.audio.frame_stack)
        self.post_init()

    def record_passes(self) -> None:
        """Has a GPU record the passes of training as CUDA graphs, one for each of few sizes of a batch, and run those.

        The host, which takes most of the time of a small step, need not issue them again. Positions are filled up
        (`ctal.packing.fill`), so dropout draws other numbers. Gradients are in the parameters' `grad` after `backward`
        as ever, but hooks, DDP's too, do not hear of them. On other devices nothing changes.

        To be called last, when it is settled what is trained and how: what is changed later, but for values of weights,
        is not seen. Activations are not computed again. Memory may be twice a step's, in which something is recorded.
        Raises `InputError` for a model with attention dropout.
        """
        parts = {"text": self.config.text, "audio": self.config.audio}
        for name, part in parts.items():
            if part.attention_probs_dropout_prob:
                raise InputError(
                    f"attention_probs_dropout_prob={part.attention_probs_dropout_prob} of the {name} encoder cannot be "
                    "recorded (cuda_graphs=true): leave one out"
                )
        self._recorded = RecordedPasses(self._both_losses, self.parameters)

    def forget_passes(self) -> None:
        """Gives the memory of `record_passes` back."""
        self._recorded = None

    def get_input_embeddings(self) -> nn.Module:
        return self.ctal.text_encoder.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.text_head.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        feature_labels: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        token_count: Tensor | int | None = None,
        frame_count: Tensor | int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> CtalForPreTrainingOutput:
        """Predicts masked tokens and masked frames. The first four arguments are `CtalModel`'s.

        Args:
            labels: (B, L) original ids where a token is predicted, else -100.
            feature_labels: (B, T, F) original features, or (M, F), those of the frames that are predicted alone.
            mask_time_indices: (B, T) bool, frames that are predicted; padding never is.
            token_count: Predicted tokens of the whole step, over all ranks and microbatches, by which the sum of their
                losses is divided; None: those of this batch.
            frame_count: Predicted frames of the whole step, likewise.
            output_hidden_states: With labels, return all other outputs too, not the losses alone.
            output_attentions: Also return what each frame attends to in the text; implies `output_hidden_states`.
        """
        text, frames = self.ctal.pack_inputs(input_ids, attention_mask, input_features, feature_attention_mask)
        frames = None if frames is None else self.ctal.stacked(frames)
        # Before anything is computed, since a GPU is waited for to learn what is masked.
        tokens_to_predict = None if labels is None else self._tokens_to_predict(text, labels)
        frames_to_predict: FramesToPredict | None = None
        if feature_labels is not None:
            if input_features is None or frames is None or mask_time_indices is None:
                raise InputError("feature_labels need input_features and mask_time_indices")
            _check_shape("mask_time_indices", mask_time_indices, _padded_shape(input_features, feature_attention_mask))
            is_masked_BT = mask_time_indices.bool()
            if feature_attention_mask is not None:
                is_masked_BT = is_masked_BT & feature_attention_mask.bool()
            frames_to_predict = self._frames_to_predict(frames, feature_labels, is_masked_BT)
        has_labels = labels is not None or feature_labels is not None
        full = not has_labels or output_hidden_states or output_attentions

        output = CtalForPreTrainingOutput()
        if (
            self._recorded is not None
            and (can_record(text.index.device) and self.training and torch.is_grad_enabled() and not full)
            and (frames is not None and tokens_to_predict is not None and frames_to_predict is not None)
        ):
            batch = PretrainingBatch(text, frames, tokens_to_predict, frames_to_predict)
            losses = self._recorded_losses(self._recorded, batch, token_count, frame_count)
            output.text_loss, output.audio_loss = losses.unbind()
            output.loss = losses.sum()
            return CtalForPreTrainingOutput(**output)
        text = self.ctal.text_encoder(text)
        states: Tensor | None = None
        if full:
            output.text_hidden_state = text.padded()
            output.logits = text.with_values(self.text_head(text.values)).padded()
            if input_features is not None and frames is not None:
                weights: list[list[Tensor]] | None = [] if output_attentions else None
                audio = frames.with_values(self.ctal.audio_encoder(frames, text, weights=weights))
                states = audio.values
                output.audio_hidden_state = audio.padded()
                stacked = audio.with_values(self.audio_head(audio.values)).padded()
                longest = _padded_shape(input_features, feature_attention_mask)[1]
                output.reconstruction = unstack_frames(stacked, self.config.audio.frame_stack, longest)
                if weights is not None:
                    output.cross_attentions = _padded_weights(weights, audio, text)
        if tokens_to_predict is not None:
            output.text_loss = self._text_loss(text, tokens_to_predict, token_count)
        if frames is not None and frames_to_predict is not None:
            selected = frames_to_predict.positions
            if states is None:
                states_SD: Tensor = self.ctal.audio_encoder(frames, text, selected)
            else:
                states_SD = states.index_select(0, selected.index)
            output.audio_loss = self._audio_loss(states_SD, frames_to_predict, frame_count)
        losses = [loss for loss in (output.text_loss, output.audio_loss) if loss is not None]
        if losses:
            output.loss = torch.stack(losses).sum()
        return CtalForPreTrainingOutput(**output)  # in the order of the fields: `outputs[0]` is the loss

    def _recorded_losses(
        self,
        recorded: RecordedPasses,
        batch: PretrainingBatch,
        token_count: Tensor | int | None,
        frame_count: Tensor | int | None,
    ) -> Tensor:
        """(2,) losses of the text and of the audio, by what was recorded."""
        audio, device = self.config.audio, batch.text.index.device
        counts = (
            torch.as_tensor(len(wanted.index) if count is None else count, device=device)
            for wanted, count in ((batch.tokens, token_count), (batch.to_predict, frame_count))
        )
        batch = fill(batch, self.config.text.max_tokens, audio.max_position_embeddings, audio.frame_stack)
        return recorded(batch, torch.stack(list(counts)))

    def _both_losses(self, batch: PretrainingBatch, counts_2: Tensor) -> Tensor:
        """(2,) losses of the text and of the audio."""
        text = self.ctal.text_encoder(batch.text)
        states_SD = self.ctal.audio_encoder(batch.frames, text, batch.to_predict.positions)
        text_loss = self._text_loss(text, batch.tokens, counts_2[0])
        return torch.stack([text_loss, self._audio_loss(states_SD, batch.to_predict, counts_2[1])])

    def _tokens_to_predict(self, text: Packed, labels: Tensor) -> TokensToPredict:
        _check_shape("labels", labels, text.shape)
        labels_N = labels.flatten().index_select(0, text.index)
        index = (labels_N != IGNORED).nonzero().squeeze(1)
        return TokensToPredict(index, labels_N.index_select(0, index))

    def _frames_to_predict(self, frames: Packed, feature_labels: Tensor, is_masked_BT: Tensor) -> FramesToPredict:
        """`feature_labels` may be in either form."""
        size, device = self.config.audio.feature_size, frames.index.device
        is_padded = feature_labels.ndim != 2
        shape = (*is_masked_BT.shape, size) if is_padded else (len(feature_labels), size)
        _check_shape("feature_labels", feature_labels, torch.Size(shape))
        targets_MF = feature_labels[is_masked_BT] if is_padded else feature_labels

        slots = stack_mask(is_masked_BT, self.config.audio.frame_stack).flatten(0, 1)
        # On the host, once: the device need not be waited for again to learn where and how many they are.
        is_masked_Nk = slots.index_select(0, frames.index).cpu().numpy()
        any_N = is_masked_Nk.any(1)
        sizes_B = np.array(frames.lengths.sizes)
        ends_B, before_N = sizes_B.cumsum(), np.concatenate([[0], any_N.cumsum(dtype=np.int64)])
        sizes = (before_N[ends_B] - before_N[ends_B - sizes_B]).tolist()
        positions, index = (torch.from_numpy(np.flatnonzero(each)).to(device) for each in (any_N, is_masked_Nk[any_N]))
        if len(targets_MF) != len(index):
            raise InputError(f"feature_labels has {len(targets_MF)} frames, but mask_time_indices marks {len(index)}")
        return FramesToPredict(Selection(positions, Lengths(sizes, device)), index, targets_MF)

    def _text_loss(self, text: Packed, wanted: TokensToPredict, count: Tensor | int | None) -> Tensor:
        """Sum of cross-entropies over masked tokens / count; 0 where none is masked."""
        logits_SV = self.text_head(text.values.index_select(0, wanted.index))
        total = F.cross_entropy(logits_SV.float(), wanted.ids, reduction="sum", ignore_index=IGNORED)
        return total / _at_least_one(len(wanted.index) if count is None else count)

    def _audio_loss(self, states_SD: Tensor, wanted: FramesToPredict, count: Tensor | int | None) -> Tensor:
        """Sum of L1 over masked frames / (count · F); 0 where none is masked."""
        size = self.config.audio.feature_size
        predicted_MF = self.audio_head(states_SD).view(-1, size).index_select(0, wanted.index)
        apart_MF = (predicted_MF.float() - wanted.targets).abs()
        total = (apart_MF if wanted.counted_M is None else apart_MF * wanted.counted_M[:, None]).sum()
        return total / (_at_least_one(len(wanted.index) if count is None else count) * size)


class WeightedLayerSum(nn.Module):
    """The states of all layers → their sum, weighted by the softmax of learned weights, which begin as equal ones."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Any number of (N, D) → (N, D)."""
        shares = self.weight.softmax(0).to(layers[0].dtype)
        total = shares[0] * layers[0]
        for share, states in zip(shares[1:], layers[1:], strict=True):
            total = torch.addcmul(total, share, states)
        return total


class FusionHead(nn.Module):
    """States of both encoders → one vector an utterance (paper, section 3.5): linear and tanh, pools, fusion, linear
    and tanh."""

    def __init__(self, config: CtalConfig) -> None:
        super().__init__()
        width, kind = config.hidden_size, FUSIONS[config.fusion]
        self.text_dense = nn.Linear(width, width) if kind.uses_text else None
        self.audio_dense = nn.Linear(width, width) if kind.uses_audio else None
        self.audio_attention = nn.Linear(width, 1) if kind.uses_audio else None
        self.audio_pooling = config.audio_pooling
        self.prosody = None
        if config.audio_pooling == "prosody" and kind.uses_audio and kind.uses_both_kinds:
            self.prosody = Prosody(width, config.text.vocab_size)
        self.text_layers = self.audio_layers = None
        if config.use_weighted_layer_sum:
            self.text_layers = WeightedLayerSum(config.text.num_hidden_layers) if kind.uses_text else None
            self.audio_layers = WeightedLayerSum(config.audio.num_hidden_layers) if kind.uses_audio else None
        self.standardisation = PoolStandardisation(width) if config.standardise_pools else None
        norm: OrthogonalNorm = "reference" if config.orthogonal_norm == "reference" else "cosine"
        self.fusion = kind(width, norm)
        self.dense = nn.Linear(2 * width, 2 * width)

    @property
    def has_constants(self) -> bool:
        """Whether there is something to measure before it is trained."""
        return self.standardisation is not None or self.prosody is not None

    def forward(self, pools: Pools) -> Fused:
        fused = self.fusion(pools if self.standardisation is None else self.standardisation(pools))
        return fused._replace(vector=self.dense(fused.vector).tanh())

    def pools(self, text: Packed, audio: Packed | None, functionals_BP: Tensor | None = None) -> Pools:
        """`audio` is None where no utterance has a recording; `functionals_BP` are for `audio_pooling="prosody"`."""
        batch = len(text.lengths.sizes)
        zeros_BD = text.values.new_zeros(batch, text.values.shape[1])
        pools = Pools(
            zeros_BD, zeros_BD, zeros_BD, zeros_BD, torch.zeros(batch, dtype=torch.bool, device=text.index.device)
        )
        if self.text_dense is not None:
            states_ND = self.text_dense(text.values).tanh()
            first_B = text.lengths.offsets[:-1].long()
            is_rest = torch.ones(len(states_ND), dtype=torch.bool, device=first_B.device).index_fill(0, first_B, False)
            maximum = segment_max(states_ND[is_rest], text.owner[is_rest], batch)
            pools = pools._replace(text_first=states_ND[first_B], text_max=maximum)
        if self.audio_dense is not None and self.audio_attention is not None and audio is not None:
            states_ND = self.audio_dense(audio.values).tanh()
            owner, scores_N = audio.owner, self.audio_attention(states_ND)[:, 0]
            has_audio = torch.tensor(audio.lengths.sizes, device=owner.device) > 0
            if self.audio_pooling == "statistics":
                attended, other = segment_statistics(states_ND, scores_N, owner, batch)
            else:
                attended = segment_attend(states_ND, scores_N, owner, batch)
                other = segment_max(states_ND, owner, batch) if self.prosody is None else self.spoken(functionals_BP)
            pools = pools._replace(audio_attended=attended, audio_max=other, has_audio=has_audio)
        return pools

    def spoken(self, functionals_BP: Tensor | None) -> Tensor:
        """The pool that `audio_pooling="prosody"` has in the place of the maximum; 0 without a recording."""
        assert self.prosody is not None
        assert functionals_BP is not None
        return self.prosody(functionals_BP).masked_fill(functionals_BP.isnan().all(1, keepdim=True), 0)


class _CtalForTask(CtalPreTrainedModel):
    """Both encoders, the fusion, and a classifier without bias over the fused vector."""

    accepts_loss_kwargs = False
    """As in `CtalForPreTraining`."""
    _keys_to_ignore_on_load_unexpected = [r"^(text_head|audio_head)\."]  # noqa: RUF012 (of pre-training)

    def __init__(self, config: CtalConfig) -> None:
        super().__init__(config)
        self.ctal = CtalModel(config)
        self.head = FusionHead(config)
        self.dropout = Dropout(config.head_dropout_prob)
        self.classifier = nn.Linear(2 * config.hidden_size, self._outputs(config), bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        class_weights: Tensor | None = None,  # not `label_…`, which transformers' Trainer would take for a label
        utterance_count: Tensor | int | None = None,
        utterance_frames: Tensor | None = None,
    ) -> CtalTaskOutput:
        """Classifies utterances. The first four arguments are `CtalModel`'s.

        Args:
            labels: (B,) class numbers, or scores of a regression.
            class_weights: (C,) weight of each class in the loss; None: 1.
            utterance_count: Utterances of the whole step, over all ranks and microbatches, by which sums of losses are
                divided; None: those of this batch.
            utterance_frames: (B,) frames of the whole recordings, where `input_features` are windows of them: what
                `audio_pooling="prosody"` takes rates of words over.
        """
        packed = self.ctal.pack_inputs(input_ids, attention_mask, input_features, feature_attention_mask)
        fused = self.head(self._pools(*packed, self._functionals(*packed, utterance_frames)))
        logits = self._logits(fused.vector, labels)
        output = CtalTaskOutput(logits=self._answers(logits), embeddings=fused.vector)
        if labels is not None:
            _check_shape("labels", labels, logits.shape[:1])
            count = _at_least_one(len(logits) if utterance_count is None else utterance_count)
            task_loss = self._loss(logits.float(), labels, class_weights) / count
            orthogonality_loss = fused.orthogonality_B.sum() / count
            output.task_loss, output.orthogonality_loss = task_loss, orthogonality_loss
            output.loss = task_loss + self.config.orthogonality_weight * orthogonality_loss
        return CtalTaskOutput(**output)  # in the order of the fields: `outputs[0]` is the loss

    @torch.no_grad()
    def measure_pools(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Takes the constants of a new head, of its pools with `standardise_pools` and of what it hears of prosody with
        `audio_pooling="prosody"`, from what these training utterances give.

        To be called once, before training. Each batch has arguments of `CtalModel`'s `forward`, and `utterance_frames`
        perhaps. Raises `InputError` for a model without either.
        """
        standardisation, prosody = self.head.standardisation, self.head.prosody
        if not self.head.has_constants:
            raise InputError("measure_pools: is for a model with standardise_pools=True or audio_pooling='prosody'")
        pools: list[Pools] = []
        functionals: list[Tensor] = []
        for batch in batches:
            inputs = dict(batch)
            whole_B = inputs.pop("utterance_frames", None)
            packed = self.ctal.pack_inputs(**inputs)
            functionals_BP = self._functionals(*packed, whole_B)
            pools.append(self._pools(*packed, functionals_BP))
            if functionals_BP is not None:
                functionals.append(functionals_BP)
        if prosody is not None:
            prosody.measure(functionals)
            heard = zip(pools, functionals, strict=True)
            pools = [each._replace(audio_max=self.head.spoken(functionals_BP)) for each, functionals_BP in heard]
        if standardisation is not None:
            standardisation.measure(pools)

    def _pools(self, text: Packed, frames: Packed | None, functionals_BP: Tensor | None) -> Pools:
        if frames is None and not self.head.fusion.uses_text:
            raise InputError(f"fusion='{self.config.fusion}' needs a recording: give input_features")
        text_layers, audio_layers = self.head.text_layers, self.head.audio_layers
        layers: list[Tensor] = []
        last = self.ctal.text_encoder(text, layers if text_layers is not None else None)
        text = last if text_layers is None else last.with_values(text_layers(layers))
        if frames is None or not self.head.fusion.uses_audio:
            return self.head.pools(text, None)
        layers = []
        stacked = self.ctal.stacked(frames)
        states_ND = self.ctal.audio_encoder(stacked, last, layers=layers if audio_layers is not None else None)
        audio = stacked.with_values(states_ND if audio_layers is None else audio_layers(layers))
        return self.head.pools(text, audio, functionals_BP)

    def _functionals(self, tokens: Packed, frames: Packed | None, whole_B: Tensor | None) -> Tensor | None:
        """(B, P) of utterances whose frames end with their pitch; None for a head that hears no prosody."""
        prosody = self.head.prosody
        if prosody is None:
            return None
        if frames is None:
            return torch.full((len(tokens.lengths.sizes), NUM_FUNCTIONALS), torch.nan, device=tokens.index.device)
        log_hertz_N, _, voicing_N = frames.values[:, -NUM_PITCH:].unbind(1)
        return prosody.functionals(log_hertz_N, voicing_N, frames.lengths, tokens.values, tokens.owner, whole_B)

    @classmethod
    def _outputs(cls, config: CtalConfig) -> int:
        """Of the classifier."""
        return len(config.id2label or ())

    def _logits(self, fused_BE: Tensor, labels: Tensor | None) -> Tensor:
        return self.classifier(self.dropout(fused_BE))

    def _answers(self, logits: Tensor) -> Tensor:
        """(B, C) from what the loss takes."""
        return logits

    @property
    def _smoothing(self) -> float:
        return self.config.label_smoothing if self.training else 0.0

    def _loss(self, logits_BC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
        """Sum over utterances."""
        losses = F.cross_entropy(logits_BC, labels_B.long(), reduction="none", label_smoothing=self._smoothing)
        return (losses if weights_C is None else losses * weights_C[labels_B.long()]).sum()


class CtalForSequenceClassification(_CtalForTask):
    """An emotion or another class of an utterance; with `problem_type="regression"` and one label, a score.

    With `regression_loss="histogram"` the score is the median of a distribution over `SCORES`, which is what makes the
    mean absolute error the least; it is learned by cross-entropy (histogram loss: Imani and White, 2018), a label
    between two of them as its shares of both.
    """

    @classmethod
    def _outputs(cls, config: CtalConfig) -> int:
        return len(SCORES) if _has_histogram(config) else super()._outputs(config)

    def _answers(self, logits: Tensor) -> Tensor:
        return median_score(logits) if _has_histogram(self.config) else logits

    def _loss(self, logits_BC: Tensor, labels_B: Tensor, weights_C: Tensor | None) -> Tensor:
        if _has_histogram(self.config):
            return F.cross_entropy(
                logits_BC, _shares_of_scores(labels_B), reduction="sum", label_smoothing=self._smoothing
            )
        if self.config.problem_type == "regression":
            loss = F.l1_loss if self.config.regression_loss == "l1" else F.mse_loss
            return loss(logits_BC[:, 0], labels_B.float(), reduction="sum")
        return super()._loss(logits_BC, labels_B, weights_C)


def _has_histogram(config: CtalConfig) -> bool:
    return config.problem_type == "regression" and config.regression_loss == "histogram"


def median_score(logits_BS: Tensor) -> Tensor:
    """(B, 1): the first of `SCORES` by which half of the distribution is reached."""
    reached_BS = logits_BS.float().softmax(1).cumsum(1) >= 0.5
    return logits_BS.new_tensor(SCORES)[reached_BS.int().argmax(1)][:, None]


def _shares_of_scores(labels_B: Tensor) -> Tensor:
    """(B, S) of each of `SCORES`: the nearer of the two that a label lies between, the more."""
    step, labels_B = SCORES[1] - SCORES[0], labels_B.float()
    apart_BS = (labels_B.clamp(SCORES[0], SCORES[-1])[:, None] - labels_B.new_tensor(SCORES)).abs()
    return (1 - apart_BS / step).clamp_min(0)


class CtalForXVector(_CtalForTask):
    """Speaker verification: a classifier of the training speakers whose `embeddings` are compared by cosine.

    With `speaker_loss="aam"` the logits are scaled cosines, and in training the angle to the right speaker must be
    smaller by a margin (Deng et al., ArcFace, CVPR 2019, formula 3).
    """

    def _logits(self, fused_BE: Tensor, labels: Tensor | None) -> Tensor:
        if self.config.speaker_loss == "softmax":
            return super()._logits(fused_BE, labels)
        # Autocast would multiply in half precision, whose steps, scaled, are as large as the margin's effect.
        with torch.autocast(fused_BE.device.type, enabled=False):
            weight_CE = F.normalize(self.classifier.weight.float())
            cosines_BC = F.linear(F.normalize(self.dropout(fused_BE).float()), weight_CE)
        if labels is not None and self.training:
            angles_B = cosines_BC.gather(1, labels[:, None].long()).clamp(-1 + 1e-6, 1 - 1e-6).acos()
            # Beyond π the cosine would rise again.
            marked = (angles_B + self.config.speaker_margin).clamp(max=torch.pi).cos()
            cosines_BC = cosines_BC.scatter(1, labels[:, None].long(), marked)
        return self.config.speaker_scale * cosines_BC


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _padded_shape(features: Tensor, mask: Tensor | None) -> torch.Size:
    """(B, T) of features, with padding or without."""
    return features.shape[:2] if mask is None else mask.shape


def _check_dimensions(name: str, values: Tensor, axes: str) -> None:
    if values.ndim != axes.count(",") + 1 or values.numel() == 0:
        raise InputError(f"{name} has shape {tuple(values.shape)}: it must be {axes}, none of them 0")


def _check_shape(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.shape != shape:
        raise InputError(f"{name} has shape {tuple(values.shape)}: it must be {tuple(shape)}, as its input")


def _sizes(name: str, mask: Tensor | None, like: Tensor, *, may_be_empty: bool = False) -> list[int]:
    """How many positions of each row of the (B, longest) tensor `like` are not padding, all without a `mask`.

    Raises `InputError` for padding that is not last, and for empty rows.
    """
    if mask is None:
        return [like.shape[1]] * len(like)
    _check_shape(name, mask, like.shape)
    is_there_BT = (mask != 0).cpu().numpy()
    sizes_B = is_there_BT.sum(1)
    is_last = is_there_BT == (np.arange(mask.shape[1]) < sizes_B[:, None])
    if not (is_last.all() and (may_be_empty or sizes_B.all())):
        least = "" if may_be_empty else " at least one,"
        raise InputError(f"{name} must be ones,{least} then zeros in each row: padding belongs on the right")
    return sizes_B.tolist()


def _padded_weights(weights: list[list[Tensor]], audio: Packed, text: Packed) -> tuple[Tensor, ...]:
    """Attention weights a layer and utterance → (B, heads, T, L) a layer."""
    return tuple(
        torch.stack(
            [F.pad(each, (0, text.shape[1] - each.shape[2], 0, audio.shape[1] - each.shape[1])) for each in layer]
        )
        for layer in weights
    )


AutoModel.register(CtalConfig, CtalModel)
AutoModelForPreTraining.register(CtalConfig, CtalForPreTraining)
AutoModelForSequenceClassification.register(CtalConfig, CtalForSequenceClassification)
AutoModelForAudioXVector.register(CtalConfig, CtalForXVector)
