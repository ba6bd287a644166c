"""From a quantized checkpoint to a model that runs: skeleton, quantized linears, float tensors, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from awq.checkpoint.read import Checkpoint, open_checkpoint
from awq.engine import attach, check_length
from awq.engine.head import use_head
from awq.errors import CheckpointError, OutOfMemoryError
from awq.kernels import pinned_version, select_kernel_version
from awq.linear import QuantLinear
from awq.pretrained.limits import check_folder
from awq.pretrained.outline import check_outline
from awq.pretrained.source import auto_class, drop_quantization, find_folder, pick_device, replace_module, skeleton
from awq.pretrained.unreadable import one_sentence
from awq.storage.names import Rename, from_stored, kept_in_float32, of_module
from awq.storage.place import find_places, is_spread, spread
from awq.structure.experts import split_experts
from awq.structure.linears import as_linear

MakeLinear = Callable[[Checkpoint, str, nn.Linear], nn.Module]


def load_quantized(
    model: str | Path,
    *,
    version: str | None = None,
    kernel: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    outliers: bool = True,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    max_seq_len: int | None = None,
    head: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load an AWQ checkpoint (folder or hub id) with its linears quantized, ready for `generate`.

    version: "GEMM" or "GEMV" pins that kernel version for every call; None or "auto" chooses per call.
    kernel:  one backend by name, for tests and bug reports ("reference" computes in float32).
    dtype:   of activations; by default the checkpoint's on a GPU, bfloat16 on a CPU, where int4 is fast only in it.
    device_map, max_memory, offload_folder: accelerate's, instead of `device`: where parts of a model go that one GPU
             does not hold, "auto" or a dictionary.
    max_seq_len: tokens of prompt and answer at most; None: what memory allows.
    head:    "int8" rounds a float output head to 8 bits, half the bytes; None and "float" leave it.
    Raises KernelNotSupportedError before any weight is read where the hardware cannot run `version`.
    """
    check_length(max_seq_len)
    target = pick_device(device)
    version = pinned_version(version, notice=True)
    select_kernel_version(version=version, device=target)
    checkpoint = open_checkpoint(find_folder(model, revision=revision, code=trust_remote_code))
    if dtype is None:
        dtype = _config_dtype(checkpoint) if target.type != "cpu" else torch.bfloat16
    parted = is_spread(device_map, max_memory, _weight_bytes(checkpoint))

    def prepare(layer: QuantLinear) -> None:
        layer.prepare(version=version, kernel=kernel, dtype=dtype)

    def quant_linear(source: Checkpoint, name: str, linear: nn.Linear) -> nn.Module:
        bias = source.bias(name)
        if "bias" in dict(linear.named_parameters()) and bias is None:
            raise CheckpointError(f"{source.path.name} lacks {name}.bias: copy or download it again.")
        bias = bias if bias is None else bias.to(dtype)
        layer = QuantLinear(source.packed(name), bias, source.outliers(name) if outliers else None)
        if not parted:
            layer.to(target)
            prepare(layer)
        return layer

    try:
        made = _assemble(checkpoint, quant_linear, dtype, trust_remote_code)
        use_head(made, head)
        if parted:
            made = spread(made, find_places(made, device_map, max_memory), prepare, offload_folder)
        else:
            made = made.to(target)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{model} does not fit into what is free on {target}: free some of its memory, choose another device, or "
            "spread the model over several, device_map='auto' in from_quantized."
        ) from error
    return attach(made, max_seq_len)


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))


def load_dequantized(
    model: str | Path,
    *,
    outliers: bool = True,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The checkpoint as a plain float model: what is measured then does not depend on the kernel at hand.

    `outliers=False` leaves the fp16 channels out, as engines do that read the int4 weights alone.
    """

    def float_linear(source: Checkpoint, name: str, linear: nn.Linear) -> nn.Module:
        weight = source.packed(name).dequantize()
        kept = source.outliers(name) if outliers else None
        if kept is not None:
            weight = kept.add_to(weight)
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        bias = source.bias(name)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return linear

    return _assemble(
        open_checkpoint(find_folder(model, revision=revision, code=trust_remote_code)),
        float_linear,
        dtype,
        trust_remote_code,
    )


def _assemble(checkpoint: Checkpoint, make_linear: MakeLinear, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    config = _model_config(checkpoint, trust_remote_code)
    model = skeleton(config, dtype, trust_remote_code)
    split_experts(model)
    tensor_name = from_stored(model)
    linear_name = of_module(tensor_name)
    names = {stored: linear_name(stored) for stored in checkpoint.linears}
    keep = kept_in_float32(model)
    floats = _float_tensors(checkpoint, model, tensor_name)
    tensors = {name: tensor if keep(name) else _cast(tensor, dtype) for name, tensor in floats}
    for stored, name in names.items():
        replace_module(model, name, make_linear(checkpoint, stored, _linear(model, name, checkpoint, stored)))
    for name, scales in checkpoint.act_scales.items():
        with one_sentence(checkpoint.path.name, f"scaled activation {name}"):
            replace_module(model, name, ScaledActivation(model.get_submodule(name), scales.to(dtype)))
    _fill(model, tensors, checkpoint.path.name)
    if (checkpoint.path / "generation_config.json").exists():
        with one_sentence(checkpoint.path.name, "generation settings"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return model.eval()


class ScaledActivation(nn.Module):
    """act(x) / scales: how AutoAWQ scales a linear behind a GELU (`<act>.scales`, [features])."""

    def __init__(self, activation: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("scales", scales)
        self.scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(x) / self.scales
        return result


def _model_config(checkpoint: Checkpoint, trust_remote_code: bool) -> PretrainedConfig:
    check_folder(checkpoint.path, trust_remote_code)
    with one_sentence(checkpoint.path.name, "configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    drop_quantization(config)
    if not trust_remote_code:
        with one_sentence(checkpoint.path.name, "architecture"):
            check_outline(auto_class(config), config, checkpoint.held, checkpoint.path.name)
    return config


def _linear(model: nn.Module, name: str, checkpoint: Checkpoint, stored: str) -> nn.Linear:
    """The linear that `stored` is the weight of; CheckpointError where config.json says otherwise."""
    shape = checkpoint.shape(stored)
    try:
        module = as_linear(model.get_submodule(name))
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"{checkpoint.path.name} has a quantized {stored}, where the architecture in its config.json has no linear."
        )
    if (module.in_features, module.out_features) != (shape.in_features, shape.out_features):
        raise CheckpointError(
            f"{checkpoint.path.name} stores {stored} as {shape.out_features} x {shape.in_features}, where its "
            f"config.json says {module.out_features} x {module.in_features}: one of them is of another model."
        )
    return module


def _float_tensors(checkpoint: Checkpoint, model: nn.Module, rename: Rename) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors that the model has, by its names; what it has in another shape or kind is not read."""
    wanted = model.state_dict()
    for stored in checkpoint.float_names:
        if (known := wanted.get(name := rename(stored))) is None:
            continue
        found = checkpoint.outline(stored)
        if found.shape != known.shape or found.is_floating_point() != known.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path.name} stores {name} as {found.dtype} {list(found.shape)}, where its config.json "
                f"says {known.dtype} {list(known.shape)}: one of them is of another model."
            )
        yield name, checkpoint.tensor(stored)


def _fill(model: Any, tensors: dict[str, Tensor], folder: str) -> None:
    """Load every tensor that is not quantized, and check that none is missing."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing[0]} ({len(missing)} tensors in all are missing).")
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _config_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.bfloat16 if name == "bfloat16" else torch.float16
