"""`awq quantize`: a float model and calibration text to a checkpoint."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from awq.cli import options
from awq.cli.output import format_bytes, is_first_process, print_facts, print_json, say
from awq.config import MAX_OUTLIER_RATIO, QuantConfig
from awq.errors import ConfigError

if TYPE_CHECKING:
    from awq.pipeline.recipe import Finished

DEFAULTS = QuantConfig()


class Effort(StrEnum):
    FAST = "fast"
    BALANCED = "balanced"
    MAX = "max"


DEFAULT_EFFORT = Effort(DEFAULTS.effort)


class Verify(StrEnum):
    NONE = "none"
    QUICK = "quick"
    FULL = "full"


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The float model: a folder, a .gguf file or a hub id.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it too: the repository, owner/name.")] = None,
    private: options.Private = False,
    bits: Annotated[int, typer.Option(help="Bits a weight; only 4 can be stored.")] = DEFAULTS.bits,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input channels that share a scale: 16, 32, 64, 128, -1 (all).", show_default="128, 64, 32"),
    ] = DEFAULTS.group_size,
    zero_point: Annotated[
        bool, typer.Option("--zero-point/--symmetric", help="Codes with a zero point, or symmetric around 8.")
    ] = DEFAULTS.zero_point,
    version: Annotated[
        str, typer.Option(help="Kernel version to note in the checkpoint: GEMM or GEMV; pins nothing.")
    ] = DEFAULTS.version,
    outlier_ratio: Annotated[
        float,
        typer.Option(
            help="Share of the weights that may be kept in fp16 too, as input channels, "
            f"0 (off) to {MAX_OUTLIER_RATIO}."
        ),
    ] = DEFAULTS.outlier_ratio,
    effort: Annotated[
        Effort,
        typer.Option(
            help="fast: scale, clip, plain rounding; balanced: compensated rounding, behind what is quantized already; "
            "max: balanced, then learned block by block, for a GPU."
        ),
    ] = DEFAULT_EFFORT,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Part of the name of linears that stay float; repeatable.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="prose, code, self, a text, jsonl or parquet file, or a hub data set; repeatable.",
            show_default="prose and code",
        ),
    ] = None,
    text_column: options.TextColumn = "text",
    samples: Annotated[int, typer.Option(help="Blocks of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a block.")] = 512,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    verify: Annotated[Verify, typer.Option(help="Read back after writing: one block, all or none.")] = Verify.QUICK,
    shard_size: Annotated[str, typer.Option(help="The most that one file of weights holds.")] = "5GB",
    gpu_memory: Annotated[
        str | None, typer.Option(help='GPU memory to use, such as "8GiB".', show_default="most of what is free")
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory to use; the rest waits in files.", show_default="most of what is free"),
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Load all of the model, not block by block.")] = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model to 4 bits and write a checkpoint; after an interruption, the same command goes on."""
    config = QuantConfig(
        bits=bits,
        group_size=group_size,
        zero_point=zero_point,
        version=version,
        outlier_ratio=outlier_ratio,
        effort=effort.value,
        modules_to_not_convert=tuple(modules_to_not_convert or ()),
    )
    if bits != DEFAULTS.bits:
        raise ConfigError(f"bits={bits} cannot be stored: use 4; other widths can only be evaluated in Python.")
    options.quiet_libraries()
    from awq import hub
    from awq.kernels import pinned_version
    from awq.pipeline.recipe import quantize_folder

    pinned_version(version, notice=is_first_process())
    if push_to_hub:
        hub.check_access(push_to_hub, private)
    finished = quantize_folder(
        model,
        output,
        config,
        calibration=tuple(calibration or ()),
        text_column=text_column,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        verify=verify.value,
        shard_size=shard_size,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        whole=whole,
    )
    if is_first_process():
        url = hub.push(hub.prepare(finished.path, push_to_hub), private) if push_to_hub else None
        _show(finished, url, as_json)
        if url:
            say(f"uploaded to {url}")


def _show(finished: Finished, url: str | None, as_json: bool) -> None:
    from awq.checkpoint.report import summarize

    for warning in finished.warnings:
        say(f"warning: {warning}")
    summary = summarize(finished.report)
    if as_json:
        print_json(
            {
                "path": finished.path,
                "size_bytes": finished.size_bytes,
                "already_complete": finished.already_complete,
                "url": url,
                "warnings": finished.warnings,
                "recipe": finished.report["recipe"],
                "summary": summary,
                "seconds": finished.seconds,
                "memory_bytes": finished.memory,
            }
        )
        return
    title = "Already complete: the identical recipe wrote it" if finished.already_complete else "Quantized"
    took: dict[str, object] = {f"seconds to {stage}": seconds for stage, seconds in finished.seconds.items()}
    took |= {f"{place} memory": format_bytes(size) for place, size in finished.memory.items()}
    if finished.already_complete:  # the size of shards is no part of a recipe
        took["shards"] = "of the size that they had; --overwrite writes them anew"
    print_facts(title, {"folder": finished.path, "size": format_bytes(finished.size_bytes), **summary, **took})
