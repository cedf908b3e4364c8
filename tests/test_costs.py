"""Costs are what the real model has and torch counts; seconds follow from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretraining_step import positions_of
from benchmarks.samples import masked_batch
from ctal import CtalConfig, CtalForPreTraining, CtalForSequenceClassification
from ctal.costs import (
    CPU,
    FRAMES_A_SECOND,
    GPUS,
    STORED_BYTES,
    Precision,
    activation_bytes,
    communicated_bytes,
    count_weights,
    expected_positions,
    finetuning_operations,
    launches,
    pretraining_operations,
    state_bytes,
    step_seconds,
)
from ctal.dropout import Dropout
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.recipes import PretrainConfig, make_config

CONFIG = CtalConfig.of_size("nano", vocab_size=300)
MASKING = make_config(PretrainConfig)
SECONDS = (0.6, 2.1, 1.3)


def test_configurations_differ_in_what_torch_counts_as_in_the_formula():
    for overrides in ({}, {"audio_is_causal": True}, {"audio_sees_text": False}, {"frame_stack": 4}):
        config = CtalConfig.of_size("nano", vocab_size=300, **overrides)
        batch = masked_batch(SECONDS, config)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
            CtalForPreTraining(config)(**batch).loss.backward()
        expected = pretraining_operations(config, positions_of(config, batch))
        assert counter.get_total_flops() == expected - not_needed(config, batch), overrides


@pytest.mark.parametrize("fusion", ["orthogonal", "concat", "text", "audio"])
def test_operations_of_fine_tuning_are_those_that_torch_counts(fusion: str):
    config = CtalConfig.of_size("nano", vocab_size=300, fusion=fusion)
    config.num_labels = 4
    batch = masked_batch(SECONDS, config)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "input_features", "feature_attention_mask")}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        CtalForSequenceClassification(config)(**inputs, labels=torch.tensor([0, 1, 3])).loss.backward()
    expected = finetuning_operations(config, positions_of(config, batch), outputs=4)
    assert counter.get_total_flops() == expected - (not_needed(config, batch) if fusion != "text" else 0)


def not_needed(config: CtalConfig, batch: dict[str, Tensor]) -> float:
    """The gradient of the first layer's input."""
    frames = sum(each.frames for each in positions_of(config, batch))
    return 2 * frames * config.audio.frame_stack * config.audio.feature_size * config.hidden_size


def test_operations_are_linear_in_utterances_and_grow_faster_with_length():
    def of(*seconds: float) -> float:
        return pretraining_operations(CONFIG, [expected_positions(CONFIG, each, MASKING) for each in seconds])

    assert of(1.0, 3.0, 3.0) == pytest.approx(of(1.0) + 2 * of(3.0))
    assert of(4.0) > 2 * of(2.0)


def test_joining_frames_divides_positions_and_more_than_divides_attention():
    joined = CtalConfig.of_size("nano", vocab_size=300, frame_stack=4)
    one, four = (expected_positions(each, 10.0, MASKING) for each in (CONFIG, joined))
    assert four.frames == one.frames / 4
    assert four.tokens == one.tokens
    assert pretraining_operations(joined, [four]) < pretraining_operations(CONFIG, [one]) / 2


def test_expected_positions_are_those_of_real_batches_on_average():
    for stack in (1, 4):
        config = CtalConfig.of_size("nano", vocab_size=300, frame_stack=stack)
        real = positions_of(config, masked_batch((15.0,) * 60, config))
        for found, expected in zip(
            torch.tensor(real, dtype=torch.float).mean(0), expected_positions(config, 15.0, MASKING), strict=True
        ):
            assert float(found) == pytest.approx(expected, rel=0.08)


def test_a_recording_is_cut_to_what_the_model_takes():
    assert expected_positions(CONFIG, 1000.0, MASKING).frames == CONFIG.audio.max_frames
    assert expected_positions(CONFIG, 1000.0, MASKING).tokens == CONFIG.text.max_tokens


@pytest.mark.parametrize("size", ["nano", "mini"])
def test_weights_gradients_and_moments_are_as_large_as_a_real_models(size: str):
    config = CtalConfig.of_size(size)
    model, weights = CtalForPreTraining(config), count_weights(config)
    real = sum(parameter.nbytes for parameter in model.parameters())
    assert state_bytes(weights) == 4 * real
    assert state_bytes(weights, devices=8) == real / 2
    assert weights.tensors == len(list(model.parameters()))
    encoders = (model.ctal.text_encoder, model.ctal.audio_encoder)
    assert weights.layers == sum(each.numel() for encoder in encoders for each in encoder.layers.parameters())


def test_activations_are_about_what_autograd_keeps():
    config = CtalConfig.of_size("tiny", vocab_size=300)
    model, batch = CtalForPreTraining(config), masked_batch((2.0, 8.0), config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    assert loss.requires_grad
    # A copy of what attention gives, and dropout in fp32, are kept on a CPU only.
    expected = activation_bytes(config, positions_of(config, batch), "fp32")
    assert 1.0 < sum(kept.values()) / expected < 1.35


class CountLaunches(TorchDispatchMode):
    """Counts what is more than another view of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = (argument.alias_info for argument in func._schema.arguments)
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", [2, 6])
def test_a_step_launches_about_as_many_operations_as_it_has_tensors_of_weights_times_a_constant(
    precision: Precision, layers: int, monkeypatch: pytest.MonkeyPatch
):
    # As on a GPU, where launches count most, and dropout is torch's.
    monkeypatch.setattr(Dropout, "forward", torch.nn.Dropout.forward)
    config = CtalConfig.of_size("nano", vocab_size=300, num_hidden_layers=layers)
    model, batch = CtalForPreTraining(config), masked_batch((1.0,), config)
    with CountLaunches() as counted, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(**batch).loss.backward()
    assert launches(count_weights(config), precision) == pytest.approx(counted.count, rel=0.12)


def test_one_device_communicates_nothing_and_many_no_more_than_twice_the_gradients():
    weights = count_weights(CONFIG)
    for sharded in (False, True):
        assert communicated_bytes(weights, 1, sharded=sharded) == 0
    sent = [communicated_bytes(weights, devices, sharded=False) for devices in (2, 8, 64)]
    assert sent[0] == 4 * weights.total
    assert sent == sorted(sent)
    assert sent[-1] < 8 * weights.total
    assert communicated_bytes(weights, 64, sharded=True) > sent[-1]


def test_storage_is_what_the_extractor_makes_in_two_bytes_a_number():
    frame = CtalFeatureExtractor().feature_size
    assert STORED_BYTES["16-bit features"] == FRAMES_A_SECOND * frame * 2
    assert STORED_BYTES["16-bit log-mel"] == STORED_BYTES["16-bit features"] / 2


def test_the_host_hides_behind_a_device_that_computes_longer_and_adds_to_a_cpu():
    weights, gpu = count_weights(CONFIG), GPUS["h200"]
    short, long = (step_seconds(gpu, weights, operations, "bf16") for operations in (1e9, 1e14))
    assert short.total == short.host > short.passes + short.update
    assert long.total == long.passes + long.update > long.host
    here = step_seconds(CPU, weights, 1e12, "fp32")
    assert here.total == pytest.approx(here.passes + here.update + here.host)


def test_communication_costs_only_what_the_backward_pass_does_not_hide():
    weights = count_weights(CtalConfig.of_size("base"))
    slow = replace(GPUS["h100"], network=1e6)
    large, small = (step_seconds(GPUS["h100"], weights, each, "bf16", devices=64) for each in (1e14, 1e10))
    assert large.communication == 0 < small.communication
    assert step_seconds(slow, weights, 1e14, "bf16", devices=8).communication == 0, "within a node"
    assert step_seconds(slow, weights, 1e14, "bf16", devices=64).communication > 1


def test_split_weights_are_updated_by_each_device_in_part():
    weights = count_weights(CONFIG)
    whole, split = (
        step_seconds(GPUS["h100"], weights, 1e12, "bf16", devices=8, sharded=each) for each in (False, True)
    )
    assert split.update == whole.update / 8
