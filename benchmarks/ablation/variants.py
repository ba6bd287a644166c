"""The rows of the table: what is done to the model, and with which text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from awq.config import EFFORTS, QuantConfig

BOTH, PROSE, CODE, BUILT_IN, NO_TEXT = "prose and code", "prose", "code", "built-in", "none"
ORIGINAL, RESCALED = "original", "rescaled"
GROUP_SIZE = 64
KEPT = 0.01
PLAIN = {"scale": False, "clip": False, "refit": False, "effort": "fast"}


@dataclass(frozen=True)
class Variant:
    """One way to quantize; one row, or two where it keeps channels: without them, as other engines run it, and with.

    config: None for the float model
    step:   what effort="balanced" does without, a name in `benchmarks.ablation.steps.STEPS`
    keep:   criterion by which channels of the plainly rounded model are kept, a name in `...channels.CRITERIA`
    """

    section: str
    name: str
    config: QuantConfig | None
    calibration: str = BOTH
    model: str = ORIGINAL
    step: str | None = None
    keep: str | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        kept = self.config.outlier_ratio if self.config and not self.keep else 0
        return (self.name, f"{self.name}, {100 * kept:g} % fp16 channels") if kept else (self.name,)


def variants() -> list[Variant]:
    return [*_steps(), *_channels(), *_bits_and_groups(), *_texts(), *_rescaled()]


def _config(**changes: Any) -> QuantConfig:
    return QuantConfig(**{"group_size": GROUP_SIZE, "outlier_ratio": 0.0, **changes})


def _rounding(section: str, name: str = "rounding", model: str = ORIGINAL, **changes: Any) -> Variant:
    return Variant(section, name, _config(**PLAIN, **changes), NO_TEXT, model, keep="none")


def _steps() -> Iterator[Variant]:
    section = "steps"
    yield Variant(section, "float", None, NO_TEXT)
    yield _rounding(section)
    yield Variant(section, "scale", _config(**PLAIN | {"scale": True}))
    yield Variant(section, "clip", _config(**PLAIN | {"clip": True}))
    yield Variant(section, "scale + clip", _config(**PLAIN | {"scale": True, "clip": True}))
    yield Variant(section, "scale + clip + refit: fast", _config(effort="fast", outlier_ratio=KEPT))
    for step, name in (
        ("float inputs", "+ compensated rounding"),
        ("own targets", "+ inputs propagated"),
        ("no residual", "+ the float model's outputs as target"),
    ):
        yield Variant(section, name, _config(effort="balanced"), step=step)
    yield Variant(section, "+ half the residual stream's error: balanced", _config(outlier_ratio=KEPT))
    if "max" in EFFORTS:
        yield Variant(section, "+ learned block by block: max", _config(effort="max", outlier_ratio=KEPT))


def _channels() -> Iterator[Variant]:
    for criterion in ("activation", "weight", "random"):
        for ratio in (0.001, 0.01, 0.03):
            name = f"rounding, {100 * ratio:g} % of channels fp16 by {criterion}"
            text = BOTH if criterion == "activation" else NO_TEXT
            yield Variant("fp16 channels", name, _config(**PLAIN, outlier_ratio=ratio), text, keep=criterion)


def _bits_and_groups() -> Iterator[Variant]:
    settings: list[dict[str, Any]] = [{"bits": 3}, *({"group_size": size} for size in (32, 128, -1))]
    for changes in settings:
        yield _rounding("bits and groups", **changes)
        for effort in EFFORTS if "bits" in changes else ("fast", "balanced"):
            yield Variant("bits and groups", effort, _config(effort=effort, **changes))


def _texts() -> Iterator[Variant]:
    for text in (PROSE, CODE, BUILT_IN):
        for effort in ("fast", "balanced"):
            yield Variant("calibration text", effort, _config(effort=effort), text)


def _rescaled() -> Iterator[Variant]:
    section = "off the grid"
    yield Variant(section, "float", None, NO_TEXT, RESCALED)
    yield _rounding(section, model=RESCALED)
    for effort in EFFORTS:
        yield Variant(section, effort, _config(effort=effort), model=RESCALED)
    yield _rounding(section, model=RESCALED, group_size=32)
    yield Variant(section, "balanced", _config(group_size=32), model=RESCALED)
