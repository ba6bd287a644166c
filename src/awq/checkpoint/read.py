"""Open an AWQ checkpoint folder: checked from the headers at once, read tensor by tensor on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.checkpoint.files import Held, TensorFiles, inside, read_json
from awq.checkpoint.report import read_report
from awq.checkpoint.settings import StoredQuant, find_settings
from awq.errors import CheckpointError, ModelNotFoundError
from awq.packing import Outliers, PackedInt4, StoredShape, from_layout, stored_shape

OUTLIER_FOLDER = "outliers"
_ZERO_NAMES = ("qzeros", "scaled_zeros")  # llm-awq's name is the second


@dataclass(frozen=True)
class _Linear:
    """One quantized linear: its shape, and the names of its tensors by part (qweight, qzeros, scales)."""

    shape: StoredShape
    parts: dict[str, str]


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder; CheckpointError where it has none."""
    config = read_json(path, "config.json")
    if config is None:
        raise CheckpointError(f"{path} has no config.json: it is not a model folder, or not all of it was copied.")
    return config


class Checkpoint:
    """An opened folder; made by `open_checkpoint`.

    path:        the folder
    config:      config.json as it is
    quant:       the stored settings
    linears:     prefixes of the quantized linears, sorted
    float_names: the other tensors, less biases of quantized linears and activation scales
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ModelNotFoundError(f"{path} is not a folder: give the folder of a quantized checkpoint.")
        config = read_config(path)
        settings = find_settings(path, config)
        self.path, self.config = path, config
        self._files = TensorFiles(path)
        self._linears = _find_linears(self._files, settings["group_size"])
        self._act_scales = _find_act_scales(self._files, self._linears)
        self._outliers = _open_outliers(path, self._linears)
        self.linears = list(self._linears)
        self.quant = _stored_quant(path, settings, self._linears)
        self.float_names = self._find_floats()

    def shape(self, name: str) -> StoredShape:
        """Layout, in_features, out_features and group_size of a linear, from the headers."""
        return self._linear(name).shape

    def packed(self, name: str) -> PackedInt4:
        """The linear's weight, whatever its layout on disk; CheckpointError for a scale that is not finite."""
        linear = self._linear(name)
        tensors = {part: self._files.load(stored) for part, stored in linear.parts.items()}
        tensors["scales"] = tensors["scales"].to(torch.float16)
        for part, tensor in tensors.items():
            _check_finite(linear.parts[part], tensor)
        try:
            return from_layout(tensors, linear.shape.group_size)
        except CheckpointError as error:
            raise CheckpointError(f"{name} in {self.path}: {error}; copy or download it again.") from None

    def bias(self, name: str) -> Tensor | None:
        """The linear's bias [out_features] in its stored dtype, or None."""
        self._linear(name)
        stored = f"{name}.bias"
        return _check_finite(stored, self._files.load(stored)) if stored in self._files else None

    def outliers(self, name: str) -> Outliers | None:
        """The linear's fp16 channels, or None; CheckpointError for an index out of range or order."""
        shape = self._linear(name).shape
        if self._outliers is None or f"{name}.idx" not in self._outliers:
            return None
        index = self._outliers.load(f"{name}.idx")
        if not index_fits(index, shape.in_features):
            raise CheckpointError(
                f"{name}.idx in {self._outliers.folder} must ascend within 0..{shape.in_features - 1}: quantize again."
            )
        residual = self._outliers.load(f"{name}.residual")
        return Outliers(index, _check_finite(f"{name}.residual", residual))

    @property
    def act_scales(self) -> dict[str, Tensor]:
        """Scaled activations: module prefix -> scales [features]; that module computes act(x) / scales."""
        return {name.removesuffix(".scales"): _check_finite(name, self._files.load(name)) for name in self._act_scales}

    @property
    def report(self) -> dict[str, Any] | None:
        """`awq_report.json`, or None where another tool wrote the folder; CheckpointError for a damaged one."""
        return read_report(self.path)

    @property
    def held(self) -> Held:
        """How many tensors the folder has, and values at most."""
        return self._files.held()

    def outline(self, name: str) -> Tensor:
        """Any tensor's dtype and shape, on the meta device, from the headers."""
        return self._files.outline(name)

    def tensor(self, name: str) -> Tensor:
        """Any tensor of the folder by its full name, as stored."""
        return self._files.load(name)

    def _linear(self, name: str) -> _Linear:
        try:
            return self._linears[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no quantized linear {name}: `linears` lists them.") from None

    def _find_floats(self) -> list[str]:
        taken = {stored for linear in self._linears.values() for stored in linear.parts.values()}
        taken.update(self._act_scales, (f"{name}.bias" for name in self._linears))
        return [name for name in self._files.names if name not in taken]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a folder in any AWQ layout (gemm, gemv, gemv_fast, llm-awq), sharded or not.

    Reads configuration and headers, no weights. ModelNotFoundError when there is no such folder,
    CheckpointError when it is damaged, incomplete, pickled or not 4-bit AWQ.
    """
    return Checkpoint(Path(folder).expanduser())


def index_fits(index: Tensor, in_features: int) -> bool:
    """Whether the kept channels [k], k > 0, ascend and exist."""
    ascending = bool((index[1:] > index[:-1]).all())
    return ascending and int(index[0]) >= 0 and int(index[-1]) < in_features


def _find_linears(files: TensorFiles, group_size: int | None) -> dict[str, _Linear]:
    linears = {}
    for name in files.names:
        prefix, _, part = name.rpartition(".")
        if part == "qweight" and prefix:
            linears[prefix] = _check_linear(files, prefix, group_size)
        elif part in (*_ZERO_NAMES, "g_idx") and f"{prefix}.qweight" not in files:
            raise CheckpointError(f"{files.folder} has {name} but no {prefix}.qweight: copy or download it again.")
    if not linears:
        raise CheckpointError(f"{files.folder} holds no quantized linear (no tensor named qweight): quantize it first.")
    return linears


def _check_linear(files: TensorFiles, prefix: str, group_size: int | None) -> _Linear:
    if f"{prefix}.g_idx" in files:
        raise CheckpointError(f"{prefix} in {files.folder} has a g_idx: it is GPTQ, not AWQ; quantize the float model.")
    zeros = next((name for name in _ZERO_NAMES if f"{prefix}.{name}" in files), _ZERO_NAMES[0])
    parts = {"qweight": f"{prefix}.qweight", "qzeros": f"{prefix}.{zeros}", "scales": f"{prefix}.scales"}
    for stored in parts.values():
        if stored not in files:
            raise CheckpointError(f"{files.folder} lacks {stored}: it is incomplete; copy or download it again.")
    try:
        shape = stored_shape({part: files.outline(stored) for part, stored in parts.items()}, group_size)
    except CheckpointError as error:
        raise CheckpointError(f"{prefix} in {files.folder}: {error}; correct config.json or copy it again.") from None
    if f"{prefix}.bias" in files:
        _check_outline(files, f"{prefix}.bias", (shape.out_features,))
    return _Linear(shape, parts)


def _find_act_scales(files: TensorFiles, linears: dict[str, _Linear]) -> list[str]:
    """`<module>.scales` [features] with no qweight beside it: the scales of an activation function."""
    found = []
    for name in files.names:
        prefix, _, part = name.rpartition(".")
        if part == "scales" and prefix not in linears:
            if files.outline(name).dim() != 1:
                raise CheckpointError(f"{files.folder} has {name} but no {prefix}.qweight: copy or download it again.")
            found.append(name)
    return found


def _open_outliers(path: Path, linears: dict[str, _Linear]) -> TensorFiles | None:
    if not inside(path, OUTLIER_FOLDER).is_dir():
        return None
    files = TensorFiles(path / OUTLIER_FOLDER)
    for name in files.names:
        prefix, _, part = name.rpartition(".")
        if prefix not in linears or part not in ("idx", "residual"):
            raise CheckpointError(f"{files.folder} holds {name}, which belongs to no quantized linear: copy it again.")
    for prefix in sorted({name.rpartition(".")[0] for name in files.names}):
        count = _check_outline(files, f"{prefix}.idx", (None,), torch.int32).shape[0]
        shape = linears[prefix].shape
        _check_outline(files, f"{prefix}.residual", (count, shape.out_features), torch.float16)
        if not 0 < count <= shape.in_features:
            raise CheckpointError(f"{prefix}.idx in {files.folder} keeps {count} channels of {shape.in_features}.")
    return files


def _check_outline(
    files: TensorFiles, name: str, size: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """The outline, of this dtype (None: any floating point) and this shape (None: any length)."""
    outline = files.outline(name)
    right_dtype = outline.dtype == dtype if dtype else outline.dtype.is_floating_point
    right_size = outline.dim() == len(size) and all(a in (None, b) for a, b in zip(size, outline.shape, strict=True))
    if not (right_dtype and right_size):
        raise CheckpointError(
            f"{name} in {files.folder} is {outline.dtype} {list(outline.shape)}, which does not fit: copy it again."
        )
    return outline


def _check_finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged; copy it or quantize again.")
    return tensor


def _stored_quant(path: Path, settings: dict[str, Any], linears: dict[str, _Linear]) -> StoredQuant:
    shapes = [linear.shape for linear in linears.values()]
    if settings["group_size"] is None:
        settings["group_size"] = _common_group_size(path, shapes)
    return StoredQuant(layout=shapes[0].layout, **settings)


def _common_group_size(path: Path, shapes: list[StoredShape]) -> int:
    sizes = sorted({shape.group_size for shape in shapes})
    if len(sizes) == 1:
        return sizes[0]
    if all(shape.group_size == shape.in_features for shape in shapes):
        return -1
    raise CheckpointError(f"{path} mixes groups of {' and '.join(map(str, sizes))}: give config.json a group_size.")
