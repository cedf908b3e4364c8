"""bf16 is chosen where the machine has instructions for it, and warned of where it has none."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from ctal.precision import check_precision, fast_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "avx2"])
def test_bf16_is_warned_of_exactly_where_it_would_not_be_chosen(
    instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_precision("bf16", CPU)
        check_precision(fast_precision(), CPU)
        check_precision("fp32", CPU)
        check_precision("int8", CPU)
    assert fast_precision() == ("fp32" if instructions == "avx2" else "bf16")
    assert [str(each.message) for each in caught] == (
        ["precision bf16: this CPU multiplies it in software, which takes many times as long; use fp32"]
        if instructions == "avx2"
        else []
    )


def test_the_command_line_says_it_in_one_line_and_other_warnings_as_python_does() -> None:
    code = """
import sys, warnings
from ctal import cli
from ctal.errors import CtalWarning
def app():
    warnings.warn("field: slow here", CtalWarning)
    warnings.warn("elsewhere", UserWarning)
cli.app = app
cli.main()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.splitlines()
    assert said[0] == "ctal: field: slow here"
    assert said[1].endswith(":7: UserWarning: elsewhere")
