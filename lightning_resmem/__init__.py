"""ResMem for PyTorch Lightning: a k-nearest-neighbour memory of training residuals, added at prediction time."""

from lightning_resmem.errors import (
    EmptyMemoryError,
    HeadError,
    InputError,
    MemoryPassError,
    ResMemError,
    ResMemWarning,
    StaleMemoryError,
    StorageError,
)
from lightning_resmem.memory.base import Neighbors, Predictions, ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.values import DenseValues, Values
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Multilabel, Regression, Task

__version__ = "0.1.0"
