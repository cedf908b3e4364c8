"""How an utterance is spoken in a few numbers: what NumPy finds, whatever else is in the batch, and what is unknown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ctal.attention import Lengths
from ctal.prosody import NUM_FUNCTIONALS, QUANTILES, Prosody

FRAMES = [7, 0, 1, 12]
"""Of each utterance; the second has no recording."""
WORDS = [[3, 5], [4], [], [3, 3, 4]]
"""Tokens of each; the third has no transcript."""
LETTERS = [0, 0, 0, 4, 6, 2]
BEGINS_WORD = [True, False, False, True, True, False]
"""0 is `<s>`, 2 `</s>`."""


@pytest.fixture
def prosody() -> Prosody:
    module = Prosody(8, vocab_size=6)
    module.initialize()
    module.count_letters(LETTERS, BEGINS_WORD)
    return module


def functionals(prosody: Prosody, chosen: list[int]) -> Tensor:
    """Of some utterances, whose pitch and voicing are always the same."""
    tracks = torch.randn(2, sum(FRAMES), generator=torch.Generator().manual_seed(0)).split(FRAMES, 1)
    log_hertz, voicing = torch.cat([tracks[number] for number in chosen], 1)
    ids = [[0, *WORDS[number], 2] for number in chosen]
    owner = torch.tensor([place for place, each in enumerate(ids) for _ in each])
    lengths = Lengths([FRAMES[number] for number in chosen], torch.device("cpu"))
    tokens = torch.tensor([token for each in ids for token in each])
    return prosody.functionals(log_hertz, voicing, lengths, tokens, owner)


def test_functionals_are_those_of_numpy(prosody: Prosody) -> None:
    found = functionals(prosody, [0, 3])
    for number, row in zip([0, 3], found.numpy(), strict=True):
        tracks = torch.randn(2, sum(FRAMES), generator=torch.Generator().manual_seed(0)).split(FRAMES, 1)[number]
        log_hertz, voicing = tracks.numpy()
        letters, words = (
            sum(LETTERS[each] for each in WORDS[number]),
            1 + sum(BEGINS_WORD[each] for each in WORDS[number]),
        )
        expected = [
            *np.percentile(log_hertz, [100 * each for each in QUANTILES]),
            *(log_hertz.std(), voicing.mean(), voicing.std()),
            *(np.log(letters / FRAMES[number]), np.log(words / FRAMES[number])),
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)


def test_the_other_utterances_of_a_batch_change_nothing(prosody: Prosody) -> None:
    together = functionals(prosody, [0, 1, 2, 3, 1])
    for place, number in enumerate([0, 1, 2, 3, 1]):
        torch.testing.assert_close(together[place], functionals(prosody, [number])[0], equal_nan=True)


def test_without_a_recording_nothing_is_known_and_without_a_word_all_but_the_rates(prosody: Prosody) -> None:
    found = functionals(prosody, [1, 2])
    assert found[0].isnan().all()
    assert found[1].isnan().tolist() == [False] * (NUM_FUNCTIONALS - 2) + [True] * 2


def test_what_is_not_known_counts_as_the_mean_of_training_and_has_no_part_in_it(prosody: Prosody) -> None:
    known = functionals(prosody, [0, 3])
    prosody.measure([known, functionals(prosody, [1])])
    torch.testing.assert_close(prosody.mean_P, known.mean(0))
    torch.testing.assert_close(prosody.deviation_P, known.std(0, correction=0))

    unknown = prosody(functionals(prosody, [1]))
    torch.testing.assert_close(unknown, prosody(known.mean(0, keepdim=True)))


def test_constants_stay_harmless_where_no_utterance_has_a_word(prosody: Prosody) -> None:
    prosody.measure([functionals(prosody, [2, 2])])
    assert prosody.mean_P.isfinite().all()
    assert torch.equal(prosody.deviation_P, torch.ones(NUM_FUNCTIONALS))
    assert prosody(functionals(prosody, [0, 1, 2])).isfinite().all()
