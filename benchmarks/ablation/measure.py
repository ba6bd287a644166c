"""One variant: quantize a copy of the float model, and compare it with the float model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.data.calibration import CalibrationSet, load_calibration
from awq.evaluate import compare, evaluation_tokens
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.pretrained.source import find_source, replace_module
from awq.structure.linears import as_linear
from awq.structure.plan import make_plan
from benchmarks.ablation.channels import round_but_keep
from benchmarks.ablation.rescale import rescale
from benchmarks.ablation.steps import STEPS
from benchmarks.ablation.variants import BOTH, BUILT_IN, NO_TEXT, ORIGINAL, PROSE, RESCALED, Variant

PROBE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the texts and the protocol that all rows share.

    evaluation:  by name, the text's file and how many windows of it are read (None: all)
    calibration: by name ("prose", "code"), the text's file
    """

    folder: str
    evaluation: Mapping[str, tuple[Path, int | None]]
    calibration: Mapping[str, Path]
    device: torch.device
    samples: int = 128
    seq_len: int = 512
    window: int = 1024

    def measure(self, variant: Variant) -> Iterator[dict[str, float]]:
        """The figures of each row of `variant`, in the order of `variant.rows`."""
        reference = self._float_model(ORIGINAL)
        model = copy.deepcopy(self._float_model(variant.model))
        started = time.perf_counter()
        quantized = self._quantize(model, variant)
        seconds = {"seconds": time.perf_counter() - started}
        for with_outliers in range(len(variant.rows)):
            for name, linear in quantized.items():
                replace_module(model, name, _dense(linear, bool(with_outliers)))
            yield self._compare(model, reference) | seconds

    def _quantize(self, model: Any, variant: Variant) -> dict[str, QuantLinear]:
        if variant.config is None:
            return {}
        names = make_plan(model, variant.config).linears
        if variant.keep:
            for name in names:
                replace_module(model, name, as_linear(model.get_submodule(name)))
            round_but_keep(model, names, self._tokens(variant.calibration), variant.config, variant.keep)
            return {}
        text = CalibrationSet(self._tokens(variant.calibration), (variant.calibration,))
        with STEPS[variant.step]():
            quantize_model(model, variant.config, text, device=self.device, progress=False)
        return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}

    def _compare(self, model: nn.Module, reference: nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, (_, windows) in self.evaluation.items():
            found = compare(model, reference, self._evaluation_tokens(name), self.window, windows)
            difference = found.difference
            figures |= {
                f"{name}_ppl": found.perplexity.value,
                f"{name}_dln_x100": 100 * difference.mean,
                f"{name}_dln_se_x100": 100 * difference.error,
                f"{name}_kl_x1000": 1000 * found.kl,
                f"{name}_kl_se_x1000": 1000 * found.kl_error,
                f"{name}_top1": found.top1,
            }
        return figures

    @cache  # noqa: B019 one Bench lives as long as the process
    def _float_model(self, which: str) -> Any:
        model = find_source(self.folder).load(torch.float32).to(self.device)
        if which == RESCALED and not rescale(model, self._evaluation_tokens(PROSE)[None, :PROBE_TOKENS]):
            raise RuntimeError("no group of linears was found that could be rescaled.")
        return model

    @cache  # noqa: B019
    def _tokenizer(self) -> Any:
        return find_source(self.folder).tokenizer()

    @cache  # noqa: B019
    def _evaluation_tokens(self, name: str) -> Tensor:
        return evaluation_tokens(self._tokenizer(), self.evaluation[name][0])

    @cache  # noqa: B019
    def _tokens(self, text: str) -> Tensor:
        sources = {
            BOTH: list(self.calibration.values()),
            BUILT_IN: None,
            **{name: [path] for name, path in self.calibration.items()},
        }
        if text == NO_TEXT:
            return torch.zeros(1, 2, dtype=torch.int64)
        loaded = load_calibration(self._tokenizer(), sources=sources[text], samples=self.samples, seq_len=self.seq_len)
        return loaded.tokens


def _dense(linear: QuantLinear, with_outliers: bool) -> nn.Linear:
    """The linear with the float32 weight that its codes, and its fp16 channels if wanted, stand for."""
    weight = linear.packed.dequantize()
    if with_outliers and linear.outliers is not None:
        weight = linear.outliers.add_to(weight)
    bias = linear.bias
    dense = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device=weight.device)
    dense.weight.data = weight
    if isinstance(bias, Tensor):
        dense.bias.data = bias.float()
    return dense
