"""Writing: the exact folder, streamed and sharded, complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from awq.checkpoint import check_output, finished_recipe, open_checkpoint, shards, write_checkpoint
from awq.checkpoint.files import TensorFiles
from awq.checkpoint.shards import ShardWriter, parse_size
from awq.checkpoint.write import NamedLinear
from awq.config import QuantConfig
from awq.errors import AwqError, CheckpointError, ConfigError, OutputExistsError
from awq.packing import Outliers, PackedInt4
from tests.checkpoint.small import (
    CONFIG,
    digests,
    random_outliers,
    random_packed,
    same_contents,
    small_floats,
    small_linears,
    write_raw,
    write_small,
)


def test_folder_as_other_engines_read_it(tmp_path: Path) -> None:
    written = write_small(tmp_path / "out")
    assert written.path == tmp_path / "out"
    assert sorted(digests(written.path)) == [
        "awq_report.json",
        "config.json",
        "model.safetensors",
        "outliers/model.safetensors",
    ]
    assert written.bytes == sum((written.path / name).stat().st_size for name in digests(written.path))
    assert json.loads((written.path / "config.json").read_text()) == CONFIG | {
        "quantization_config": {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": 32,
            "bits": 4,
            "version": "gemm",
            "modules_to_not_convert": [],
        }
    }
    with safe_open(written.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    stored = load_file(written.path / "model.safetensors")
    assert stored["blocks.0.up.qweight"].shape == (64, 2) and stored["blocks.0.up.qweight"].dtype == torch.int32
    assert stored["blocks.0.gate.bias"].dtype == stored["blocks.0.up.scales"].dtype == torch.float16
    kept = load_file(written.path / "outliers" / "model.safetensors")
    assert sorted(kept) == [f"blocks.0.{name}" for name in ("down.idx", "down.residual", "gate.idx", "gate.residual")]
    assert kept["blocks.0.gate.idx"].dtype == torch.int32 and kept["blocks.0.gate.residual"].shape == (3, 16)


@pytest.mark.parametrize("shard_size", ["5GB", 600, 1])
def test_what_was_written_is_read(tmp_path: Path, shard_size: int | str) -> None:
    write_small(tmp_path / "out", shard_size=shard_size, verify="full")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert same_contents(checkpoint, small_linears())
    assert checkpoint.float_names == ["embed.weight", "norm.weight"]
    for name, tensor in small_floats():
        assert torch.equal(checkpoint.tensor(name), tensor) and checkpoint.tensor(name).dtype == tensor.dtype
    assert checkpoint.report == {"recipe": {"bits": 4}, "linears": {}}


def test_shards_are_named_and_indexed_as_the_hub_does(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "out", shard_size=700).path
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] != []
    held = {name: file for file in files for name in load_file(folder / file)}
    assert index["weight_map"] == held
    sizes = [tensor.nbytes for file in files for tensor in load_file(folder / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    single = [load_file(folder / file) for file in files]
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 700 for shard in single)


def test_at_most_one_shard_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def counting(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, **options)

    monkeypatch.setattr(shards, "save_file", counting)
    writer = ShardWriter(tmp_path, 1000, "quick")
    for i in range(20):
        writer.add(f"t{i:02d}", torch.full((100,), i, dtype=torch.float32))
        assert writer._filled <= 1000
    writer.finish()
    assert held == [800] * 10


@pytest.mark.parametrize("shard_size", ["5GB", 600])
def test_same_input_same_bytes(tmp_path: Path, shard_size: int | str) -> None:
    first, second = (write_small(tmp_path / name, shard_size=shard_size).path for name in "ab")
    assert digests(first) == digests(second)


def test_shared_and_strided_tensors_are_stored_whole(tmp_path: Path) -> None:
    base = torch.arange(64.0)
    index = random_outliers([0, 5])
    linears = [("a", random_packed(), None, index), ("b", random_packed(), None, Outliers(index.index, index.residual))]
    floats = [("whole", base), ("again", base), ("part", base[8:16]), ("turned", base.view(8, 8).t())]
    write_small(tmp_path / "out", linears=linears, floats=floats, verify="full")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, tensor in floats:
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.outliers("b") is not None


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write_small(tmp_path / "out", extras=lambda stage: (stage / "tokenizer.json").write_text("{}")).path
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}


def test_extras_travel_along_and_config_is_ours(tmp_path: Path) -> None:
    def extras(stage: Path) -> None:
        (stage / "tokenizer.json").write_text("{}")
        (stage / "config.json").write_text("theirs")

    folder = write_small(tmp_path / "out", extras=extras).path
    assert (folder / "tokenizer.json").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_symmetric_weights_store_zeros_of_8(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, zero_point=False)
    linears = [("a", random_packed(zero_point=False), None, None)]
    folder = write_small(tmp_path / "out", quant=quant, linears=linears).path
    assert load_file(folder / "model.safetensors")["a.qzeros"].unique().tolist() == [0x88888888 - 2**32]
    assert not open_checkpoint(folder).quant.zero_point


def test_whole_rows_are_groups(tmp_path: Path) -> None:
    linears: list[NamedLinear] = [
        ("a", random_packed(64, 8, 64), None, None),
        ("b", random_packed(128, 8, 128), None, None),
    ]
    checkpoint = open_checkpoint(write_small(tmp_path / "out", quant=QuantConfig(group_size=-1), linears=linears).path)
    assert checkpoint.quant.group_size == -1 and same_contents(checkpoint, linears)


def test_report_is_strict_json(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "out", report={"loss": float("nan"), "text": Path("a"), "ü": "é"}).path
    text = (folder / "awq_report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "text": "a", "ü": "é"}


class Stop(BaseException):
    """Neither an Exception nor expected, as KeyboardInterrupt is."""


def failing_linears(error: type[BaseException]) -> Iterator[NamedLinear]:
    yield from small_linears()[:2]
    raise error("while a linear was made")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, RuntimeError])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_writes_leave_no_trace(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    if existing:
        write_small(tmp_path / "out", linears=small_linears()[:1])
    before = digests(tmp_path)
    with pytest.raises(error):
        write_small(tmp_path / "out", linears=failing_linears(error), shard_size=600, overwrite=True)
    assert digests(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


@pytest.mark.parametrize("moment", ["extras", "save", "index", "read back", "rename"])
def test_failure_at_any_moment_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = digests(write_small(tmp_path / "out", linears=small_linears()[:1]).path)

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    changes: dict[str, Any] = {"overwrite": True, "shard_size": 600}
    if moment == "extras":
        changes["extras"] = fail
    elif moment == "rename":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: fail() if ".partial-" in self.name else rename(self, to))
    else:
        place = {"save": "save_file", "index": "write_json", "read back": "TensorFiles"}[moment]
        monkeypatch.setattr(shards, place, fail)
    with pytest.raises((AwqError, OSError), match="No space left"):
        write_small(tmp_path / "out", **changes)
    monkeypatch.undo()
    assert digests(tmp_path / "out") == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", fail)
    with pytest.raises(AwqError, match=r"could not be written .*No space left.*free some space"):
        write_small(tmp_path / "out")


@pytest.mark.parametrize(("verify", "caught"), [("none", False), ("quick", True), ("full", True)])
def test_read_back_finds_a_changed_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str, caught: bool
) -> None:
    """The disk flips the last bit of the file: in the sampled linear, as nothing else is stored."""

    def corrupting(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(shards, "save_file", corrupting)
    changes: dict[str, Any] = {"linears": small_linears()[:1], "floats": [], "verify": verify}
    if not caught:
        write_small(tmp_path / "out", **changes)
        return
    with pytest.raises(CheckpointError, match="reads back changed"):
        write_small(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_full_verification_reaches_the_last_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    load = TensorFiles.load

    def noting(self: TensorFiles, name: str) -> torch.Tensor:
        seen.append(name)
        return load(self, name)

    monkeypatch.setattr(TensorFiles, "load", noting)
    write_small(tmp_path / "quick")
    assert seen[:3] == [f"blocks.0.up.{part}" for part in ("qweight", "qzeros", "scales")] and len(seen) < 8
    seen.clear()
    write_small(tmp_path / "full", verify="full")
    assert {"norm.weight", "blocks.0.gate.bias", "blocks.0.down.residual"} < set(seen)


def nan_scales() -> PackedInt4:
    packed = random_packed()
    packed.scales[1, 3] = torch.nan
    return packed


REFUSED: list[tuple[dict[str, Any], type[AwqError], str]] = [
    ({"quant": QuantConfig(bits=3, group_size=32)}, ConfigError, "bits=3 cannot be stored"),
    ({"quant": QuantConfig()}, ConfigError, "group_size is not resolved"),
    ({"verify": "maybe"}, ConfigError, "verify='maybe'"),
    ({"shard_size": "5XB"}, ConfigError, "'5XB' is no size"),
    ({"shard_size": 0}, ConfigError, "0 is no size"),
    ({"expected_bytes": 10**18}, AwqError, "needs 1000000000.00 GB"),
    ({"quant": QuantConfig(group_size=64)}, CheckpointError, "blocks.0.up cannot be stored.*groups of 64"),
    ({"quant": QuantConfig(group_size=32, zero_point=False)}, CheckpointError, "zero points other than 8"),
    ({"linears": [("a", nan_scales(), None, None)]}, CheckpointError, "a.scales holds NaN"),
    ({"linears": [("a", random_packed(), torch.full((16,), 1e9), None)]}, CheckpointError, "a.bias holds NaN or inf"),
    ({"linears": [("a", random_packed(), torch.zeros(8), None)]}, CheckpointError, r"a.bias has shape \[8\]"),
    ({"linears": [("a", random_packed(), None, random_outliers([5, 3]))]}, CheckpointError, "ascend within 0..63"),
    ({"linears": [("a", random_packed(), None, random_outliers([64]))]}, CheckpointError, "ascend within 0..63"),
    ({"linears": [("a", random_packed(), None, random_outliers([3], 8))]}, CheckpointError, "a.residual has shape"),
    ({"linears": small_linears() * 2}, CheckpointError, "two tensors are named blocks.0.up.qweight"),
    ({"floats": small_floats() * 2}, CheckpointError, "two tensors are named embed.weight"),
    ({"floats": [("blocks.0.up.scales", torch.ones(1))]}, CheckpointError, "two tensors are named blocks.0.up.scales"),
    ({"linears": []}, CheckpointError, "no quantized linear"),
]


@pytest.mark.parametrize(("changes", "error", "sentence"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_not_stored(tmp_path: Path, changes: dict[str, Any], error: type[AwqError], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        write_small(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_full_prefixes_are_written(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, modules_to_not_convert=("lm_head", "blocks.0.router"))
    folder = write_small(tmp_path / "out", quant=quant).path
    assert open_checkpoint(folder).quant.modules_to_not_convert == ("lm_head", "blocks.0.router")


def test_a_prefix_that_hides_a_quantized_linear_is_said(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, modules_to_not_convert=("blocks.0.g",))
    written = write_small(tmp_path / "out", quant=quant)
    assert written.warnings[0].startswith("modules_to_not_convert holds 'blocks.0.g', which is also in the quantized")


def test_output_that_is_not_empty_offers_overwrite(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"not empty.*--overwrite"):
        check_output(tmp_path)
    with pytest.raises(OutputExistsError, match=r"not empty.*--overwrite"):
        write_small(tmp_path)
    with pytest.raises(OutputExistsError, match="something else than a quantized checkpoint"):
        write_small(tmp_path, overwrite=True)
    assert digests(tmp_path).keys() == {"note"}


def test_outputs_that_are_empty_new_or_linked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("empty", "new/deep/down", "link"):
        write_small(tmp_path / name)
        assert open_checkpoint(tmp_path / name).linears
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").exists()


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert check_output("here") == tmp_path / "here"
    assert check_output("~/there") == tmp_path / "home" / "there"


@pytest.mark.parametrize("place", [".", "..", "~", "/"])
def test_home_and_current_folder_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").write_text("")
    (tmp_path / "a" / "b" / "file").write_text("")
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    with pytest.raises(OutputExistsError, match="--overwrite does not replace"):
        check_output(place, overwrite=True)


def test_float_models_and_checkouts_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "code" / ".git").mkdir(parents=True)
    for name in ("float", "code"):
        with pytest.raises(OutputExistsError, match="--overwrite does not replace"):
            check_output(tmp_path / name, overwrite=True)
    assert check_output(write_raw(tmp_path / "old"), overwrite=True) == tmp_path / "old"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ConfigError, match="file is a file"):
        check_output(tmp_path / "file" / "out")

    def refuse(**_arguments: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(AwqError, match=r"cannot be written to \(Permission denied\)"):
        check_output(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(ConfigError, match="mount point"):
        check_output(tmp_path / "out")


def test_output_that_fills_up_meanwhile_is_kept(tmp_path: Path) -> None:
    def extras(_: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(OutputExistsError):
        write_small(tmp_path / "out", extras=extras)
    assert digests(tmp_path) == digests(tmp_path) and list(digests(tmp_path)) == ["out/theirs"]


def test_recipe_of_a_finished_folder(tmp_path: Path) -> None:
    assert finished_recipe(write_small(tmp_path / "out").path) == {"bits": 4}
    assert finished_recipe(tmp_path) is None and finished_recipe(tmp_path / "absent") is None
    for text in ("{", "[]", '{"recipe": 3}', "{}"):
        (tmp_path / "awq_report.json").write_text(text)
        assert finished_recipe(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("200MB", 2 * 10**8), ("7KB", 7000), (12, 12)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5TB", "0", "five", "1e9", None])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        parse_size(text)


def test_linears_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """The next linear is made only after the one before it was stored or buffered."""
    alive: list[int] = []

    def linears() -> Iterator[NamedLinear]:
        for i in range(5):
            alive.append(i)
            yield f"l{i}", random_packed(seed=i), None, None

    write_checkpoint(
        tmp_path / "out", config=CONFIG, quant=QuantConfig(group_size=32), linears=linears(), floats=[], report={}
    )
    assert alive == list(range(5))


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    for process in (2**22 + 1, os.getppid()):  # no such process; one that runs
        (tmp_path / f".out.partial-{process}").mkdir()
    write_small(tmp_path / "out")
    assert [path.name for path in tmp_path.glob(".out*")] == [f".out.partial-{os.getppid()}"]
