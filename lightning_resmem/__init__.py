"""ResMem for PyTorch Lightning: a k-nearest-neighbour memory of training residuals, added at prediction time."""

from lightning_resmem.callback import ResMemCallback
from lightning_resmem.errors import (
    EmptyMemoryError,
    HeadError,
    InputError,
    MemoryPassError,
    ResMemError,
    ResMemWarning,
    ShardUnavailableError,
    StaleMemoryError,
    StorageError,
)
from lightning_resmem.evaluation import Evaluation, Flip
from lightning_resmem.explain import Explanation, explain
from lightning_resmem.gate import Gate
from lightning_resmem.head import HeadTap
from lightning_resmem.influence import Influence, Ranking, label_errors, usefulness
from lightning_resmem.memorize import memorize
from lightning_resmem.memory.base import Neighbors, Predictions, ResidualMemory
from lightning_resmem.memory.faiss_index import FaissIndex
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.ray import RayMemory
from lightning_resmem.memory.sparse import SparseConfig, SparseValues
from lightning_resmem.memory.values import DenseConfig, DenseValues, Values
from lightning_resmem.metrics import NegativeFlipRate, NeighborhoodAccuracy, PositiveFlipRate, ResMemMetrics
from lightning_resmem.module import ResMemModule
from lightning_resmem.params import ResMemParams
from lightning_resmem.predictor import ResMemPredictor
from lightning_resmem.tasks import Multiclass, Multilabel, Regression, Task
from lightning_resmem.tuning import GridTuner, Tuner, TuningResult

__version__ = "0.1.0"

__all__ = [
    "DenseConfig",
    "DenseValues",
    "EmptyMemoryError",
    "Evaluation",
    "Explanation",
    "FaissIndex",
    "Flip",
    "Gate",
    "GridTuner",
    "HeadError",
    "HeadTap",
    "Influence",
    "InputError",
    "LocalMemory",
    "MemoryPassError",
    "Multiclass",
    "Multilabel",
    "NegativeFlipRate",
    "NeighborhoodAccuracy",
    "Neighbors",
    "PositiveFlipRate",
    "Predictions",
    "Ranking",
    "RayMemory",
    "Regression",
    "ResMemCallback",
    "ResMemError",
    "ResMemMetrics",
    "ResMemModule",
    "ResMemParams",
    "ResMemPredictor",
    "ResMemWarning",
    "ResidualMemory",
    "ShardUnavailableError",
    "SparseConfig",
    "SparseValues",
    "StaleMemoryError",
    "StorageError",
    "Task",
    "Tuner",
    "TuningResult",
    "Values",
    "explain",
    "label_errors",
    "memorize",
    "usefulness",
]
