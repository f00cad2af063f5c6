"""Continual learning: tasks that come one after the other, and how much of each is forgotten."""

from jlora.continual.matrix import average_accuracy as average_accuracy
from jlora.continual.matrix import backward_transfer as backward_transfer
from jlora.continual.matrix import forgetting as forgetting
from jlora.continual.matrix import forgetting_matrix as forgetting_matrix

__all__ = ["average_accuracy", "backward_transfer", "forgetting", "forgetting_matrix"]
