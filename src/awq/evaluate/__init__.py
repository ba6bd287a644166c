"""How good a model is: perplexity, and agreement with the float model it was made from."""

from awq.evaluate.agreement import Agreement, compare
from awq.evaluate.perplexity import PairedDifference, Perplexity, paired_difference, perplexity
from awq.evaluate.text import evaluation_tokens

__all__ = [
    "Agreement",
    "PairedDifference",
    "Perplexity",
    "compare",
    "evaluation_tokens",
    "paired_difference",
    "perplexity",
]
