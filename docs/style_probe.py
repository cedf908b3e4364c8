"""How well the demo corpus's speaking styles can be told from nothing but pitch and the rate of the words.

    python docs/style_probe.py demo/corpus

An SVM over what `ctal.pitch` finds in an utterance (how its pitch and voicing are spread), how long it is, and how many
letters and words it has a second; trained on the training speakers, tested on all others. Last, without rate and
length, and without pitch: what either is worth.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ctal.audio import SAMPLING_RATE, load_audio
from ctal.features import NUM_PITCH, extract_features
from ctal.pitch import VOICED

QUANTILES = (5, 10, 25, 50, 75, 90, 95)


def statistics(wave: np.ndarray, text: str) -> dict[str, list[float]]:
    features_TD = extract_features(torch.from_numpy(wave), cmvn="none", pitch=True)
    log_hertz, _, voicing = features_TD[:, -NUM_PITCH:].T.numpy()
    spoken = log_hertz[voicing > VOICED] if (voicing > VOICED).any() else log_hertz
    spread = np.percentile(spoken, QUANTILES)
    seconds = len(wave) / SAMPLING_RATE
    letters, words = len(re.findall("[a-z]", text.lower())), len(text.split())
    return {
        "pitch": [*spread, spread[-1] - spread[0], spoken.std(), float(np.median(np.abs(np.diff(spoken))))],
        "voicing": [voicing.mean(), voicing.std(), (voicing > VOICED).mean()],
        "rate": [np.log(letters / seconds), np.log(words / seconds), seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    corpus = parser.parse_args().corpus
    records = [json.loads(line) for line in (corpus / "utterances.jsonl").read_text().splitlines()]
    found = [statistics(load_audio(corpus / each["audio"]), each["text"]) for each in records]
    styles = np.array([each["style"] for each in records])
    is_training = np.array([each["split"] == "train" for each in records])
    for left_out in (None, "rate", "pitch"):
        kept = [[part for name, part in each.items() if name != left_out] for each in found]
        values = np.array([np.concatenate(parts) for parts in kept])
        svm = make_pipeline(StandardScaler(), SVC(C=3)).fit(values[is_training], styles[is_training])
        right = svm.score(values[~is_training], styles[~is_training])
        print(f"without {left_out}" if left_out else "all", f"accuracy {right:.3f}", sep=": ", flush=True)


if __name__ == "__main__":
    main()
