"""Plans of steps, what is held out, and what a batch holds."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import TinyCorpus, record
from ctal import batching
from ctal.audio import load_audio
from ctal.batching import (
    Corpus,
    Microbatch,
    Parcel,
    PlannedStep,
    Position,
    PretrainingDataset,
    StepPlan,
    collate,
    deal,
    hold_out,
    load,
    plan_from,
)
from ctal.configuration_ctal import CtalConfig
from ctal.corpora import Utterance
from ctal.errors import InputError
from ctal.feature_extraction_ctal import CtalFeatureExtractor
from ctal.masking import IGNORED
from ctal.objective import corpus_features
from ctal.pretrain import load_tokenizer, make_dataset
from ctal.processing_ctal import CtalProcessor
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store, prepare_store
from ctal.stored_features import write_features

Rows = Sequence[tuple[str | None, int, bool, str | None]]
"""(speaker, frames, has text, split) of each utterance."""

LENGTHS = np.random.default_rng(3).integers(24, 200, 150)


def plan_of(lengths: np.ndarray = LENGTHS, batch_frames: int = 1000, seed: int = 0, shards: int = 1) -> StepPlan:
    rows = np.arange(len(lengths))
    return StepPlan(rows, lengths, rows * shards // len(rows), batch_frames, seed)


def walk(
    plan: StepPlan, count: int, start: Position | None = None, rank: int = 0, ranks: int = 1, accumulation: int = 1
) -> list[PlannedStep]:
    steps = plan_from(plan, start or Position(), rank=rank, ranks=ranks, accumulation=accumulation)
    return list(islice(steps, count))


def rows_of(step: PlannedStep) -> list[int]:
    return [row for microbatch in step.microbatches if microbatch.weight for row in microbatch.rows]


# The plan ---------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    batch_frames=st.integers(50, 2000),
    shards=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(deadline=None)
def test_every_row_is_used_once_an_epoch_and_no_step_is_empty(
    lengths: list[int], batch_frames: int, shards: int, epoch: int
) -> None:
    steps = list(plan_of(np.array(lengths), batch_frames, shards=shards).steps(epoch))
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert all(len(step) for step in steps)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80), batch_frames=st.integers(50, 2000))
@settings(deadline=None)
def test_a_step_is_bounded_by_frames_and_the_last_one_by_half_as_many_again(
    lengths: list[int], batch_frames: int
) -> None:
    plan = plan_of(np.array(lengths), batch_frames)
    *others, last = [plan.frames[step] for step in plan.steps(0)]
    for frames in others:
        assert frames.sum() <= batch_frames or len(frames) == 1
    assert last.sum() <= max(batch_frames, last.max()) + batch_frames / 2
    if others:
        assert last.sum() >= batch_frames / 2, "no small step, whose few utterances would count as much as many"


def test_a_plan_is_a_pure_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [step.tolist() for step in plan_of(seed=seed).steps(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)


def test_jumping_to_a_position_equals_walking_there() -> None:
    plan = plan_of()
    walked = walk(plan, 60, rank=1, ranks=2, accumulation=2)
    assert walked[-1].after.epoch >= 2, "the walk must cross epochs"
    for done in range(0, 59, 7):
        jumped = walk(plan, 60 - done - 1, start=walked[done].after, rank=1, ranks=2, accumulation=2)
        assert jumped == walked[done + 1 :]


def test_a_plan_may_start_where_an_epoch_has_ended() -> None:
    plan = plan_of()
    epoch_length = len(list(plan.steps(0)))
    assert walk(plan, 3, start=Position(0, epoch_length)) == walk(plan, 3, start=Position(1, 0))


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_holds_the_same_utterances_however_it_is_dealt_out(ranks: int, accumulation: int) -> None:
    whole = walk(plan_of(), 40)
    dealt = [walk(plan_of(), 40, rank=rank, ranks=ranks, accumulation=accumulation) for rank in range(ranks)]
    for number, step in enumerate(whole):
        shares = [steps[number] for steps in dealt]
        assert {share.after for share in shares} == {step.after}
        assert all(len(share.microbatches) == accumulation for share in shares)
        assert sorted(row for share in shares for row in rows_of(share)) == sorted(rows_of(step))


def test_two_ranks_never_see_the_same_utterance_in_an_epoch() -> None:
    plan = plan_of()
    epoch = len(list(plan.steps(0)))
    first, second = (
        [row for step in walk(plan, epoch, rank=rank, ranks=2) for row in rows_of(step)] for rank in (0, 1)
    )
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(len(LENGTHS)))


@given(lengths=st.lists(st.integers(1, 300), min_size=8, max_size=80), parts=st.integers(1, 8))
@settings(deadline=None)
def test_the_frames_of_a_step_are_dealt_out_evenly(lengths: list[int], parts: int) -> None:
    frames = np.array(lengths)
    dealt = deal(np.arange(len(frames)), frames, parts)
    loads = [int(frames[part].sum()) for part in dealt]
    assert len(dealt) == parts
    assert all(len(part) for part in dealt)
    # The greedy rule: the fullest was the emptiest before its last utterance came.
    assert max(loads) - min(loads) <= max(lengths)


def test_steps_of_too_few_utterances_for_the_processes_are_refused_with_the_mend_before_any_is_made() -> None:
    plan = plan_of(np.full(30, 300), batch_frames=700)
    with pytest.raises(InputError, match="raise batch_frames or lower accumulation"):
        plan_from(plan, Position(), rank=0, ranks=2, accumulation=2)


def test_of_a_step_of_one_long_utterance_every_rank_has_a_microbatch_and_one_of_them_counts() -> None:
    plan = plan_of(np.array([*LENGTHS.tolist(), 5000, 5000]))
    epoch = len(list(plan.steps(0)))
    whole = walk(plan, epoch)
    dealt = [walk(plan, epoch, rank=rank, ranks=2, accumulation=2) for rank in (0, 1)]
    assert min(len(rows_of(step)) for step in whole) == 1
    for number, step in enumerate(whole):
        shares = [steps[number] for steps in dealt]
        assert all(len(share.microbatches) == 2 for share in shares)
        assert all(part.rows for share in shares for part in share.microbatches)
        assert sorted(row for share in shares for row in rows_of(share)) == sorted(rows_of(step))


def test_shards_are_read_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SHARDS_A_GROUP", 2)
    plan = plan_of(shards=6)
    order = plan.shards[np.concatenate(list(plan.steps(0)))]
    last_seen = {int(shard): int(np.flatnonzero(order == shard)[-1]) for shard in np.unique(order)}
    first_seen = {int(shard): int(np.flatnonzero(order == shard)[0]) for shard in np.unique(order)}
    open_at_once = [
        sum(first_seen[shard] <= place <= last_seen[shard] for shard in last_seen) for place in range(len(order))
    ]
    assert max(open_at_once) == 2


# Holding out ------------------------------------------------------------------------------------------------------


class Table:
    """Stands in for a store of which only the index is asked for."""

    corpus = "table"

    def __init__(self, rows: Rows) -> None:
        speakers, frames, has_text, splits = (list(column) for column in zip(*rows, strict=True))
        self.index = SimpleNamespace(
            ids=[f"u{number}" for number in range(len(rows))],
            speakers=speakers,
            frames=np.array(frames),
            has_text=np.array(has_text),
            splits=splits,
            shards=np.zeros(len(rows), int),
        )

    def __len__(self) -> int:
        return len(self.index.ids)

    def audio_hashes(self) -> list[str]:
        return [f"{number:016x}" for number in range(len(self))]


def table(rows: Rows) -> Corpus:
    return Corpus([cast(Store, Table(rows))])


def many_speakers(count: int = 20, each: int = 5) -> list[tuple[str | None, int, bool, str | None]]:
    return [(f"speaker {number % count}", 100 + number, True, None) for number in range(count * each)]


def speakers_of(corpus: Corpus, rows: np.ndarray) -> set[str | None]:
    return {corpus.speakers[row] for row in rows}


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([None, *"abcdef"]), st.integers(1, 3000), st.booleans(), st.none()), min_size=2
    ),
    share=st.floats(0.01, 0.99),
)
@settings(deadline=None)
def test_every_row_is_in_one_part_none_is_empty_and_no_speaker_is_in_both(rows: Rows, share: float) -> None:
    corpus = table(rows)
    try:
        train, validation, _ = hold_out(corpus, share)
    except InputError:
        assert len({name for name, *_ in rows}) < 2
        return
    assert sorted([*train, *validation]) == list(range(len(rows)))
    assert len(train)
    assert len(validation)
    named = {name for name, *_ in rows if name}
    if len(named) > 1:
        assert not speakers_of(corpus, train) & speakers_of(corpus, validation) - {None}


def test_the_share_is_reached_and_passed_by_less_than_a_speaker() -> None:
    corpus = table(many_speakers())
    train, validation, rule = hold_out(corpus, 0.2)
    total, held = corpus.frames.sum(), corpus.frames[validation].sum()
    largest = max(corpus.frames[[name == each for name in corpus.speakers]].sum() for each in set(corpus.speakers))
    assert 0.2 * total <= held < 0.2 * total + largest
    assert "speakers held out" in rule
    assert len(train) > len(validation)


def test_who_has_most_of_the_recordings_is_trained_on_and_utterances_without_a_speaker_are_told() -> None:
    for many in range(8):
        names = [f"guest {many}", "host", "another"]
        corpus = table([(names[max(0, number - 97)], 3000, True, None) for number in range(100)])
        train, validation, rule = hold_out(corpus, 0.1)
        assert speakers_of(corpus, validation) <= {"host", "another"}
        assert corpus.speakers[train[0]] == f"guest {many}"
        assert "no speaker" not in rule
    corpus = table([*many_speakers(), (None, 10, True, None)])
    assert hold_out(corpus, 0.2).rule.endswith("; 1 of 101 utterances have no speaker, so voices may be shared")


def test_untranscribed_recordings_do_not_change_which_transcribed_ones_are_held_out() -> None:
    rows = many_speakers()
    more: list[tuple[str | None, int, bool, str | None]] = [
        (f"{kind} {number % 20}", 500, False, None) for number in range(40) for kind in ("speaker", "another")
    ]
    before, after = hold_out(table(rows), 0.2), hold_out(table([*rows, *more]), 0.2)
    corpus = table([*rows, *more])
    assert speakers_of(corpus, after.validation) == speakers_of(corpus, before.validation)
    assert [row for row in after.validation if row < len(rows)] == before.validation.tolist()


def test_the_corpus_s_own_split_is_respected_and_its_test_part_never_used() -> None:
    splits = ["train", "validation", "test", None]
    corpus = table([(f"s{number}", 100, True, splits[number % 4]) for number in range(40)])
    train, validation, rule = hold_out(corpus, 0.1)
    assert {number % 4 for number in train} == {0, 3}
    assert {number % 4 for number in validation} == {1}
    assert rule == "the corpus's own split"
    corpus.speakers[1] = "s0"
    assert hold_out(corpus, 0.1).rule.endswith("; 1 of its 10 validation speakers are in the training part too")

    no_validation = table([(f"s{number}", 100, True, ["train", "test"][number % 2]) for number in range(40)])
    train, validation, _ = hold_out(no_validation, 0.1)
    assert {row % 2 for row in [*train, *validation]} == {0}


def test_at_most_an_hour_is_held_out() -> None:
    corpus = table([(f"s{number}", 3000, True, None) for number in range(4000)])
    assert corpus.frames[hold_out(corpus, 0.1).validation].sum() == batching.MAX_HELD_OUT


def test_without_speakers_whole_utterances_are_held_out() -> None:
    corpus = table([(None, 100, True, None)] * 50)
    train, validation, rule = hold_out(corpus, 0.1)
    assert (len(train), len(validation)) == (45, 5)
    assert "utterances held out" in rule


@pytest.mark.parametrize(
    "rows",
    [
        [("a", 100, True, None)],
        [("a", 100, True, "test"), ("b", 100, True, "test"), ("c", 100, True, "test")],
        [("a", 100, True, "validation"), ("b", 100, True, "test")],
    ],
    ids=["one utterance", "test only", "validation without train"],
)
def test_too_little_to_train_and_to_validate_on_is_refused(
    rows: Rows,
) -> None:
    with pytest.raises(InputError):
        hold_out(table(rows), 0.1)


def test_people_of_other_corpora_are_other_people_and_change_no_name_of_the_first(tmp_path: Path) -> None:
    recording = record(tmp_path / "a.wav", 0.5)
    stores = []
    for number, name in enumerate(("one", "one", "two")):
        utterances = [Utterance(f"{number}-{speaker}", recording, speaker=speaker) for speaker in ("7", None)]
        prepare_store(utterances, tmp_path / str(number), corpus=name, workers=1)
        stores.append(Store(tmp_path / str(number)))
    assert Corpus(stores[:2]).speakers == ["7", None, "7", None]
    assert Corpus(stores).speakers == ["7", None, "7", None, "two/7", None]


# Speakers' means --------------------------------------------------------------------------------------------------

CENTRED = CtalFeatureExtractor(cmvn="speaker", pitch=True)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers with four recordings each, at other levels, and two recordings of nobody."""
    folder = tmp_path_factory.mktemp("voices")
    utterances = [
        Utterance(str(number), record(folder / f"{number}.wav", 0.4 + 0.1 * number, 150, number), speaker=speaker)
        for number, speaker in enumerate(["a", "b", None, "a", "a", "b", "b", "a", None, "b"])
    ]
    prepare_store(utterances, folder / "store", corpus="voices", workers=1)
    return folder / "store"


def centred(store: Path) -> tuple[Corpus, list[Tensor]]:
    corpus = Corpus([Store(store)])
    features = corpus_features(corpus, CENTRED)
    return corpus, [features.read(row, corpus.read(row)) for row in range(len(corpus))]


def test_features_less_a_speakers_mean_have_mean_0_over_that_speaker_or_over_a_recording_of_nobody(
    voices: Path,
) -> None:
    corpus, features = centred(voices)
    of: dict[str, list[Tensor]] = {}
    for row, speaker in enumerate(corpus.speakers):
        of.setdefault(speaker or corpus.ids[row], []).append(features[row])
    assert [len(each) for each in of.values()] == [4, 4, 1, 1]
    for each in of.values():
        assert torch.cat(each).float().mean(0).abs().max() < 2e-3  # float16
    assert of["a"][0].float().mean(0).abs().max() > 0.01, "one recording of several is not the mean"
    (note,) = corpus_features(corpus, CENTRED).notes()
    assert note == "2 of 10 utterances have no speaker: each is less its own mean"


def test_a_speakers_mean_is_that_which_use_takes_and_stored_features_are_those_of_fixed(
    voices: Path, tmp_path: Path
) -> None:
    shutil.copytree(voices, tmp_path / "store")
    corpus, features = centred(tmp_path / "store")
    waves = {row: load_audio(corpus.read(row).audio, "") for row, name in enumerate(corpus.speakers) if name == "a"}
    known = CENTRED.for_speaker(waves.values(), 16_000)
    for row, wave in waves.items():
        assert (known.features(wave) - features[row].float()).abs().max() < 0.01  # twice rounded to float16
    fixed = CtalFeatureExtractor(cmvn="fixed", pitch=True)
    write_features(Store(tmp_path / "store"), fixed.analysis, fixed.features, workers=1)
    for one, other in zip(features, centred(tmp_path / "store")[1], strict=True):
        assert torch.equal(one, other)


def test_a_random_mean_is_over_some_other_recordings_of_the_speaker_or_over_the_recording_itself(voices: Path) -> None:
    corpus = Corpus([Store(voices)])
    features = corpus_features(corpus, CENTRED)
    uncentred = corpus_features(corpus, CENTRED.uncentred)
    row, others = 0, (3, 4, 7)
    whole = {each: uncentred.read(each, corpus.read(each)).float() for each in (row, *others)}
    chosen = [(row,), *(some for count in (1, 2, 3) for some in combinations(others, count))]
    means = torch.stack([torch.cat([whole[each] for each in some]).mean(0) for some in chosen])
    drawn = []
    for seed in range(60):
        stored, generator = corpus.read(row), torch.Generator().manual_seed(seed)
        distances = (whole[row].mean(0) - features.read(row, stored, generator).float().mean(0) - means).abs().amax(1)
        assert distances.min() < 5e-3  # float16
        drawn.append(chosen[int(distances.argmin())])
    assert set(drawn) == set(chosen)
    counts = [0 if some == (row,) else len(some) for some in drawn]
    assert counts.count(0) > counts.count(3)

    own = corpus.speakers.index(None)
    by_chance, always = (features.read(own, corpus.read(own), each) for each in (torch.Generator(), None))
    assert torch.equal(by_chance, always), "nobody is named"


def test_of_many_recordings_as_many_are_heard_as_tell_the_mean(voices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Corpus([Store(voices)]).frames[[0, 3, 4, 7]]
    monkeypatch.setattr("ctal.batching.SPEAKER_FRAMES", 1.5 * lengths.mean())
    features = centred(voices)[1]
    outer = [features[row].float() for row in (0, 7)]
    assert torch.cat(outer).mean(0).abs().max() < 2e-3, "the first and the last of a"


def test_workers_take_the_same_means(tiny: TinyCorpus) -> None:
    extractor = CtalFeatureExtractor(cmvn="speaker")
    processor = CtalProcessor(extractor, load_tokenizer(tiny.tokenizer))
    one, other = (some_batches(dataset_of(tiny, processor), workers, epochs=1) for workers in (0, 2))
    assert all(equal(*pair) for pair in zip(one, other, strict=True))
    corpus = Corpus([Store(tiny.store)])
    assert len(set(corpus.speakers)) < len(corpus), "several recordings a speaker"


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny: TinyCorpus) -> CtalProcessor:
    return CtalProcessor(CtalFeatureExtractor(), load_tokenizer(tiny.tokenizer))


def dataset_of(tiny: TinyCorpus, processor: CtalProcessor, max_frames: int = 3000, seed: int = 0) -> PretrainingDataset:
    corpus = Corpus([Store(tiny.store)])
    return make_dataset(corpus, processor, make_config(PretrainConfig), max_frames=max_frames, seed=seed)


def some_batches(dataset: PretrainingDataset, workers: int, epochs: int = 2) -> list[dict[str, Tensor]]:
    def microbatches() -> Iterator[Microbatch]:
        for epoch in range(epochs):
            for first in range(0, 24, 6):
                yield Microbatch(epoch, tuple(range(first, first + 6)))

    return list(load(dataset, microbatches(), workers))


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_parcel_holds_tensors_of_any_type_and_shape() -> None:
    batch = {
        "odd": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 160, dtype=torch.float16),
        "scores": torch.tensor([0.25, -3.0], dtype=torch.float64),
        "turned": torch.arange(6).view(2, 3).T.half(),
    }
    opened = Parcel.of(batch).opened()
    assert opened.keys() == batch.keys()
    for name, value in batch.items():
        assert opened[name].dtype == value.dtype
        assert torch.equal(opened[name], value), name


def test_what_the_loader_hands_over_is_what_the_data_set_makes(tiny: TinyCorpus, processor: CtalProcessor) -> None:
    dataset, key = dataset_of(tiny, processor), Microbatch(0, (4, 1, 7))
    made = dataset[key]
    assert {each.dtype for each in made.values()} == {torch.int64, torch.float16, torch.bool}
    (loaded,) = load(dataset, iter([key]), workers=0)
    assert equal(loaded, made)
    assert all(loaded[name].dtype == each.dtype for name, each in made.items())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_a_batch_built_twice_is_identical_on_0_1_and_4_workers(tiny: TinyCorpus, processor: CtalProcessor) -> None:
    dataset = dataset_of(tiny, processor)
    first = some_batches(dataset, workers=0)
    assert len(first) == 8
    for workers in (0, 1, 4):
        again = some_batches(dataset, workers)
        assert len(again) == len(first)
        assert all(equal(one, other) for one, other in zip(first, again, strict=True)), f"{workers} workers"


def test_masks_differ_between_epochs_and_seeds_and_the_data_below_them_does_not(
    tiny: TinyCorpus, processor: CtalProcessor
) -> None:
    dataset = dataset_of(tiny, processor)
    for row in range(24):
        one, other = (dataset.utterance(row, epoch)["feature_labels"] for epoch in range(2))
        assert torch.equal(one, other)
    batches = some_batches(dataset, workers=0)
    for one, other in zip(batches[:4], batches[4:], strict=True):
        assert not torch.equal(one["mask_time_indices"], other["mask_time_indices"])
        if one["input_ids"].shape[1] > 2:  # the last batch has no transcripts
            assert not torch.equal(one["labels"], other["labels"])
    reseeded = some_batches(dataset_of(tiny, processor, seed=1), workers=0, epochs=1)
    assert not torch.equal(batches[0]["mask_time_indices"], reseeded[0]["mask_time_indices"])


def test_an_utterance_is_masked_the_same_in_whatever_batch_it_comes(tiny: TinyCorpus, processor: CtalProcessor) -> None:
    dataset = dataset_of(tiny, processor)
    alone = dataset.utterance(5, epoch=1)
    batch = dataset[Microbatch(1, (3, 5, 8))]
    tokens, frames = len(alone["input_ids"]), len(alone["input_features"])
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][1, :tokens], alone[name])
    is_masked = alone["mask_time_indices"]
    assert torch.equal(batch["mask_time_indices"][1, :frames], is_masked)
    before, masked_before = int(batch["feature_attention_mask"][0].sum()), int(batch["mask_time_indices"][0].sum())
    assert torch.equal(batch["input_features"][before : before + frames], alone["input_features"])
    labels = batch["feature_labels"][masked_before : masked_before + int(is_masked.sum())]
    assert torch.equal(labels, alone["feature_labels"][is_masked])


def test_a_batch_has_frames_without_padding_and_the_rest_padded_on_the_right_with_nothing_to_predict(
    tiny: TinyCorpus, processor: CtalProcessor
) -> None:
    dataset = dataset_of(tiny, processor)
    utterances = [dataset.utterance(row, 0) for row in range(6)]
    batch = collate(utterances)
    for number, utterance in enumerate(utterances):
        tokens, frames = len(utterance["input_ids"]), len(utterance["input_features"])
        assert batch["attention_mask"][number].sum() == tokens
        assert batch["feature_attention_mask"][number].sum() == frames
        assert (batch["input_ids"][number, tokens:] == CtalConfig.of_size("nano").text.pad_token_id).all()
        assert (batch["labels"][number, tokens:] == IGNORED).all()
        assert not batch["mask_time_indices"][number, frames:].any()
    assert len(batch["input_features"]) == batch["feature_attention_mask"].sum()
    assert len(batch["feature_labels"]) == batch["mask_time_indices"].sum() > 0
    assert batch["attention_mask"].min() == 0, "lengths differ"


def test_an_utterance_without_a_transcript_has_two_tokens_and_none_to_predict(
    tiny: TinyCorpus, processor: CtalProcessor
) -> None:
    dataset = dataset_of(tiny, processor)
    untranscribed = np.flatnonzero(~dataset.corpus.has_text)
    assert len(untranscribed) == 6
    for row in untranscribed.tolist():
        utterance = dataset.utterance(row, 0)
        assert utterance["input_ids"].tolist() == [0, 2]
        assert (utterance["labels"] == IGNORED).all()
        assert utterance["mask_time_indices"].any()


def test_of_a_longer_recording_a_window_is_used_that_moves_from_epoch_to_epoch(
    tiny: TinyCorpus, processor: CtalProcessor
) -> None:
    whole, cropped = dataset_of(tiny, processor), dataset_of(tiny, processor, max_frames=40)
    row = int(np.argmax(whole.corpus.frames))
    windows = [cropped.utterance(row, epoch)["feature_labels"] for epoch in range(8)]
    everything = whole.utterance(row, 0)["feature_labels"].unfold(0, 40, 1).transpose(1, 2)
    places = [int((everything == window).all(2).all(1).nonzero()[0, 0]) for window in windows]
    assert all(len(window) == 40 for window in windows)
    assert len(Counter(places)) > 4


def test_frames_in_the_index_are_the_frames_that_are_made(tiny: TinyCorpus, processor: CtalProcessor) -> None:
    dataset = dataset_of(tiny, processor)
    for row in range(len(dataset.corpus)):
        assert len(dataset.utterance(row, 0)["input_features"]) == dataset.corpus.frames[row]


def test_stores_side_by_side_are_one_table(tiny: TinyCorpus) -> None:
    one, two = Corpus([Store(tiny.store)]), Corpus([Store(tiny.store), Store(tiny.store)])
    assert len(two) == 2 * len(one)
    assert two.ids == one.ids * 2
    assert two.read(24 + 7).id == one.read(7).id == two.read(7).id
    assert two.frames.tolist() == one.frames.tolist() * 2
    assert not set(two.shards[:24].tolist()) & set(two.shards[24:].tolist())
    assert one.content_hash != two.content_hash


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recording_that_became_unreadable_is_one_line_naming_it_from_a_worker_too(
    tiny: TinyCorpus, processor: CtalProcessor, tmp_path: Path, workers: int
) -> None:
    dataset = dataset_of(tiny, processor)

    class Rotten(Corpus):
        def read(self, row: int) -> Any:
            stored = super().read(row)
            return SimpleNamespace(id=stored.id, text=stored.text, audio=stored.audio[:100])

    dataset.corpus = Rotten(dataset.corpus.stores)
    with pytest.raises(InputError) as caught:
        list(load(dataset, iter([Microbatch(0, (4, 5))]), workers))
    assert str(caught.value).startswith("u04: ")
    assert "\n" not in str(caught.value)


def test_no_worker_outlives_an_error_whoever_still_holds_it(tiny: TinyCorpus, processor: CtalProcessor) -> None:
    dataset = dataset_of(tiny, processor)
    with pytest.raises(IndexError) as caught:
        list(load(dataset, iter([Microbatch(0, (4, 1000))]), workers=1))
    assert multiprocessing.active_children() == [], caught
