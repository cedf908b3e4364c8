"""Features beside a store: the same results, without the recordings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import Cli, TinyCorpus
from ctal import CtalFeatureExtractor, CtalProcessor
from ctal.batching import Corpus, Microbatch, PretrainingDataset, load
from ctal.errors import InputError
from ctal.pretrain import load_tokenizer, make_dataset
from ctal.recipes import PretrainConfig, make_config
from ctal.store import Store, read_json, write_json
from ctal.stored_features import FeatureSummary, open_features, rounded, write_features

EXTRACTOR = CtalFeatureExtractor()
ALL = [Microbatch(0, tuple(range(start, start + 4))) for start in range(0, 20, 4)]


@pytest.fixture
def store(tiny: TinyCorpus, tmp_path: Path) -> Path:
    shutil.copytree(tiny.store, tmp_path / "store")
    return tmp_path / "store"


def analyse(store: Path, workers: int = 1) -> FeatureSummary:
    return write_features(Store(store), EXTRACTOR.analysis, EXTRACTOR.features, workers=workers)


def dataset(tiny: TinyCorpus, store: Path) -> PretrainingDataset:
    processor = CtalProcessor(EXTRACTOR, load_tokenizer(tiny.tokenizer))
    config = make_config(PretrainConfig, {"cache_megabytes": 0})
    return make_dataset(Corpus([Store(store)]), processor, config, max_frames=3000, seed=0)


def deaf(wave: np.ndarray) -> Tensor:
    raise AssertionError("a recording was analysed although its features are stored")


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_features_change_no_batch_and_spare_the_recordings(tiny: TinyCorpus, store: Path, workers: int) -> None:
    before = list(load(dataset(tiny, store), iter(ALL), 0))
    analyse(store)
    stored = dataset(tiny, store)
    stored.features.extract = deaf
    for one, other in zip(before, load(stored, iter(ALL), workers), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_features_cross_to_the_trainer_in_half_the_bytes(tiny: TinyCorpus, store: Path) -> None:
    batch = dataset(tiny, store)[ALL[0]]
    assert batch["input_features"].dtype == batch["feature_labels"].dtype == torch.float16


def test_rounding_moves_features_by_less_than_a_thousandth() -> None:
    features = EXTRACTOR.features(np.random.default_rng(0).normal(size=32_000).astype(np.float32))
    assert (rounded(features).float() - features).abs().max() < 1e-3 * features.abs().max()


def test_what_is_there_is_kept_and_what_is_missing_is_made(store: Path) -> None:
    first = analyse(store)
    assert not first.up_to_date
    assert analyse(store).up_to_date
    files = {path: path.read_bytes() for path in first.path.iterdir()}
    lost = min(first.path.glob("*.arrow"))
    lost.write_bytes(lost.read_bytes()[:-100])  # as a copy that was cut off leaves it
    times = {path: path.stat().st_mtime_ns for path in first.path.glob("*.arrow")}
    assert not analyse(store).up_to_date
    assert {path: path.read_bytes() for path in first.path.iterdir()} == files
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost}


def test_unfinished_features_are_not_used(store: Path) -> None:
    (analyse(store).path / "features.json").unlink()
    assert open_features(Store(store), EXTRACTOR.analysis) is None


def test_features_written_half_anew_are_not_taken_for_those_of_recordings_that_come_back(store: Path) -> None:
    folder, manifest = analyse(store).path, read_json(store / "store.json")
    write_json(store / "store.json", {**manifest, "content_hash": "other recordings"})
    max(folder.glob("*.arrow")).unlink()
    with pytest.raises(AssertionError):
        write_features(Store(store), EXTRACTOR.analysis, deaf, workers=1)
    write_json(store / "store.json", manifest)
    assert open_features(Store(store), EXTRACTOR.analysis) is None


def test_it_is_said_where_features_are_stored_of_another_analysis_alone(tiny: TinyCorpus, store: Path) -> None:
    assert dataset(tiny, store).features.notes() == []
    other = CtalFeatureExtractor(cmvn="fixed")
    write_features(Store(store), other.analysis, other.features, workers=1)
    (note,) = dataset(tiny, store).features.notes()
    assert f"{store}: has features of {other.analysis} only" in note
    analyse(store)
    assert dataset(tiny, store).features.notes() == []


def test_features_of_another_analysis_are_not_used(store: Path) -> None:
    analyse(store)
    assert open_features(Store(store), CtalFeatureExtractor(delta_order=2).analysis) is None


def test_features_of_other_recordings_are_refused_with_the_mend(tiny: TinyCorpus, store: Path) -> None:
    analyse(store)
    write_json(store / "store.json", {**read_json(store / "store.json"), "content_hash": "another"})
    with pytest.raises(InputError, match=r"was made before .* was prepared anew; run `ctal features` again"):
        dataset(tiny, store)


def test_the_command_names_what_is_wrong_and_what_it_wrote(ctal: Cli, store: Path, tmp_path: Path) -> None:
    assert f"written, {len(Store(store))} utterances" in ctal("features", store).output
    other = shutil.copytree(store, tmp_path / "other", ignore=shutil.ignore_patterns("features"))
    first, second = ctal("features", store, other).output.splitlines()
    assert f"{store / 'features' / 'mel-1-cmvn'}: up to date" in first
    assert f"{other / 'features' / 'mel-1-cmvn'}: written" in second
    assert (store / "features" / "mel-1-cmvn").is_dir()
    assert "written" in ctal("features", store, "--cmvn", "fixed").output
    assert (store / "features" / "mel-1-fixed").is_dir()
    assert "written" in ctal("features", store, "--pitch").output
    assert (store / "features" / "mel-1-cmvn-pitch").is_dir()
    assert "mel-1-fixed: up to date" in ctal("features", store, "--cmvn", "speaker").output, "the mean is not stored"
    assert "did you mean 'fixed'" in ctal("features", store, "--cmvn", "fixd").errors
    missing = ctal("features", tmp_path / "nowhere")
    assert missing.code == 2
    assert "no such store; make it with `ctal prepare`" in missing.errors
