"""Upload a finished checkpoint to the hub, in one commit, with its model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from awq.checkpoint.files import REPORT_FILE, inside
from awq.checkpoint.read import open_checkpoint
from awq.errors import AwqError, CheckpointError, ConfigError
from awq.hub.card import model_card

CARD_FILE = "README.md"
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
_STARTS = (CARD_FILE, "LICENSE", "NOTICE")
_WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True)
class Upload:
    """What will lie in the repository: the card, and the files by their names there.

    left_out: files of the folder that are not uploaded, such as code
    """

    repo: str
    card: str
    files: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())


def prepare(folder: str | Path, repo: str, base_model: str | None = None) -> Upload:
    """Check the folder and make its card; nothing is sent.

    A README.md of the folder is used as it is. ConfigError for an id that is none, CheckpointError for a folder that is
    damaged, unfinished or of another tool.
    """
    _check_id(repo)
    checkpoint = open_checkpoint(folder)
    report = checkpoint.report
    if report is None:
        raise CheckpointError(
            f"{checkpoint.path} has no {REPORT_FILE}, which a finished run leaves: quantize it again, or convert it."
        )
    names = sorted(path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*"))
    names = [name for name in names if (checkpoint.path / name).is_file() and name != CARD_FILE]
    files = {name: inside(checkpoint.path, name) for name in names if _is_uploaded(name)}
    size = sum(path.stat().st_size for path in files.values())
    own = inside(checkpoint.path, CARD_FILE)
    card = own.read_text("utf-8") if own.is_file() else model_card(checkpoint, report, repo, size, base_model)
    return Upload(repo, card, files, tuple(name for name in names if name not in files))


def check_access(repo: str, private: bool = False) -> None:
    """Whether the repository can be written to, before long work; AwqError with the reason where it cannot.

    A repository that holds something else than a checkpoint of this package is not written to, nor is a public one
    where `private` is asked for.
    """
    _check_id(repo)
    with _in_one_sentence(repo):
        _find_repository(HfApi(), repo, private)


def push(upload: Upload, private: bool = False) -> str:
    """Send everything in one commit, which also removes weights that an earlier one left there; returns the address."""
    api = HfApi()
    with _in_one_sentence(upload.repo):
        old = _find_repository(api, upload.repo, private)
        if old is None:
            api.create_repo(upload.repo, private=private or None, exist_ok=True)
        stale = [name for name in old or () if name.endswith(_WEIGHTS) and name not in upload.files]
        done = api.create_commit(
            upload.repo,
            [
                CommitOperationAdd(CARD_FILE, upload.card.encode()),
                *(CommitOperationAdd(name, path) for name, path in upload.files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message="AWQ checkpoint",
        )
    return str(done.repo_url)


def _find_repository(api: HfApi, repo: str, private: bool) -> list[str] | None:
    """The names of the files that the repository holds, None where there is none yet."""
    me = api.whoami()
    owners = [str(me["name"]), *(str(group["name"]) for group in me.get("orgs", ()))]
    if repo.partition("/")[0] not in owners:
        raise AwqError(f"{repo} belongs to another: your token writes for {', '.join(owners)}.")
    if not api.repo_exists(repo):
        return None
    if private and not api.model_info(repo).private:
        raise AwqError(f"{repo} exists and is public: choose another name, or make it private on its page first.")
    names = list(api.list_repo_files(repo))
    if any(name.endswith(_WEIGHTS) for name in names) and REPORT_FILE not in names:
        raise AwqError(f"{repo} holds another model already: choose another name.")
    return names


def _check_id(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no repository id ({error})") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo!r} has no owner: give the repository as owner/name.")


def _is_uploaded(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and (name.endswith(_SUFFIXES) or name.startswith(_STARTS))


@contextmanager
def _in_one_sentence(repo: str) -> Iterator[None]:
    try:
        yield
    except AwqError:
        raise
    except LocalTokenNotFoundError:
        raise AwqError(
            "the hub asks who you are: run `hf auth login`, or set HF_TOKEN to a token that writes."
        ) from None
    except HfHubHTTPError as error:
        raise AwqError(_refusal(repo, error)) from error
    except (HTTPError, OSError) as error:
        raise AwqError(
            f"the hub cannot be reached ({error}): check the connection, then run the same again."
        ) from error


def _refusal(repo: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub does not know your token: run `hf auth login` again, or set HF_TOKEN to a token that writes."
    if status == 403:
        return f"your token may not write to {repo}: make one that does on the hub's settings page."
    reason = error.server_message or f"status {status}"
    return f"the hub did not take {repo} ({reason}): run the same again, which sends only what is missing."
