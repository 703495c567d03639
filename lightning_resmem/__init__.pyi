"""ResMem for PyTorch Lightning: a k-nearest-neighbour memory of training residuals, added at prediction time."""

from .callback import ResMemCallback
from .errors import (
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
from .evaluation import Evaluation, Flip
from .explanation import Explanation, explain
from .gate import Gate
from .head import HeadTap
from .influence import Influence, Ranking, label_errors, usefulness
from .memorization import memorize
from .memory.base import Neighbors, Predictions, ResidualMemory
from .memory.faiss_index import FaissIndex
from .memory.local import LocalMemory
from .memory.ray import RayMemory
from .memory.sparse import SparseConfig, SparseValues
from .memory.values import DenseConfig, DenseValues, Values
from .metrics import NegativeFlipRate, NeighborhoodAccuracy, PositiveFlipRate, ResMemMetrics
from .module import ResMemModule
from .params import ResMemParams
from .predictor import ResMemPredictor
from .tasks import Multiclass, Multilabel, Regression, Task
from .tuning import GridTuner, Tuner, TuningResult

__version__: str

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
