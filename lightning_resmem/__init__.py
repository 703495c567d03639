"""ResMem for PyTorch Lightning: a k-nearest-neighbour memory of training residuals, added at prediction time."""

import lazy_loader

__version__ = "0.1.0"

# What is exported is in __init__.pyi, and imported when it is first used: an actor of a RayMemory needs neither
# Lightning nor torchmetrics, which take longer to import than all the rest.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
