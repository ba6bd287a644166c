"""The model card of a checkpoint: what it is, what was done to it, how to load it; all from the folder itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from awq.checkpoint.read import Checkpoint
from awq.checkpoint.report import outlier_total, worst
from awq.checkpoint.serving import serving_warnings
from awq.config import GROUP_SIZES, QuantConfig

WORST = 5
_LICENCE = ("license", "license_name", "license_link")
_LOADING = """\
With the package `awq-int4`, whose kernels are made for a single query:

```python
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

model = AutoAWQForCausalLM.from_quantized("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

With vLLM: `vllm serve {repo}`

With transformers, which asks for the package `gptqmodel`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", device_map="auto")
```
"""


def model_card(checkpoint: Checkpoint, report: dict[str, Any], repo: str, size: int, base_model: str | None) -> str:
    """README.md for the repository `repo`, whose files have `size` bytes in all.

    base_model: id of the float model on the hub, else the one that the report knows
    """
    base = base_model or report.get("source", {}).get("id")
    title = repo.rpartition("/")[2]
    origin = f"[{_plain(base)}](https://huggingface.co/{base})" if base else _plain(_name(report))
    parts = [
        f"---\n{_metadata(report, base)}\n---",
        f"# {title}\n\n{origin} in 4 bits: activation-aware weight quantization (AWQ), {_tool(report)}.",
        _table(("", ""), _facts(checkpoint, report, size)),
        "## Loading it\n\n" + _LOADING.format(repo=repo) + _kept(report) + _notes(checkpoint),
    ]
    if linears := worst(report, WORST) if report.get("linears") else []:
        parts.append(
            "## Where it loses most\n\nError of a linear's output over the output's power, on calibration text.\n\n"
            + _table(("linear", "plain rounding", "this checkpoint"), (_losses(*item) for item in linears))
        )
    return "\n\n".join(parts) + "\n"


def float16_bytes(checkpoint: Checkpoint) -> int:
    """What the model's weights would take in 16 bits a value."""
    shapes = [checkpoint.shape(name) for name in checkpoint.linears]
    values = sum(shape.in_features * shape.out_features for shape in shapes)
    return 2 * (values + sum(checkpoint.outline(name).numel() for name in checkpoint.float_names))


def _metadata(report: dict[str, Any], base: str | None) -> str:
    source = report.get("source", {})
    more: dict[str, Any] = {key: source[key] for key in _LICENCE if isinstance(source.get(key), str)}
    if base:
        more |= {"base_model": base, "base_model_relation": "quantized"}
    tags = ["awq", "4-bit", "int4"]
    return str(ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **more).to_yaml())


def _facts(checkpoint: Checkpoint, report: dict[str, Any], size: int) -> Iterable[tuple[str, str]]:
    quant, recipe = checkpoint.quant, report.get("recipe", {})
    groups = "one scale a row" if quant.group_size == -1 else f"groups of {quant.group_size}"
    yield "weights", f"{quant.bits} bits, {groups}, {'zero points' if quant.zero_point else 'symmetric'}"
    yield "size", f"{_megabytes(size)}; {_megabytes(float16_bytes(checkpoint))} in 16 bits"
    if sources := recipe.get("calibration", {}).get("sources"):
        yield "calibration", "; ".join(sources)
    if effort := recipe.get("config", {}).get("effort"):
        yield "effort", str(effort)
    if (kept := outlier_total(report))["channels"]:
        amount = _megabytes(kept["bytes"]) if kept["bytes"] else "a residual"
        yield "fp16 channels", f"{kept['channels']} of {kept['linears']} linears, {amount} in `outliers/`"
    if reasons := Counter(report.get("not_converted", {}).values()):
        yield "left in float", "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
    yield "linears", str(len(checkpoint.linears))


def _kept(report: dict[str, Any]) -> str:
    if not outlier_total(report)["channels"]:
        return ""
    return "\nvLLM and transformers run the int4 weights alone, without the fp16 channels.\n"


def _notes(checkpoint: Checkpoint) -> str:
    """What vLLM cannot do with it."""
    stored = checkpoint.quant
    if stored.group_size not in GROUP_SIZES:
        return ""
    quant = QuantConfig(group_size=stored.group_size, zero_point=stored.zero_point)
    warnings = serving_warnings({name: checkpoint.shape(name) for name in checkpoint.linears}, quant)
    return "".join(f"\n- {_plain(warning)}" for warning in warnings)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _losses(name: str, linear: dict[str, Any]) -> tuple[str, str, str]:
    return f"`{_plain(name)}`", _number(linear["loss_rounding"]), _number(linear["loss_with_outliers"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _name(report: dict[str, Any]) -> str:
    model = report.get("recipe", {}).get("model", {})
    return str(model.get("name", "A language model")) if isinstance(model, dict) else "A language model"


def _tool(report: dict[str, Any]) -> str:
    version = report.get("versions", {}).get("awq") or report.get("recipe", {}).get("awq")
    return f"with awq {_plain(str(version))}" if version else "as another tool computed it"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_plain(cell, keep="`") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str, keep: str = "") -> str:
    """The text without what Markdown, HTML or a table would act upon."""
    return "".join(" " if letter in set("|<>[]`\n\r") - set(keep) else letter for letter in text)
