"""Checkpoints on the hub: a model card made from the report, and the upload."""

from awq.hub.card import model_card
from awq.hub.upload import Upload, check_access, prepare, push

__all__ = ["Upload", "check_access", "model_card", "prepare", "push"]
