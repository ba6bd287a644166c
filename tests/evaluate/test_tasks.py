"""lm-eval's tasks, by a stand-in for the package, and by the package itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from awq.errors import ConfigError, MissingDependencyError
from awq.evaluate import check_tasks, evaluate_tasks
from tests.tiny import byte_tokenizer, tiny_llama

TASK = """
task: vowels
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: ["a", "x"]
metric_list: [{{metric: acc}}]
"""


class Harness:
    """Stands in for lm_eval: notes what it is asked, answers as it does."""

    def __init__(self, patch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.asked: dict[str, Any] = {}
        self.failure = failure
        tasks, models = ModuleType("lm_eval.tasks"), ModuleType("lm_eval.models.huggingface")
        tasks.TaskManager = type("Manager", (), {"all_tasks": ["hellaswag", "arc_easy"]})  # type: ignore[attr-defined]
        models.HFLM = lambda **settings: settings  # type: ignore[attr-defined]
        package = ModuleType("lm_eval")
        package.simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        for name, module in (("lm_eval", package), (tasks.__name__, tasks), (models.__name__, models)):
            patch.setitem(sys.modules, name, module)

    def evaluate(self, **settings: Any) -> Any:
        self.asked = settings
        if self.failure:
            raise self.failure
        scores = {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.1, "em,strict": 1.0, "bleu,none": "N/A"}
        return {"results": {"hellaswag": scores | {"sample_len": 4}}, "versions": {}}


def test_scores_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    harness, model, tokenizer = Harness(monkeypatch), tiny_llama(), byte_tokenizer()
    found = evaluate_tasks(model, tokenizer, ["hellaswag"], limit=4)
    assert found == {"hellaswag": {"acc": 0.25, "acc_stderr": 0.1, "em,strict": 1.0}}
    assert harness.asked["tasks"] == ["hellaswag"]
    assert harness.asked["limit"] == 4
    assert harness.asked["model"]["pretrained"] is model
    assert harness.asked["model"]["tokenizer"] is tokenizer


def test_an_unknown_task_is_named_with_those_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Harness(monkeypatch)
    with pytest.raises(ConfigError, match=r"no task 'helaswag': did you mean hellaswag\?"):
        check_tasks(["arc_easy", "helaswag"])
    with pytest.raises(ConfigError, match="see `lm-eval ls tasks`"):
        check_tasks(["zzz"])


def test_data_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    Harness(monkeypatch, ConnectionError("Couldn't reach the Hub.\nmore"))
    with pytest.raises(ConfigError, match=r"the data of arc_easy cannot be loaded \(Couldn't reach the Hub\)"):
        evaluate_tasks(tiny_llama(), byte_tokenizer(), ["arc_easy"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "awq-int4\[eval\]"'):
        check_tasks(["hellaswag"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_package_itself_on_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"question": f"{letter} is like", "answer": i % 2} for i, letter in enumerate("bcdfgh")]
    data, task = tmp_path / "questions.jsonl", tmp_path / "vowels.yaml"
    data.write_text("\n".join(map(json.dumps, questions)))
    task.write_text(TASK.format(data=data))
    found = evaluate_tasks(tiny_llama(), byte_tokenizer(), [str(task)])
    (scores,) = found.values()
    assert scores["acc"] in [n / 6 for n in range(7)]
    assert scores.keys() >= {"acc", "acc_stderr"}
