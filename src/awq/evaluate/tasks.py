"""Tasks of lm-evaluation-harness (hellaswag, arc_easy, ...), asked of a model in memory."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from awq.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sequences in one forward: scores depend on it in the last digit, so it is the same on every machine.
_BATCH = 8


def check_tasks(tasks: Sequence[str]) -> None:
    """MissingDependencyError without the package, ConfigError for a task that it does not know."""
    known = _manager().all_tasks
    for task in tasks:
        if task not in known and not Path(task).is_file():
            near = ", ".join(difflib.get_close_matches(task, known)) or "see `lm-eval ls tasks`"
            raise ConfigError(f"lm-eval has no task {task!r}: did you mean {near}? A .yaml file of a task works too.")


def evaluate_tasks(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores by task and metric, such as acc and acc_stderr, of a causal model of `transformers` on its own device.

    tasks: names of tasks, groups and tags that lm-eval knows, or .yaml files of tasks; their data are downloaded at
           first use, and ConfigError says where that fails
    limit: only the first examples of each task
    """
    check_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, task_manager=_manager(), log_samples=False
        )
    except OSError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ConfigError(
            f"the data of {', '.join(tasks)} cannot be loaded ({reason}): check the connection, or fill the cache of "
            "`datasets` where there is one."
        ) from error
    return {task: _scores(metrics) for task, metrics in found["results"].items()}


def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingDependencyError(
            'tasks are evaluated by the package lm-eval: run `pip install "awq-int4[eval]"`.'
        ) from None
    return TaskManager()


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result: lm-eval names them "acc,none", the second part being the filter of the answers."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if math.isfinite(value)}
