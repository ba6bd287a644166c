"""The model card says what the folder and its report say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from awq.checkpoint import open_checkpoint
from awq.hub import prepare
from awq.hub.card import float16_bytes
from tests.checkpoint.small import write_raw
from tests.tiny import tiny_llama


def report_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "awq_report.json").read_text())


def changed(folder: Path, target: Path, **changes: object) -> Path:
    """A copy with parts of its report replaced."""
    shutil.copytree(folder, target)
    (target / "awq_report.json").write_text(json.dumps(report_of(folder) | changes))
    return target


def test_metadata(checkpoint: Path) -> None:
    data = ModelCard(prepare(checkpoint, "me/tiny-AWQ", base_model="them/tiny").card).data.to_dict()
    assert data == {
        "base_model": "them/tiny",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "other",
        "license_link": "https://example.org/licence",
        "license_name": "tiny-licence",
        "pipeline_tag": "text-generation",
        "tags": ["awq", "4-bit", "int4"],
    }


def test_what_is_not_known_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    data = ModelCard(prepare(changed(checkpoint, tmp_path / "x", source={}), "me/x").card).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


def test_the_hub_id_of_the_source_is_the_base_model(checkpoint: Path, tmp_path: Path) -> None:
    card = prepare(changed(checkpoint, tmp_path / "x", source={"id": "them/tiny"}), "me/x").card
    assert ModelCard(card).data.to_dict()["base_model"] == "them/tiny"
    assert "[them/tiny](https://huggingface.co/them/tiny) in 4 bits" in card


def test_the_body(checkpoint: Path) -> None:
    card = prepare(checkpoint, "me/tiny-AWQ").card
    report = report_of(checkpoint)
    assert "# tiny-AWQ" in card and "tiny in 4 bits" in card
    assert "| weights | 4 bits, groups of 32, zero points |" in card
    assert "| calibration | 4 blocks of 64 tokens from built-in prose |" in card
    assert 'from_quantized("me/tiny-AWQ")' in card and "vllm serve me/tiny-AWQ" in card and "gptqmodel" in card
    linears: dict[str, dict[str, float]] = report["linears"]  # type: ignore[assignment]
    kept = sum(linear["outliers"] for linear in linears.values())
    assert f"| fp16 channels | {kept} of {sum(linear['outliers'] > 0 for linear in linears.values())} linears" in card
    worst = sorted(linears, key=lambda name: -linears[name]["loss_with_outliers"])[:5]
    rows = [line for line in card.splitlines() if line.startswith("| `model.")]
    assert [row.split("`")[1] for row in rows] == worst
    assert f"{linears[worst[0]]['loss_rounding']:.3g} | {linears[worst[0]]['loss_with_outliers']:.3g}" in rows[0]


def test_float16_bytes(checkpoint: Path) -> None:
    values = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert float16_bytes(open_checkpoint(checkpoint)) == 2 * values


def test_the_same_folder_gives_the_same_card(checkpoint: Path) -> None:
    assert prepare(checkpoint, "me/tiny-AWQ") == prepare(str(checkpoint), "me/tiny-AWQ")


def test_a_converted_checkpoint(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "model", settings={"zero_point": False})
    (folder / "awq_report.json").write_text('{"converted_from": "gemv"}')
    card = prepare(folder, "me/tiny-AWQ").card
    assert "| weights | 4 bits, groups of 32, symmetric |" in card and "Where it loses most" not in card


@pytest.mark.parametrize("hostile", ["a|b", "<script>alert(1)</script>", "x](javascript:1)", "line\nline", "`code`"])
def test_a_report_cannot_write_markup(checkpoint: Path, tmp_path: Path, hostile: str) -> None:
    report = report_of(checkpoint)
    linears: dict[str, dict[str, object]] = report["linears"]  # type: ignore[assignment]
    linears |= {hostile: linears["model.layers.0.mlp.up_proj"] | {"loss_with_outliers": 9.0}}
    versions = {"awq": hostile}
    source = {"license": f"mit\n---\n{hostile}"}
    folder = changed(checkpoint, tmp_path / "x", linears=linears, versions=versions, source=source)
    card = prepare(folder, "me/x").card
    assert hostile not in card.partition("\n---\n\n")[2]
    assert set(ModelCard(card).data.to_dict()) == {"library_name", "license", "pipeline_tag", "tags"}


def test_own_card_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("# Mine\n")
    upload = prepare(tmp_path / "own", "me/tiny-AWQ")
    assert upload.card == "# Mine\n" and "README.md" not in upload.files
