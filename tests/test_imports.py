"""Who may import whom, and how light that is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "ctal"

LAYERS = {
    "surfaces": {"__main__", "cli", "console", "demo", "report", "reproduce"},
    "learning": {
        "ablate",
        "baselines",
        "checkpoint",
        "costs",
        "diagnostics",
        "finetune",
        "inference",
        "model_folders",
        "objective",
        "precision",
        "pretrain",
        "protocols",
        "recipes",
        "sharding",
        "tasks",
        "training",
    },
    "hugging face": {
        "configuration_ctal",
        "convert_original",
        "feature_extraction_ctal",
        "modeling_ctal",
        "processing_ctal",
    },
    "data": {"batching", "corpora", "heard", "store", "stored_features"},
    "pure": {
        *(
            "attention",
            "audio",
            "dropout",
            "errors",
            "features",
            "files",
            "fusion",
            "gelu",
            "masking",
            "metrics",
            "packing",
            "pitch",
            "processes",
            "prosody",
            "recording",
        ),
        *("text", "trials"),
    },
}
"""Layer → its modules, or packages with all that is in them. `ctal` itself holds the version and lazy names only."""

MAY_IMPORT = {
    "surfaces": set(LAYERS),
    "learning": {"learning", "hugging face", "data", "pure"},
    "hugging face": {"hugging face", "pure"},
    "data": {"data", "pure"},
    "pure": {"pure"},
}

MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def top_name(path: Path) -> str:
    """The module or package right below `ctal` that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def layer_of(name: str) -> str:
    for layer, members in LAYERS.items():
        if name in members:
            return layer
    pytest.fail(f"ctal.{name} has no layer: place it in LAYERS of {Path(__file__).name}")


def imported(path: Path) -> Iterator[str]:
    """Modules right below `ctal` that a file imports, wherever in the file."""
    known = {top_name(each) for each in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "ctal" and rest and rest[0] in known:
                yield rest[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards_and_the_two_middle_layers_never_meet(path: Path) -> None:
    layer = layer_of(top_name(path))
    for name in imported(path):
        assert layer_of(name) in MAY_IMPORT[layer], f"{layer} module {path.name} imports {layer_of(name)} module {name}"


def test_every_module_that_has_a_layer_exists() -> None:
    assert set().union(*LAYERS.values()) <= {top_name(path) for path in MODULES}


def python(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def loaded_by(code: str) -> set[str]:
    """Those of the heavy packages that `code` loads."""
    return set(python(f"{code}\nimport sys\nprint(*{{'torch', 'transformers'}} & sys.modules.keys())").split())


def test_importing_ctal_loads_no_other_package() -> None:
    """And so is quick (`python -m benchmarks startup`)."""
    code = "import sys; before = set(sys.modules); import ctal\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)"
    assert python(code) == "ctal"


@pytest.mark.parametrize("module", ["corpora", "corpora.demo", "errors", "store", "text", "cli"])
def test_reading_and_preparing_data_does_not_load_torch(module: str) -> None:
    assert not loaded_by(f"import ctal.{module}")


def test_every_corpus_can_be_looked_up_without_torch() -> None:
    assert not loaded_by("from ctal.corpora import corpus_names, get_corpus\n[get_corpus(n) for n in corpus_names()]")


@pytest.mark.parametrize("name", ["CtalConfig", "CtalProcessor"])
def test_touching_any_public_class_registers_all_with_the_auto_classes(name: str) -> None:
    code = f"""
import ctal
ctal.{name}
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining, AutoProcessor
config = AutoConfig.for_model("ctal")
for auto in (AutoModel, AutoModelForPreTraining):
    print(auto._model_mapping[type(config)].__name__)
from transformers.models.auto import feature_extraction_auto, processing_auto
print(feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING[type(config)].__name__)
print(processing_auto.PROCESSOR_MAPPING[type(config)].__name__)
"""
    expected = ["CtalModel", "CtalForPreTraining", "CtalFeatureExtractor", "CtalProcessor"]
    assert python(code).split() == expected


def test_every_public_name_exists_and_an_unknown_one_is_an_attribute_error() -> None:
    import ctal

    for name in ctal.__all__:
        assert getattr(ctal, name).__name__ == name
    assert set(dir(ctal)) >= set(ctal.__all__)
    with pytest.raises(AttributeError, match="CtalModle"):
        ctal.CtalModle  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
