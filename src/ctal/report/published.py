"""Figures that others have published, which stand beside ours where a user supplies them with their source.

A YAML file:

    source: where they were published, for example a paper and the numbers of its tables
    emotion: {orthogonal: 0.7}      # task: variant, as in our tables: its main metric (UA and EER as shares of 1)
    sentiment: {orthogonal: 0.6}
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ctal.errors import InputError, first_problem


class Published(BaseModel):
    """Variant → value of the task's main metric, for each task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    emotion: dict[str, float] = {}
    sentiment: dict[str, float] = {}
    verification: dict[str, float] = {}

    def of(self, task: str) -> dict[str, float]:
        return getattr(self, task)


def read_published(path: Path) -> Published:
    """Raises `InputError` naming the field that is wrong."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: published figures have the fields {', '.join(Published.model_fields)}; this is none")
    try:
        return Published.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error, Published.model_fields)}") from None
