"""The command line. Torch and transformers are imported inside the verbs that need them, so that help is quick."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand

from ctal.corpora import all_in, corpus_names, get_corpus
from ctal.errors import CtalWarning, InputError, did_you_mean
from ctal.processes import keep_freed_memory, leave_processes, share_cores

if TYPE_CHECKING:
    from ctal.console import TrainingProgress
    from ctal.inference import Pipeline, Recording, Result
    from ctal.store import StoreSummary

ResultT = TypeVar("ResultT", bound="Result")

_FORMAT_WARNING = warnings.formatwarning

app = typer.Typer(
    name="ctal",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Joint representations of speech and its transcript. Start with `ctal demo`.",
)

StoresArgument = Annotated[list[Path], typer.Argument(metavar="STORE...", help="One or several prepared stores.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="A field of the run or of the model; may be repeated."),
]


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 2 wrong usage or input, 1 a fault of ours, 143 by SIGTERM, 130 by Ctrl-C."""
    share_cores(os.environ)
    keep_freed_memory(os.environ)
    warnings.formatwarning = _format_warning
    try:
        app()
    except InputError as error:
        print(f"ctal: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_processes()
    sys.exit(0)


def _format_warning(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning of ours as all else that the command line says, others with the line of code that they come from."""
    return f"ctal: {message}\n" if issubclass(category, CtalWarning) else _FORMAT_WARNING(message, category, *where)


class _PrepareCommand(TyperCommand):
    """Lists the corpora below the help; they are imported for that only then."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        corpora = map(get_corpus, corpus_names())
        self.epilog = "\n\n".join(f"**{corpus.name}**: {corpus.help}" for corpus in corpora)
        super().format_help(ctx, formatter)


@app.command(cls=_PrepareCommand)
def prepare(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help=f"One of: {', '.join(corpus_names())}.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT_OR_FILE", help="Where the corpus lies.")],
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store to write.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Put every utterance into this part: train, validation or test.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A file that cannot be used is an error.")] = False,
) -> None:
    """Read a corpus into an Arrow store: checked audio, transcripts, speakers, labels.

    Interrupted, run it again: it goes on where it stopped. A file that cannot be used goes into quarantine, with its
    reason.

    Example: `ctal prepare folder my-recordings my-store`
    """
    from ctal.console import bar
    from ctal.store import prepare_store

    utterances = get_corpus(corpus).prepare(root)
    if split is not None:
        utterances = all_in(split, utterances)
    with bar("preparing") as progress:
        summary = prepare_store(utterances, store, corpus=corpus, workers=workers, strict=strict, progress=progress)
    _show_summary(summary)


@app.command()
def features(
    stores: StoresArgument,
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Analyse as this model does; by default as a new one.")
    ] = None,
    cmvn: Annotated[
        str | None,
        typer.Option(help="Normalise for a new model with this --set cmvn: utterance, level, fixed or speaker."),
    ] = None,
    pitch: Annotated[bool, typer.Option("--pitch", help="For a new model with --set pitch=true.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Compute the features of stores' recordings once and keep them in each STORE/features, 92 MB an hour.

    Every training and evaluation on them then reads these instead of decoding recordings, with the same results.
    Worth it where the processors are busy, as beside a GPU, and with several folds; within a training, small corpora
    are kept in memory anyway (`cache_megabytes` in `ctal settings`). Interrupted, run it again: it goes on where it
    stopped.

    Example: `ctal features my-store`
    """
    from ctal.console import bar
    from ctal.model_folders import load_processor
    from ctal.pretrain import new_extractor
    from ctal.store import Store
    from ctal.stored_features import write_features

    asked = {name: value for name, value in {"cmvn": cmvn, "pitch": pitch}.items() if value}
    if model and asked:
        raise InputError(f"--{next(iter(asked))}: a model has its own features; leave it out with --model")
    extractor = (load_processor(model).feature_extractor if model else new_extractor(asked)).uncentred
    for store in [Store(path) for path in stores]:
        with bar("analysing") as progress:
            summary = write_features(store, extractor.analysis, extractor.features, workers=workers, progress=progress)
        done = "up to date" if summary.up_to_date else "written"
        print(f"{summary.path}: {done}, {summary.utterances} utterances, {summary.megabytes:,.0f} MB")


@app.command()
def tokenizer(
    sources: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Prepared stores, or text files.")],
    out: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Entries; a few hundred for minutes of speech.")] = 30_000,
) -> None:
    """Train a byte-level BPE tokenizer on the transcripts of stores, and on the lines of text files.

    Example: `ctal tokenizer my-store my-tokenizer --vocab-size 1000`
    """
    from ctal.pretrain import make_tokenizer

    entries = make_tokenizer(sources, out, vocab_size)
    fewer = f", and not {vocab_size}: the text has no more to merge" if entries < vocab_size else ""
    print(f"{out}: {entries} entries{fewer}")


@app.command()
def pretrain(
    stores: StoresArgument,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; RUN/model is the result.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer, for a new model.")] = None,
    size: Annotated[
        str | None, typer.Option(help="nano, mini, tiny, base or large: the model and its recipe.  [default: base]")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--from", metavar="MODEL", help="Continue this model's weights, by the recipe of its size."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; by default the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from RUN's newest checkpoint.")] = False,
    settings: SettingsOption = None,
) -> None:
    """Pre-train on audio-text pairs: masked language modelling and masked cross-modal acoustic modelling.

    Runs on one process as it is, and on many under `accelerate launch` or `torchrun`. Ctrl-C and SIGTERM save a
    checkpoint, from which `--resume` goes on. `ctal settings --size mini` lists what `--set` takes.

    Example: `ctal pretrain my-store --tokenizer my-tokenizer --out run --size mini --steps 2000`
    """
    from ctal.configuration_ctal import settable_fields
    from ctal.pretrain import pretrain as run
    from ctal.pretrain import size_of
    from ctal.recipes import MODEL_DEFAULTS, PRETRAINING, PretrainConfig, make_config, parse_settings
    from ctal.report import write_pretraining_report

    fields = parse_settings(settings or [], [*PretrainConfig.model_fields, *settable_fields()])
    architecture = {name: fields.pop(name) for name in list(fields) if name in settable_fields()}
    if start_from:
        for option, value in {"--size": size, "--tokenizer": tokenizer}.items():
            if value is not None:
                raise InputError(f"{option} {value}: a continued model keeps its own; leave it out with --from")
        if architecture:
            raise InputError(f"--set {next(iter(architecture))}: the architecture is that of --from {start_from}")
        size = size_of(start_from)
    size = _checked_size(size or "base")
    config = make_config(PretrainConfig, PRETRAINING[size], fields, {} if steps is None else {"steps": steps})
    with _training() as progress:
        evaluation = run(
            stores,
            out,
            config,
            size=size,
            architecture={**MODEL_DEFAULTS.get(size, {}), **architecture},
            tokenizer=tokenizer,
            start_from=start_from,
            resume=resume,
            progress=progress,
        )
    if evaluation:
        write_pretraining_report(out, stores, out / "report.html", title=f"CTAL pre-training: {out.resolve().name}")
        _show_evaluation(evaluation)
        best = f"after step {evaluation['step']}" if evaluation["step"] else "untrained: no step was better held out"
        print(f"{out / 'model'}: the best model by text_loss × audio_loss, {best}; {out / 'report.html'}: its report")


def _checked_size(size: str) -> str:
    from ctal.configuration_ctal import SIZES

    if size not in SIZES:
        raise InputError(f"--size {size}: unknown{did_you_mean(size, SIZES)}; choose from {', '.join(SIZES)}")
    return size


class _FinetuneCommand(TyperCommand):
    """Lists tasks and protocols below the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from ctal.tasks import TASKS

        tasks = "\n\n".join(f"**{task.name}**: {task.help}" for task in TASKS.values())
        self.epilog = f"{tasks}\n\n{_PROTOCOLS_HELP}"
        super().format_help(ctx, formatter)


_PROTOCOLS_HELP = (
    "**protocol** (`--set protocol=…`): `auto` is the corpus's own split where it has a test part, else "
    "`leave-one-session-out` where sessions are labelled and nobody speaks in two of them, else "
    "`leave-one-speaker-out` of at most 12 speakers (neither for verification, which needs pairs of several), else "
    "`5-fold` by speaker; an inner part of other speakers chooses the epoch, or none with `--set validation_share=0`. "
    "`split` insists on the corpus's own. `paper` chooses the epoch on the reported fold, as the authors did. `ge2e` "
    "adds the authors' measure of verification. `all` trains on everything and measures nothing."
)


@app.command(cls=_FinetuneCommand)
def finetune(
    task: Annotated[str, typer.Argument(metavar="TASK", help="emotion, sentiment or verification.")],
    stores: StoresArgument,
    start_from: Annotated[Path, typer.Option("--from", metavar="MODEL", help="A pre-trained model, RUN/model.")],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; RUN/model is the result.")],
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data; by default the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, instead of epochs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    settings: SettingsOption = None,
) -> None:
    """Fine-tune a pre-trained model for a task, and judge it by a named protocol on speakers it has not heard.

    Several folds are trained one after the other. RUN/evaluation.json holds the metrics, RUN/predictions.jsonl what was
    predicted. `ctal settings finetune` lists what `--set` takes: fusion, learning rate, modality dropout, freezing, …

    Example: `ctal finetune emotion demo/store --from demo/pretrain/model --out run`
    """
    from ctal.configuration_ctal import HEAD_FIELDS, ONE_TASKS_FIELDS, CtalConfig, settable_fields
    from ctal.finetune import finetune as run
    from ctal.pretrain import size_of
    from ctal.recipes import FINETUNING, HEAD_DEFAULTS, FinetuneConfig, PretrainConfig, make_config, parse_settings
    from ctal.report import write_task_report

    if steps and epochs:
        raise InputError("--steps and --epochs: give one of the two")
    known = [*FinetuneConfig.model_fields, *HEAD_FIELDS]
    known.remove("steps")  # it follows from --epochs, or is --steps
    decided = settable_fields().keys() | PretrainConfig.model_fields.keys() - FinetuneConfig.model_fields.keys()
    fields = parse_settings(settings or [], known, of_pretraining=decided)
    for name in fields:
        if ONE_TASKS_FIELDS.get(name, task) != task:
            raise InputError(f"--set {name}: changes {ONE_TASKS_FIELDS[name]} alone, not {task}; leave it out")
    size = size_of(start_from)
    if task == "sentiment" and fields.get("label_smoothing"):
        loss = fields.get("regression_loss", CtalConfig.from_pretrained(start_from).regression_loss)
        if loss != "histogram":
            raise InputError(
                "--set label_smoothing: spreads a histogram's scores; --set regression_loss=histogram with it"
            )
    head = HEAD_DEFAULTS.get(size, {}) | {name: fields.pop(name) for name in list(fields) if name in HEAD_FIELDS}
    recipe = FINETUNING[size]
    config = make_config(FinetuneConfig, recipe, fields, {} if epochs is None else {"epochs": epochs})
    with _training() as progress:
        evaluation = run(
            task, stores, out, config, start_from=start_from, head=head, steps=steps, resume=resume, progress=progress
        )
    if evaluation:
        _show_metrics(evaluation)
        write_task_report(out, stores, out / "report.html", title=f"CTAL for {task}: {out.resolve().name}")
        what = "what it does on the test part" if "metrics" in evaluation else "how it was trained"
        print(f"{out / 'model'}: the model; {out / 'report.html'}: {what}")


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help="pretraining, emotion, sentiment or verification.")],
    stores: StoresArgument,
    model: Annotated[Path, typer.Option(metavar="MODEL", help="A model folder, for example RUN/model.")],
    trials: Annotated[
        Path | None, typer.Option(metavar="LIST", help="Verification: a list, `1 A B` or `0 A B` a line.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="both, audio or text: what the model gets; by default as it was trained.")
    ] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each prediction there.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of a task: fp32, bf16 or int8 (CPU); by default as it was trained.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a model on the held-out part of stores.

    For `pretraining`: masked frames against the training median and a straight line, masked tokens against their
    frequencies, and an utterance's own transcript against another's, each with its 95 % interval over utterances. For a
    task: its metrics on the test part of the data it was trained on, or on another corpus. A recording that is longer
    than the model's window is judged by one window of it, always the same, where `predict` and `verify` average over
    all. Under `accelerate launch` the work on a task is shared.

    Example: `ctal evaluate emotion demo/store --model demo/emotion/model`
    """
    from ctal.tasks import TASKS

    if task != "pretraining" and task not in TASKS:
        known = ("pretraining", *TASKS)
        raise InputError(f"unknown task '{task}'{did_you_mean(task, known)}: choose from {', '.join(known)}")
    if task == "pretraining":
        for option, value in {
            "--trials": trials,
            "--inputs": inputs,
            "--scores": scores,
            "--precision": precision,
        }.items():
            if value is not None:
                raise InputError(f"{option}: is for tasks; leave it out for pretraining")
        from ctal.pretrain import evaluate_model

        evaluation, show = evaluate_model(stores, model), _show_evaluation
    else:
        from ctal.finetune import evaluate_task

        evaluation = evaluate_task(
            task, stores, model, trials=trials, inputs=inputs, scores=scores, precision=precision
        )
        show = _show_metrics
    if evaluation is None:  # not the main process
        return
    if as_json:
        print(json.dumps(evaluation, indent=1))
    else:
        show(evaluation)


@app.command()
def baseline(
    task: Annotated[str, typer.Argument(metavar="TASK", help="emotion, sentiment or verification.")],
    stores: StoresArgument,
    protocol: Annotated[str, typer.Option(help="As `--set protocol=…` of `ctal finetune`.")] = "auto",
    train_on: Annotated[
        list[Path] | None,
        typer.Option("--train-on", metavar="STORE", help="Fit on this store and test STORE...; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure simple models by a task's protocol: what every result has to be better than.

    Bag of words, statistics of MFCC and both, each with logistic regression, and the best constant answer; for
    verification the cosine of MFCC statistics. Folds and metrics are those of `ctal finetune` with the same protocol.
    For the demo corpus the best possible scores stand below.

    Example: `ctal baseline emotion demo/store`
    """
    from ctal.baselines import measure_baselines
    from ctal.console import bar

    with bar("listening") as progress:
        evaluation = measure_baselines(task, stores, protocol, train_on=train_on or (), progress=progress)
    if as_json:
        print(json.dumps(evaluation, indent=1))
    else:
        _show_baselines(evaluation)


TaskModelOption = Annotated[Path, typer.Option("--model", metavar="MODEL", help="A fine-tuned model, RUN/model.")]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or quicker on some machines and a little less exact: bf16, int8 (CPU).")
]


@app.command()
def predict(
    audio: Annotated[
        list[Path],
        typer.Argument(
            metavar="AUDIO...",
            help="Recordings, folders of them, or manifests: .csv, .tsv or .jsonl with `audio` and, if known, `text`.",
        ),
    ],
    model: TaskModelOption,
    text: Annotated[str | None, typer.Option(help="The transcript of a single recording.")] = None,
    transcripts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A manifest with the transcripts of AUDIO, instead of those beside them."),
    ] = None,
    asr: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Hear missing transcripts with this local model (transformers' recognition)."),
    ] = None,
    speaker: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Recordings of the one who speaks in all AUDIO, or a folder of them, for a model with cmvn=speaker.",
        ),
    ] = None,
    precision: PrecisionOption = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a recording.")] = False,
) -> None:
    """Predict the emotion or sentiment of recordings; with a verification model, `--json` gives embeddings.

    The transcript of x.wav is x.txt beside it, or what the manifest says that lists it, unless `--text` or
    `--transcripts` is given; without one the model hears the audio alone, and the result says so. Long recordings are
    cut at pauses, and their windows averaged. A recording that cannot be used is named in one line, the others are
    done, and the exit code is 2.

    A model that was pre-trained with `--set cmvn=speaker` hears how someone differs from how they always sound: give it
    ten or more recordings of them with `--speaker`, in various moods; those to be judged may be among them. If it was
    fine-tuned with `random_speaker_mean=true`, a few are enough.

    Example: `ctal predict my-recordings --model run/model`
    """
    with _quick_start():
        from ctal.inference import Pipeline, find_recordings, load_task_model

        recordings = find_recordings(audio, text=text, transcripts=transcripts)
        known = find_recordings(speaker) if speaker else None
        pipeline = Pipeline(load_task_model(model), asr=asr, precision=precision, speaker=known)
    for reason in pipeline.unusable:
        print(f"ctal: --speaker: {reason}", file=sys.stderr)
    results: list[Result] = []
    failed = bool(pipeline.unusable)
    for result in _with_bar("listening", pipeline, recordings, quiet=as_json):
        if isinstance(result, InputError):
            print(f"ctal: {result}", file=sys.stderr)
            failed = True
        elif as_json:
            print(_printable(json.dumps(result.to_dict(), ensure_ascii=False)), flush=True)
        else:
            results.append(result)
    if results:
        _show_predictions(results)
    if failed:
        sys.exit(2)


@app.command()
def verify(
    model: TaskModelOption,
    audio: Annotated[list[Path] | None, typer.Argument(metavar="A B", help="Two recordings.")] = None,
    trials: Annotated[
        Path | None, typer.Option(metavar="LIST", help="Pairs instead: `A B`, or as VoxCeleb `1 A B`, `0 A B` a line.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the list's paths start; by default its own folder.")
    ] = None,
    precision: PrecisionOption = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a pair.")] = False,
) -> None:
    """Say whether two recordings are of the same speaker: the cosine of their embeddings and the model's threshold.

    With `--trials`, a score a line, and with labels the EER and minDCF; every recording is heard once. Transcripts are
    read from the .txt beside a recording.

    Example: `ctal verify one.wav other.wav --model run/model`
    """
    if (trials is None) == (audio is None) or (audio and len(audio) != 2):
        raise InputError("give two recordings, or --trials LIST")
    with _quick_start():
        from ctal.corpora.folder import transcript_beside
        from ctal.inference import Recording
        from ctal.inference import pipeline as make_pipeline
        from ctal.trials import Trial, read_trial_list

        if trials:
            root = root or trials.parent
            pairs = list(read_trial_list(trials).values())
        else:
            assert audio
            root, pairs = Path(), [Trial(None, str(audio[0]), str(audio[1]))]
        pipeline = make_pipeline("verification", model, precision=precision)
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.a, pair.b)))
    recordings = [Recording(root / name, transcript_beside(root / name)) for name in names]
    results = dict(zip(names, _with_bar("listening", pipeline, recordings, quiet=as_json), strict=True))
    failures = [result for result in results.values() if isinstance(result, InputError)]
    for failure in failures:
        print(f"ctal: {failure}", file=sys.stderr)

    usable = {name: result for name, result in results.items() if not isinstance(result, InputError)}
    if not as_json:
        _show_notes(list(usable.values()))
    if len({result.inputs for result in usable.values()}) > 1:
        print("some recordings have a transcript and some have none: their scores are less reliable", file=sys.stderr)
    scores, labels = [], []
    for label, a, b in pairs:
        if a not in usable or b not in usable:
            continue
        verification = pipeline.compared(usable[a], usable[b])
        scores.append(verification.score)
        labels.append(label)
        verdict = {True: "same speaker", False: "different speakers", None: None}[verification.same_speaker]
        if as_json:
            fields = {"a": a, "b": b, "score": round(verification.score, 6), "threshold": verification.threshold}
            fields |= {"verdict": verdict} | ({} if label is None else {"is_target": label})
            print(_printable(json.dumps(fields, ensure_ascii=False)))
        elif trials:
            print(_printable(f"{verification.score:.6f} {a} {b}"))
        elif verdict is None:
            print(f"score {verification.score:.4f}; no verdict, for the model has no threshold")
        else:
            print(f"{verdict}: score {verification.score:.4f}, threshold {verification.threshold:.4f}")
    left_out = len(pairs) - len(scores)
    said = f"; {left_out} of {len(pairs)} trials left out" if left_out else ""
    if set(labels) in ({True}, {False}):
        print(f"no EER: it needs trials of one speaker and of two{said}", file=sys.stderr)
    elif set(labels) == {True, False}:
        from ctal.metrics import verification_metrics

        metrics = verification_metrics(scores, labels)
        if as_json:
            print(json.dumps({"trials": len(scores), "left_out": left_out, **metrics}))
        else:
            print(f"EER {metrics['eer']:.2%}, minDCF {metrics['min_dcf']:.4f}, {len(scores)} trials{said}")
    if failures:
        sys.exit(2)


class _AblateCommand(TyperCommand):
    """Lists the plans that come with ctal below the help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from ctal.ablate import load_plan, plan_names

        plans = "\n\n".join(f"**{name}**: {load_plan(name).about}" for name in plan_names())
        self.epilog = f"{plans}\n\n{_PLAN_HELP}"
        super().format_help(ctx, formatter)


_PLAN_HELP = (
    "A **plan of your own** is a YAML file with `size`, `seeds`, `base` (a variant's name) and `variants`: name → "
    "fields that differ, in `pretraining:` and `finetuning:` (those of `--set` there; `pretraining: {steps: 0}` is "
    "none). A variant may also have `about`, `tasks`, `after: emotion` (or another task that it is fine-tuned for "
    "first), and `expected: worse` or `better`, the claim that the report judges; a plan `about`, `tasks`, "
    "`vocab_size`, `vary_pretraining`, and `pretraining:` and `finetuning:` of all variants."
)


@app.command(cls=_AblateCommand)
def ablate(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan that comes with ctal, or a YAML file.")],
    stores: StoresArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Workspace; several plans may share one.")],
    pretrain_on: Annotated[
        list[Path] | None,
        typer.Option("--pretrain-on", metavar="STORE", help="Pre-train on this instead of STORE...; may be repeated."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer; else one is trained.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time; by default what the machine has room for.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Run the I-th of N parts, from 1.")] = "1/1",
) -> None:
    """Train a base and its variants with several seeds, and write a row a result to DIR/results.jsonl.

    Interrupted, run it again: what is done stays, what was running goes on. Variants that differ in fine-tuning alone
    share a pre-training. `ctal report DIR` makes tables with intervals of the rows.

    Example: `ctal ablate paper-fusion demo/store --out ablations`
    """
    from ctal.ablate import load_plan, run_plan
    from ctal.console import bar

    first, slash, last = shard.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal()):
        raise InputError(f"--shard {shard}: write it as I/N, for example 1/4")
    chosen = load_plan(plan)
    with _training() as progress, bar(f"{chosen.name}: results") as show:
        rows = run_plan(
            chosen,
            out,
            pretrain_on or stores,
            dict.fromkeys(chosen.tasks, stores),
            tokenizer=tokenizer,
            jobs=jobs,
            shard=(int(first), int(last)),
            progress=progress,
            show=show,
        )
    print(f"{rows}: the results; `ctal report {out}` makes tables of them")


PublishedOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML with published figures and their source; see `ctal report --help`."),
]


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="paper-base or paper-large.")],
    librispeech: Annotated[Path, typer.Option(metavar="DIR", help="Holds train-clean-100, dev-clean, test-clean, …")],
    iemocap: Annotated[Path, typer.Option(metavar="DIR", help="IEMOCAP_full_release, unpacked.")],
    mosei: Annotated[Path, typer.Option(metavar="DIR", help="CMU-MOSEI; `ctal prepare --help` tells its layouts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of everything that is made.")],
    size: Annotated[str | None, typer.Option(help="Another size than the recipe's, to try things out.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each pre-training, instead of a million.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each fine-tuning, instead of 20.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of each fine-tuning, instead of 5.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=256, help="Of the tokenizer, instead of 30,000.")] = None,
    published: PublishedOption = None,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """From the raw corpora to the paper's tables and ablations: prepare, tokenizer, pre-train, fine-tune, report.

    Interrupted, run it again: it goes on where it stopped.

    Example: `ctal reproduce paper-base --librispeech LibriSpeech --iemocap IEMOCAP_full_release --mosei CMU_MOSEI --out
    paper --dry-run`
    """
    from ctal.reproduce import Scale, dry_run
    from ctal.reproduce import reproduce as run

    scale = Scale.of(recipe, size, steps=steps, epochs=epochs, seeds=seeds, vocab_size=vocab_size)
    roots = {"librispeech": librispeech, "iemocap": iemocap, "mosei": mosei}
    if is_dry:
        from ctal.console import print_table

        print_table(dry_run(scale, roots))
        return
    from ctal.report import write_ablation_report

    with _training() as progress:
        rows = run(scale, roots, out, progress=progress)
    for note in write_ablation_report([rows], [out / "report.html", out / "report.md"], published):
        print(note, file=sys.stderr)
    print(f"{out / 'report.html'}: the tables; {rows}: the results")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, pre-trained or fine-tuned.")],
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="A recording.")],
    text: Annotated[str | None, typer.Option(help="Its transcript.")] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Show the utterances of this store that are nearest to it.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page to write.")] = Path("inspect.html"),
) -> None:
    """Look inside a model: which words it attends to when, what it fills in, what it takes to be alike.

    Writes one HTML file that needs nothing else. The transcript of x.wav is x.txt beside it, unless `--text` is given.
    Of a recording that is longer than the model's window, the first window is looked at.

    Example: `ctal inspect run/model talk.wav --text "what a day" --store my-store -o inspect.html`
    """
    with _quick_start():
        from ctal.console import bar
        from ctal.report import write_inspection

    with bar("listening") as progress:
        notes = write_inspection(model, audio, out, text=text, store=store, progress=progress)
    for note in notes:
        print(f"{audio}: {note}", file=sys.stderr)
    print(f"{out}: open it in a browser")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A states-*.ckpt of the authors' code.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with their vocab.json and merges.txt.")] = None,
) -> None:
    """Import a checkpoint of the authors' code into a model folder. Nothing in it is executed.

    Example: `ctal convert states-1000000.ckpt ctal-base --tokenizer libri-roberta_train-960`
    """
    from ctal.convert_original import convert_checkpoint

    convert_checkpoint(checkpoint, out, tokenizer)
    print(f"{out}: imported; use it with --from, or with CtalModel.from_pretrained")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; fewer for a quick look.")] = None,
) -> None:
    """Make a synthetic corpus, pre-train a small model on it, fine-tune it for three tasks, write OUT/report.html.

    Interrupted, run it again: it goes on where it stopped.

    Example: `ctal demo --out demo`
    """
    from ctal.demo import run_demo

    with _training() as progress:
        run_demo(out, steps=steps, progress=progress)
    print(f"{out / 'report.html'}: open it in a browser")


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Files that `ctal ablate` wrote, or folders of them.")
    ],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", metavar="FILE", help="report.html or .md; may be repeated."),
    ] = None,
    published: PublishedOption = None,
) -> None:
    """Compare the variants of ablations: means and paired differences with 95 % intervals over seeds, and costs.

    Results of several shards are merged. Each plan, task, data set and protocol has a table of its own. HTML is one
    file that needs no network; Markdown holds the same tables. Figures of others stand beside ours where a file has
    them: `source: …` says where they were published, `emotion: {orthogonal: 0.7, concat: …}` (likewise for the other
    tasks) what they are, by the names of our rows.

    Example: `ctal report ablations -o report.html -o results.md`
    """
    from ctal.report import write_ablation_report

    outs = out or [Path("report.html")]
    for note in write_ablation_report(results, outs, published):
        print(note, file=sys.stderr)
    for each in outs:
        print(f"{each}: written")


@app.command()
def settings(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="pretrain or finetune.")] = "pretrain",
    size: Annotated[str, typer.Option(help="nano, mini, tiny, base or large.")] = "base",
) -> None:
    """List the fields that `--set` takes, with what they are in the recipe of a size.

    Example: `ctal settings finetune --size mini`
    """
    from rich.table import Column, Table
    from rich.text import Text

    from ctal.configuration_ctal import HEAD_FIELDS, CtalConfig, meanings, owners_of, settable_fields
    from ctal.console import print_table
    from ctal.recipes import (
        FINETUNING,
        HEAD_DEFAULTS,
        MODEL_DEFAULTS,
        PRETRAINING,
        FinetuneConfig,
        PretrainConfig,
        make_config,
    )

    if verb not in ("pretrain", "finetune"):
        raise InputError(f"settings of '{verb}'{did_you_mean(verb, ('pretrain', 'finetune'))}: pretrain or finetune")
    size = _checked_size(size)
    kind, recipe = (PretrainConfig, PRETRAINING) if verb == "pretrain" else (FinetuneConfig, FINETUNING)
    table = Table(Column("field", no_wrap=True), f"with --size {size}", "meaning")

    def row(name: str, values: Iterable[Any], meaning: str) -> None:
        # Text: brackets are not markup.
        table.add_row(name, " / ".join(dict.fromkeys(map(json.dumps, values))), Text(" ".join(meaning.split())))

    for name, value in make_config(kind, recipe[size]).model_dump().items():
        if (verb, name) != ("finetune", "steps"):  # it follows from --epochs, or is --steps
            row(name, [value], kind.model_fields[name].description or "")
    table.add_section()
    model = CtalConfig.of_size(size, **MODEL_DEFAULTS.get(size, {}), **HEAD_DEFAULTS.get(size, {}))
    parts, said = {"both": model, "text encoder": model.text, "audio encoder": model.audio}, meanings()
    for name in settable_fields() if verb == "pretrain" else HEAD_FIELDS:
        owners = owners_of(name)
        whose = "head" if verb == "finetune" else ", ".join(owners).replace("both", "model")
        row(name, [getattr(parts[owner], name) for owner in owners], f"{whose}: {said.get(name, '')}")
    print_table(table)


@contextmanager
def _quick_start() -> Iterator[None]:
    """For imports: they make a million objects that stay, and looking for garbage among them takes a sixth longer."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _with_bar(
    description: str, pipeline: Pipeline[ResultT], recordings: Sequence[Recording], *, quiet: bool
) -> Iterator[ResultT | InputError]:
    """Results as they come; without a bar where they are printed at once, since a bar would take that to stderr."""
    from ctal.console import bar

    if quiet or len(recordings) < 2:
        yield from pipeline.each(recordings)
        return
    with bar(description) as progress:
        for done, result in enumerate(pipeline.each(recordings), 1):
            progress(done, len(recordings))
            yield result


@contextmanager
def _training() -> Iterator[TrainingProgress]:
    """A progress bar; ends the process with 143 after SIGTERM, 130 after Ctrl-C, and with 1 and one line when training
    diverged."""
    from ctal.console import TrainingProgress
    from ctal.processes import Terminated
    from ctal.training import NonFiniteLoss

    progress = TrainingProgress()
    try:
        yield progress
    except (Terminated, NonFiniteLoss) as ending:
        progress.note(f"ctal: {ending}")
        traceback.clear_frames(ending.__traceback__)  # else they hold the model, and its ties to other processes
        sys.exit(ending.exit_code if isinstance(ending, Terminated) else 1)
    finally:
        progress.stop()


def _show_summary(summary: StoreSummary) -> None:
    for entry in summary.quarantined:
        print(f"left out {entry.id}: {entry.reason}", file=sys.stderr)
    if summary.quarantined:
        print(f"{len(summary.quarantined)} left out, listed in {summary.path / 'quarantine.jsonl'}", file=sys.stderr)
    if summary.removed:
        print(f"{summary.removed} utterances of before are no longer in it", file=sys.stderr)
    state = "up to date" if summary.up_to_date else "written"
    print(
        f"{summary.path}: {state}, {summary.utterances} utterances, {summary.hours:.2f} h, "
        f"{summary.with_text} with a transcript, {summary.speakers} speakers"
    )


def _show_predictions(results: Sequence[Result]) -> None:
    """A table; notes below it, on stderr."""
    from rich.table import Table
    from rich.text import Text

    from ctal.console import print_table
    from ctal.inference import EmotionResult, SentimentResult

    table = Table("recording", "seconds", "windows", "inputs", "prediction")
    for result in results:
        if isinstance(result, EmotionResult):
            ranked = sorted(result.probabilities.items(), key=lambda item: -item[1])
            prediction = ", ".join(f"{label} {probability:.2f}" for label, probability in ranked)
        elif isinstance(result, SentimentResult):
            prediction = f"{result.score:+.2f}"
        else:
            prediction = "an embedding; --json prints it"
        # Text: brackets in a path are not markup.
        row = Text(_printable(str(result.audio)), overflow="fold"), f"{result.duration:.1f}", str(len(result.windows))
        table.add_row(*row, result.inputs, prediction)
    print_table(table)
    _show_notes(results)


def _printable(text: str) -> str:
    """What no encoding can print, of a file name that is not UTF-8, escaped, as JSON has it too."""
    return text.encode(errors="backslashreplace").decode()


def _show_notes(results: Sequence[Result]) -> None:
    """Each note once, on stderr, with the recordings it is on."""
    noted: dict[str, list[str | None]] = {}
    for result in results:
        for note in result.notes:
            noted.setdefault(note, []).append(result.audio)
    for note, names in noted.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{names[0]}{others}: {note}", file=sys.stderr)


def _show_metrics(evaluation: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ctal.console import print_table

    protocol = evaluation.get("protocol", {}).get("description") or evaluation.get("measured_on", "")
    if "metrics" not in evaluation:
        print(f"{evaluation['task']}: {protocol}")
        return
    folds, speakers = evaluation.get("over_folds"), evaluation.get("over_speakers")
    measured = "mean over folds (95 % interval)" if folds else "test part"
    table = Table("metric", f"{measured} (95 % interval over speakers)" if speakers else measured, title=f"{protocol}")
    for name, value in evaluation["metrics"].items():
        table.add_row(name, _with_interval(value, (folds or speakers or {}).get(name)))
    for name, value in evaluation.get("pooled_metrics", {}).items():
        table.add_row(f"{name}, folds pooled", f"{value:.4f}")
    for withheld, metrics in evaluation.get("missing_modality", {}).items():
        for name, value in metrics.items():
            table.add_row(f"{name}, {withheld} alone", f"{value:.4f}")
    for name, value in evaluation.get("at_threshold", {}).items():
        table.add_row("threshold" if name == "threshold" else f"{name} at the threshold", f"{value:.4f}")
    print_table(table)


def _with_interval(value: float, interval: Mapping[str, float] | None) -> str:
    return f"{value:.4f}" + (f" ({interval['low']:.4f} … {interval['high']:.4f})" if interval else "")


def _show_baselines(evaluation: Mapping[str, Any]) -> None:
    """Means over folds; notes on stderr."""
    from rich.table import Table

    from ctal.console import print_table

    protocol, rows = evaluation["protocol"], evaluation["baselines"]
    first = next(iter(rows.values()))
    # Not the table's title, which would be as narrow as its few columns.
    brackets = "; in brackets 95 % intervals over speakers" if "over_speakers" in first else ""
    print(f"{evaluation['task']}: {protocol['description']}; checksum {protocol['checksum'][:16]}{brackets}")
    names = list(first["metrics"])
    table = Table("baseline", *names)
    for name, measured in rows.items():
        intervals = measured.get("over_speakers", {})
        cells = (_with_interval(measured["metrics"][metric], intervals.get(metric)) for metric in names)
        table.add_row(name, *cells)
    table.add_section()
    for view, best in evaluation.get("ceilings", {}).items():
        table.add_row(f"best possible, {view}", *(f"{best[each]:.4f}" if each in best else "" for each in names))
    print_table(table)
    for note in evaluation["notes"]:
        print(note, file=sys.stderr)


def _show_evaluation(evaluation: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ctal.console import print_table

    # Not the table's title, which Rich would break over lines as narrow as the table.
    print(f"pretraining: {evaluation['held_out']}")
    if not evaluation["comparisons"]:
        print("nothing to compare: fewer than two held-out utterances have anything masked")
        return
    table = Table("compared with", "unit", "model", "reference", "gain (95 % interval)", "utterances")
    for row in evaluation["comparisons"]:
        gain = row["gain"]
        table.add_row(
            row["name"],
            row["unit"],
            f"{row['model']['mean']:.4f}",
            f"{row['reference']['mean']:.4f}",
            f"{gain['mean']:+.4f} ({gain['low']:+.4f} … {gain['high']:+.4f})",
            str(row["utterances"]),
        )
    print_table(table)
