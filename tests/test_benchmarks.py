"""The baseline is the same function as ours, and the harness reports what it was given. Never how fast anything is."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import combinations, groupby
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu, harness
from benchmarks.__main__ import BENCHMARKS
from benchmarks.baseline import Attention, AuthorsModel, compare, copy_weights, counterparts
from benchmarks.data_loading import FilePerUtterance, write_features
from benchmarks.devices import (
    Training,
    check_checkpointing,
    frames_dealt,
    frames_drawn,
    imbalance,
    largest_difference,
    train_and_watch,
)
from benchmarks.harness import (
    DOCUMENT,
    Check,
    Limits,
    Report,
    Spread,
    Stopwatch,
    Table,
    alternate,
    is_timed,
    publish,
    times_faster,
)
from benchmarks.inference import authors_embeddings, made_up_features, our_embeddings
from benchmarks.pretraining_step import (
    ALLOCATORS,
    AUTHORS,
    AUTHORS_KEEPING,
    GRADIENT_LIMIT,
    LOSS_LIMIT,
    OURS,
    OURS_CAUSAL,
    OURS_DROPOUT,
    OURS_GIVING_BACK,
    ROWS,
    Parts,
    Row,
    Trainers,
    measure,
    operations,
    step_table,
)
from benchmarks.samples import (
    MIXED_SECONDS,
    NEIGHBOURING_SECONDS,
    librispeech_like_seconds,
    masked_batch,
    without_padding,
    write_store,
)
from benchmarks.scaling import Point, Timed, error, fit, outlook
from conftest import TinyCorpus
from ctal import CtalConfig, CtalFeatureExtractor, CtalForPreTraining, CtalProcessor
from ctal.batching import Corpus, Microbatch
from ctal.costs import CPU, Machine, Precision, count_weights, step_seconds
from ctal.precision import for_precision
from ctal.pretrain import load_tokenizer, make_dataset
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store

CONFIG = CtalConfig.of_size("nano", audio_is_causal=True, hidden_dropout_prob=0, position_init="normal", vocab_size=300)
LENGTHS = (0.4, 2.1, 1.3)


@pytest.fixture(scope="module")
def ours() -> CtalForPreTraining:
    """Weights of which no two are equal, biases and LayerNorms included."""
    torch.manual_seed(0)
    model = CtalForPreTraining(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return masked_batch(LENGTHS, CONFIG)


def baseline_of(ours: CtalForPreTraining, attention: Attention = "eager") -> AuthorsModel:
    authors = AuthorsModel(ours.config, attention)
    copy_weights(ours, authors)
    return authors


# The baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [LENGTHS, (1.5,)], ids=["mixed lengths, padded", "one utterance"])
def test_equal_weights_give_the_losses_and_gradients_of_ours(
    ours: CtalForPreTraining, lengths: tuple[float, ...], attention: Attention
) -> None:
    differences = compare(ours, baseline_of(ours, attention), masked_batch(lengths, CONFIG))
    assert differences.loss <= LOSS_LIMIT
    assert differences.gradient <= GRADIENT_LIMIT, differences.parameter


def test_a_bidirectional_model_is_told_from_the_causal_baseline(
    ours: CtalForPreTraining, batch: Mapping[str, Tensor]
) -> None:
    bidirectional = CtalForPreTraining(CtalConfig.of_size("nano", hidden_dropout_prob=0, vocab_size=300))
    bidirectional.load_state_dict(ours.state_dict())
    assert compare(bidirectional, baseline_of(ours), batch).loss > LOSS_LIMIT


def test_every_parameter_of_both_has_exactly_one_counterpart(ours: CtalForPreTraining) -> None:
    places, sources = counterparts(CONFIG), dict(ours.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in AuthorsModel(CONFIG).named_parameters()}
    assert places.keys() == sizes.keys()
    for name, (source, rows) in places.items():
        assert sources[source][rows].numel() == sizes[name], name
    taken = Counter(
        (source, row) for source, rows in places.values() for row in range(*rows.indices(len(sources[source])))
    )
    assert taken == Counter((name, row) for name, each in sources.items() for row in range(len(each)))


@torch.no_grad()
def test_any_two_weights_swapped_are_noticed(ours: CtalForPreTraining, batch: Mapping[str, Tensor]) -> None:
    authors = baseline_of(ours)
    expected = authors(**batch).loss
    # What a key's bias adds to the score of every key alike, the softmax takes away again.
    telling = [(name, each) for name, each in authors.named_parameters() if not name.endswith("key.bias")]
    by_shape = sorted(telling, key=lambda pair: (tuple(pair[1].shape), pair[0]))
    swaps = 0
    for _, alike in groupby(by_shape, key=lambda pair: pair[1].shape):
        for (one, first), (other, second) in list(combinations(alike, 2))[::7]:
            swapped = first.clone(), second.clone()
            first.copy_(swapped[1])
            second.copy_(swapped[0])
            assert abs(authors(**batch).loss - expected) > LOSS_LIMIT, f"{one} and {other}"
            first.copy_(swapped[0])
            second.copy_(swapped[1])
            swaps += 1
    assert swaps > 100


def test_embeddings_one_by_one_and_in_padded_batches_are_those_of_ours(ours: CtalForPreTraining) -> None:
    features = made_up_features((0.4, 1.1, 0.7))
    ours.eval()
    authors = baseline_of(ours).eval()
    expected = our_embeddings(ours.ctal, "fp32", features)
    for batch_size in (1, 2):
        torch.testing.assert_close(authors_embeddings(authors, batch_size, features), expected, atol=1e-5, rtol=1e-4)
    int8 = our_embeddings(for_precision(ours.ctal, "int8"), "int8", features)
    assert torch.cosine_similarity(int8, expected).min() > 0.99
    assert not torch.equal(int8, expected)
    ours.train()


def test_files_give_the_batches_of_the_store_padded(tiny: TinyCorpus, tmp_path: Path) -> None:
    processor = CtalProcessor(CtalFeatureExtractor(), load_tokenizer(tiny.tokenizer))
    config = make_config(PretrainConfig)
    dataset = make_dataset(Corpus([Store(tiny.store)]), processor, config, max_frames=3000, seed=0)
    files = FilePerUtterance(write_features(tmp_path / "npy", dataset), dataset)
    microbatch = Microbatch(2, (3, 0, 7))
    expected, found = dataset[microbatch], without_padding(files[microbatch])
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name


# What a step is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [AUTHORS, OURS, OURS_CAUSAL], ids=lambda row: row.name)
def test_operations_are_those_that_torch_counts(row: Row) -> None:
    config = row.config("nano")
    batch = masked_batch((1.5,), config)
    model = row.build("nano")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
        model(**batch).loss.backward()
    # The first layer's input needs no gradient.
    first = 2 * int(batch["feature_attention_mask"].sum()) * config.audio.feature_size * config.hidden_size
    assert counter.get_total_flops() == operations(config, batch, all_positions=not row.ours) - first


def test_padding_is_no_work() -> None:
    def of(*lengths: float) -> float:
        return operations(CONFIG, masked_batch(lengths, CONFIG))

    assert of(1.0, 3.0) == of(1.0) + of(3.0)


def test_rows_train_the_same_weights_and_differ_in_how() -> None:
    trainers = Trainers("nano")
    for row in (OURS, OURS_DROPOUT):
        trainers.prepare(row)
    first, second = (trainers._models[row] for row in (OURS, OURS_DROPOUT))
    before = second.get_parameter("audio_head.dense.weight").clone()
    trainers.step(OURS, masked_batch((1.0,), OURS.config("nano")))
    assert all(one is other for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(second.get_parameter("audio_head.dense.weight"), before)
    assert len(trainers.parts[OURS]) == 1


def test_all_rows_hear_as_many_seconds_of_librispeechs_lengths() -> None:
    assert len(MIXED_SECONDS) == len(NEIGHBOURING_SECONDS) == 6
    assert {round(sum(row.seconds), 6) for row in (*ROWS, *ALLOCATORS)} == {73.8}
    made_up = librispeech_like_seconds(2000)
    assert min(made_up) >= 2
    assert max(made_up) <= 17
    assert sum(made_up) / len(made_up) == pytest.approx(12.3, abs=0.2)


@pytest.mark.parametrize("load", gpu.LOADS, ids=lambda load: f"{load.size}, {load.name}")
def test_rows_of_a_load_on_a_gpu_hear_the_same_seconds_and_the_authors_come_first(load: gpu.Load) -> None:
    rows = load.rows()
    assert rows[0].name == AUTHORS.name
    assert len({round(sum(row.seconds), 6) for row in rows}) == 1
    assert len({row.name for row in rows}) == len(rows)


def test_a_stopwatch_tells_the_time_between_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for pause in (0.0, 0.05):
        time.sleep(pause)
        watch.mark()
    first, second = watch.spans()
    assert first >= 0
    assert second >= 0.05


def test_a_row_for_which_memory_does_not_suffice_stands_in_the_table_without_a_time() -> None:
    memory = {AUTHORS: 12.0, OURS: float("inf")}
    table = step_table("A step", "nano", [AUTHORS, OURS], {AUTHORS: [2.0, 4.0]}, memory, Limits(1e12, 1e12, 1e9))
    assert [row[1] for row in table.rows] == ["3 (2–4)", "out of memory"]
    assert table.rows[0][2:6] == ("24.6", "1", "12", "100 %")
    table = step_table("A step", "nano", [OURS, AUTHORS], {AUTHORS: [2.0]}, memory, Limits(1e12, 1e12, 1e9))
    assert [row[3] for row in table.rows] == ["–", "–"], "nothing to compare with"
    assert {len(row) for row in table.rows} == {len(table.columns)}


# Several processes, many steps ------------------------------------------------------------------------------------


def test_trainings_take_a_step_when_asked_and_split_weights_give_the_losses_of_one_process(tmp_path: Path) -> None:
    write_store(tmp_path, np.linspace(0.4, 1.2, 24).tolist())
    losses = []
    for ranks in (1, 2):
        config = make_config(PretrainConfig, {"batch_frames": 400, "warmup_ratio": 0, "workers": 0, "sharded": True})
        with closing(Training(ranks, 1, tmp_path, tmp_path / f"run-{ranks}", "nano", config)) as training:
            assert all(training.step() > 0 for _ in range(3))
        losses.append(training.losses)
    assert [len(each) for each in losses] == [3, 3]
    assert largest_difference(*losses) <= LOSS_LIMIT
    assert largest_difference(losses[0], losses[0][::-1]) > LOSS_LIMIT, "steps differ"


def test_activations_computed_again_change_nothing_and_another_model_is_noticed() -> None:
    again = replace(OURS, gradient_checkpointing=True)
    assert again.build("nano").is_activation_checkpointing
    assert check_checkpointing("nano", (OURS, again), (0.8, 0.3)).passed
    assert not check_checkpointing("nano", (OURS, OURS_CAUSAL), (0.8, 0.3)).passed


def test_every_frame_is_dealt_out_once_and_more_evenly_than_at_random() -> None:
    frames = np.arange(300, 1500)
    for ranks in (2, 8):
        ours, at_random = frames_dealt(frames, ranks, ranks * 6000), frames_drawn(frames, ranks)
        assert ours.sum() == frames.sum()
        assert ours.shape[1] == at_random.shape[1] == ranks
        assert 0 < imbalance(ours) < imbalance(at_random) / 2
    assert imbalance(frames_drawn(np.full(120, 7), 4)) == 0
    assert imbalance(np.array([[1, 3], [2, 2]])) == 0.25


def test_memory_is_told_of_the_training_and_its_worker_after_the_wanted_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_store(tmp_path, [0.4, 0.8, 0.6, 0.5])
    config = make_config(PretrainConfig, {"steps": 6, "batch_frames": 100, "workers": 1})
    found = harness.in_fresh_process(train_and_watch, tmp_path, "nano", config, [2, 6])
    assert list(found) == [2, 6]
    assert all(50 < megabytes < 5000 for both in found.values() for megabytes in both)


# The cost model ---------------------------------------------------------------------------------------------------


def timed_by(machine: Machine, size: str, precision: Precision, operations: float) -> Timed:
    """What `machine` would have measured."""
    weights = count_weights(CtalConfig.of_size(size))
    step = step_seconds(machine, weights, operations, precision)
    parts = Parts(step.passes / 3, 2 / 3 * step.passes + step.host, step.update)
    return Timed(Point(size, (1.0,)), size, precision, operations, weights, [parts])


def test_a_fit_finds_the_constants_that_made_its_points_and_never_sees_what_is_held_out() -> None:
    truth = replace(CPU, peaks={"fp32": 1e11, "bf16": 2e11})
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    points = [
        timed_by(truth, size, precision, operations)
        for size, operations in (("nano", 1e8), ("mini", 1e10), ("tiny", 1e11))
        for precision in precisions
    ]
    wrong = timed_by(replace(truth, launch=1.0), "base", "fp32", 1e11)
    held_out = replace(wrong, point=replace(wrong.point, is_held_out=True))
    found = fit([*points, held_out], Limits(1e11, 2e11, 1e10))
    assert found.shares == pytest.approx(truth.shares)
    assert (found.bandwidth, found.launch) == pytest.approx((truth.bandwidth, truth.launch))
    assert [error(found, each) for each in points] == pytest.approx([0] * len(points), abs=1e-6)
    assert error(found, held_out) < -0.5


def test_where_bf16_is_multiplied_in_software_it_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.multiplies_bf16", lambda device_type: False)
    assert [is_timed(*each) for each in (("fp32", False), ("bf16", False), ("bf16", True))] == [True, False, True]
    limits = Limits(1e11, math.nan, 1e10)
    assert "bf16" not in str(limits.better(limits))
    points = [timed_by(CPU, size, "fp32", operations) for size, operations in (("nano", 1e8), ("tiny", 1e11))]
    found = fit(points, limits._replace(fp32=CPU.peaks["fp32"]))
    assert found.shares == pytest.approx({"fp32": CPU.shares["fp32"]})


def test_the_tables_on_gpus_in_the_document_are_those_that_follow_from_the_constants() -> None:
    text = DOCUMENT.with_name("scaling.md").read_text()
    report = outlook(quick=False)
    for part in [*report.tables, *report.notes]:
        assert str(part) in text, "run `python -m benchmarks outlook`"


# The harness ------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_every_other_one_goes_backwards() -> None:
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "own": lambda: 12.5}, 2)
    assert "".join(calls) == "abba"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, "own": 2}
    assert seconds["own"] == [12.5, 12.5], "timed by itself"


def test_who_is_timed_once_is_compared_with_the_last_round() -> None:
    assert times_faster([1.0, 2.0, 6.0], [12.0]) == Spread(0.5, 0.5, 0.5)
    assert times_faster([12.0], [1.0, 2.0, 6.0]) == Spread(2, 2, 2)


def test_rows_take_steps_in_processes_of_their_kind_and_those_timed_once_after_the_others() -> None:
    rows = [row.scaled(0.05) for row in (AUTHORS_KEEPING, OURS, OURS_DROPOUT, OURS_GIVING_BACK)]
    rows = [replace(row, has_memory=False) for row in rows]
    assert [row.keeps for row in rows] == [True, True, True, False]
    seconds, memory, parts = measure("nano", rows, rounds=2)
    assert [len(seconds[row]) for row in rows] == [1, 2, 2, 2]
    assert seconds == {row: [sum(each) for each in parts[row]] for row in rows}
    assert not memory


def test_a_ratio_compares_the_same_rounds() -> None:
    assert times_faster([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == Spread(3.0, 2.0, 4.0)


def test_peak_memory_is_that_of_the_work_and_its_libraries() -> None:
    assert 1.0 < harness.peak_memory(mul, b"x", 10**9) < 3.0


def test_only_unequal_results_fail() -> None:
    assert Check("a difference", 1e-5, 1e-5).passed
    assert not Check("a difference", 2e-5, 1e-5).passed
    assert not Check("a difference", float("nan"), 1e-5).passed
    assert Check("a cosine", 0.9995, 0.999, at_least=True).passed
    assert not Check("a cosine", 0.99, 0.999, at_least=True).passed
    assert Report("slow but right", checks=[Check("a difference", 0, 1e-5)]).passed


def test_a_report_goes_between_its_markers_and_a_quick_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    monkeypatch.setattr(harness, "DOCUMENT", document)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    report = Report(
        "one", tables=[Table("A caption", ("", "s"), [("ours", "1.5")])], measured={"bf16": math.nan, "GB": math.inf}
    )
    publish(report, {"CPU": "x"}, "make bench", quick=True)
    assert "old" in document.read_text()
    for _ in range(2):
        publish(report, {"CPU": "x"}, "make bench", quick=False)
    text = document.read_text()
    assert text.startswith("before\n<!-- one -->\n**A caption**")
    assert text.endswith("Measured with `make bench`. CPU x.\n<!-- end of one -->\nafter\n")
    assert "old" not in text
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"one.json", "one-quick.json"}
    assert json.loads((tmp_path / "results" / "one.json").read_text())["measured"] == {"bf16": None, "GB": "Infinity"}
    with pytest.raises(ValueError, match="needs the markers"):
        publish(Report("two"), {}, "make bench", quick=False)


def test_the_documents_have_a_place_for_every_benchmark() -> None:
    text = "".join(path.read_text() for path in DOCUMENT.parent.glob("*.md"))
    for name in BENCHMARKS:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1, name
