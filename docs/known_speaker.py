"""How many recordings of a speaker a model with `cmvn=speaker` wants.

    python docs/known_speaker.py STORE RUN

RUN is a `ctal finetune emotion STORE` in folds, from a model that was pre-trained with `--set cmvn=speaker`. Every
utterance is judged by the model of its own fold, as `ctal predict --speaker` judges it, given none, a few or all of the
other recordings of its speaker: mean recall (UAR) over the folds, as in the run's own evaluation, and over three draws
of the few.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.metrics import balanced_accuracy_score

from ctal.audio import SAMPLING_RATE, load_audio
from ctal.inference import Recording, load_task_model, pipeline
from ctal.store import Store

GIVEN = (0, 1, 3, 10, 30)
DRAWS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
    store = Store(given.store)
    stored = {each.id: each for each in map(store.read, range(len(store)))}
    sounds = {name: Recording(load_audio(each.audio, name), None, SAMPLING_RATE, name) for name, each in stored.items()}
    others = {
        name: [other for other, by in stored.items() if by.speaker == each.speaker and other != name]
        for name, each in stored.items()
    }
    recalls: dict[str, list[list[float]]] = {}
    for fold in sorted((given.run / "folds").iterdir()):
        model = load_task_model(fold / "model")
        lines = [json.loads(line) for line in (fold / "predictions.jsonl").read_text().splitlines()]
        truth = [line["label"] for line in lines]

        for count in (*GIVEN, len(stored)):
            of_draws = []
            for draw in range(DRAWS if 0 < count < len(stored) else 1):
                rng = np.random.default_rng(draw)
                said = []
                for line in lines:
                    known = [sounds[name] for name in rng.permutation(others[line["id"]])[:count]]
                    hear = pipeline("emotion", model, device="cpu", speaker=known or None)
                    said.append(hear(sounds[line["id"]].audio, sampling_rate=SAMPLING_RATE).label)
                of_draws.append(balanced_accuracy_score(truth, said))
            recalls.setdefault(str(count) if count < len(stored) else "all", []).append(of_draws)
        print(f"{fold.name} done", flush=True)
    for count, of_folds in recalls.items():
        print(f"{count} other recordings: UAR {np.mean(of_folds):.3f}")


if __name__ == "__main__":
    main()
