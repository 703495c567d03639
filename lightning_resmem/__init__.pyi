"""ResMem for PyTorch Lightning: a k-nearest-neighbour memory of training residuals, added at prediction time."""

from .callback import ResMemCallback
from .cluster.memory import RayMemory
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
from .explanation.influence import Influence, Ranking, influence, usefulness
from .explanation.label_errors import label_errors
from .explanation.neighbors import Explanation, explain
from .explanation.passages import passages
from .memorization import memorize
from .memory.answers import Neighbors, Predictions
from .memory.interface import ResidualMemory
from .memory.local import LocalMemory
from .memory.search.faiss_index import FaissIndex
from .memory.values.dense import DenseConfig, DenseValues
from .memory.values.interface import Values
from .memory.values.sparse import SparseConfig, SparseValues
from .metrics.binned import NeighborhoodAccuracy
from .metrics.evaluation import Evaluation, Flip
from .metrics.side_by_side import ResMemMetrics
from .metrics.sums import NegativeFlipRate, PositiveFlipRate
from .metrics.tokens import BitsPerByte
from .model.head import HeadTap
from .module import ResMemModule
from .params import Gate, ResMemParams
from .predictor import ResMemPredictor
from .tasks import Multiclass, Multilabel, Regression, Task
from .tuning.result import TuningResult
from .tuning.tuner import GridTuner, Tuner

__version__: str

__all__ = [
    "BitsPerByte",
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
    "influence",
    "label_errors",
    "memorize",
    "passages",
    "usefulness",
]
