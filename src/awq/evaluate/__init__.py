"""How good a model is: perplexity, agreement with the float model it was made from, and lm-eval's tasks."""

from awq.evaluate.agreement import Agreement, compare
from awq.evaluate.perplexity import PairedDifference, Perplexity, paired_difference, perplexity
from awq.evaluate.tasks import check_tasks, evaluate_tasks
from awq.evaluate.text import evaluation_tokens

__all__ = [
    "Agreement",
    "PairedDifference",
    "Perplexity",
    "check_tasks",
    "compare",
    "evaluate_tasks",
    "evaluation_tokens",
    "paired_difference",
    "perplexity",
]
