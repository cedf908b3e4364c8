"""The whole journey on an embedded default, as one short script: corpus, store, tokenizer, pre-training, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctal.console import bar
from ctal.corpora import get_corpus
from ctal.corpora.demo import make_demo
from ctal.pretrain import make_tokenizer, pretrain
from ctal.recipes import PRETRAINING, PretrainConfig, make_config
from ctal.report import write_pretraining_report
from ctal.store import prepare_store
from ctal.training import Progress, fast_precision

SIZE = "mini"
VOCAB_SIZE = 400
"""Pieces of words, each of which occurs often. With 2,000, whole words that occur a handful of times are memorised:
held-out cross-entropy rises from step 200 on, and the audio does not learn to listen to them."""

RECIPE: dict[str, Any] = {"steps": 1000, "checkpoint_every": 250, "audio_mask_ratio": 0.3}
"""About eight minutes on two cores. Twice the paper's share of masked frames: more of each utterance has to be
predicted, and from further away, so the text is needed sooner."""

ARCHITECTURE = {"frame_stack": 2}
"""Not the four of the size's own recipe: those reconstruct better, but had not begun to listen to the text after as
much audio (docs/results.md)."""


def run_demo(out: Path, *, steps: int | None, progress: Progress) -> None:
    """Makes `out/corpus`, `out/store`, `out/tokenizer`, `out/pretrain` and `out/report.html`.

    What is there already is kept; an interrupted training goes on, a finished one is only reported again.
    """
    corpus, store, tokenizer, run = (out / name for name in ("corpus", "store", "tokenizer", "pretrain"))
    with bar("making the synthetic corpus") as show:
        make_demo(corpus, progress=show)
    with bar("preparing the store") as show:
        summary = prepare_store(get_corpus("demo").prepare(corpus), store, corpus="demo", progress=show)
    progress.note(
        f"{store}: {summary.utterances} synthetic utterances, {summary.hours:.2f} h, {summary.speakers} speakers"
    )
    if not (tokenizer / "tokenizer.json").is_file():
        make_tokenizer(store, tokenizer, VOCAB_SIZE)
    if (run / "evaluation.json").is_file():
        progress.note(f"{run}: trained already; remove it to train again")
    else:
        fast = {"precision": fast_precision()}
        config = make_config(PretrainConfig, PRETRAINING[SIZE], RECIPE, fast, {} if steps is None else {"steps": steps})
        pretrain(
            [store],
            run,
            config,
            size=SIZE,
            architecture=ARCHITECTURE,
            tokenizer=tokenizer,
            resume=(run / "config.json").is_file(),
            progress=progress,
        )
    write_pretraining_report(run, [store], out / "report.html", title="CTAL demo")
