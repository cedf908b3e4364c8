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
    from ctal.modeling_ctal import CtalForPreTraining, CtalModel
    from ctal.processing_ctal import CtalProcessor

__version__ = "0.1.0"

_SURFACE = {
    "configuration_ctal": ("CtalConfig", "CtalTextConfig", "CtalAudioConfig"),
    "modeling_ctal": ("CtalModel", "CtalForPreTraining"),
    "feature_extraction_ctal": ("CtalFeatureExtractor",),
    "processing_ctal": ("CtalProcessor",),
}

__all__ = [
    "CtalAudioConfig",
    "CtalConfig",
    "CtalFeatureExtractor",
    "CtalForPreTraining",
    "CtalModel",
    "CtalProcessor",
    "CtalTextConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ctal' has no attribute '{name}'")
    for module, names in _SURFACE.items():
        globals().update({each: getattr(import_module(f"ctal.{module}"), each) for each in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
