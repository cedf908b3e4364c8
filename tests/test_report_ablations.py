"""The report on ablations: compared seed by seed, kept apart by data and protocol, the same in HTML and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from ctal.ablate import load_plan
from ctal.cli import app
from ctal.errors import InputError
from ctal.report import write_ablation_report
from ctal.report.comparisons import PAPER_PLANS, Ablation, Line, Result, compare, read_results
from ctal.report.html import Scale
from test_report import HOSTILE, Reader

Rows = list[dict[str, Any]]

BASE, WORSE, BETTER, SAME = "base", f"without {HOSTILE} | it", "better *one*", "as good"
SHIFTS = {BASE: 0.0, WORSE: -0.1, BETTER: 0.05, SAME: 0.0}
CLAIMS = {BASE: None, WORSE: "worse", BETTER: "worse", SAME: "better"}


def row(**fields: Any) -> dict[str, Any]:
    whole = {
        "plan": "fusion",
        "plan_about": f"what it is worth {HOSTILE}",
        "base": BASE,
        "varies": "fine-tuning",
        "variant": BASE,
        "about": "",
        "expected": None,
        "order": 0,
        "task": "emotion",
        "seed": 0,
        "metrics": {"ua": 0.7, "wa": 0.7},
        "validation_metrics": None,
        "protocol": {"name": "split", "description": f"whole <i>speakers</i> {HOSTILE}", "checksum": "018c1052" * 8},
        "utterances": 320,
        "corpus": ["demo"],
        "synthetic": True,
        "data_hash": "abcd" * 16,
        "run": "finetuning/emotion-0",
        "pretraining": {"key": "p", "steps": 800, "audio_hours": 1.07, "seconds": 300.0, "resumed": False},
        "config": {"epochs": 4, "seed": 0},
        "head": {"fusion": "orthogonal"},
        "size": "mini",
        "seconds": 40.0,
        "resumed": False,
        "peak_memory_mb": 800,
        "audio_hours": 1.07,
        "versions": {"ctal": "0.1.0"},
        "commit": None,
    } | fields
    whole.setdefault("run_key", "-".join(str(whole[name]) for name in ("plan", "variant", "task", "seed", "data_hash")))
    return whole


def metrics_of(task: str, value: float) -> dict[str, float]:
    """Where `value` is high for what is good."""
    return {
        "emotion": {"ua": value, "wa": value + 0.01},
        "sentiment": {"mae": 1 - value, "corr": value},
        "verification": {"eer": 1 - value, "min_dcf": 1 - value},
    }[task]


def made(task: str = "emotion", seeds: int = 5, **fields: Any) -> Rows:
    """Seeds move all variants alike, much further than what is left, so that only pairs tell them apart."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.05, seeds)
    rows = []
    for order, (variant, shift) in enumerate(SHIFTS.items()):
        own = rng.normal(0, 0.004, seeds)
        for seed in range(seeds):
            known = {"variant": variant, "expected": CLAIMS[variant], "order": order, "seed": seed, "task": task}
            known |= {"head": {"fusion": variant}, "config": {"epochs": 4, "seed": seed}}
            rows.append(row(**known, metrics=metrics_of(task, 0.7 + shift + common[seed] + own[seed]), **fields))
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]], end: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows) + end, encoding="utf-8")
    return path


def compared(rows: Rows) -> list[Ablation]:
    return compare([Result.model_validate(each) for each in rows])


def lines(rows: Rows) -> dict[str, Line]:
    (ablation,) = compared(rows)
    return {line.name: line for line in ablation.lines}


def report(*results: Path, to: Path) -> tuple[str, str]:
    """HTML and Markdown."""
    outs = [to / "new" / "report.html", to / "new" / "report.md"]
    write_ablation_report(results, outs)
    html, markdown = (out.read_text(encoding="utf-8") for out in outs)
    return html, markdown


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Statistics -----------------------------------------------------------------------------------------------------------


def test_means_and_paired_differences_have_the_t_intervals_of_scipy() -> None:
    rows = made()
    by_variant = {name: [each["metrics"]["ua"] for each in rows if each["variant"] == name] for name in SHIFTS}
    for name, line in lines(rows).items():
        expected = stats.ttest_1samp(by_variant[name], 0).confidence_interval(0.95)
        assert (line.mean.low, line.mean.high) == pytest.approx((expected.low, expected.high))
        if name != BASE:
            paired = stats.ttest_rel(by_variant[name], by_variant[BASE])
            assert line.difference is not None
            ends = paired.confidence_interval(0.95)
            assert (line.difference.low, line.difference.high) == pytest.approx((ends.low, ends.high))
            assert (line.effect == "undecided") == (paired.pvalue > 0.05)


@pytest.mark.parametrize("task", ["emotion", "sentiment", "verification"])
def test_better_follows_the_direction_of_the_metric_and_judges_the_claim(task: str) -> None:
    found = lines(made(task))
    assert {name: line.effect for name, line in found.items() if name != BASE} == {
        WORSE: "worse",
        BETTER: "better",
        SAME: "undecided",
    }
    verdicts = {BASE: None, WORSE: "confirmed", BETTER: "contradicted", SAME: "undecided"}
    assert {name: line.verdict for name, line in found.items()} == verdicts


def test_seeds_that_are_missing_are_said_and_left_out_of_the_pairs(tmp_path: Path) -> None:
    rows = [each for each in made() if (each["variant"], each["seed"]) not in {(WORSE, 1), (WORSE, 4), (BASE, 2)}]
    line = lines(rows)[WORSE]
    base = {each["seed"]: each["metrics"]["ua"] for each in rows if each["variant"] == BASE}
    own = {each["seed"]: each["metrics"]["ua"] for each in rows if each["variant"] == WORSE}

    assert line.differences.tolist() == [own[seed] - base[seed] for seed in (0, 3)]
    assert len(line.results) == 3
    _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    assert "it lacks 2 seeds: 1, 4." in markdown
    assert "it is over the 2 that the base has too." in markdown


def test_one_seed_has_no_interval_and_decides_nothing(tmp_path: Path) -> None:
    rows = made(seeds=1)
    assert {line.effect for line in lines(rows).values()} == {"undecided"}
    html, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    for text in (html, markdown):
        assert "There is one seed, hence no interval" in text
        assert text.count("one seed: no interval") == len(SHIFTS) - 1
        assert "nan" not in text


def test_an_interval_without_width_decides_nothing() -> None:
    rows = [
        row(variant=name, seed=seed, metrics={"ua": value, "wa": value}, order=order)
        for order, (name, value) in enumerate([(BASE, 0.25), (WORSE, 0.2)])
        for seed in range(3)
    ]
    line = lines(rows)[WORSE]
    assert line.difference is not None
    assert line.difference.high < 0
    assert line.effect == "undecided"


def test_without_the_base_there_are_means_and_no_differences(tmp_path: Path) -> None:
    rows = [each for each in made() if each["variant"] != BASE]
    assert all(line.difference is None for line in lines(rows).values())
    html, _ = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    assert "hence no differences" in html


def test_intervals_that_leave_out_what_pretraining_varies_are_said(tmp_path: Path) -> None:
    for is_varied in (False, True):
        rows = made(seeds=3)
        for each in rows:
            key = f"{each['variant']} {each['seed'] if is_varied else ''}"
            each["pretraining"] = None if each["variant"] == SAME else each["pretraining"] | {"key": key}
        _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
        assert ("A single pre-training is behind" in markdown) != is_varied


def test_seconds_of_interrupted_runs_are_left_out_of_means(tmp_path: Path) -> None:
    rows = made(seeds=3)
    for each in rows:
        if each["seed"] == 0:
            each |= {"resumed": True, "seconds": 7.0}
        if each["seed"] == 1:
            each.update(seconds=None, peak_memory_mb=None)
    _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    assert markdown.count("| 40.0 s [1.07 h of audio, 800 MB] | 5.0 min [1.07 h of audio] |") == len(SHIFTS)
    assert f"{2 * len(SHIFTS)} of {3 * len(SHIFTS)} results are of runs that were interrupted" in markdown
    # One pre-training, however many start from it.
    assert f"cost in all: {(300 + 40 * len(SHIFTS)) / 60:.1f} min for {1 + len(SHIFTS)} runs" in markdown


def test_intervals_over_speakers_are_averaged_over_seeds_for_variants_that_have_them_all(tmp_path: Path) -> None:
    rows = made("verification", seeds=2)
    for each in rows:
        if each["variant"] != SAME or each["seed"]:
            low = 0.1 if each["seed"] else 0.2
            each["over_speakers"] = {"eer": {"low": low, "high": low + 0.3}}
    _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)

    assert f"{BASE} 15.0% … 45.0%" in markdown
    assert markdown.count("15.0% … 45.0%") == len(SHIFTS) - 1


# What shares a table --------------------------------------------------------------------------------------------------


def test_synthetic_and_real_speech_never_share_a_table(tmp_path: Path) -> None:
    # Even where all else is said to be the same.
    rows = [*made(), *({**each, "synthetic": False, "run_key": "other"} for each in made(seeds=2, data_hash="0"))]
    both = {**rows[0], "synthetic": False, "run_key": rows[0]["run_key"], "seed": 9}
    ablations = compared([*rows, both])
    assert all(len({each.synthetic for each in ablation.results}) == 1 for ablation in ablations)

    html, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    titles = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert titles == ["## Emotion, fusion: demo (real speech)", "## Emotion, fusion: demo (synthetic speech)"]
    assert html.index("(real speech)</h2>") < html.index("SYNTHETIC SPEECH") < html.index("(synthetic speech)</h2>")


@pytest.mark.parametrize("field", ["plan", "task", "data_hash", "protocol"])
def test_plans_tasks_data_and_protocols_have_tables_of_their_own(field: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"plan": "other", "data_hash": "1" * 64}
    values["protocol"] = row()["protocol"] | {"checksum": "2" * 64}
    own: dict[str, Any] = {field: values.get(field), "run_key": "other"}
    other = made("sentiment") if field == "task" else made(**own)
    if field == "protocol":
        other = [each | {"seed": each["seed"] + 5} for each in other]
    rows = [*made(), *other]
    assert [len(each.results) for each in compared(rows)] == [len(made())] * 2
    _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    assert len(set(re.findall(r"^## .*", markdown, re.MULTILINE))) == 2


def test_protocols_that_test_the_same_utterances_share_a_table_that_names_them_all(tmp_path: Path) -> None:
    rows = made(seeds=2)
    for each in rows:
        checksum = ("2" if each["variant"] == SAME else "1") * 64
        each["protocol"] = each["protocol"] | {"checksum": checksum, "tested": "3" * 64}
    (ablation,) = compared(rows)
    _, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)

    assert len(ablation.results) == len(rows)
    assert all(f"checksum {number * 64}" in markdown for number in "12")


def test_two_bases_of_a_plan_are_refused() -> None:
    rows = [*made(), *made("sentiment", base=SAME)]
    assert "two bases" in refusal(lambda: compared(rows))


# Reading --------------------------------------------------------------------------------------------------------------


def test_shards_give_the_same_report_as_one_file_in_any_order(tmp_path: Path) -> None:
    rows = [*made(), *made("sentiment")]
    whole = report(write(tmp_path / "one" / "results.jsonl", rows), to=tmp_path / "one")
    for number in range(3):
        write(tmp_path / "many" / f"results-{number + 1}-of-3.jsonl", rows[number::3][::-1])
    write(tmp_path / "elsewhere.jsonl", rows[:7])  # again
    assert report(tmp_path / "many", tmp_path / "elsewhere.jsonl", to=tmp_path / "many") == whole


def test_a_torn_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    # Torn in the middle of a character of two bytes.
    path = write(tmp_path / "results.jsonl", made())
    path.write_bytes(path.read_bytes() + '{"plan": "für'.encode()[:-1][:-1])
    results, notes = read_results([tmp_path, path])
    assert len(results) == len(made())
    assert notes == [f"{path}, line {len(made()) + 1}: torn, left out; `ctal ablate` writes it anew"]
    html, _ = report(path, to=tmp_path)
    assert "torn, left out" in html


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{torn", "line 2: not JSON"),
        ('{"plan": 1}', "line 2: not a row"),
        ("[1, 2]", "line 2: not a row"),
        (json.dumps(row(task="emotoin")), "did you mean 'emotion'?"),
        (json.dumps(row(metrics={"ua": 0.5})), "metrics: wa is not a number"),
        (json.dumps(row(metrics={"ua": float("nan"), "wa": 0.5})), "metrics: ua is not a number"),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(broken: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "results.jsonl", [row()], end=f"{broken}\n{json.dumps(row(seed=1))}\n")
    refused = refusal(lambda: read_results([tmp_path]))
    assert str(path) in refused
    assert said in refused


def test_two_results_of_a_variant_from_different_settings_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "results-1-of-2.jsonl", made())
    two = write(tmp_path / "results-2-of-2.jsonl", [each | {"run_key": "changed"} for each in made()[:2]])
    refused = refusal(lambda: read_results([tmp_path]))
    assert f"{one}, line 1 and {two}, line 1" in refused
    assert "1 more" in refused
    assert "remove" in refused


def test_a_run_that_was_measured_twice_counts_once_and_is_noted_where_it_differs(tmp_path: Path) -> None:
    again = [made()[0] | {"metrics": {"ua": 0.1, "wa": 0.1}}, made()[1]]
    results, notes = read_results([write(tmp_path / "results.jsonl", [*made(), *again])])
    assert len(results) == len(made())
    assert results[0].metrics["ua"] == made()[0]["metrics"]["ua"]
    assert len(notes) == 1
    assert "with other metrics" in notes[0]


def test_wrong_files_and_folders_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "words.txt").write_text("words")
    for name, said in {
        "nothing.jsonl": "No such file",
        "empty": "no results*.jsonl",
        "blank.jsonl": "no results yet",
        "picture.png": "line 1: not JSON",
        "words.txt": "line 1: not JSON",
    }.items():
        refused = refusal(lambda path=tmp_path / name: read_results([path]))
        assert said in refused
        assert name in refused

    path = write(tmp_path / "results.jsonl", made())
    assert ".html or .md" in refusal(lambda: write_ablation_report([path], [tmp_path / "report.pdf"]))
    assert "cannot be written" in refusal(lambda: write_ablation_report([path], [path / "report.md"]))


def test_the_verb_writes_all_that_it_is_asked_for_and_prints_notes_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out" / "results.jsonl", made(), end='{"plan"')
    done = CliRunner().invoke(app, ["report", "out", "-o", "a/report.html", "-o", "a/results.md"])
    assert done.exit_code == 0
    assert done.stdout == "a/report.html: written\na/results.md: written\n"
    assert "torn" in done.stderr
    assert sorted(each.name for each in (tmp_path / "a").iterdir()) == ["report.html", "results.md"]

    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    assert (tmp_path / "report.html").is_file()
    assert isinstance(CliRunner().invoke(app, ["report", "nowhere"]).exception, InputError)


# Pages ----------------------------------------------------------------------------------------------------------------


def test_pages_hold_every_variant_as_text_and_stand_alone(tmp_path: Path) -> None:
    rows = [*made(), *made("sentiment"), *made("verification")]
    html, _ = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    reader = Reader(html)
    assert reader.open == []
    assert not {"script", "i", "b"} & {tag for tag, _ in reader.elements}
    assert all(not name.startswith("on") for _, attributes in reader.elements for name in attributes)
    for name in SHIFTS:
        assert reader.words.count(name) >= 3 * 4  # two tables, a picture and what it changes, for each task
    for text in (f"what it is worth {HOSTILE}", f"whole <i>speakers</i> {HOSTILE}", "018c1052" * 8, "abcd" * 16):
        assert text in reader.words
    assert reader.words.index("SYNTHETIC SPEECH") < reader.words.index("70.")
    assert not re.search(r"url\(|https?:", html)
    charts = [each for each in reader.attributes("svg") if "aria-hidden" not in each]
    assert len(charts) == 3 * (2 * len(SHIFTS) - 1)
    assert all(each["role"] == "img" and each["aria-label"] for each in charts)
    anchors = {f"#{attributes.get('id')}" for _, attributes in reader.elements}
    links = [attributes["href"] for attributes in reader.attributes("a")]
    assert len(links) == 3
    assert set(links) <= anchors


def test_directions_intervals_and_verdicts_are_said_in_words(tmp_path: Path) -> None:
    html, markdown = report(write(tmp_path / "results.jsonl", made()), to=tmp_path)
    for text in (Reader(html).words, markdown):
        for said in ("▼ worse", "▲ better", "◆ not told apart", "→ confirmed", "→ contradicted", "→ undecided"):
            assert said in text
        assert "3 expectations: 1 confirmed, 1 contradicted, 1 undecided." in text
        assert "none is corrected for their number (3 here)" in text
        assert "a seed varies" in text


@pytest.mark.parametrize("plan", ["paper-fusion", "paper-of-mine", "fusion"])
def test_an_expectation_is_called_the_paper_s_in_a_plan_of_its_claims_alone(tmp_path: Path, plan: str) -> None:
    rows = made(plan=plan)
    html, markdown = report(write(tmp_path / "results.jsonl", rows), to=tmp_path)
    for text in (Reader(html).words, markdown):
        is_papers = [said in text for said in ("The paper says", "3 claims of the paper: 1 confirmed")]
        is_ours = [said in text for said in ("Expected", "3 expectations: 1 confirmed")]
        assert is_papers == [plan == "paper-fusion"] * 2
        assert is_ours == [plan != "paper-fusion"] * 2

    changed = [each | ({"expected": "better"} if each["seed"] else {}) for each in rows]
    _, markdown = report(write(tmp_path / "changed.jsonl", changed), to=tmp_path)
    assert "its rows name different expectations, so none is judged" in markdown


@pytest.mark.parametrize("plan", PAPER_PLANS)
def test_plans_of_the_paper_s_claims_come_with_ctal_and_have_some(plan: str) -> None:
    assert any(each.expected for each in load_plan(plan).variants.values())


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    split = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in cells] for cells in rows] for rows in split]


def test_markdown_tables_are_whole_and_hold_the_numbers(tmp_path: Path) -> None:
    _, markdown = report(write(tmp_path / "results.jsonl", made()), to=tmp_path)
    assert HOSTILE not in markdown  # a `<` would start markup
    for rows in markdown_tables(markdown):
        assert {len(cells) for cells in rows} == {len(rows[0])}
        assert set(rows[1]) == {"---"}
        assert len(rows) == 2 + len(SHIFTS)
    head, _, base, worse, *_ = markdown_tables(markdown)[0]
    line = lines(made())[WORSE]
    assert line.difference is not None
    assert head[1:] == ["UA ↑", "Difference", "Expected", "WA ↑", "Seeds"]
    assert base[0] == "base (base)"
    ends = (line.mean.low, line.mean.high)
    assert worse[1] == f"{line.mean.mean:.1%} [{ends[0]:.1%} … {ends[1]:.1%}]"
    points = [f"{100 * each:+.2f}".replace("-", "−") for each in vars(line.difference).values()]
    assert worse[2] == f"{points[0]} [{points[1]} … {points[2]}] ▼ worse"
    assert worse[3:] == ["worse → confirmed", f"{line.secondary:.1%}", "5"]


def test_settings_that_differ_stand_beside_their_variant(tmp_path: Path) -> None:
    _, markdown = report(write(tmp_path / "results.jsonl", made()), to=tmp_path)
    assert f"- {SAME}: fusion {SAME}\n" in markdown
    other = [each | {"head": {}, "pretraining": each["pretraining"] | {"key": each["variant"]}} for each in made()]
    _, markdown = report(write(tmp_path / "other.jsonl", other), to=tmp_path)
    assert f"- {SAME}: another pre-training\n" in markdown
    assert "settings of all rows: size mini, pre-training 800 steps on 1.07 h, epochs 4\n" in markdown


def test_a_first_task_is_a_setting_and_what_an_earlier_version_did_not_say_is_the_default(tmp_path: Path) -> None:
    more = {"after": "sentiment", "head": {"fusion": "concat", "regression_loss": "l1"}}
    told = [each | (more if each["variant"] == SAME else {}) for each in made()]
    _, markdown = report(write(tmp_path / "results.jsonl", told), to=tmp_path)
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"- {SAME}: ")]
    assert set(line.removeprefix(f"- {SAME}: ").split(", ")) == {"fusion concat", "first task sentiment"}


def test_labels_of_an_axis_never_overlap() -> None:
    for ticks in ([-0.0025, 0.0, 0.0025, 0.005], np.arange(-24, 17, 2.0).tolist(), [57.6, 58.2, 58.8]):
        labels = re.findall(r'<text x="([\d.]+)"[^>]*>([^<]+)<', Scale(ticks).axis())
        spans = sorted((float(x) - 3 * len(text), float(x) + 3 * len(text)) for x, text in labels)
        assert len(labels) >= 2
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


# Published figures ----------------------------------------------------------------------------------------------------

FIGURES = f"""
source: A paper, table 3 {HOSTILE}
emotion: {{base: 0.7345, nobody: 0.5}}
"""


def test_published_figures_stand_beside_real_results_with_their_source_and_never_beside_synthetic_ones(
    tmp_path: Path,
) -> None:
    published = tmp_path / "published.yaml"
    published.write_text(FIGURES)
    for is_synthetic in (False, True):
        results = write(tmp_path / "results.jsonl", made(synthetic=is_synthetic))
        notes = write_ablation_report([results], [tmp_path / "report.md", tmp_path / "report.html"], published)
        markdown, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
        for text in (markdown, html):
            assert ("73.5" in text) is not is_synthetic
            assert ("Published: A paper, table 3" in text) is not is_synthetic
            assert "Published figure of emotion, nobody: stands nowhere" in text
        assert len(notes) == 1 + is_synthetic
    assert HOSTILE not in html


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("emotion: {base: 0.7}", "source: Field required"),
        ("source: x\nemotions: {base: 0.7}", "emotions: Extra inputs are not permitted (did you mean 'emotion'?)"),
        ("source: x\nemotion: {base: good}", "emotion: base: Input should be a valid number"),
        ("- 1", "this is none"),
        ("a: [", "not YAML"),
    ],
)
def test_a_file_of_published_figures_that_is_wrong_is_named_with_its_field(
    tmp_path: Path, content: str, message: str
) -> None:
    results = write(tmp_path / "results.jsonl", made())
    (tmp_path / "published.yaml").write_text(content)
    told = refusal(lambda: write_ablation_report([results], [tmp_path / "report.md"], tmp_path / "published.yaml"))
    assert message in told
    assert "published.yaml" in told


def test_a_missing_file_of_published_figures_is_named(tmp_path: Path) -> None:
    results = write(tmp_path / "results.jsonl", made())
    told = refusal(lambda: write_ablation_report([results], [tmp_path / "report.md"], tmp_path / "none.yaml"))
    assert "none.yaml: cannot be read" in told
