"""The upload: what is sent, and every way in which it is refused, against a hub in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from httpx import ConnectError
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from awq.errors import AwqError, CheckpointError, ConfigError
from awq.hub import check_access, prepare, push
from awq.pipeline import recipe
from tests.checkpoint.small import digests, write_raw
from tests.cli.run import refused, run, run_json
from tests.hub.fake import FakeHub, refusal

FILES = {
    "LICENSE",
    "awq_report.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "outliers/model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_everything_arrives_in_one_commit(checkpoint: Path, fake: FakeHub) -> None:
    before = digests(checkpoint)
    upload = prepare(checkpoint, "me/tiny-AWQ")
    assert push(upload) == "https://huggingface.co/me/tiny-AWQ"
    stored = fake.repositories["me/tiny-AWQ"]
    assert set(stored) == {*FILES, "README.md"}
    assert all(stored[name] == (checkpoint / name).read_bytes() for name in FILES)
    assert stored["README.md"].decode() == upload.card
    assert fake.commits == 1 and not fake.private
    assert digests(checkpoint) == before


def test_private(checkpoint: Path, fake: FakeHub) -> None:
    push(prepare(checkpoint, "team/tiny-AWQ"), private=True)
    assert fake.private == {"team/tiny-AWQ"}
    push(prepare(checkpoint, "team/tiny-AWQ"), private=True)


def test_pushed_again_leaves_no_stale_weights(checkpoint: Path, fake: FakeHub) -> None:
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"", "awq_report.json": b""}
    fake.repositories["me/x"] = {**stale, "notes.md": b"mine"}
    push(prepare(checkpoint, "me/x"))
    assert set(fake.repositories["me/x"]) == {*FILES, "README.md", "notes.md"}


def test_code_and_hidden_files_stay_here(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    for name in ("modeling.py", "weights.bin", ".env", ".git/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    upload = prepare(folder, "me/x")
    assert set(upload.files) == FILES
    assert set(upload.left_out) == {"modeling.py", "weights.bin", ".env", ".git/config.json"}


def test_a_link_out_of_the_folder_is_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    for name in ("notes.txt", "README.md"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            prepare(tmp_path / "model", "me/x")
        (tmp_path / "model" / name).unlink()


@pytest.mark.parametrize("repo", ["", "x", "a/b/c", "me/a b", "me/..", "/x", "me/", "me/" + "a" * 200])
def test_ids_that_are_none(checkpoint: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match=r"repository id|owner/name"):
        prepare(checkpoint, repo)


def test_folders_that_are_not_finished(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no awq_report\.json, which a finished run leaves"):
        prepare(write_raw(tmp_path / "foreign"), "me/x")
    shutil.copytree(checkpoint, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        prepare(tmp_path / "half", "me/x")
    (tmp_path / "half" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        prepare(tmp_path / "half", "me/x")


FAILURES = [
    ("whoami", LocalTokenNotFoundError("no token"), "hf auth login"),
    ("whoami", refusal(401), "does not know your token"),
    ("whoami", ConnectError("name resolution failed"), r"cannot be reached \(name resolution failed\)"),
    ("whoami", OfflineModeIsEnabled("offline"), "cannot be reached"),
    ("repo_exists", refusal(503, "sleepy"), r"\(sleepy\)"),
]


@pytest.mark.parametrize(("method", "error", "sentence"), FAILURES)
def test_failures_before_long_work(fake: FakeHub, method: str, error: Exception, sentence: str) -> None:
    fake.fails = {method: error}
    with pytest.raises(AwqError, match=sentence):
        check_access("me/x")


@pytest.mark.parametrize(
    ("method", "error", "sentence"),
    [
        *FAILURES,
        ("create_repo", refusal(403), "may not write to me/x"),
        ("create_commit", refusal(403), "may not write to me/x"),
        ("create_commit", refusal(500), r"did not take me/x \(status 500\): run the same again"),
        ("create_commit", ConnectError("gone"), "cannot be reached"),
        ("create_commit", OSError("disk"), "cannot be reached"),
    ],
)
def test_failures_of_the_upload(checkpoint: Path, fake: FakeHub, method: str, error: Exception, sentence: str) -> None:
    fake.fails = {method: error}
    with pytest.raises(AwqError, match=sentence):
        push(prepare(checkpoint, "me/x"))
    assert fake.commits == 0


def test_repositories_that_are_not_written_to(fake: FakeHub) -> None:
    with pytest.raises(AwqError, match="belongs to another: your token writes for me, team"):
        check_access("them/x")
    fake.repositories = {"me/float": {"model.safetensors": b""}, "me/empty": {".gitattributes": b""}}
    with pytest.raises(AwqError, match="holds another model"):
        check_access("me/float")
    with pytest.raises(AwqError, match="is public"):
        check_access("me/empty", private=True)
    check_access("me/empty")
    check_access("me/new", private=True)


def test_dry_run_sends_nothing(checkpoint: Path, fake: FakeHub) -> None:
    fake.fails = {"whoami": AssertionError("asked")}
    shown = run("push", checkpoint, "me/tiny-AWQ", "--dry-run")
    assert shown.exit_code == 0 and "# tiny-AWQ" in shown.stdout and "outliers/model.safetensors" in shown.stdout
    found = run_json("push", checkpoint, "me/tiny-AWQ", "--dry-run", "--base-model", "them/tiny")
    assert set(found["files"]) == FILES and "base_model: them/tiny" in found["card"] and found["url"] is None
    assert not fake.repositories


def test_the_command(checkpoint: Path, fake: FakeHub) -> None:
    shown = run("push", checkpoint, "me/tiny-AWQ", "--private")
    assert shown.exit_code == 0 and "https://huggingface.co/me/tiny-AWQ" in shown.stdout
    assert fake.private == {"me/tiny-AWQ"}
    fake.fails = {"whoami": LocalTokenNotFoundError("no token")}
    assert "hf auth login" in refused("push", checkpoint, "me/tiny-AWQ")
    assert "is not a folder" in refused("push", "absent", "me/tiny-AWQ")


SETTINGS = (
    "--calibration",
    "prose",
    "--group-size",
    32,
    "--samples",
    4,
    "--seq-len",
    64,
    "--effort",
    "fast",
    "--device",
    "cpu",
)


def test_quantize_and_push(tiny_source: Path, tmp_path: Path, fake: FakeHub) -> None:
    target = ("--output", tmp_path / "out", "--push-to-hub", "me/tiny-AWQ", "--private")
    found = run_json("quantize", tiny_source, *target, *SETTINGS)
    assert found["url"] == "https://huggingface.co/me/tiny-AWQ"
    assert "license_name: tiny-licence" in fake.repositories["me/tiny-AWQ"]["README.md"].decode()
    again = run_json("quantize", tiny_source, *target, *SETTINGS)
    assert again["already_complete"] and fake.commits == 2


def test_access_is_checked_before_the_work(
    tiny_source: Path, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "quantize_blocks", None)  # no long work
    target = ("--output", tmp_path / "out", "--push-to-hub", "them/x")
    assert "belongs to another" in refused("quantize", tiny_source, *target, *SETTINGS)
    fake.fails = {"whoami": LocalTokenNotFoundError("no token")}
    assert "hf auth login" in refused("quantize", tiny_source, *target, *SETTINGS)
    assert not (tmp_path / "out").exists()
