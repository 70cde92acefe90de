"""BERT in use: classification, tagging, matching, retrieval and question answering, from files to fine-tuned models."""

from .data.problems import DataError
from .finetune import Outcome, Sources
from .loop import DivergedError
from .settings import Training
from .table import TASKS, task_named
from .task import Example, Model, Prediction, Task
from .use import Tuned, open_cross_encoder, open_model
from .vectors import Searcher, embed
from .verbs import evaluate, finetune, predict, rerank, search

__all__ = [
    "TASKS",
    "DataError",
    "DivergedError",
    "Example",
    "Model",
    "Outcome",
    "Prediction",
    "Searcher",
    "Sources",
    "Task",
    "Training",
    "Tuned",
    "embed",
    "evaluate",
    "finetune",
    "open_cross_encoder",
    "open_model",
    "predict",
    "rerank",
    "search",
    "task_named",
]
