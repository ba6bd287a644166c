"""What was measured: rows, the read ceiling beside them, and what they say about the two kernel versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch

from awq.bench.kernels.shapes import DTYPE_NAMES, Setting, Shape
from awq.bench.timing import Timing

# Beside "GEMV" and "GEMM": a dense linear in the same dtype, and other projects' kernels.
DENSE, PEER = "dense", "peer"
MEMORY_BOUND_ROWS = 16  # up to so many a call costs its bytes, and a share of the read ceiling says something
# How much more than reading its bytes at the ceiling a call for one row may take on any shape.
_SWEEP_FACTOR, _SWEEP_EXTRA_US = 1.5, 2.0


@dataclass(frozen=True)
class KernelRow:
    """Microseconds of one call with `rows` rows of input.

    version:   GEMV, GEMM, DENSE or PEER
    pdl:       launched so that it may start before its predecessor ends
    error:     ||y - reference|| / ||reference||, the worst of several checks, NaN for a wrong value; None: not checked
    dense_us:  the dense linear's time in the same cell; read_bytes: the least that the call moves
    """

    out_features: int
    in_features: int
    group_size: int
    outliers: int
    dtype: str
    rows: int
    version: str
    kernel: str
    median_us: float
    p10_us: float
    p90_us: float
    repeats: int
    zero_point: bool = True
    outlier_ratio: float = 0.0
    pdl: bool = False
    error: float | None = None
    dense_us: float | None = None
    read_bytes: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.out_features, self.in_features)

    @property
    def over_dense(self) -> float | None:
        """How many times as fast as the dense linear."""
        return self.dense_us / self.median_us if self.dense_us else None

    def of_ceiling(self, ceiling_gbs: float | None) -> float | None:
        """Percent of the read ceiling at which its bytes were moved; None where arithmetic counts too."""
        if not ceiling_gbs or self.version == DENSE or self.rows > MEMORY_BOUND_ROWS:
            return None
        return 100 * self.read_bytes / self.median_us / 1e3 / ceiling_gbs


def row_of(
    setting: Setting,
    rows: int,
    version: str,
    kernel: str,
    timing: Timing,
    *,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
    error: float | None = None,
    dense_us: float | None = None,
) -> KernelRow:
    """A row of `setting`. dtype: of a kernel that does not take the setting's."""
    return KernelRow(
        out_features=setting.shape.out_features,
        in_features=setting.shape.in_features,
        group_size=setting.group_size,
        outliers=setting.outliers,
        dtype=str(dtype or setting.dtype).removeprefix("torch."),
        rows=rows,
        version=version,
        kernel=kernel,
        median_us=1e6 * timing.median,
        p10_us=1e6 * timing.p10,
        p90_us=1e6 * timing.p90,
        repeats=timing.repeats,
        zero_point=setting.zero_point,
        outlier_ratio=setting.outlier_ratio,
        pdl=pdl,
        error=error,
        dense_us=dense_us,
        read_bytes=setting.call_bytes(rows),
    )


@dataclass(frozen=True)
class Ceiling:
    """GB/s of reading alone, measured before and after the rest. The higher one counts: shares are never flattered."""

    start_gbs: float
    end_gbs: float

    @property
    def gbs(self) -> float:
        return max(self.start_gbs, self.end_gbs)


@dataclass(frozen=True)
class KernelBench:
    """Every measurement, why a version has none, which peers were left out and why, and what was odd."""

    rows: list[KernelRow]
    refused: dict[str, str]
    ceiling: Ceiling | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ceiling_gbs(self) -> float | None:
        return self.ceiling.gbs if self.ceiling else None

    @property
    def crossovers(self) -> dict[str, int | None]:
        return {label: crossover(rows) for label, rows in panels(self.rows).items()}

    @property
    def promises(self) -> dict[str, dict[str, float | int | None]]:
        """For each linear: how much less time GEMV takes for one row, in percent, and from how many rows GEMM leads."""
        return {
            label: {"gemv_less_percent": gemv_gain(rows), "gemm_from_rows": crossover(rows)}
            for label, rows in panels(self.rows).items()
        }

    @property
    def slow(self) -> list[str]:
        """The linears whose one-row call takes more than 1.5 times reading its bytes at the ceiling and 2 us."""
        if not self.ceiling_gbs:
            return []
        best = {label: _best(rows).get(("GEMV", 1)) for label, rows in panels(self.rows).items()}
        return [label for label, row in best.items() if row and row.median_us > _allowed_us(row, self.ceiling_gbs)]

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, as from JSON: to draw it where matplotlib is."""
        names = [each.name for each in fields(KernelRow)]
        rows = [KernelRow(**{name: row[name] for name in names}) for row in found["rows"]]
        ceiling = found.get("ceiling")
        measured = Ceiling(ceiling["start_gbs"], ceiling["end_gbs"]) if ceiling else None
        return cls(rows, found["refused"], measured, found["left_out"], found["notes"])

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "rows": [asdict(row) | {"percent_of_ceiling": row.of_ceiling(self.ceiling_gbs)} for row in self.rows],
            "crossovers": self.crossovers,
            "promises": self.promises,
            "refused": self.refused,
        }
        if self.ceiling:
            found |= {"ceiling": asdict(self.ceiling) | {"gbs": self.ceiling_gbs}, "slow": self.slow}
        return found | {"left_out": self.left_out, "notes": self.notes}


def panels(rows: Iterable[KernelRow]) -> dict[str, list[KernelRow]]:
    """The rows of each linear but the peers', under "NxK" and whatever else differs between linears of one shape."""
    groups: dict[tuple[object, ...], list[KernelRow]] = {}
    for row in rows:
        if row.version != PEER:
            key = (row.shape, f"group {row.group_size}", dtype_name(row.dtype), *_kind(row))
            groups.setdefault(key, []).append(row)
    varied = [position for position in range(1, 5) if len({key[position] for key in groups}) > 1]
    return {" ".join(str(key[i]) for i in (0, *varied) if key[i]): found for key, found in groups.items()}


def crossover(rows: Sequence[KernelRow]) -> int | None:
    """The first row count from which on GEMM is faster than GEMV; None where it never is or one was not measured."""
    best = _best(rows)
    counts = sorted({count for version, count in best if version == "GEMV" and ("GEMM", count) in best})
    found = None
    for count in reversed(counts):
        if best["GEMM", count].median_us >= best["GEMV", count].median_us:
            break
        found = count
    return found


def gemv_gain(rows: Sequence[KernelRow]) -> float | None:
    """Percent by which GEMV takes less time than GEMM for one row; None where one was not measured."""
    best = _best(rows)
    gemv, gemm = best.get(("GEMV", 1)), best.get(("GEMM", 1))
    return 100 * (1 - gemv.median_us / gemm.median_us) if gemv and gemm else None


def _best(rows: Iterable[KernelRow]) -> dict[tuple[str, int], KernelRow]:
    """The row of each version and count, launched as an engine launches it: with `pdl` where there is such a row."""
    return {(row.version, row.rows): row for row in sorted(rows, key=lambda row: row.pdl)}


def _allowed_us(row: KernelRow, ceiling_gbs: float) -> float:
    return _SWEEP_FACTOR * row.read_bytes / ceiling_gbs / 1e3 + _SWEEP_EXTRA_US


def dtype_name(name: str) -> str:
    """ "fp16" for "float16"."""
    return DTYPE_NAMES.get(getattr(torch, name), name)


def _kind(row: KernelRow) -> tuple[str, str]:
    return "" if row.zero_point else "symmetric", f"{100 * row.outlier_ratio:g} % outliers" if row.outliers else ""
