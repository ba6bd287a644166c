"""`QuantConfig`: one frozen dataclass for both spellings (w_bit/bits, q_group_size/group_size)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Self

from awq.errors import ConfigError

GROUP_SIZES = (-1, 16, 32, 64, 128)
MAX_OUTLIER_RATIO = 0.05
KERNEL_VERSIONS = ("GEMM", "GEMV")
# Names that older scripts and checkpoints use, and the kernel version that serves them here.
VERSION_ALIASES = {
    "gemm": "GEMM",
    "gemv": "GEMV",
    "gemv_fast": "GEMV",
    "gemvfast": "GEMV",
    "marlin": "GEMM",
}
EFFORTS = ("fast", "balanced", "max")
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
_METHODS = ("awq", "llm-awq")


def canonical_version(version: str) -> str:
    """ "GEMM" or "GEMV" for any spelling of a version; ConfigError for an unknown one."""
    try:
        return VERSION_ALIASES[version.lower().replace("-", "_")]
    except (KeyError, AttributeError):
        known = ", ".join(sorted({*KERNEL_VERSIONS, "gemv_fast", "marlin"}, key=str.lower))
        raise ConfigError(f"unknown kernel version {version!r}: use one of {known}.") from None


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize.

    bits:          4 to store; 2 and 3 can be evaluated in memory, not saved
    group_size:    input channels that share a scale: 16, 32, 64, 128 or -1 (all of them);
                   None picks 128, or the largest of 64 and 32 that divides the model's widths
    zero_point:    asymmetric codes (True) or symmetric around 8 (False)
    version:       kernel version a script asked for; validated, never pins a kernel
    outlier_ratio: share of the weights that may be kept in fp16 too, as input channels, 0 to 0.05; 0 is off
    scale, clip:   search activation-aware scales; search clipped ranges
    refit:         refit the group scales to the chosen codes by least squares
    effort:        "fast" rounds plainly; "balanced" rounds with compensation, behind what is already quantized;
                   "max" then learns rounding, scales and norms block by block: for a GPU
    """

    bits: int = 4
    group_size: int | None = None
    zero_point: bool = True
    version: str = "GEMM"
    modules_to_not_convert: tuple[str, ...] = ()
    outlier_ratio: float = 0.005
    scale: bool = True
    clip: bool = True
    refit: bool = True
    effort: str = "balanced"

    def __post_init__(self) -> None:
        for name in ("zero_point", "scale", "clip", "refit"):
            object.__setattr__(self, name, _flag(name, getattr(self, name)))
        for name in ("bits", "group_size"):
            object.__setattr__(self, name, _whole(getattr(self, name)))
        if self.bits not in (2, 3, 4):
            raise ConfigError(f"bits={self.bits!r} cannot be quantized: use 4 (2 and 3 only to evaluate).")
        if self.group_size not in (None, *GROUP_SIZES):
            raise ConfigError(f"group_size={self.group_size!r} is not one of {', '.join(map(str, GROUP_SIZES))}.")
        if not (_is_number(self.outlier_ratio) and 0 <= self.outlier_ratio <= MAX_OUTLIER_RATIO):
            raise ConfigError(
                f"outlier_ratio={self.outlier_ratio!r} is out of range: use 0 (off) to {MAX_OUTLIER_RATIO}."
            )
        if self.effort not in EFFORTS:
            raise ConfigError(f"effort={self.effort!r} is not known: use {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}.")
        canonical_version(self.version)
        object.__setattr__(self, "modules_to_not_convert", _name_list(self.modules_to_not_convert))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> Self:
        """Read a user's dictionary in either spelling; an unknown key is a ConfigError that names it."""
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"quant_config={settings!r} is no dictionary of settings.")
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in (settings or {}).items():
            name = _OLD_NAMES.get(key, key)
            if key == "quant_method":
                if str(value).lower() not in _METHODS:
                    raise ConfigError(f"quant_method={value!r} is not AWQ: this package writes and reads 'awq' only.")
            elif name not in known:
                raise ConfigError(
                    f"unknown setting {key!r} in quant_config: the settings are {', '.join(sorted(known))}."
                )
            elif name in values and values[name] != value:
                raise ConfigError(f"quant_config gives {name} twice, as {values[name]!r} and {value!r}: keep one.")
            elif value is not None or name in ("group_size",):
                values[name] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` reads, in AutoAWQ's spelling."""
        return {
            "zero_point": self.zero_point,
            "q_group_size": self.group_size,
            "w_bit": self.bits,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "outlier_ratio": self.outlier_ratio,
            "scale": self.scale,
            "clip": self.clip,
            "refit": self.refit,
            "effort": self.effort,
        }

    def with_group_size(self, group_size: int) -> Self:
        return replace(self, group_size=group_size)

    def with_kept(self, names: tuple[str, ...]) -> Self:
        """With what stays float."""
        return replace(self, modules_to_not_convert=names)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flag(name: str, value: Any) -> bool:
    """A switch as JSON and numpy spell it; a word would count as true whatever it says."""
    if value not in (False, True):
        raise ConfigError(f"{name}={value!r} is neither on nor off: use True or False.")
    return bool(value)


def _whole(value: Any) -> Any:
    """4.0 and numpy's 4 as the int that they equal, which JSON can hold; anything else as it is."""
    return int(float(value)) if isinstance(value, Real) and value % 1 == 0 else value


def _name_list(names: Any) -> tuple[str, ...]:
    """A single string is one name, not its letters."""
    listed = (names,) if isinstance(names, str) else () if names is None else names
    if not isinstance(listed, Collection) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"modules_to_not_convert={names!r} is no list of names: give parts of linears' names.")
    return tuple(listed)
