"""Checkpoint folders: any AWQ layout is read, the gemm layout is written."""

from awq.checkpoint.output import check_output, finished_recipe
from awq.checkpoint.read import Checkpoint, open_checkpoint
from awq.checkpoint.write import Written, write_checkpoint

__all__ = [
    "Checkpoint",
    "Written",
    "check_output",
    "finished_recipe",
    "open_checkpoint",
    "write_checkpoint",
]
