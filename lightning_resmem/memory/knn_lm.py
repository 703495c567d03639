"""kNN-LM, the peer of ResMem: `(1 - share) p + share * knn`, from the same neighbours (https://arxiv.org/abs/1911.00172).

It is ResMem with the query's own base prediction in the place of the neighbours': what the memory adds is
`share * (labels - p)` instead of `strength * (labels - neighbours' p)`.
"""

import json
from dataclasses import asdict

from torch import Tensor

from lightning_resmem.functional import combine, whole_residual
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.params import ResMemParams

# In the provenance of a memory: how it is read as kNN-LM.
_KEY = "knn_lm"


def note_knn_lm(memory: ResidualMemory, params: ResMemParams | None) -> None:
    """Keep with a memory how it is best read as kNN-LM, `strength` being the share; None forgets it."""
    memory.provenance.pop(_KEY, None)
    if params is not None:
        memory.provenance[_KEY] = json.dumps(asdict(params))


def knn_lm_params(memory: ResidualMemory) -> ResMemParams | None:
    """How a memory is best read as kNN-LM, where tuning has found that out, and as many are looked up."""
    noted = memory.provenance.get(_KEY)
    params = None if noted is None else ResMemParams(**json.loads(noted))
    return None if params is None or params.k > memory.params.k else params


def predict_knn_lm(memory: ResidualMemory, params: ResMemParams, outputs: Tensor, neighbors: Neighbors) -> Tensor:
    """The prediction of kNN-LM, shape `(B, C)`; the base's own where there is no neighbour.

    Args:
        memory: Filled.
        params: From `knn_lm_params`.
        outputs: What the head returned, shape `(B, C)`.
        neighbors: Of the same rows; at most the `params.k` nearest count.
    """
    base = memory.task.predict(outputs, params.softmax_temperature)
    scale = memory.params.sigma / params.sigma  # `sums` divides by the sigma of the memory
    near = Neighbors(neighbors.distances[:, : params.k] * scale, neighbors.ids[:, : params.k])
    labels = memory.sums(near).labels.to(base.device)
    found = combine(base, whole_residual(labels, labels.sum(dim=1), base), params.strength)
    after = params.combined_temperature
    if after == 1:
        return found
    known = neighbors.distances[:, :1].isfinite().to(base.device)
    return memory.task.tempered(found, base, after).where(known, base)
