"""Metrics agree with what the authors' code gave for the same predictions."""

from __future__ import annotations

import json

import pytest

from conftest import REFERENCE, needs_reference
from ctal.metrics import emotion_metrics, sentiment_metrics

pytestmark = needs_reference

THEIRS = {"acc2_nonzero": "acc_2class", "f1_nonzero": "f1_2class"}
"""Our name → theirs, where they differ."""


def test_metrics_are_the_recorded_ones() -> None:
    cases = json.loads((REFERENCE / "metric_cases.json").read_text())
    assert {case["task"] for case in cases} == {"emotion", "sentiment"}
    for case in cases:
        if case["task"] == "emotion":
            metrics = emotion_metrics(case["predictions"], case["labels"], 4)
        else:
            metrics = sentiment_metrics(case["predictions"], case["labels"])
        ours = {THEIRS.get(name, name): value for name, value in metrics.items()}
        for name, expected in case["metrics"].items():
            assert ours[name] == pytest.approx(expected, rel=0, abs=1e-9), (case["task"], name)
