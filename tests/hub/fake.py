"""A hub in memory, with the part of HfApi that is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from httpx import Request, Response
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError


def refusal(status: int, message: str | None = None) -> HfHubHTTPError:
    response = Response(status, request=Request("POST", "https://huggingface.co/api"))
    return HfHubHTTPError("refused", response=response, server_message=message)


@dataclass
class FakeHub:
    """Repositories by id: their files, and which are private. `fails` is raised by the method of that name."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    fails: dict[str, Exception] = field(default_factory=dict)
    commits: int = 0

    def __call__(self) -> FakeHub:
        return self

    def _call(self, name: str) -> None:
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict[str, Any]:
        self._call("whoami")
        return {"name": "me", "orgs": [{"name": "team"}]}

    def repo_exists(self, repo: str) -> bool:
        self._call("repo_exists")
        return repo in self.repositories

    def model_info(self, repo: str) -> Any:
        return SimpleNamespace(private=repo in self.private)

    def list_repo_files(self, repo: str) -> list[str]:
        return list(self.repositories[repo])

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        self._call("create_repo")
        self.repositories.setdefault(repo, {})
        self.private |= {repo} if private else set()

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str) -> Any:
        self._call("create_commit")
        files = self.repositories[repo]
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                content = operation.path_or_fileobj
                files[operation.path_in_repo] = (
                    content if isinstance(content, bytes) else Path(str(content)).read_bytes()
                )
        self.commits += 1
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo}")
