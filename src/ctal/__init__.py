"""ctal: joint representations of speech and its transcript.

Importing the package does nothing and is quick; touching a public class imports what it needs (PEP 562) and registers
all classes with transformers' Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctal.configuration_ctal import CtalAudioConfig, CtalConfig, CtalTextConfig
    from ctal.feature_extraction_ctal import CtalFeatureExtractor
    from ctal.inference import pipeline
    from ctal.modeling_ctal import CtalForPreTraining, CtalForSequenceClassification, CtalForXVector, CtalModel
    from ctal.processing_ctal import CtalProcessor

__version__ = "0.1.0"

_SURFACE = {
    "configuration_ctal": ("CtalConfig", "CtalTextConfig", "CtalAudioConfig"),
    "modeling_ctal": ("CtalModel", "CtalForPreTraining", "CtalForSequenceClassification", "CtalForXVector"),
    "feature_extraction_ctal": ("CtalFeatureExtractor",),
    "processing_ctal": ("CtalProcessor",),
}
_TOOLS = {"inference": ("pipeline",)}

__all__ = [
    "CtalAudioConfig",
    "CtalConfig",
    "CtalFeatureExtractor",
    "CtalForPreTraining",
    "CtalForSequenceClassification",
    "CtalForXVector",
    "CtalModel",
    "CtalProcessor",
    "CtalTextConfig",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ctal' has no attribute '{name}'")
    # A tool is imported alone; one class brings all, for the Auto classes.
    tools = {module: names for module, names in _TOOLS.items() if name in names}
    for module, names in (tools or _SURFACE).items():
        globals().update({each: getattr(import_module(f"ctal.{module}"), each) for each in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
