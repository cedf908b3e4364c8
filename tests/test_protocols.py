"""Who is trained on, who chooses the epoch, and who is judged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ctal.errors import InputError
from ctal.protocols import PROTOCOLS, Protocol, make_protocol, make_trials, read_trials, write_trials

SPEAKERS = 15


def corpus(*, speakers: int = SPEAKERS, named: bool = True, splits: Any = None, sessions: bool = False) -> Any:
    """Three utterances a speaker; only what a protocol looks at."""
    owner = [f"s{number % speakers:02d}" for number in range(3 * speakers)]
    return SimpleNamespace(
        ids=[f"u{number:03d}" for number in range(len(owner))],
        recordings=np.arange(len(owner)),
        speakers=owner if named else [None] * len(owner),
        splits=[splits(name) if splits else None for name in owner],
        labels=[{"session": f"Ses{int(name[1:]) % 5}"} if sessions else {} for name in owner],
    )


def protocol(name: str, **how: Any) -> tuple[Protocol, Any]:
    source = corpus(**how)
    return make_protocol(name, source, np.arange(len(source.ids)), 0.1), source


def test_copies_of_a_recording_without_speakers_stay_together() -> None:
    twice = corpus(named=False)
    twice.recordings = np.arange(len(twice.ids)) // 3
    for fold in make_protocol("5-fold", twice, np.arange(len(twice.ids)), 0.1).folds:
        parts = [set(twice.recordings[part]) for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 15


def test_copies_without_a_speaker_are_by_the_speaker_of_the_one_that_has_one() -> None:
    twice = corpus()
    half = len(twice.ids) // 2
    twice.recordings = np.arange(len(twice.ids)) % half
    twice.speakers = [name if row < half else None for row, name in enumerate(twice.speakers)]
    for fold in make_protocol("5-fold", twice, np.arange(len(twice.ids)), 0.1).folds:
        parts = [set(twice.recordings[part]) for part in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == half


def test_of_what_voices_share_is_told_what_is_known() -> None:
    said = [
        make_protocol("5-fold", each, np.arange(len(each.ids)), 0.1).description
        for each in (corpus(speakers=1), corpus(named=False))
    ]
    assert "all are by one speaker, who is in every part" in said[0]
    assert "45 of 45 utterances have no speaker, so voices may be shared" in said[1]
    partly = corpus()
    partly.speakers[0] = None
    rows = np.arange(len(partly.ids))
    for name, share in (("5-fold", 0.1), ("5-fold", 0.0), ("paper", 0.1)):
        assert "1 of 45 utterances have no speaker" in make_protocol(name, partly, rows, share).description


def test_of_a_given_split_it_is_told_what_it_does_not_keep_apart() -> None:
    given = corpus(splits=lambda name: "test" if name < "s05" else "train")
    rows = np.arange(len(given.ids))
    assert make_protocol("auto", given, rows, 0.0).description == "the corpus's own split; the last epoch is taken"
    given.recordings[given.splits.index("test")] = given.recordings[given.splits.index("train")]
    given.speakers[given.splits.index("train")] = "s00"
    said = make_protocol("auto", given, rows, 0.0).description
    assert "1 of its 5 test speakers are in the training part too" in said
    assert "1 of its 15 recordings are in the training part too, which flatters" in said


def test_a_corpus_without_parts_has_no_split_of_its_own() -> None:
    with pytest.raises(InputError, match="protocol=split: no utterance is in a part of its own"):
        protocol("split")


def test_pairs_of_one_speaker_and_of_two_can_choose_the_epoch() -> None:
    few = corpus(speakers=10)
    usual, in_pairs = (
        make_protocol("5-fold", few, np.arange(len(few.ids)), 0.1, in_pairs=each).folds for each in (False, True)
    )
    assert {len({few.speakers[row] for row in fold.validation}) for fold in usual} == {1}
    assert {len({few.speakers[row] for row in fold.validation}) for fold in in_pairs} == {2}


def split_of(name: str) -> str:
    number = int(name[1:])
    return "test" if number > 11 else "validation" if number > 9 else "train"


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("auto", {}),
        ("auto", {"speakers": 6}),
        ("auto", {"sessions": True}),
        ("auto", {"splits": split_of}),
        ("split", {"splits": lambda name: "test" if split_of(name) == "test" else None}),
        ("leave-one-speaker-out", {}),
        ("5-fold", {}),
    ],
)
def test_no_speaker_is_in_two_parts_and_every_utterance_is_in_one(name: str, how: dict[str, Any]) -> None:
    made, source = protocol(name, **how)

    for fold in made.folds:
        parts = [{source.speakers[row] for row in part} for part in (fold.train, fold.validation, fold.test)]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert sorted(np.concatenate([fold.train, fold.validation, fold.test])) == list(range(len(source.ids)))


@pytest.mark.parametrize("how", [{}, {"speakers": 6}, {"sessions": True}])
def test_over_the_folds_every_utterance_is_tested_once(how: dict[str, Any]) -> None:
    made, source = protocol("auto", **how)

    assert sorted(np.concatenate([fold.test for fold in made.folds])) == list(range(len(source.ids)))


def test_auto_takes_the_published_split_then_sessions_then_few_speakers_then_folds() -> None:
    chosen = [
        protocol("auto", **how)[0].name
        for how in ({"splits": split_of, "sessions": True}, {"sessions": True}, {"speakers": 6}, {})
    ]

    assert chosen == ["split", "leave-one-session-out", "leave-one-speaker-out", "5-fold"]


def test_sessions_in_which_the_same_people_speak_are_not_left_out_unless_asked_and_then_said() -> None:
    source = corpus(speakers=4)
    for number, labels in enumerate(source.labels):
        labels["session"] = f"day {number % 3}"
    rows = np.arange(len(source.ids))

    assert make_protocol("auto", source, rows, 0.1).name == "leave-one-speaker-out"
    asked = make_protocol("leave-one-session-out", source, rows, 0.1)
    assert asked.description.endswith("; 4 speakers are in several sessions, so in the training part too")


def test_a_session_may_be_called_0() -> None:
    source = corpus(speakers=4)
    source.labels = [{"session": int(name[1:])} for name in source.speakers]

    assert make_protocol("auto", source, np.arange(len(source.ids)), 0.1).name == "leave-one-session-out"


def test_no_session_is_in_two_folds_and_their_number_is_that_of_sessions() -> None:
    made, source = protocol("leave-one-session-out", sessions=True)

    assert len(made.folds) == 5
    for fold in made.folds:
        tested = {source.labels[row]["session"] for row in fold.test}
        assert tested == {fold.name}
        assert tested.isdisjoint(source.labels[row]["session"] for row in [*fold.train, *fold.validation])


def test_paper_chooses_the_epoch_on_the_reported_fold_and_says_so() -> None:
    made, _ = protocol("paper", sessions=True)

    assert "flatters" in made.description
    for fold in made.folds:
        assert np.array_equal(fold.validation, fold.test)


def test_paper_chooses_the_epoch_of_a_published_split_on_its_test_part_and_trains_on_the_same() -> None:
    (usual,), (papers,) = (protocol(name, splits=split_of)[0].folds for name in ("auto", "paper"))
    made, _ = protocol("paper", splits=split_of)

    assert "flatters" in made.description
    assert "test speakers are in the training part" not in made.description
    assert np.array_equal(papers.validation, usual.test)
    assert np.array_equal(papers.test, usual.test)
    assert np.array_equal(papers.train, usual.train)


def test_protocols_that_test_the_same_say_so_whatever_chooses_the_epoch() -> None:
    usual, papers = (protocol(name, splits=split_of)[0] for name in ("auto", "paper"))
    folds, _ = protocol("5-fold", splits=split_of)

    assert usual.tested == papers.tested != folds.tested
    assert usual.checksum != papers.checksum


def test_a_split_without_validation_or_test_part_says_what_stands_in() -> None:
    no_validation, source = protocol("split", splits=lambda name: "test" if split_of(name) == "test" else "train")
    no_test, _ = protocol("split", splits=lambda name: "validation" if split_of(name) == "test" else "train")

    assert "chosen on other speakers" in no_validation.description
    assert {source.speakers[row] for row in no_validation.folds[0].test} == {"s12", "s13", "s14"}
    assert "flatters" in no_test.description


@pytest.mark.parametrize(
    ("name", "how"), [("5-fold", {}), ("auto", {"speakers": 6}), ("split", {"splits": lambda name: "train"})]
)
def test_nothing_held_out_takes_the_last_epoch(name: str, how: dict[str, Any]) -> None:
    source = corpus(**how)
    made = make_protocol(name, source, np.arange(len(source.ids)), 0)

    assert "the last epoch is taken" in made.description
    for fold in made.folds:
        assert not len(fold.validation)
        assert sorted(np.concatenate([fold.train, fold.test])) == list(range(len(source.ids)))


def test_a_published_validation_part_chooses_the_epoch_even_where_nothing_else_is_held_out() -> None:
    source = corpus(splits=split_of)
    made = make_protocol("split", source, np.arange(len(source.ids)), 0)
    assert made.facts() == protocol("split", splits=split_of)[0].facts()


def test_one_recording_a_training_speaker_leaves_no_pairs_to_choose_the_epoch_by_and_all_train() -> None:
    source = corpus(speakers=15, splits=lambda name: "test" if split_of(name) == "test" else "train")
    tests = [row for row in range(len(source.ids)) if source.splits[row] == "test"]
    once = [row for row in range(15) if source.splits[row] == "train"]
    rows = np.array(sorted([*tests, *once]))

    fold = make_protocol("auto", source, rows, 0.1, in_pairs=True).folds[0]

    assert (fold.train.tolist(), fold.validation.tolist(), fold.test.tolist()) == (once, [], tests)
    assert len(make_protocol("auto", source, rows, 0.1).folds[0].validation), "a task without pairs chooses as ever"


def test_a_split_that_shares_speakers_says_so() -> None:
    source = corpus()
    source.splits = ["test" if number % 3 == 0 else "train" for number in range(len(source.ids))]
    source.speakers = ["one", "two", "three"] * SPEAKERS
    source.speakers[0] = source.speakers[1]

    made = make_protocol("split", source, np.arange(len(source.ids)), 0.1)

    assert "1 of its 2 test speakers are in the training part too" in made.description


def test_without_named_speakers_the_protocol_says_that_voices_may_be_shared() -> None:
    assert "voices may be shared" in protocol("auto", named=False)[0].description


def test_all_trains_on_everything() -> None:
    (fold,) = protocol("all")[0].folds

    assert len(fold.train) == 3 * SPEAKERS
    assert not len(fold.validation)
    assert not len(fold.test)


def test_the_checksum_is_that_of_who_is_where() -> None:
    once, again, other = (protocol("5-fold", **how)[0].checksum for how in ({}, {}, {"speakers": 14}))

    assert once == again != other


def test_an_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'paper'"):
        protocol("papper")
    assert "ge2e" in PROTOCOLS


@pytest.mark.parametrize("speakers", [1, 2])
def test_too_few_speakers_are_one_line_with_the_mend(speakers: int) -> None:
    with pytest.raises(InputError, match=r"protocol=(5-fold or )?all"):
        protocol("leave-one-speaker-out", speakers=speakers)


def test_trials_are_all_pairs_whatever_the_order_of_the_recordings() -> None:
    ids, speakers = [f"u{number}" for number in range(6)], list("aabbcc")

    def named(order: list[int]) -> set[tuple[str, str, bool]]:
        trials = make_trials([ids[i] for i in order], [speakers[i] for i in order])
        names = [ids[i] for i in order]
        return {(names[a], names[b], bool(same)) for a, b, same in zip(*trials, strict=True)}

    straight, shuffled = named([0, 1, 2, 3, 4, 5]), named([5, 0, 3, 1, 4, 2])

    assert straight == shuffled
    assert len(straight) == 15
    assert sum(same for *_, same in straight) == 3


def test_trials_of_many_recordings_are_bounded_and_have_both_kinds() -> None:
    ids = [f"u{number}" for number in range(5000)]
    speakers = [f"s{number % 40}" for number in range(5000)]

    trials = make_trials(ids, speakers)

    used = set(trials.first.tolist()) | set(trials.second.tolist())
    assert len(used) == 40 * 20
    assert trials.is_target.any()
    assert not trials.is_target.all()


def test_a_written_list_reads_back_the_same_with_or_without_suffixes(tmp_path: Path) -> None:
    ids = ["a/1", "a/2", "b/1"]
    trials = make_trials(ids, ["a", "a", "b"])

    checksum = write_trials(tmp_path / "trials.txt", trials, ids)
    (tmp_path / "wav.txt").write_text("1 a/1.wav a/2.wav\n0 a/1.wav b/1\n0 a/2 b/1.flac\n")

    for name in ("trials.txt", "wav.txt"):
        for read, written in zip(read_trials(tmp_path / name, ids), trials, strict=True):
            assert np.array_equal(read, written)
    assert checksum == write_trials(tmp_path / "again.txt", trials, ids)


def test_names_with_spaces_survive_a_written_list(tmp_path: Path) -> None:
    ids = ["my talk/part 1", "my talk/part 2", "yours"]
    trials = make_trials(ids, ["a", "a", "b"])

    write_trials(tmp_path / "trials.txt", trials, ids)

    for read, written in zip(read_trials(tmp_path / "trials.txt", ids), trials, strict=True):
        assert np.array_equal(read, written)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("same a b\n", "line 1: write `A B`, or `1 A B`"),
        ("1 a b\n1 a\n", "line 2: some lines have a label"),
        ("1 a b\n\n1 a c\n", "line 3: 'c' is not in the store"),
        ("1 a b\n1 . a\n", "line 2: '.' is not in the store"),
        ("1 a b\n1 a /\n", "line 2: '/' is not in the store"),
        ("1\ta\t\n", "line 1: write"),
        ("a b\n", "line 1: has no label"),
        ("1 a b\n0 a twice\n", "line 2: 'twice' is in several of the stores"),
        ("\n", "has no trials"),
    ],
)
def test_a_list_that_is_not_one_is_refused_by_line(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "list").write_text(content)

    with pytest.raises(InputError, match=named):
        read_trials(tmp_path / "list", ["a", "b", "twice", "twice"])


def test_no_list_is_made_that_could_not_name_its_recordings() -> None:
    with pytest.raises(InputError, match="'a' is in several of the stores"):
        make_trials(["a", "b", "a"], ["s", "s", "t"])
