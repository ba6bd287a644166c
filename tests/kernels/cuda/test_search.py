from pathlib import Path

import pytest

from awq import jit
from awq.algorithm.search import refit
from awq.algorithm.search.clip import SHRINKS
from awq.jit.launch import constant
from awq.kernels.cuda import search

VARIANTS = {(source, tuple(defines.items())) for source, _, _, defines in search.variants("sm_90a")}


@pytest.mark.parametrize(("source", "defines"), sorted(VARIANTS))
def test_the_launch_and_the_source_agree(source: Path, defines: tuple[tuple[str, int], ...]) -> None:
    cubin = jit.compile_cubin(source, "sm_90a", dict(defines))
    assert constant(cubin, "threads") == search.THREADS
    if source.stem == "best_shrinks":
        assert constant(cubin, "rows_a_block") == search.ROWS
        assert constant(cubin, "most_shrinks") == search.MOST_SHRINKS
    if source.stem == "group_dots":
        assert constant(cubin, "most_products") == search.MOST_PRODUCTS


def test_what_is_asked_for_fits_into_a_launch() -> None:
    assert len(SHRINKS) <= search.MOST_SHRINKS and SHRINKS[0] == 1
    assert refit._TOGETHER <= search.MOST_PRODUCTS
