"""The importer of the authors' checkpoints, on a tiny one made here in their format."""

from __future__ import annotations

import argparse
import copy
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import Tensor

import ctal
from ctal.convert_original import convert_checkpoint, model_from_original, read_original_checkpoint
from ctal.errors import InputError

HIDDEN, LAYERS, FFN, VOCAB, FRAMES = 8, 2, 12, 30, 40
SECTION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": FFN,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}


class Numbered:
    """Makes tensors that differ from each other in every value, so that a swap of two of them shows."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *shape: int) -> Tensor:
        self.count += 1
        return self.count + torch.rand(shape, generator=torch.Generator().manual_seed(self.count)) / 2


def linear(number: Numbered, name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.weight": number(rows, columns), f"{name}.bias": number(rows)}


def norm(number: Numbered, name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": number(HIDDEN), f"{name}.bias": number(HIDDEN)}


def attention(number: Numbered, name: str) -> dict[str, Tensor]:
    state = {}
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        state |= linear(number, f"{name}.{part}", HIDDEN, HIDDEN)
    return state | norm(number, f"{name}.output.LayerNorm")


def encoder(number: Numbered, name: str, positions: int, blocks: tuple[str, ...]) -> dict[str, Tensor]:
    state = {
        f"{name}.embeddings.position_ids": torch.arange(positions)[None],
        f"{name}.embeddings.position_embeddings.weight": number(positions, HIDDEN),
        f"{name}.embeddings.token_type_embeddings.weight": number(2, HIDDEN),
    } | norm(number, f"{name}.embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"{name}.encoder.layer.{i}"
        for block in blocks:
            state |= attention(number, f"{layer}.{block}")
        state |= linear(number, f"{layer}.intermediate.dense", FFN, HIDDEN)
        state |= linear(number, f"{layer}.output.dense", HIDDEN, FFN)
        state |= norm(number, f"{layer}.output.LayerNorm")
    return state


def head(number: Numbered, name: str, outputs: int) -> dict[str, Tensor]:
    state = linear(number, f"{name}.dense", HIDDEN, HIDDEN) | norm(number, f"{name}.layer_norm")
    state |= linear(number, f"{name}.decoder", outputs, HIDDEN)
    return state | {f"{name}.bias": state[f"{name}.decoder.bias"]}


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the authors' code saves, the objects of classes that we do not have included."""
    module = types.ModuleType("m2p_optimization")
    schedule = type("WarmupLinearSchedule", (argparse.Namespace,), {"__module__": "m2p_optimization"})
    module.WarmupLinearSchedule = schedule  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "m2p_optimization", module)
    instance = schedule(warmup=0.07)

    number = Numbered()
    text = encoder(number, "roberta", 512, ("attention",)) | head(number, "lm_head", VOCAB)
    text["roberta.embeddings.word_embeddings.weight"] = text["lm_head.decoder.weight"]
    audio = encoder(number, "acoustic", FRAMES, ("attention", "crossattention")) | head(number, "am_head", 160)
    audio |= linear(number, "acoustic.embeddings.dense", HIDDEN, 160)
    config = {
        "semantic": {**SECTION, "vocab_size": VOCAB},
        "acoustic": {**SECTION, "audio_size": 160, "max_position_embeddings": FRAMES, "is_decoder": True},
        "optimizer": {"learning_rate": "5e-5"},
    }
    return {
        "semantic_model": text,
        "acoustic_model": audio,
        "Optimizer": {"state": {}, "param_groups": [{"schedule": instance}]},
        "Global_step": 7,
        "Settings": {"Config": config, "Paras": argparse.Namespace(seed=1337)},
    }


def saved(content: object, path: Path, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert ";" in message, f"no mend in: {message}"
    return message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_every_weight_arrives_at_its_place(content: dict[str, Any], tmp_path: Path, zipped: bool) -> None:
    path = saved(content, tmp_path / "states-7.ckpt", _use_new_zipfile_serialization=zipped)

    checkpoint = read_original_checkpoint(path)
    ours = model_from_original(checkpoint).state_dict()

    text, audio = content["semantic_model"], content["acoustic_model"]
    assert checkpoint.step == 7
    assert checkpoint.config == content["Settings"]["Config"]
    for side, state, theirs in (
        ("text", text, "roberta.encoder.layer.1"),
        ("audio", audio, "acoustic.encoder.layer.1"),
    ):
        layer = f"ctal.{side}_encoder.layers.1"
        for field in ("weight", "bias"):
            parts = [state[f"{theirs}.attention.self.{part}.{field}"] for part in ("query", "key", "value")]
            torch.testing.assert_close(ours[f"{layer}.attention.query_key_value.{field}"], torch.cat(parts))
            for target, source in (
                ("attention.output.dense", "attention.output.dense"),
                ("attention.output.norm", "attention.output.LayerNorm"),
                ("feed_forward.dense", "intermediate.dense"),
                ("feed_forward.output.dense", "output.dense"),
                ("feed_forward.output.norm", "output.LayerNorm"),
            ):
                torch.testing.assert_close(ours[f"{layer}.{target}.{field}"], state[f"{theirs}.{source}.{field}"])
    cross, theirs = "ctal.audio_encoder.layers.0.cross_attention", "acoustic.encoder.layer.0.crossattention"
    key_value = [audio[f"{theirs}.self.{part}.bias"] for part in ("key", "value")]
    torch.testing.assert_close(ours[f"{cross}.key_value.bias"], torch.cat(key_value))
    torch.testing.assert_close(ours[f"{cross}.query.weight"], audio[f"{theirs}.self.query.weight"])
    token_types = audio["acoustic.embeddings.token_type_embeddings.weight"]
    torch.testing.assert_close(ours["ctal.audio_encoder.token_type_embedding"], token_types[0])
    torch.testing.assert_close(ours["text_head.decoder.weight"], text["roberta.embeddings.word_embeddings.weight"])
    torch.testing.assert_close(ours["audio_head.decoder.bias"], audio["am_head.decoder.bias"])


def test_no_number_of_theirs_is_lost_and_none_is_new(content: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = read_original_checkpoint(saved(content, tmp_path / "states-7.ckpt"))
    model = model_from_original(checkpoint)

    theirs = {
        number
        for state in (checkpoint.text, checkpoint.audio)
        for name, tensor in state.items()
        if "position_ids" not in name
        for number in (tensor[0] if "token_type" in name else tensor).flatten().tolist()
    }
    ours = {number for parameter in model.parameters() for number in parameter.flatten().tolist()}
    assert ours == theirs


def test_the_folder_serves_from_pretrained_and_says_where_it_comes_from(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(content, tmp_path / "states-7.ckpt")
    out = tmp_path / "model"

    convert_checkpoint(path, out)

    model = ctal.CtalForPreTraining.from_pretrained(out)
    assert model.config.audio_is_causal
    assert model.config.audio.max_frames == FRAMES
    assert model.config.audio.hidden_dropout_prob == 0.1
    assert model.config.audio.attention_probs_dropout_prob == 0
    for name, tensor in model_from_original(read_original_checkpoint(path)).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    extractor = ctal.CtalFeatureExtractor.from_pretrained(out)
    assert extractor.feature_size == model.config.audio.feature_size
    assert extractor.max_frames == FRAMES
    card = (out / "README.md").read_text()
    assert "states-7.ckpt" in card
    assert "audio_is_causal" in card
    assert str(tmp_path) not in card


def test_with_a_tokenizer_the_folder_serves_the_processor_too(content: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = [chr(code) for code in range(ord("a"), ord("a") + VOCAB - len(special) - 1)]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, "ab"])}
    (tokenizer / "vocab.json").write_text(str(vocabulary).replace("'", '"'))
    (tokenizer / "merges.txt").write_text("#version: 0.2\na b\n")
    path = saved(content, tmp_path / "states-7.ckpt")

    convert_checkpoint(path, tmp_path / "model", tokenizer)

    processor = ctal.CtalProcessor.from_pretrained(tmp_path / "model")
    batch = processor(text="abc", audio=torch.rand(4000).numpy(), sampling_rate=16000)
    assert batch["input_ids"].tolist() == [[0, vocabulary["ab"], vocabulary["c"], 2]]
    outputs = ctal.CtalModel.from_pretrained(tmp_path / "model")(**batch)
    assert outputs.audio_hidden_state.shape == (1, batch["input_features"].shape[1], HIDDEN)

    content["Settings"]["Config"]["semantic"]["vocab_size"] = VOCAB - 1
    state = content["semantic_model"]
    for name in ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"):
        state[name] = state[name][1:]
    for name in ("lm_head.bias", "lm_head.decoder.bias"):
        state[name] = state[name][1:]
    smaller = saved(content, tmp_path / "states-8.ckpt")
    with pytest.raises(InputError, match="has 30 entries, the checkpoint 29") as error:
        convert_checkpoint(smaller, tmp_path / "other", tokenizer)
    one_line(error)
    assert not (tmp_path / "other").exists()


def _drop(part: str, name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].pop(name)


def _put(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].update({name: value})


def _rename(part: str, name: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[part].update({new: content[part].pop(name)})


def _configure(section: str, field: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["Settings"]["Config"][section].update({field: value})


def _spoil(part: str, name: str, value: float) -> Callable[[dict[str, Any]], object]:
    def spoil(content: dict[str, Any]) -> None:
        content[part][name] = content[part][name].clone()
        content[part][name].view(-1)[-1] = value

    return spoil


QUERY = "acoustic.encoder.layer.1.crossattention.self.query.weight"
DENSE = "roberta.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(_drop("acoustic_model", QUERY), QUERY, id="a weight is missing"),
        pytest.param(_rename("semantic_model", DENSE, "roberta.renamed"), DENSE, id="a weight is renamed"),
        pytest.param(_put("semantic_model", "extra.weight", torch.ones(2)), "extra.weight", id="a weight is left over"),
        pytest.param(_put("acoustic_model", QUERY, torch.ones(HIDDEN, FFN)), QUERY, id="a weight has a wrong shape"),
        pytest.param(_put("acoustic_model", QUERY, [1.0]), QUERY, id="a weight is no tensor"),
        pytest.param(_spoil("acoustic_model", QUERY, float("nan")), QUERY, id="NaN"),
        pytest.param(_spoil("semantic_model", DENSE, float("inf")), DENSE, id="infinity"),
        pytest.param(_spoil("semantic_model", "lm_head.decoder.weight", 5.0), "tied", id="the decoder is not tied"),
        pytest.param(_spoil("semantic_model", "lm_head.bias", 5.0), "lm_head.bias", id="two biases differ"),
        pytest.param(
            _spoil("acoustic_model", "acoustic.embeddings.position_ids", 3), "position_ids", id="positions do not count"
        ),
        pytest.param(lambda content: content.pop("acoustic_model"), "acoustic_model", id="no audio encoder"),
        pytest.param(lambda content: content.pop("Settings"), "Settings", id="no settings"),
        pytest.param(lambda content: content.pop("Global_step"), "Global_step", id="no step"),
        pytest.param(lambda content: content.update(Classifier={}), "Classifier", id="a part that is not pre-training"),
        pytest.param(
            lambda content: content["Settings"]["Config"].pop("acoustic"), "acoustic", id="a section is missing"
        ),
        pytest.param(_configure("acoustic", "hidden_act", "relu"), "hidden_act", id="another activation"),
        pytest.param(_configure("acoustic", "is_decoder", False), "is_decoder", id="not causal"),
        pytest.param(_configure("acoustic", "audio_size", 80), "audio_size", id="other features"),
        pytest.param(_configure("semantic", "num_attention_heads", 0), "num_attention_heads", id="no heads"),
        pytest.param(_configure("semantic", "hidden_dropout_prob", "much"), "hidden_dropout_prob", id="no number"),
        pytest.param(_configure("semantic", "num_hidden_layers", 3), "layer.2", id="fewer layers than configured"),
        pytest.param(_configure("semantic", "num_hidden_layers", 1), "layer.1", id="more layers than configured"),
    ],
)
def test_a_wrong_checkpoint_gives_one_line_that_names_what_is_wrong(
    content: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    content = copy.deepcopy(content)
    change(content)
    path = saved(content, tmp_path / "states-7.ckpt")

    with pytest.raises(InputError) as error:
        convert_checkpoint(path, tmp_path / "model")

    message = one_line(error)
    assert named in message
    assert str(path) in message
    assert not (tmp_path / "model").exists()


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
@pytest.mark.parametrize("function", ["system", "open", "eval"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(
    content: dict[str, Any], tmp_path: Path, function: str, zipped: bool
) -> None:
    proof = tmp_path / "proof"
    payload = {
        "system": Runs(os.system, f"touch {proof}"),
        "open": Runs(open, str(proof), "w"),
        "eval": Runs(eval, f"open({str(proof)!r}, 'w')"),
    }[function]
    content["Settings"]["Paras"] = payload
    path = saved(content, tmp_path / "states-7.ckpt", _use_new_zipfile_serialization=zipped)

    with pytest.raises(InputError, match=rf"'\S*{function}'.*could run code") as error:
        read_original_checkpoint(path)

    one_line(error)
    assert not proof.exists()


def test_the_permission_to_read_their_classes_ends_with_the_reading(content: dict[str, Any], tmp_path: Path) -> None:
    path = saved(content, tmp_path / "states-7.ckpt")
    before = set(torch.serialization.get_safe_globals())

    read_original_checkpoint(path)

    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_a_truncated_file_gives_one_line(content: dict[str, Any], tmp_path: Path, zipped: bool) -> None:
    whole = saved(content, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "states-7.ckpt"
    for size in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError) as error:
            read_original_checkpoint(path)
        assert str(path) in one_line(error)


def test_what_is_not_a_checkpoint_gives_one_line(tmp_path: Path) -> None:
    text = tmp_path / "states-1.ckpt"
    text.write_text("not a checkpoint\n" * 100)
    tensor = saved(torch.ones(2), tmp_path / "states-2.ckpt")
    for path in (tmp_path / "absent.ckpt", tmp_path, text, tensor):
        with pytest.raises(InputError) as error:
            read_original_checkpoint(path)
        assert str(path) in one_line(error)


def test_nothing_is_written_into_a_folder_that_holds_something(content: dict[str, Any], tmp_path: Path) -> None:
    path = saved(content, tmp_path / "states-7.ckpt")
    with pytest.raises(InputError, match="not an empty folder") as error:
        convert_checkpoint(path, tmp_path)
    one_line(error)
    assert list(tmp_path.iterdir()) == [path]

    empty = tmp_path / "model"
    empty.mkdir()
    convert_checkpoint(path, empty)
    assert (empty / "config.json").exists()
