"""`AutoAWQForCausalLM`: AutoAWQ's face, so that its users' scripts run as they stand; everything is delegated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from awq.config import QuantConfig
from awq.data.calibration import load_calibration
from awq.engine import Engine, attach, engine_of
from awq.errors import AwqError, ConfigError
from awq.pipeline.recipe import check_model, quantize_model
from awq.pretrained.source import Source, find_folder, find_source, pick_device, pick_dtype
from awq.processes import in_company
from awq.storage.convert import convert_checkpoint
from awq.storage.load import load_quantized
from awq.storage.place import AUTOMATIC
from awq.storage.save import save_quantized

# AutoAWQ's keywords that have nothing to act on here, with its defaults: only another value is worth a word.
_IDLE_FROM_PRETRAINED = {"safetensors": True, "low_cpu_mem_usage": True, "use_cache": False}
_IDLE_FROM_QUANTIZED = {
    "quant_filename": "",
    "max_new_tokens": None,
    "fuse_layers": True,
    "use_exllama": False,
    "use_exllama_v2": False,
    "use_ipex": False,
    "batch_size": 1,
    "safetensors": True,
}
_IDLE_QUANTIZE = {
    "duo_scaling": True,
    "n_parallel_calib_samples": None,
    "max_chunk_memory": 1024**3,
    "quantizer_cls": None,
}


class AwqModel(nn.Module):
    """A causal language model, float or quantized; `.model` is the transformers model inside."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        tokenizer: Any = None,
        source: Path | None = None,
        beside: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.source = source  # the quantized checkpoint it was loaded from
        self.tokenizer = tokenizer
        self.processor: Any = None
        self.beside = beside  # files of the float model that are saved as they are
        self.report: dict[str, Any] | None = None
        self.quant_config = QuantConfig()
        self.is_quantized = source is not None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def engine(self) -> Engine:
        """How it generates: `tier`, `reason`, and both in one line as text."""
        return engine_of(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` of the inner model, under `torch.inference_mode`; its loop is the engine's.

        seed: of the tokens that are sampled; torch's own random state stays as it is then. None goes on with that.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return self.model.generate(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        self.model.to(*args, **kwargs)
        return self

    @in_company
    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | QuantConfig | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        apply_clip: bool = True,
        export_compatible: bool = False,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        *,
        calib_dataset: Any = None,
        seed: int = 0,
        device: str = "auto",
        **idle: Any,
    ) -> None:
        """Quantize in place.

        quant_config: a QuantConfig or a dictionary in either spelling; nothing means 4 bits, zero points, GEMM and
            group 128, or the largest of 64 and 32 that divides the model's widths.
        calib_data (or calib_dataset): texts, token lists, a file, a built-in domain ("prose", "code", "self") or a
            data set's name; "pileval" and an empty list mean the built-in text.
        Raises ConfigError, CalibrationError or CheckpointError before any long work.
        """
        if self.is_quantized:
            raise AwqError(f"{self.name} is already quantized: load its float original with from_pretrained.")
        _warn_idle("quantize", idle, _IDLE_QUANTIZE)
        if export_compatible:
            warnings.warn("export_compatible has no meaning here: quantize() packs at once.", stacklevel=2)
        config = quant_config if isinstance(quant_config, QuantConfig) else QuantConfig.from_dict(quant_config)
        if not apply_clip:
            config = QuantConfig.from_dict({**config.to_dict(), "clip": False})
        if config.bits != 4:
            warnings.warn(f"bits={config.bits} can be evaluated in memory but not saved.", stacklevel=2)
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise ConfigError("quantize() needs the model's tokenizer to read the calibration text: pass tokenizer=.")
        check_model(self.model, config, self.name)
        calibration = load_calibration(
            tokenizer,
            calib_data if calib_dataset is None else calib_dataset,
            samples=max_calib_samples,
            seq_len=max_calib_seq_len,
            seed=seed,
            split=split,
            text_column=text_column,
            model=self.model,
        )
        self.report = quantize_model(self.model, config, calibration, device=device, name=self.name)
        self.tokenizer = tokenizer
        self.quant_config = QuantConfig.from_dict(self.report["recipe"]["config"])
        self.is_quantized = True
        attach(self.model)

    def pack(self) -> None:
        """Nothing to do: quantize() packs as it goes. Kept for scripts that quantized with export_compatible=True."""

    def save_quantized(
        self, save_dir: str | Path, safetensors: bool = True, shard_size: str | int = "5GB", *, overwrite: bool = True
    ) -> None:
        """Write the checkpoint in the AWQ `gemm` layout, always as safetensors; the tokenizer travels along."""
        if not safetensors:
            warnings.warn("safetensors=False has no meaning here: pickled weights are not written.", stacklevel=2)
        if self.source is not None:
            convert_checkpoint(self.source, save_dir, overwrite=overwrite, shard_size=shard_size)
            return
        if self.report is None:
            raise AwqError(f"{self.name} is not quantized yet: call quantize() before save_quantized().")
        written = save_quantized(
            self.model,
            save_dir,
            self.report,
            tokenizer=self.tokenizer,
            processor=self.processor,
            beside=self.beside,
            shard_size=shard_size,
            overwrite=overwrite,
        )
        for warning in written.warnings:
            warnings.warn(warning, stacklevel=2)


class AutoAWQForCausalLM:
    """Load a float model to quantize, or a quantized one to run."""

    def __init__(self) -> None:
        raise OSError("use AutoAWQForCausalLM.from_pretrained or AutoAWQForCausalLM.from_quantized.")

    @staticmethod
    def from_pretrained(
        model_path: str | Path,
        torch_dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        *,
        dtype: torch.dtype | str | None = None,
        **model_init_kwargs: Any,
    ) -> AwqModel:
        """The float model at `model_path`: a folder, a GGUF file or a hub id. Only safetensors weights are read."""
        idle = {"safetensors": safetensors, "low_cpu_mem_usage": low_cpu_mem_usage, "use_cache": use_cache}
        _warn_idle("from_pretrained", idle, _IDLE_FROM_PRETRAINED)
        revision = model_init_kwargs.pop("revision", (download_kwargs or {}).get("revision"))
        source = find_source(model_path, revision=revision, trust_remote_code=trust_remote_code)
        source.config()
        chosen = pick_dtype(dtype if dtype is not None else torch_dtype)
        model = source.load(chosen or "auto", _float_device_map(device_map, source), **model_init_kwargs)
        return AwqModel(model, name=source.name, beside=source.processor_files())

    @staticmethod
    def from_quantized(
        quant_path: str | Path,
        quant_filename: str = "",
        max_seq_len: int | None = None,
        trust_remote_code: bool = False,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = "balanced",
        max_memory: Any = None,
        offload_folder: str | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        *,
        version: str | None = None,
        kernel: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        head: str | None = None,
        **config_kwargs: Any,
    ) -> AwqModel:
        """The quantized checkpoint at `quant_path` (folder or hub id), in any layout that AutoAWQ wrote.

        max_seq_len: tokens of prompt and answer at most; None: what memory allows
        device_map, max_memory, offload_folder: "auto" takes the first GPU, or several and the CPU where the model does
            not fit there or max_memory says so ({0: "20GB", "cpu": "60GB"}); a device; or a dictionary of module names
        head: "int8" rounds a float output head to 8 bits
        version: "GEMM" or "GEMV" pins that kernel version; by default it is chosen per call. KernelNotSupportedError
            (a RuntimeError) before any weight is read, where the hardware cannot run it.
        """
        arguments = {name: value for name, value in locals().items() if name in _IDLE_FROM_QUANTIZED}
        _warn_idle("from_quantized", {**arguments, **config_kwargs}, _IDLE_FROM_QUANTIZED)
        revision = revision or (download_kwargs or {}).get("revision")
        model = load_quantized(
            quant_path,
            version=version,
            kernel=kernel,
            device=_single_device(device_map),
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            max_seq_len=max_seq_len,
            head=head,
            dtype=pick_dtype(dtype if dtype is not None else torch_dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return AwqModel(model, name=str(quant_path), source=find_folder(quant_path, revision=revision))


def _warn_idle(function: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    idle = sorted(name for name, value in given.items() if name not in defaults or value != defaults[name])
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        warnings.warn(f"{function}: {', '.join(idle)} {verb} no effect here and can be dropped.", stacklevel=3)


def _float_device_map(device_map: Any, source: Source) -> Any:
    """Where the float model goes: for "auto" the one GPU if it fits there, else the CPU, from where blocks visit it."""
    if device_map in AUTOMATIC:
        needed = sum(file.stat().st_size for file in source.weight_files())
        fits = torch.cuda.device_count() == 1 and needed < 0.6 * torch.cuda.mem_get_info()[0]
        return {"": 0} if fits else None
    if isinstance(device_map, str | int | torch.device):
        return {"": pick_device(_single_device(device_map))}
    for place in device_map.values() if isinstance(device_map, Mapping) else ():
        if place != "disk":
            pick_device(_single_device(place))
    return device_map


def _single_device(device_map: Any) -> Any:
    """The device that a device_map comes down to, or "auto" where it names several."""
    if isinstance(device_map, Mapping):
        places = {str(place): place for place in device_map.values()}
        device_map = next(iter(places.values())) if len(places) == 1 else "auto"
    if device_map is None or device_map in AUTOMATIC:
        return "auto"
    return f"cuda:{device_map}" if isinstance(device_map, int) else device_map
