"""Folders made to do harm: each is refused in one sentence, before anything is allocated, run or read elsewhere."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.checkpoint import files, open_checkpoint
from awq.config import QuantConfig
from awq.errors import CheckpointError
from awq.pipeline.recipe import quantize_folder
from awq.pretrained import limits
from awq.pretrained.gguf import check_gguf
from awq.pretrained.source import find_source
from awq.storage.convert import convert_checkpoint
from awq.storage.load import load_dequantized
from tests.checkpoint.small import write_raw, write_small
from tests.tiny import save_tiny, save_tiny_gguf

Entry = dict[str, Any]


def safetensors(folder: Path, table: object, data: bytes = bytes(4), length: int | None = None) -> None:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: list[tuple[str, object, str]] = [
    ("overlap", {"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, "truncated or damaged"),
    ("out of range", {"a": entry([2], 0, 8)}, "truncated or damaged"),
    ("negative", {"a": entry([1], -4, 0)}, "truncated or damaged"),
    ("backwards", {"a": entry([1], 4, 0)}, "truncated or damaged"),
    ("not covered", {"a": entry([0], 0, 0)}, "truncated or damaged"),
    ("shape beyond its bytes", {"a": entry([2**40, 2**40], 0, 4)}, "truncated or damaged"),
    ("shape below its bytes", {"a": entry([1], 0, 4, "F16")}, "truncated or damaged"),
    ("no type", {"a": entry([1], 0, 4, "PICKLE")}, "truncated or damaged"),
    ("nested", b'{"a":' + b"[" * 100_000, "truncated or damaged"),
    ("escape", {"\x1b[2J": entry([1], 0, 4)}, "no name"),
    ("no name", {"": entry([1], 0, 4)}, "no name"),
    ("long name", {"a" * 5000: entry([1], 0, 4)}, "no name"),
]


@pytest.mark.parametrize(("table", "sentence"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_headers(tmp_path: Path, table: object, sentence: str) -> None:
    safetensors(write_raw(tmp_path), table)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**63, 0], [2**62, 0]])
def test_sizes_that_nothing_backs(tmp_path: Path, shape: list[int]) -> None:
    """A tensor of no bytes may claim any shape."""
    safetensors(write_raw(tmp_path), {"a.b.qweight": entry(shape, 0, 0, "I32")}, b"")
    with pytest.raises(CheckpointError, match="impossible shape"):
        files.TensorFiles(tmp_path).outline("a.b.qweight")


def test_a_header_too_large_to_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="which no model needs"):
        open_checkpoint(write_raw(tmp_path))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch trapped",)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
@pytest.mark.parametrize("disguise", [zipped, lambda path: path.write_bytes(pickle.dumps(Trap()))])
def test_a_pickle_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, disguise: Callable[[Path], object]
) -> None:
    folder = write_raw(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    disguise(folder / name)
    monkeypatch.chdir(tmp_path)
    for read in (open_checkpoint, find_source):
        with pytest.raises(CheckpointError, match="pickle under another name"):
            read(folder)
    assert not (tmp_path / "trapped").exists()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take it where the safetensors file has a name of its own."""
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        find_source(folder).load()
    assert not (tmp_path / "trapped").exists()


LINKED = ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "more/tool.jinja"]


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_the_folder(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    folder = save_tiny(tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True)
    secret.write_text((folder / name).read_text() if (folder / name).exists() else "{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        find_source(folder)


def test_links_within_the_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "config.json").rename(folder / "original.json")
    (folder / "config.json").symlink_to("original.json")
    assert find_source(folder).config().model_type == "llama"


def test_blobs_that_are_a_link_themselves(tmp_path: Path) -> None:
    """An archive that is laid out as a hub cache must not reach what its blobs point to."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    write_raw(snapshot)
    (tmp_path / "elsewhere").mkdir()
    (snapshot / "config.json").rename(tmp_path / "elsewhere" / "secret")
    (tmp_path / "models--x--y" / "blobs").symlink_to(tmp_path / "elsewhere")
    (snapshot / "config.json").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_checkpoint(snapshot)


def test_a_hub_cache_of_a_float_model(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    save_tiny(snapshot)
    blobs.mkdir()
    for path in sorted(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert find_source(snapshot).load()


@pytest.mark.parametrize("name", ["config.json", "awq_report.json", "model.safetensors.index.json"])
def test_pipes_do_not_hang(tmp_path: Path, name: str) -> None:
    folder = write_raw(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a plain file"):
        files.read_json(folder, name)


def test_json_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_BYTES", 1 << 20)
    with (write_raw(tmp_path) / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # takes no disk
    with pytest.raises(CheckpointError, match="more than 1 MiB"):
        open_checkpoint(tmp_path)


def changed(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


SETTINGS: list[tuple[dict[str, object], str]] = [
    ({"num_hidden_layers": 10**12}, "num_hidden_layers to more than"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers to more than"),
    ({"num_labels": 10**7}, "num_labels to more than"),
    ({"text_config": {"vision": {"num_experts": 2**40}}}, "num_experts to more than"),
    ({"num_hidden_layers": 10**5}, "much larger model"),
    ({"hidden_size": 10**12}, "much larger model|cannot read"),
    ({"hidden_size": 10**6}, "much larger model"),
    ({"vocab_size": 10**12}, "much larger model"),
    ({"intermediate_size": 10**7}, "much larger model"),
    ({"head_dim": 10**9}, "much larger model"),
    ({"hidden_size": -64}, "cannot read"),
    ({"num_attention_heads": 0}, "cannot read"),
    ({"hidden_size": "64"}, "cannot read the configuration .* 'hidden_size'"),
    ({"model_type": ["llama"]}, "cannot read"),
    ({"get_text_config": 1}, "cannot read"),
    ({"attn_implementation": "evil/kernel"}, "code that would be fetched"),
    ({"_attn_implementation": "evil/kernel"}, "code that would be fetched"),
    ({"attn_implementation": {"": "evil/kernel"}}, "code that would be fetched"),
    ({"text_config": {"experts_implementation": "evil/kernel"}}, "code that would be fetched"),
    ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot read the configuration"),
    ({"model_type": "evil", "auto_map": {"AutoConfig": "evil/repo--evil.Config"}}, "cannot read the configuration"),
]
EVIL = 'open("trapped", "w").close()'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float model, its quantized checkpoint, and a GGUF."""
    place = tmp_path_factory.mktemp("models")
    config = QuantConfig(group_size=32, effort="fast", outlier_ratio=0.02)
    options: dict[str, Any] = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "device": "cpu"}
    source = save_tiny(place / "float")
    (place / "gguf").mkdir()
    save_tiny_gguf(place / "gguf" / "model.gguf")
    return {
        "float": source,
        "quantized": quantize_folder(source, place / "quantized", config, **options, progress=False).path,
        "gguf": place / "gguf",
    }


READERS: dict[str, Callable[[Path], object]] = {
    "float": lambda folder: find_source(folder).load(),
    "quantized": load_dequantized,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_configurations(
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, object],
    sentence: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models[kind], folder)
    changed(folder / "config.json", **settings)
    (folder / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=sentence):
        READERS[kind](folder)
    assert not (tmp_path / "trapped").exists()


def test_counts_that_are_no_counts(tmp_path: Path) -> None:
    """Settings of published models, some in the millions."""
    settings = {"rope_theta": 10**10, "max_position_embeddings": 10485760, "layer_norm_eps": 1e-5, "block_size": 2**20}
    limits.check_settings(tmp_path, {**settings, "vocab_size": 262144, "head_dim": 256, "attn_implementation": "sdpa"})


TENSORS: list[tuple[str, torch.Tensor, str]] = [
    ("model.norm.weight", torch.ones(64, dtype=torch.int64), r"stores model.norm.weight as torch.int64"),
    ("model.norm.weight", torch.ones(65).half(), r"stores model.norm.weight as .*\[65\]"),
    ("model.norm.weight", torch.ones(64, 1).half(), r"stores model.norm.weight as .*\[64, 1\]"),
    ("nowhere.scales", torch.ones(8).half(), "scaled activation nowhere"),
    ("lm_head.weight", torch.ones(300, 64).to(torch.float8_e4m3fn), "dtype F8_E4M3"),
]


@pytest.mark.parametrize(("name", "tensor", "sentence"), TENSORS)
def test_float_tensors(tmp_path: Path, models: dict[str, Path], name: str, tensor: torch.Tensor, sentence: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["quantized"], folder)
    stored = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=sentence):
        load_dequantized(folder)


def test_a_tensor_that_the_model_has_not_is_not_read(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["quantized"], folder)
    stored = load_file(folder / "model.safetensors") | {"junk.weight": torch.ones(8)}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    read: list[str] = []
    load = files.TensorFiles.load
    monkeypatch.setattr(files.TensorFiles, "load", lambda self, name: (read.append(name), load(self, name))[1])
    load_dequantized(folder)
    assert "model.norm.weight" in read and "junk.weight" not in read


TABLES = ["", "AAAA", "/////w==", base64.b64encode(struct.pack("<I", 9) + bytes(8)).decode(), "no base64", 5, None]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_table_that_aborts_the_process(tmp_path: Path, table: object, depth: int) -> None:
    """tokenizers believes its first four bytes, allocates so much, and aborts where that fails."""
    normalizer: object = {"type": "Precompiled", "precompiled_charsmap": table}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    folder = save_tiny(tmp_path)
    changed(folder / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(CheckpointError, match="damaged precompiled_charsmap"):
        find_source(folder).tokenizer()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": 5}'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'),
        ("tokenizer_config.json", '{"extra_special_tokens": 7}'),
    ],
)
def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / file).write_text(content)
    (folder / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        find_source(folder).tokenizer()
    assert not (tmp_path / "trapped").exists()


def test_a_template_of_many_megabytes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "chat_template.jinja").write_text("x" * (5 << 20))
    with pytest.raises(CheckpointError, match="no chat template of less than 4 MiB"):
        find_source(folder).tokenizer()


def number(code: str, value: float) -> bytes:
    return struct.pack(f"<{code}", value)


def text(value: str) -> bytes:
    return number("Q", len(value)) + value.encode()


def gguf(settings: bytes = b"", count: int = 0, tensors: int = 0) -> bytes:
    return b"GGUF" + number("I", 3) + number("Q", tensors) + number("Q", count) + settings


GGUFS: list[tuple[str, bytes, str]] = [
    ("empty", b"", "truncated or damaged"),
    ("magic", b"GGML" + bytes(20), "no GGUF file"),
    ("big-endian", b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
    ("settings without end", gguf(count=2**63), "truncated or damaged"),
    ("tensors without end", gguf(tensors=2**63), "truncated or damaged"),
    ("key beyond the end", gguf(number("Q", 2**62), 1), "inside its header"),
    (
        "list without end",
        gguf(text("a") + number("I", 9) + number("I", 0) + number("Q", 2**62), 1),
        "more than 4194304",
    ),
    (
        "list beyond the end",
        gguf(text("a") + number("I", 9) + number("I", 6) + number("Q", 99), 1),
        "inside its header",
    ),
    ("texts beyond the end", gguf(text("a") + number("I", 9) + number("I", 8) + number("Q", 99), 1), "truncated"),
    ("list of lists", gguf(text("a") + number("I", 9) + number("I", 9) + number("Q", 1), 1), "a list of type 9"),
    ("no type", gguf(text("a") + number("I", 99), 1), "a setting of type 99"),
    (
        "many layers",
        gguf(text("llama.block_count") + number("I", 4) + number("I", 2**31), 1),
        "block_count to more than",
    ),
    ("dimensions", gguf(text("a") + number("I", 2**31), 0, 1), "2147483648 dimensions"),
    ("key in no encoding", gguf(number("Q", 1) + b"\xff" + number("I", 0) + b"1", 1), "truncated or damaged"),
]


@pytest.mark.parametrize(("data", "sentence"), [row[1:] for row in GGUFS], ids=[row[0] for row in GGUFS])
def test_gguf_headers(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence):
        check_gguf(tmp_path / "model.gguf")


def test_a_sound_gguf(models: dict[str, Path]) -> None:
    assert check_gguf(models["gguf"] / "model.gguf").tensors == 21
    source = find_source(models["gguf"])
    assert source.tokenizer()("ab cd")["input_ids"]
    assert sum(parameter.numel() for parameter in source.load().parameters()) > 10_000


def test_conversion_reads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """An index, a link and a licence that point away, each by itself."""
    (tmp_path / "secret").write_text("{}")
    source = write_small(tmp_path / "in", shard_size=600).path
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "LICENSE").unlink()
    index = source / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    for place in ("../secret", "/etc/passwd", "outliers/model.safetensors"):
        index.write_text(json.dumps({"weight_map": places | {"x": place}}))
        with pytest.raises(CheckpointError, match="not a file of this folder"):
            convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "rounds"), [("float", 50), ("quantized", 50), ("gguf", 25)])
def test_random_damage_within_a_limit_of_memory(models: dict[str, Path], kind: str, rounds: int) -> None:
    """In a process that may take 1 GiB more than it starts with: only sentences, or a model that loads."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretrained.fuzz", models[kind], "0", rounds]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 10, done.stdout
