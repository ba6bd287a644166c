"""Where a model comes from: a folder, a GGUF file or a hub id; checked before anything long starts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import torch
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub import errors as hub_errors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from awq.checkpoint.files import TensorFiles, inside
from awq.errors import CheckpointError, ConfigError, ModelNotFoundError
from awq.pretrained.gguf import check_gguf
from awq.pretrained.limits import check_folder, check_tokenizer
from awq.pretrained.outline import check_outline
from awq.pretrained.unreadable import one_sentence

_LICENCES = ("LICENSE*", "NOTICE*")
# Everything a model folder needs and nothing that runs code.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "outliers/*"]
_HUB_FILES += ["README.md", *_LICENCES]
# What turns images, sound and chats into a model's inputs, and the licence: as they are, beside the quantized weights.
_BESIDE = ("*processor_config.json", "audio_tokenizer_config.json", "chat_template.json", "*/*.jinja", *_LICENCES)
# In the first lines of a model card, between two of ---.
_LICENCE_LINE = re.compile(r"""^(license(?:_name|_link)?):[ \t]*["']?([^"'\n]+?)["']?[ \t]*$""", re.MULTILINE)
_CARD_BYTES = 1 << 16
_SAMPLE_BYTES, _SAMPLE_EVERY = 1 << 12, 1 << 20
_SMALL_FILE = 1 << 26  # read whole: samples of it could miss what differs


@dataclass(frozen=True)
class Source:
    """A float model on disk: its folder, and the GGUF file in it if it is one."""

    name: str
    folder: Path
    gguf: str | None = None
    trust_remote_code: bool = False

    @property
    def _where(self) -> dict[str, Any]:
        return ({"gguf_file": self.gguf} if self.gguf else {}) | {"trust_remote_code": self.trust_remote_code}

    def weight_files(self) -> list[Path]:
        return [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    def processor_files(self) -> dict[str, Path]:
        """The files of the processor, by their name in the folder: they are saved beside the quantized weights."""
        found = {path for pattern in _BESIDE for path in self.folder.glob(pattern) if path.is_file()}
        names = sorted(str(path.relative_to(self.folder)) for path in found)
        return {} if self.gguf else {name: inside(self.folder, name) for name in names}

    def config(self) -> PretrainedConfig:
        held = check_gguf(self.folder / self.gguf) if self.gguf else TensorFiles(self.folder).held()
        with one_sentence(self.name, "configuration"):
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, **self._where)
        if self.gguf:
            # transformers has dequantized it by then; left in, it would pass the result off as still quantized
            drop_quantization(config)
        elif quantization := getattr(config, "quantization_config", None):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise CheckpointError(
                f"{self.name} is already quantized ({method}): quantize its float original, or load it as it is."
            )
        if not self.trust_remote_code:
            with one_sentence(self.name, "architecture"):
                check_outline(auto_class(config), config, held, self.name)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        check_tokenizer(self.folder)
        with one_sentence(self.name, "tokenizer"):
            return AutoTokenizer.from_pretrained(self.folder, **self._where)

    def load(self, dtype: torch.dtype | str = "auto", device_map: Any = None, **options: Any) -> Any:
        """The float model in eval mode. A GGUF is dequantized to `dtype` (float16 for "auto")."""
        if self.gguf and dtype == "auto":
            dtype = torch.float16
        with one_sentence(self.name, "weights"):
            loaded: Any = auto_class(self.config()).from_pretrained(
                self.folder,
                dtype=dtype,
                device_map=device_map,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=None if self.gguf else True,
                **self._where,
                **options,
            )
        model, found = loaded
        _check_found(self.name, found)
        if self.gguf:
            drop_quantization(model.config)
            model.hf_quantizer = None
        return model.eval()

    def origin(self) -> dict[str, str]:
        """What a model card says of the source: its hub id, and the licence that its own card names."""
        path = inside(self.folder, "README.md")
        if self.gguf or not path.is_file():
            card = ""
        else:
            with path.open("rb") as file:
                card = file.read(_CARD_BYTES).decode("utf-8", "replace")
        header = card.partition("\n---")[0] if card.startswith("---") else ""
        known = {key: value for key, value in _LICENCE_LINE.findall(header) if value.isprintable()}
        return known if Path(self.name).expanduser().exists() else {"id": self.name, **known}

    def fingerprint(self) -> str:
        """A digest of the configuration, the weight files' sizes, and 4 KiB of each of their megabytes, all of a small
        file's.
        """
        digest = hashlib.sha256()
        config = self.folder / "config.json"
        if config.exists() and not self.gguf:
            digest.update(config.read_bytes())
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            sample = _SAMPLE_EVERY if size <= _SMALL_FILE else _SAMPLE_BYTES
            with path.open("rb") as file:
                for position in range(0, size, _SAMPLE_EVERY):
                    file.seek(position)
                    digest.update(file.read(sample))
        return digest.hexdigest()


def find_source(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Locate a float model and check that it can be read; ModelNotFoundError or CheckpointError otherwise."""
    path = _path(model)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{model} is a file but not a GGUF: give the model's folder, a .gguf file or a hub id."
            )
        return Source(str(model), path.parent, path.name)
    folder = find_folder(model, revision=revision, code=trust_remote_code)
    source = Source(str(model), folder, None, trust_remote_code)
    if not (folder / "config.json").exists():
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1:
            return Source(str(model), folder, ggufs[0].name)
        reason = f"it has {len(ggufs)} GGUF files: name one" if ggufs else "it has no config.json"
        raise CheckpointError(f"{model} is not a model folder: {reason}.")
    check_folder(folder, trust_remote_code)
    TensorFiles(folder)  # opens every file: a missing, truncated or pickled one is a CheckpointError
    return source


def _path(model: Any) -> Path:
    """ConfigError for what names nothing: as a path, an empty name would be the current folder."""
    if not isinstance(model, str | os.PathLike) or model == "":
        raise ConfigError(f"{model!r} names no model: give a model folder, a .gguf file or a hub id (owner/name).")
    return Path(model).expanduser()


def find_folder(model: str | Path, *, revision: str | None = None, code: bool = False) -> Path:
    """The folder of `model`: itself, or the hub's snapshot of it (downloaded once, safetensors only, code if asked)."""
    path, name = _path(model), str(model)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            raise CheckpointError(f"{name} is a GGUF file: quantize it first (awq quantize), and give that folder.")
        raise CheckpointError(f"{name} is a file: give the folder that it lies in.")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelNotFoundError(f"{name} does not exist: give a model folder, a .gguf file or a hub id (owner/name).")
    patterns = [*_HUB_FILES, "*.py"] if code else _HUB_FILES
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub_errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name} is gated: accept its licence on its page, then run `hf auth login`."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name} has no revision {revision!r}.") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} is neither a local folder nor a public model on the hub: check the name, or run `hf auth login`."
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(
            f"{name} is no local folder, and the hub cannot be reached to look for it: download it first, "
            "or check the connection."
        ) from error


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The model of `config` with its weights on the meta device (buffers, such as rotary tables, are real)."""
    with accelerate.init_empty_weights(include_buffers=False), one_sentence(config.model_type, "architecture"):
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' auto class that makes the whole model of `config`.

    AutoModelForCausalLM makes of some vision-language configurations only the language part, configured by a part.
    """
    kinds = (AutoModelForCausalLM, AutoModelForMultimodalLM)
    known: dict[Any, Any] = {auto: made for auto in kinds if (made := auto._model_mapping.get(type(config), None))}
    whole = (auto for auto, made in known.items() if made.config_class is type(config))
    return next(whole, next(iter(known), AutoModelForCausalLM))


def check_finite(model: nn.Module, name: str, prefix: str = "") -> None:
    """CheckpointError naming the first parameter that holds NaN or infinity."""
    for parameter, value in model.named_parameters():
        if value.device.type != "meta" and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{name} has NaN or infinite values in {prefix}{parameter}: the file is damaged or overflowed."
            )


def drop_quantization(config: PretrainedConfig) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config


@contextmanager
def undispatched(model: Any, blocks: str) -> Iterator[None]:
    """The blocks of a model that is spread over devices without what moves their inputs; it is spread anew behind it.

    They are moved to where they are worked on, and back.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        yield
        return
    remove_hook_from_submodules(model.get_submodule(blocks))
    yield
    accelerate.dispatch_model(model, model.hf_device_map, force_hooks=True)


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first CUDA GPU, else the CPU; ConfigError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is unknown: use auto, cpu, cuda or cuda:N.") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= count.get(chosen.type, 0):
        raise ConfigError(f"device {str(device)!r} is not there: torch sees {count['cuda']} CUDA GPUs here.")
    return chosen


def pick_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype, given as such or by name; None for None and "auto"; ConfigError for anything else."""
    if dtype is None or dtype == "auto":
        return None
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} is unknown: use float16, bfloat16, float32 or auto.")
    return chosen


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _check_found(name: str, found: dict[str, Any]) -> None:
    """CheckpointError for tensors that the weight files lack, or hold in another shape than config.json says."""
    if mismatched := sorted(str(key[0]) for key in found.get("mismatched_keys", ())):
        raise CheckpointError(
            f"{name} holds {mismatched[0]} in another shape than its config.json says: one of them is of another model."
        )
    if missing := sorted(found.get("missing_keys", ())):
        raise CheckpointError(f"{name} lacks {missing[0]} ({len(missing)} tensors in all): copy or download it again.")
