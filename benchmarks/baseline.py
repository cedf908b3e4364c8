"""The authors' recipe, built from public classes of transformers: what a user would run otherwise.

A RoBERTa with its MLM head reads the text. The audio encoder is a RoBERTa with cross-attention, hence a decoder, hence
causal; it is fed with embeddings of frames. Batches are padded, and both heads run on all positions.

`copy_weights` gives it the weights of a `CtalForPreTraining`, and `compare` tells how far losses and gradients of the
two are apart; without dropout and with `audio_is_causal=True` they are the same function.

Shape suffixes: B utterances, L tokens and T frames of the longest one, D hidden size, F dimensions of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel

from ctal import CtalAudioConfig, CtalConfig, CtalForPreTraining, CtalTextConfig

Attention = Literal["eager", "sdpa"]
"""`eager` multiplies out the softmax, as transformers did in 2021; `sdpa` is its fused attention of today."""


class Losses(NamedTuple):
    loss: Tensor
    """Sum of the other two."""
    text_loss: Tensor
    """Cross-entropy in nats, a masked token."""
    audio_loss: Tensor
    """L1, a dimension of a masked frame."""


class AuthorsModel(nn.Module):
    """What `CtalForPreTraining` of the same configuration computes, as the authors composed it."""

    def __init__(self, config: CtalConfig, attention: Attention = "eager") -> None:
        """Takes sizes and dropout from `config`; there is no frame stacking, and the audio is always causal."""
        super().__init__()
        text, audio = config.text, config.audio
        self.text = RobertaForMaskedLM(
            _roberta(text, attention, vocab_size=text.vocab_size, pad_token_id=text.pad_token_id)
        )
        self.embedding = nn.Linear(audio.feature_size, audio.hidden_size)
        # No frame is padding by its number: with a padding id, the position of that number would not be trained.
        no_words = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        decoder = {"is_decoder": True, "add_cross_attention": True, "use_cache": False}
        self.audio = RobertaModel(_roberta(audio, attention, **no_words, **decoder), add_pooling_layer=False)
        self.audio.set_input_embeddings(nn.Identity())  # words, of which it has none
        self.head = nn.Sequential(
            nn.Linear(audio.hidden_size, audio.hidden_size),
            nn.GELU(),
            nn.LayerNorm(audio.hidden_size, eps=audio.layer_norm_eps),
            nn.Linear(audio.hidden_size, audio.feature_size),
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_features: Tensor,
        feature_attention_mask: Tensor,
        labels: Tensor,
        feature_labels: Tensor,
        mask_time_indices: Tensor,
    ) -> Losses:
        """The arguments of `CtalForPreTraining`, of which at least one token and one frame must be masked."""
        text = self.text(input_ids, attention_mask=attention_mask, labels=labels, output_hidden_states=True)
        states_BTD = self._audio_states(text.hidden_states[-1], attention_mask, input_features, feature_attention_mask)
        reconstruction_BTF = self.head(states_BTD)
        audio_loss = F.l1_loss(reconstruction_BTF[mask_time_indices], feature_labels[mask_time_indices])
        return Losses(text.loss + audio_loss, text.loss, audio_loss)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, input_features: Tensor, feature_attention_mask: Tensor
    ) -> Tensor:
        """(B, T, D) last audio states, without the heads; anything at padding."""
        text_BLD = self.text.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self._audio_states(text_BLD, attention_mask, input_features, feature_attention_mask)

    def _audio_states(
        self, text_BLD: Tensor, attention_mask: Tensor, input_features: Tensor, feature_attention_mask: Tensor
    ) -> Tensor:
        return self.audio(
            inputs_embeds=self.embedding(input_features),
            position_ids=torch.arange(input_features.shape[1], device=input_features.device)[None],
            attention_mask=feature_attention_mask,
            encoder_hidden_states=text_BLD,
            encoder_attention_mask=attention_mask,
        ).last_hidden_state


def _roberta(config: CtalTextConfig | CtalAudioConfig, attention: Attention, **others: Any) -> RobertaConfig:
    return RobertaConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=1,  # the authors' second row is never selected
        **{"attn_implementation": attention, **others},
    )


# The same weights -------------------------------------------------------------------------------------------------

Place = tuple[str, slice]
"""A parameter of ours, and the rows of it."""

_ALL = slice(None)


def counterparts(config: CtalConfig) -> dict[str, Place]:
    """Where each parameter of `AuthorsModel` is in `CtalForPreTraining`."""
    width = config.hidden_size
    places: dict[str, Place] = {}

    def whole(theirs: str, ours: str, *kinds: str) -> None:
        places.update({f"{theirs}.{kind}": (f"{ours}.{kind}", _ALL) for kind in kinds or ("weight", "bias")})

    def part(theirs: str, ours: str, number: int) -> None:
        rows = slice(number * width, (number + 1) * width)
        places.update({f"{theirs}.{kind}": (f"{ours}.{kind}", rows) for kind in ("weight", "bias")})

    def embeddings(theirs: str, ours: str) -> None:
        whole(f"{theirs}.position_embeddings", f"{ours}.position_embeddings", "weight")
        places[f"{theirs}.token_type_embeddings.weight"] = (f"{ours}.token_type_embedding", _ALL)
        whole(f"{theirs}.LayerNorm", f"{ours}.norm")

    def residual(theirs: str, ours: str) -> None:
        whole(f"{theirs}.dense", f"{ours}.dense")
        whole(f"{theirs}.LayerNorm", f"{ours}.norm")

    def layer(theirs: str, ours: str) -> None:
        for number, kind in enumerate(("query", "key", "value")):
            part(f"{theirs}.attention.self.{kind}", f"{ours}.attention.query_key_value", number)
        residual(f"{theirs}.attention.output", f"{ours}.attention.output")
        whole(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.dense")
        residual(f"{theirs}.output", f"{ours}.feed_forward.output")

    def cross_attention(theirs: str, ours: str) -> None:
        whole(f"{theirs}.self.query", f"{ours}.query")
        for number, kind in enumerate(("key", "value")):
            part(f"{theirs}.self.{kind}", f"{ours}.key_value", number)
        residual(f"{theirs}.output", f"{ours}.output")

    embeddings("text.roberta.embeddings", "ctal.text_encoder")
    whole("text.roberta.embeddings.word_embeddings", "ctal.text_encoder.word_embeddings", "weight")
    for i in range(config.text.num_hidden_layers):
        layer(f"text.roberta.encoder.layer.{i}", f"ctal.text_encoder.layers.{i}")
    whole("text.lm_head.dense", "text_head.dense")
    whole("text.lm_head.layer_norm", "text_head.norm")
    places["text.lm_head.bias"] = ("text_head.decoder.bias", _ALL)

    whole("embedding", "ctal.audio_encoder.dense")
    embeddings("audio.embeddings", "ctal.audio_encoder")
    for i in range(config.audio.num_hidden_layers):
        theirs, ours = f"audio.encoder.layer.{i}", f"ctal.audio_encoder.layers.{i}"
        layer(theirs, ours)
        cross_attention(f"{theirs}.crossattention", f"{ours}.cross_attention")
    for theirs, ours in (("0", "dense"), ("2", "norm"), ("3", "decoder")):
        whole(f"head.{theirs}", f"audio_head.{ours}")
    return places


@torch.no_grad()
def copy_weights(ours: CtalForPreTraining, authors: AuthorsModel) -> None:
    """Gives `authors` the weights of `ours`; raises `KeyError` for one that has no counterpart."""
    sources = dict(ours.named_parameters())
    places = counterparts(ours.config)
    for name, parameter in authors.named_parameters():
        source, rows = places[name]
        parameter.copy_(sources[source][rows].view_as(parameter))


class Differences(NamedTuple):
    """How far two models are apart."""

    loss: float
    """The larger absolute difference of the two losses."""
    gradient: float
    """The largest relative difference of a parameter's gradient."""
    parameter: str
    """Whose gradient that is, by the authors' name."""


def compare(ours: CtalForPreTraining, authors: AuthorsModel, batch: Mapping[str, Tensor]) -> Differences:
    """Losses and gradients of both on `batch`. Leaves the gradients in place.

    A gradient's difference is relative to its norm, or to 1/10,000 of the norm of all gradients where that is larger:
    the gradient of a key's bias is 0 but for rounding.
    """
    outputs = [model(**batch) for model in (ours, authors)]
    for model, output in zip((ours, authors), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    losses = [[getattr(output, name).item() for name in ("text_loss", "audio_loss")] for output in outputs]
    gradients = list(_paired_gradients(ours, authors))
    floor = 1e-4 * float(torch.stack([theirs.norm() for _, _, theirs in gradients]).norm())
    relative = {
        name: float((mine - theirs).norm()) / max(float(theirs.norm()), floor) for name, mine, theirs in gradients
    }
    worst = max(relative, key=lambda name: relative[name])
    return Differences(max(abs(mine - theirs) for mine, theirs in zip(*losses, strict=True)), relative[worst], worst)


def _paired_gradients(ours: CtalForPreTraining, authors: AuthorsModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    sources = dict(ours.named_parameters())
    places = counterparts(ours.config)
    for name, parameter in authors.named_parameters():
        source, rows = places[name]
        mine, theirs = sources[source].grad, parameter.grad
        assert mine is not None, source
        assert theirs is not None, name
        yield name, mine[rows].view_as(theirs), theirs
