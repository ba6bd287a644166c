"""Tests that every effort must pass; learning takes long on a CPU, so that its share is a slow one."""

import pytest

from awq.config import EFFORTS

every_effort = pytest.mark.parametrize(
    "effort", [pytest.param(one, marks=[pytest.mark.slow] if one == "max" else []) for one in EFFORTS]
)
