"""The command line. Torch and transformers are imported inside the verbs that need them, so that help is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from ctal.corpora import corpus_names, get_corpus
from ctal.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ctal.console import TrainingProgress
    from ctal.store import StoreSummary

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
    """Entry point. Exit codes: 0 done, 2 wrong usage or input, 1 a fault of ours, 143 stopped by SIGTERM."""
    try:
        app()
    except InputError as error:
        print(f"ctal: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


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
    strict: Annotated[bool, typer.Option("--strict", help="A file that cannot be used is an error.")] = False,
) -> None:
    """Read a corpus into an Arrow store: checked audio, transcripts, speakers, labels.

    Interrupted, run it again: it goes on where it stopped. A file that cannot be used goes into quarantine, with its
    reason.

    Example: `ctal prepare folder my-recordings my-store`
    """
    from ctal.console import bar
    from ctal.store import prepare_store

    with bar("preparing") as progress:
        utterances = get_corpus(corpus).prepare(root)
        summary = prepare_store(utterances, store, corpus=corpus, workers=workers, strict=strict, progress=progress)
    _show_summary(summary)


@app.command()
def tokenizer(
    source: Annotated[Path, typer.Argument(metavar="STORE", help="A prepared store, or a text file.")],
    out: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Entries; a few hundred for minutes of speech.")] = 30_000,
) -> None:
    """Train a byte-level BPE tokenizer on the transcripts of a store, or on the lines of a text file.

    Example: `ctal tokenizer my-store my-tokenizer --vocab-size 1000`
    """
    from ctal.pretrain import make_tokenizer

    print(f"{out}: {make_tokenizer(source, out, vocab_size)} entries")


@app.command()
def pretrain(
    stores: StoresArgument,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; RUN/model is the result.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer, for a new model.")] = None,
    size: Annotated[str, typer.Option(help="nano, mini, tiny, base or large.")] = "base",
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="MODEL", help="Continue this model's weights.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; by default the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from RUN's newest checkpoint.")] = False,
    settings: SettingsOption = None,
) -> None:
    """Pre-train on audio-text pairs: masked language modelling and masked cross-modal acoustic modelling.

    Runs on one process as it is, and on many under `accelerate launch` or `torchrun`. SIGTERM saves a checkpoint.
    `ctal settings` lists what `--set` takes.

    Example: `ctal pretrain my-store --tokenizer my-tokenizer --out run --size mini --steps 2000`
    """
    from ctal.configuration_ctal import SIZES, settable_fields
    from ctal.pretrain import pretrain as run
    from ctal.recipes import MODEL_DEFAULTS, PRETRAINING, PretrainConfig, make_config, parse_settings
    from ctal.report import write_pretraining_report

    if size not in SIZES:
        raise InputError(f"--size {size}: unknown{did_you_mean(size, SIZES)}; choose from {', '.join(SIZES)}")
    fields = parse_settings(settings or [], [*PretrainConfig.model_fields, *settable_fields()])
    architecture = {name: fields.pop(name) for name in list(fields) if name in settable_fields()}
    if start_from and architecture:
        raise InputError(f"--set {next(iter(architecture))}: the architecture is that of --from {start_from}")
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
        print(
            f"{out / 'model'}: the best model, after step {evaluation['step']}; {out / 'report.html'}: what it learned"
        )


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK", help="pretraining.")],
    stores: StoresArgument,
    model: Annotated[Path, typer.Option(metavar="MODEL", help="A model folder, for example RUN/model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a model on the held-out part of stores.

    For `pretraining`: masked frames against the training median and a straight line, masked tokens against their
    frequencies, and an utterance's own transcript against another's, each with its 95 % interval over utterances.

    Example: `ctal evaluate pretraining my-store --model run/model`
    """
    if task != "pretraining":
        raise InputError(f"unknown task '{task}'{did_you_mean(task, ['pretraining'])}: choose from pretraining")
    from ctal.pretrain import evaluate_model

    evaluation = evaluate_model(stores, model)
    if as_json:
        print(json.dumps(evaluation, indent=1))
    else:
        _show_evaluation(evaluation)


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
    """Make a synthetic corpus, pre-train a small model on it, and write OUT/report.html.

    Interrupted, run it again: it goes on where it stopped.

    Example: `ctal demo --out demo`
    """
    from ctal.demo import run_demo

    with _training() as progress:
        run_demo(out, steps=steps, progress=progress)
    print(f"{out / 'report.html'}: open it in a browser")


@app.command()
def settings() -> None:
    """List the fields that `--set` takes, with their defaults.

    Example: `ctal settings`
    """
    from rich.console import Console
    from rich.table import Table

    from ctal.configuration_ctal import owners_of, settable_fields
    from ctal.recipes import PretrainConfig

    table = Table("field", "default", "meaning")
    for name, field in PretrainConfig.model_fields.items():
        table.add_row(name, json.dumps(field.default), field.description or "")
    table.add_section()
    for name, default in settable_fields().items():
        table.add_row(name, json.dumps(default), f"of the model: {', '.join(owners_of(name))}")
    Console().print(table)


@contextmanager
def _training() -> Iterator[TrainingProgress]:
    """A progress bar; ends the process with 143 after SIGTERM, and with 1 and one line when training diverged."""
    from ctal.console import TrainingProgress
    from ctal.training import NonFiniteLoss, Terminated

    progress = TrainingProgress()
    try:
        yield progress
    except (Terminated, NonFiniteLoss) as ending:
        progress.note(f"ctal: {ending}")
        sys.exit(143 if isinstance(ending, Terminated) else 1)
    finally:
        progress.stop()


def _show_summary(summary: StoreSummary) -> None:
    for entry in summary.quarantined:
        print(f"left out {entry.id}: {entry.reason}", file=sys.stderr)
    if summary.quarantined:
        print(f"{len(summary.quarantined)} left out, listed in {summary.path / 'quarantine.jsonl'}", file=sys.stderr)
    state = "up to date" if summary.up_to_date else "written"
    print(
        f"{summary.path}: {state}, {summary.utterances} utterances, {summary.hours:.2f} h, "
        f"{summary.with_text} with a transcript, {summary.speakers} speakers"
    )


def _show_evaluation(evaluation: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not evaluation["comparisons"]:
        print("nothing to compare: fewer than two utterances are held out")
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
    Console().print(table)
