"""How well a linear classifier tells emotions from a model's audio states: what they hold before any fine-tuning.

    python docs/linear_probe.py STORE MODEL [--random]

For each audio layer, all of them side by side, and several strengths of regularisation: mean recall (UAR) of a linear
SVM over the mean and standard deviation of an utterance's states, leave-one-speaker-out; over their mean and maximum,
as the paper's head pools; and with mean and deviation brought to mean 0 and variance 1 over all utterances of a
speaker, as one can who has many of the speaker to be judged, unlabelled.
`--random` takes new weights of the same architecture.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from ctal import CtalConfig, CtalModel, CtalProcessor
from ctal.objective import corpus_features, open_corpus

STRENGTHS = (0.001, 0.003, 0.01)


@torch.inference_mode()
def pooled_states(model: CtalModel, features_TF: torch.Tensor) -> np.ndarray:
    """(layers, 3, D) means, standard deviations and maxima over time, without a transcript."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: object, states_TD: torch.Tensor) -> None:
        seen.append(states_TD)

    hooks = [layer.register_forward_hook(keep) for layer in model.audio_encoder.layers]
    model(input_features=features_TF[None])
    for hook in hooks:
        hook.remove()
    return np.stack([torch.stack([each.mean(0), each.std(0), each.amax(0)]).numpy() for each in seen])


def normalised_by(speakers: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    normalised = np.empty_like(statistics)
    for speaker in np.unique(speakers):
        own = statistics[speakers == speaker]
        normalised[speakers == speaker] = (own - own.mean(0)) / (own.std(0) + 1e-5)
    return normalised


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("model")
    parser.add_argument("--random", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    corpus = open_corpus([Path(given.store)])
    features = corpus_features(corpus, CtalProcessor.from_pretrained(given.model).feature_extractor)
    if given.random:
        model = CtalModel(CtalConfig.from_pretrained(given.model)).eval()
    else:
        model = CtalModel.from_pretrained(given.model).eval()
    of_rows = (features.read(row, corpus.read(row)).float() for row in range(len(corpus)))
    found = np.stack([pooled_states(model, features_TF) for features_TF in of_rows])
    labels = np.array([each["emotion"] for each in corpus.labels])
    warnings.simplefilter("ignore", ConvergenceWarning)
    count = len(found)
    views = {f"layer {number + 1}": found[:, number, :2].reshape(count, -1) for number in range(found.shape[1])}
    views["all layers"] = found[:, :, :2].reshape(count, -1)
    views["all layers, mean and maximum"] = found[:, :, ::2].reshape(count, -1)
    views["all layers, by speaker"] = normalised_by(np.array(corpus.speakers), views["all layers"])
    for view, statistics in views.items():
        for strength in STRENGTHS:
            svm = make_pipeline(
                StandardScaler(), LinearSVC(C=strength, class_weight="balanced", max_iter=3000, random_state=0)
            )
            said = cross_val_predict(svm, statistics, labels, groups=corpus.speakers, cv=LeaveOneGroupOut())
            print(f"{view}, C={strength}: UAR {balanced_accuracy_score(labels, said):.3f}", flush=True)


if __name__ == "__main__":
    main()
