from pathlib import Path

import pytest

from awq import jit
from awq.algorithm.search.clip import SHRINKS
from awq.jit.launch import constant
from awq.kernels.cuda import search

VARIANTS = {(source, tuple(defines.items())) for source, _, _, defines in search.variants("sm_90a")}


@pytest.mark.parametrize(("source", "defines"), sorted(VARIANTS))
def test_the_launch_and_the_source_agree(source: Path, defines: tuple[tuple[str, int], ...]) -> None:
    cubin = jit.compile_cubin(source, "sm_90a", dict(defines))
    assert constant(cubin, "threads") == search.THREADS
    if defines:
        assert constant(cubin, "rows_a_block") == search.ROWS
        assert constant(cubin, "most_shrinks") == search.MOST_SHRINKS


def test_all_shrinks_fit_into_a_launch() -> None:
    assert len(SHRINKS) <= search.MOST_SHRINKS and SHRINKS[0] == 1
