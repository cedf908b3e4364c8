"""What a head learns by heart where every transcript can be told from the others, and what keeps it from that.

    python docs/by_heart_probe.py demo/corpus

No encoder is trained. The head is given the word class and the marker of an utterance, without error, beside 200 random
numbers of its own, by which it can be known as a transcript can; and what the prosody says (`style_probe.py`). It is
trained on the training speakers and tested on all others, with several fusions, and labels as they are or smoothed; for
sentiment by the absolute error or as the median of a histogram. Two seeds; what is printed is their mean.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from style_probe import statistics
from torch import Tensor, nn

from ctal.audio import load_audio
from ctal.fusion import FUSIONS, Pools
from ctal.modeling_ctal import SCORES, median_score

WIDTH, IDENTITY, PASSES, BATCH = 256, 200, 30, 16
WORD_CLASSES = (-2, -1, 0, 1, 2)


class Head(nn.Module):
    def __init__(self, words: int, sounds: int, fusion: str, outputs: int) -> None:
        super().__init__()
        self.words, self.sounds = nn.Linear(words, WIDTH), nn.Linear(sounds, WIDTH)
        nn.init.normal_(self.sounds.weight, std=sounds**-0.5)
        self.fusion = FUSIONS[fusion](WIDTH, "cosine")
        self.dense, self.classifier = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, outputs)

    def forward(self, words: Tensor, sounds: Tensor) -> Tensor:
        text, audio = self.words(words).tanh(), self.sounds(sounds).tanh()
        pools = Pools(text, text, audio, audio, torch.ones(len(text), dtype=torch.bool))
        return self.classifier(self.dense(self.fusion(pools).vector).tanh())


def trained(words: Tensor, sounds: Tensor, shares: Tensor, fusion: str, smoothing: float | None) -> Head:
    """On `shares` (N, C) of classes, or on scores (N, 1) by the absolute error where `smoothing` is None."""
    head = Head(words.shape[1], sounds.shape[1], fusion, shares.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PASSES)
    for _ in range(PASSES):
        for rows in torch.randperm(len(words)).split(BATCH):
            outputs, wanted = head(words[rows], sounds[rows]), shares[rows]
            if smoothing is None:
                loss = F.l1_loss(outputs, wanted)
            else:
                loss = F.cross_entropy(outputs, wanted, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return head


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    corpus = parser.parse_args().corpus
    torch.set_num_threads(1)
    records = [json.loads(line) for line in (corpus / "utterances.jsonl").read_text().splitlines()]
    is_training = torch.tensor([each["split"] == "train" for each in records])
    found = [statistics(load_audio(corpus / each["audio"]), each["text"]) for each in records]
    sounds = torch.tensor(np.array([np.concatenate(list(each.values())) for each in found]), dtype=torch.float32)
    sounds = (sounds - sounds[is_training].mean(0)) / sounds[is_training].std(0)
    kinds = [WORD_CLASSES.index(each["word_class"]) * 2 + each["marker"] for each in records]
    said = 2 * F.one_hot(torch.tensor(kinds)).float()
    words = torch.cat([said, torch.randn(len(said), IDENTITY, generator=torch.Generator().manual_seed(0))], 1)
    names = sorted({each["emotion"] for each in records})
    emotions = torch.tensor([names.index(each["emotion"]) for each in records])
    sentiments = torch.tensor([float(each["sentiment"]) for each in records])
    scores = F.one_hot(torch.tensor([SCORES.index(each) for each in sentiments.tolist()]), len(SCORES)).float()

    def mean_over_seeds(shares: Tensor, fusion: str, smoothing: float | None, judge: str) -> float:
        values = []
        for seed in range(2):
            torch.manual_seed(seed)
            head = trained(words[is_training], sounds[is_training], shares[is_training], fusion, smoothing)
            outputs = head(words[~is_training], sounds[~is_training]).detach()
            if judge == "accuracy":
                values.append((outputs.argmax(1) == emotions[~is_training]).float().mean())
                continue
            if smoothing is not None:
                outputs = median_score(outputs)
            values.append((outputs[:, 0] - sentiments[~is_training]).abs().mean())
        return float(torch.stack(values).mean())

    for fusion in ("concat", "orthogonal", "gated", "tensor"):
        for smoothing in (0.0, 0.2):
            right = mean_over_seeds(F.one_hot(emotions).float(), fusion, smoothing, "accuracy")
            print(f"emotion, {fusion}, labels smoothed by {smoothing}: accuracy {right:.3f}", flush=True)
    for fusion in ("gated", "tensor"):
        for name, shares, smoothing in (
            ("absolute error", sentiments[:, None], None),
            ("histogram", scores, 0.0),
            ("histogram, smoothed by 0.2", scores, 0.2),
        ):
            error = mean_over_seeds(shares, fusion, smoothing, "error")
            print(f"sentiment, {fusion}, {name}: MAE {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
