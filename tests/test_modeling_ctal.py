"""Invariants of the model, at nano size and without dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

from ctal import CtalConfig, CtalForPreTraining, CtalModel
from ctal.errors import InputError
from ctal.masking import IGNORED
from ctal.modeling_ctal import AudioLayer

VOCAB, FEATURES, MASK_ID = 40, 160, 4

Batch = dict[str, Tensor]

VARIANTS = [
    pytest.param({}, id="bidirectional"),
    pytest.param({"frame_stack": 2}, id="stack 2"),
    pytest.param({"frame_stack": 4}, id="stack 4"),
    pytest.param({"audio_is_causal": True}, id="causal"),
    pytest.param({"audio_sees_text": False}, id="without the text"),
]


def nano(**fields: Any) -> CtalConfig:
    defaults = {"vocab_size": VOCAB, "hidden_dropout_prob": 0.0, "max_position_embeddings": 64}
    return CtalConfig.of_size("nano", **(defaults | fields))


def pretraining_model(**fields: Any) -> CtalForPreTraining:
    """Weights large enough for outputs to depend on everything that they may depend on."""
    torch.manual_seed(0)
    return CtalForPreTraining(nano(initializer_range=0.2, **fields)).eval()


def utterance(tokens: int, frames: int, seed: int) -> Batch:
    """One utterance with a few masked tokens and frames, as a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (1, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = 0, 2
    is_masked_token = torch.zeros(1, tokens, dtype=torch.bool)
    is_masked_token[:, 1:-1:3] = True
    features = torch.randn(1, frames, FEATURES, generator=generator)
    is_masked = torch.zeros(1, frames, dtype=torch.bool)
    is_masked[:, frames // 3 : frames // 3 + 3 + seed % 4] = True
    return {
        "input_ids": ids.masked_fill(is_masked_token, MASK_ID),
        "attention_mask": torch.ones_like(ids),
        "input_features": features.masked_fill(is_masked[..., None], 0.0),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
        "labels": ids.masked_fill(~is_masked_token, IGNORED),
        "feature_labels": features,
        "mask_time_indices": is_masked,
    }


PADDING = {"input_ids": 1, "labels": IGNORED}


def collate(utterances: list[Batch], padding: int = 0) -> Batch:
    """One batch, padded on the right to the longest and `padding` positions more."""
    longest = {name: max(each[name].shape[1] for each in utterances) + padding for name in utterances[0]}
    rows: dict[str, list[Tensor]] = {name: [] for name in longest}
    for each in utterances:
        for name, value in each.items():
            row = value.new_full((1, longest[name], *value.shape[2:]), PADDING.get(name, 0))
            row[:, : value.shape[1]] = value
            rows[name].append(row)
    return {name: torch.cat(values) for name, values in rows.items()}


LENGTHS = [(7, 23), (12, 40), (4, 13), (2, 9)]
UTTERANCES = [utterance(tokens, frames, seed) for seed, (tokens, frames) in enumerate(LENGTHS)]
BATCH = collate(UTTERANCES)
INPUTS = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")


def inputs_of(batch: Batch) -> Batch:
    return {name: batch[name] for name in INPUTS}


def gradients(model: CtalForPreTraining) -> dict[str, Tensor]:
    """The gradient of every parameter; fails where there is none, which would stop DDP."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        assert parameter.grad.isfinite().all(), f"gradient of {name} is not finite"
        named[name] = parameter.grad
    return named


def assert_same_gradients(model: CtalForPreTraining, other: CtalForPreTraining) -> None:
    expected = gradients(other)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_padding_and_the_other_utterances_of_a_batch_change_nothing(fields: dict[str, Any]) -> None:
    model = pretraining_model(**fields)
    together = model(**inputs_of(collate(UTTERANCES, padding=5)))
    stack = model.config.audio.frame_stack

    for row, each in enumerate(UTTERANCES):
        alone = model(**inputs_of(each))
        tokens, frames = LENGTHS[row]
        steps = -(-frames // stack)
        for name, length in (
            ("logits", tokens),
            ("text_hidden_state", tokens),
            ("reconstruction", frames),
            ("audio_hidden_state", steps),
        ):
            torch.testing.assert_close(together[name][row, :length], alone[name][0], atol=1e-5, rtol=0)
        assert not together.audio_hidden_state[row, steps:].any()
        assert not together.text_hidden_state[row, tokens:].any()


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(fields: dict[str, Any]) -> None:
    model = pretraining_model(**fields)
    clean, dirty = (collate(UTTERANCES, padding=3) for _ in range(2))
    is_padding = dirty["feature_attention_mask"] == 0
    dirty["input_features"][is_padding] = 100.0
    dirty["feature_labels"][is_padding] = 100.0
    dirty["input_ids"][dirty["attention_mask"] == 0] = 9

    assert torch.equal(model(**clean).loss, model(**dirty).loss)


def frames_alone(batch: Batch) -> Tensor:
    """(N, F) features, one behind the other."""
    return batch["input_features"][batch["feature_attention_mask"].bool()]


def without_padding(batch: Batch) -> Batch:
    """The same, with the frames one behind the other and labels of masked ones alone."""
    labels = batch["feature_labels"][batch["mask_time_indices"]]
    return batch | {"input_features": frames_alone(batch), "feature_labels": labels}


@pytest.mark.parametrize("output_hidden_states", [False, True], ids=["losses only", "all outputs"])
@pytest.mark.parametrize("fields", VARIANTS)
def test_frames_without_padding_give_the_same_outputs_and_gradients(
    fields: dict[str, Any], output_hidden_states: bool
) -> None:
    model, other = pretraining_model(**fields), pretraining_model(**fields)

    outputs = model(**without_padding(BATCH), output_hidden_states=output_hidden_states)
    expected = other(**BATCH, output_hidden_states=output_hidden_states)
    outputs.loss.backward()
    expected.loss.backward()

    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, msg=name)
    assert_same_gradients(model, other)


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_what_is_masked_in_the_padding_is_not_predicted(fields: dict[str, Any]) -> None:
    model = pretraining_model(**fields)
    clean, dirty = (collate(UTTERANCES, padding=3) for _ in range(2))
    dirty["mask_time_indices"][dirty["feature_attention_mask"] == 0] = True
    assert torch.equal(model(**clean).loss, model(**dirty).loss)


@pytest.mark.parametrize("fields", VARIANTS)
def test_computing_only_the_losses_gives_the_same_loss_and_gradients(fields: dict[str, Any]) -> None:
    model, other = pretraining_model(**fields), pretraining_model(**fields)

    losses, everything = model(**BATCH), other(**BATCH, output_hidden_states=True)
    losses.loss.backward()
    everything.loss.backward()

    for name in ("loss", "text_loss", "audio_loss"):
        torch.testing.assert_close(losses[name], everything[name])
    assert losses[0] is losses.loss
    assert everything[0] is everything.loss
    assert losses.logits is None
    assert losses.reconstruction is None
    assert everything.reconstruction.shape == BATCH["feature_labels"].shape
    assert_same_gradients(model, other)


class Adapted(torch.nn.Module):
    """A linear layer with something added to what it gives, as an adapter of low rank is wrapped round one."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = torch.nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + self.more(states)


def test_computing_only_the_losses_passes_no_adapter_by() -> None:
    model = pretraining_model()
    layer = model.ctal.audio_encoder.layers[-1]
    assert isinstance(layer, AudioLayer)
    adapted = Adapted(layer.attention.query_key_value)
    layer.attention.query_key_value = adapted  # pyright: ignore[reportAttributeAccessIssue]

    losses, everything = model(**BATCH), model(**BATCH, output_hidden_states=True)
    losses.loss.backward()

    torch.testing.assert_close(losses.loss, everything.loss)
    assert adapted.more.weight.grad is not None
    assert adapted.more.weight.grad.any()


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_losses_are_the_means_over_masked_tokens_and_frames(fields: dict[str, Any]) -> None:
    outputs = pretraining_model(**fields)(**BATCH, output_hidden_states=True)

    text = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), BATCH["labels"].flatten())
    masked = BATCH["mask_time_indices"]
    audio = (outputs.reconstruction - BATCH["feature_labels"])[masked].abs().mean()
    torch.testing.assert_close(outputs.text_loss, text)
    torch.testing.assert_close(outputs.audio_loss, audio)
    torch.testing.assert_close(outputs.loss, text + audio)


@pytest.mark.parametrize("fields", VARIANTS)
def test_microbatches_with_the_counts_of_the_step_add_up_to_the_whole_batch(fields: dict[str, Any]) -> None:
    model, other = pretraining_model(**fields), pretraining_model(**fields)
    whole = other(**BATCH)
    whole.loss.backward()
    tokens, frames = (BATCH["labels"] != IGNORED).sum(), BATCH["mask_time_indices"].sum()

    total = torch.zeros(())
    for part in (UTTERANCES[:1], UTTERANCES[1:3], UTTERANCES[3:]):
        loss = model(**collate(part), token_count=tokens, frame_count=frames).loss
        loss.backward()
        total += loss.detach()

    torch.testing.assert_close(total, whole.loss.detach())
    assert_same_gradients(model, other)


@pytest.mark.parametrize("output_hidden_states", [False, True], ids=["losses only", "all outputs"])
@pytest.mark.parametrize("fields", VARIANTS)
def test_a_batch_without_a_masked_token_has_text_loss_0_and_all_gradients(
    fields: dict[str, Any], output_hidden_states: bool
) -> None:
    model = pretraining_model(**fields)
    batch = BATCH | {"labels": torch.full_like(BATCH["labels"], IGNORED)}

    outputs = model(**batch, output_hidden_states=output_hidden_states)
    outputs.loss.backward()

    assert outputs.text_loss == 0
    assert torch.equal(outputs.loss, outputs.audio_loss)
    for name, gradient in gradients(model).items():
        assert not (name.startswith("text_head") and "decoder.weight" not in name and gradient.any()), name


@pytest.mark.parametrize("output_hidden_states", [False, True], ids=["losses only", "all outputs"])
@pytest.mark.parametrize("fields", VARIANTS)
def test_a_batch_without_a_masked_frame_has_audio_loss_0_and_all_gradients(
    fields: dict[str, Any], output_hidden_states: bool
) -> None:
    model = pretraining_model(**fields)
    batch = BATCH | {"mask_time_indices": torch.zeros_like(BATCH["mask_time_indices"])}

    outputs = model(**batch, output_hidden_states=output_hidden_states)
    outputs.loss.backward()

    assert outputs.audio_loss == 0
    assert torch.equal(outputs.loss, outputs.text_loss)
    for name, gradient in gradients(model).items():
        assert not ("audio" in name and gradient.any()), name


def test_every_parameter_learns_from_a_full_batch() -> None:
    model = pretraining_model()
    model(**BATCH).loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.any(), name


@torch.no_grad()
def test_a_causal_frame_changes_itself_and_later_ones_only() -> None:
    inputs = inputs_of(UTTERANCES[1])
    changed = inputs | {"input_features": inputs["input_features"].clone()}
    changed["input_features"][0, 17] += 1

    for causal in (True, False):
        model = pretraining_model(audio_is_causal=causal)
        before, after = (model(**each).audio_hidden_state[0] for each in (inputs, changed))
        differs = ~torch.isclose(before, after, atol=1e-6).all(1)
        assert differs[17:].all()
        assert differs[:17].any() != causal


@torch.no_grad()
def test_the_audio_listens_to_the_text_and_the_text_not_to_the_audio() -> None:
    model = pretraining_model()
    inputs = inputs_of(UTTERANCES[0])
    other_text = inputs | {"input_ids": inputs["input_ids"].roll(1)}
    other_audio = inputs | {"input_features": inputs["input_features"].roll(1, dims=1)}

    outputs, with_text, with_audio = (model(**each) for each in (inputs, other_text, other_audio))

    assert not torch.allclose(outputs.reconstruction, with_text.reconstruction)
    assert torch.equal(outputs.logits, with_audio.logits)


@torch.no_grad()
def test_a_missing_text_is_an_empty_one_and_a_missing_recording_leaves_the_audio_out() -> None:
    model = pretraining_model()
    audio = {name: BATCH[name] for name in ("input_features", "feature_attention_mask")}
    empty = torch.tensor([[0, 2]]).expand(len(UTTERANCES), 2)
    expected = model(input_ids=empty, **audio).reconstruction
    torch.testing.assert_close(model(**audio).reconstruction, expected)
    torch.testing.assert_close(model(**audio | {"input_features": frames_alone(BATCH)}).reconstruction, expected)

    text = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**text, labels=BATCH["labels"], output_hidden_states=True)
    assert outputs.audio_loss is None
    assert outputs.reconstruction is None
    torch.testing.assert_close(outputs.loss, model(**BATCH).text_loss)


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_cross_attentions_are_distributions_over_the_tokens_of_the_utterance(fields: dict[str, Any]) -> None:
    model = pretraining_model(**fields)
    config = model.config.audio

    outputs = model(**BATCH, output_attentions=True)

    assert len(outputs.cross_attentions) == (config.num_hidden_layers if model.config.audio_sees_text else 0)
    for weights in outputs.cross_attentions:
        longest = -(-BATCH["input_features"].shape[1] // config.frame_stack)
        assert weights.shape == (len(LENGTHS), config.num_attention_heads, longest, BATCH["input_ids"].shape[1])
        for row, (tokens, frames) in enumerate(LENGTHS):
            steps = -(-frames // config.frame_stack)
            torch.testing.assert_close(weights[row, :, :steps].sum(-1), torch.ones(config.num_attention_heads, steps))
            assert not weights[row, :, steps:].any()
            assert not weights[row, :, :, tokens:].any()


@torch.no_grad()
def test_an_utterance_without_frames_is_one_without_a_recording_and_disturbs_no_other() -> None:
    model = pretraining_model()
    mask = BATCH["feature_attention_mask"].clone()
    mask[1] = 0

    output = model(**inputs_of(BATCH) | {"feature_attention_mask": mask})
    whole = model(**inputs_of(BATCH))

    assert not output.audio_hidden_state[1].any()
    for row in (0, 2, 3):
        torch.testing.assert_close(output.audio_hidden_state[row], whole.audio_hidden_state[row])
    torch.testing.assert_close(output.text_hidden_state, whole.text_hidden_state)


def test_new_positions_are_sinusoids_as_large_as_what_they_are_added_to_or_small_and_random() -> None:
    config = nano(max_position_embeddings=512, frame_stack=2)
    model = CtalModel(config)
    audio, text = (each.position_embeddings.weight for each in (model.audio_encoder, model.text_encoder))
    features = model.audio_encoder.dense(torch.randn(500, 2 * FEATURES))

    assert audio.square().mean().sqrt().item() == pytest.approx(features.square().mean().sqrt().item(), rel=0.15)
    assert text.square().mean().sqrt().item() == pytest.approx(config.text.initializer_range, rel=0.15)
    # The product of two positions depends on their distance alone.
    torch.testing.assert_close((audio[3] * audio[8]).sum(), (audio[103] * audio[108]).sum(), rtol=1e-3, atol=1e-3)

    random = CtalModel(nano(max_position_embeddings=512, position_init="normal")).audio_encoder
    assert random.position_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_asking_for_attentions_changes_no_other_output() -> None:
    model = pretraining_model()
    plain, attentive = model(**inputs_of(BATCH)), model(**inputs_of(BATCH), output_attentions=True)
    for name, value in plain.items():
        assert torch.equal(value, attentive[name]), name


@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_a_saved_model_comes_back_equal_and_tied(fields: dict[str, Any], tmp_path: Path) -> None:
    model = pretraining_model(**fields)
    model.save_pretrained(tmp_path)

    again = CtalForPreTraining.from_pretrained(tmp_path)

    assert again.config.audio.frame_stack == model.config.audio.frame_stack
    assert again.config.audio_is_causal == model.config.audio_is_causal
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(**BATCH).loss, model(**BATCH).loss, atol=0, rtol=0)
    for each in (model, again):
        assert each.text_head.decoder.weight is each.ctal.text_encoder.word_embeddings.weight
    assert [file.name for file in tmp_path.glob("*.bin")] == []


@torch.no_grad()
def test_auto_classes_find_the_model_by_its_folder(tmp_path: Path) -> None:
    model = pretraining_model()
    model.save_pretrained(tmp_path)

    assert isinstance(AutoConfig.from_pretrained(tmp_path), CtalConfig)
    encoders = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoders, CtalModel)
    assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path), CtalForPreTraining)
    outputs, expected = encoders(**inputs_of(BATCH)), model(**inputs_of(BATCH))
    assert torch.equal(outputs.audio_hidden_state, expected.audio_hidden_state)
    assert torch.equal(outputs.text_hidden_state, expected.text_hidden_state)


def test_new_weights_are_small_and_biases_0_and_differ_between_layers() -> None:
    torch.manual_seed(0)
    model = CtalForPreTraining(nano(position_init="normal"))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.4), name
    weights = model.state_dict()
    first, second = (weights[f"ctal.audio_encoder.layers.{i}.attention.query_key_value.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_compiled_layers_give_the_same_losses_and_gradients_and_are_compiled_for_any_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Machine code, which takes half a minute to make, is left out.
    compile_module = nn.Module.compile

    def traced(module: nn.Module, dynamic: bool) -> None:
        compile_module(module, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    model, compiled = pretraining_model().train(), pretraining_model().train()
    compiled.compile_layers()
    graphs = []
    for lengths in ((5, 20), (9, 33), (7, 50)):
        batch = collate([utterance(tokens, frames, tokens) for tokens, frames in (lengths, (6, 24))])
        outputs = [each(**batch) for each in (model, compiled)]
        for each, output in zip((model, compiled), outputs, strict=True):
            each.zero_grad()
            output.loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
        assert_same_gradients(model, compiled)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[0] == graphs[2]


def test_the_whole_model_can_be_compiled_too() -> None:
    """As `Trainer` does with `torch_compile=True`; where torch cannot follow, it goes on without."""
    model, batch = pretraining_model(), collate([utterance(5, 20, 0), utterance(9, 33, 1)])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_compiled_step_on_a_gpu_is_close_to_one_on_a_cpu() -> None:
    model, compiled = pretraining_model(), pretraining_model()
    nn.Module.cuda(compiled)
    compiled.compile_layers()
    batch = collate([utterance(tokens, frames, tokens) for tokens, frames in ((5, 20), (9, 33))])
    expected = model(**batch)
    with torch.autocast("cuda", torch.bfloat16):
        output = compiled(**{name: value.cuda() for name, value in batch.items()})
    output.loss.backward()
    torch.testing.assert_close(output.loss.cpu(), expected.loss, rtol=2e-2, atol=0)


@pytest.mark.parametrize("fields", VARIANTS)
def test_bf16_autocast_is_close_to_fp32(fields: dict[str, Any]) -> None:
    model = pretraining_model(**fields)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**BATCH)
    low.loss.backward()
    gradients(model)
    torch.testing.assert_close(low.loss, model(**BATCH).loss, atol=0.05, rtol=0.02)
    assert low.loss.dtype == torch.float32


WRONG: dict[str, tuple[Batch, str]] = {
    "nothing": ({}, "neither input_ids nor input_features"),
    "one dimension of ids": ({"input_ids": BATCH["input_ids"][0]}, "input_ids"),
    "no tokens": ({"input_ids": BATCH["input_ids"][:, :0]}, "input_ids"),
    "two dimensions of features": ({"input_features": BATCH["input_features"][0]}, "input_features"),
    "another number of features": ({"input_features": BATCH["input_features"][..., :80]}, "feature extractor"),
    "masks of another shape": (
        {"input_features": BATCH["input_features"], "feature_attention_mask": BATCH["feature_attention_mask"][:, 1:]},
        "feature_attention_mask",
    ),
    "padding on the left": (
        {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"].flip(1)},
        "attention_mask",
    ),
    "an utterance without tokens": (
        {"input_ids": BATCH["input_ids"], "attention_mask": 0 * BATCH["attention_mask"]},
        "attention_mask",
    ),
    "too long a text": ({"input_ids": torch.full((1, 63), 7)}, "63 tokens, more than the model's 62"),
    "too long a recording": ({"input_features": torch.zeros(1, 65, FEATURES)}, "65 frames, more than the model's 64"),
    "other numbers of texts and recordings": (
        {"input_ids": BATCH["input_ids"], "input_features": BATCH["input_features"][:2]},
        "4 texts but 2 recordings",
    ),
    "labels of another shape": (inputs_of(BATCH) | {"labels": BATCH["labels"][:, 1:]}, "labels"),
    "feature labels without masks": (
        inputs_of(BATCH) | {"feature_labels": BATCH["feature_labels"]},
        "mask_time_indices",
    ),
    "feature labels of another shape": (
        BATCH | {"feature_labels": BATCH["feature_labels"][:, 1:]},
        "feature_labels",
    ),
    "more frames without padding than the mask tells": (
        without_padding(BATCH) | {"input_features": BATCH["input_features"].flatten(0, 1)},
        "feature_attention_mask has 85 ones",
    ),
    "labels of more frames than are masked": (
        without_padding(BATCH) | {"feature_labels": BATCH["feature_labels"].flatten(0, 1)},
        "feature_labels has 160 frames, but mask_time_indices marks 18",
    ),
    "a mask of one recording": (
        {"input_features": BATCH["input_features"][0], "feature_attention_mask": BATCH["feature_attention_mask"][0]},
        r"feature_attention_mask has shape \(40,\): it must be \(B, T\)",
    ),
    "frame masks of another shape": (BATCH | {"mask_time_indices": BATCH["mask_time_indices"][:, 1:]}, "mask_time"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gives_one_line_that_names_it(name: str) -> None:
    batch, named = WRONG[name]
    with pytest.raises(InputError, match=named) as error:
        pretraining_model()(**batch)
    assert "\n" not in str(error.value)


class Utterances(torch.utils.data.Dataset):
    """A few utterances over and over, for transformers' Trainer."""

    def __init__(self, utterances: list[Batch]) -> None:
        self.utterances = utterances

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Batch:
        return self.utterances[index % len(self.utterances)]


def trainer_for(model: CtalForPreTraining, utterances: list[Batch], folder: Path, **arguments: Any) -> Trainer:
    defaults = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **(defaults | arguments)),
        data_collator=collate,
        train_dataset=Utterances(utterances),
        eval_dataset=torch.utils.data.Subset(Utterances(utterances), range(4)),
    )


def test_the_trainer_of_transformers_trains_evaluates_and_saves(tmp_path: Path) -> None:
    model = pretraining_model()
    trainer = trainer_for(model, UTTERANCES, tmp_path)
    before = trainer.evaluate()

    trainer.train()

    assert trainer.state.global_step == 5
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    with torch.no_grad():
        assert after["eval_loss"] == pytest.approx(model(**BATCH).loss.item(), rel=1e-5)
    trainer.save_model(str(tmp_path / "model"))
    again = CtalForPreTraining.from_pretrained(tmp_path / "model")
    assert torch.equal(again.text_head.decoder.weight, model.text_head.decoder.weight)


def test_the_trainer_of_transformers_averages_accumulated_batches(tmp_path: Path) -> None:
    norms = []
    for size, steps in ((4, 1), (1, 4)):
        # Batches with the same counts, since the Trainer averages means.
        trainer = trainer_for(
            pretraining_model(),
            UTTERANCES[:1],
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("sees_text", [True, False])
def test_the_audio_depends_on_the_text_only_where_it_sees_it(sees_text: bool):
    model = pretraining_model(audio_sees_text=sees_text)
    batch = utterance(12, 40, 1)
    other = {**batch, "input_ids": batch["input_ids"].roll(1, 1)}
    with torch.no_grad():
        one, two = (model(**inputs, output_hidden_states=True).audio_hidden_state for inputs in (batch, other))
    assert torch.equal(one, two) == (not sees_text)
