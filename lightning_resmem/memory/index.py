"""Exact nearest-neighbour search in torch, on any device."""

import torch
from torch import Tensor

# Keys are looked at in groups; the k groups with the smallest minimum must contain the k nearest keys.
_GROUP = 32
# One block of scores: queries x keys.
_QUERY_BLOCK = 256
_KEY_BLOCK = 65536
# Candidates beyond k that are measured again, so that rounding in the scores cannot push a neighbour out.
_SPARE = 16


class ExactIndex:
    """Euclidean k-nearest-neighbour search over all keys.

    A block of scores `|z|^2 - 2 q.z` comes from one matrix product; the candidates it finds are measured again by
    direct differences, so that the distances have no cancellation error. A query whose candidates could have missed a
    neighbour by rounding (huge norms, tiny distances) is searched again by direct differences over all keys.

    Args:
        keys: Shape `(N, D)`, floating point.
    """

    name = "exact"

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        # Distances do not change when everything is moved by the mean; the scores lose fewer digits.
        self._center = keys.mean(dim=0, dtype=torch.float32)
        self._squared_norms = torch.cat([self._centered(block).square().sum(dim=1) for block in keys.split(_KEY_BLOCK)])

    def _centered(self, rows: Tensor) -> Tensor:
        return rows.float() - self._center

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the nearest keys; of equally near ones those at the lowest positions.

        Args:
            queries: Shape `(B, D)`, on the device of the keys.
            k: At most the number of keys.

        Returns:
            Distances `(B, k)`, ascending, float32, and positions `(B, k)`, int64.
        """
        found = [self._search_block(block, k) for block in queries.split(_QUERY_BLOCK)]
        if not found:
            empty = queries.new_empty(0, k, dtype=torch.float32)
            return empty, empty.long()
        return torch.cat([distances for distances, _ in found]), torch.cat([positions for _, positions in found])

    def _search_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        wanted = min(k + _SPARE, len(self.keys))
        centered = self._centered(queries)
        scores = centered.new_empty(len(queries), 0)
        positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self.keys), _KEY_BLOCK):
            keys = self._centered(self.keys[start : start + _KEY_BLOCK])
            norms = self._squared_norms[start : start + _KEY_BLOCK]
            block = torch.addmm(norms, centered, keys.T, alpha=-2)
            block_scores, block_positions = _smallest(block, min(wanted, block.shape[1]))
            scores = torch.cat([scores, block_scores], dim=1)
            positions = torch.cat([positions, block_positions + start], dim=1)
            if scores.shape[1] > wanted:
                scores, best = scores.topk(wanted, dim=1, largest=False)
                positions = positions.gather(1, best)
        distances, positions = self._measured(queries, positions)
        if wanted < len(self.keys):
            unsure = self._unsure(centered, scores, distances[:, k - 1])
            for row in unsure.nonzero()[:, 0].tolist():
                distances[row], positions[row] = self._scan(queries[row], wanted)
        return distances[:, :k].contiguous(), positions[:, :k].contiguous()

    def _measured(self, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """True distances of the candidates, sorted by distance and then by position."""
        positions = positions.sort(dim=1).values
        differences = self.keys[positions].to(queries.dtype) - queries[:, None]  # (b, candidates, D)
        distances, order = torch.linalg.vector_norm(differences.float(), dim=2).sort(dim=1, stable=True)
        return distances, positions.gather(1, order)

    def _unsure(self, centered: Tensor, scores: Tensor, farthest: Tensor) -> Tensor:
        """Queries for which a key that is no candidate might be nearer than the k-th neighbour found."""
        norms = centered.square().sum(dim=1)
        # Standard error bound of the product, with the usual sqrt(D) growth of rounding errors.
        slack = 4 * torch.finfo(torch.float32).eps * self.keys.shape[1] ** 0.5
        rounding = slack * (norms.sqrt() + self._squared_norms.max().sqrt()).square()
        unseen_at_least = (scores.amax(dim=1) + norms - rounding).clamp_min(0).sqrt()
        return farthest > unseen_at_least * (1 + 1e-6)

    def _scan(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys of one query `(D,)` by direct differences in float64."""
        squared = torch.cat(
            [(block.double() - query.double()).square().sum(dim=1) for block in self.keys.split(_KEY_BLOCK)]
        )
        distances, positions = squared.sort(stable=True)
        return distances[:k].sqrt().float(), positions[:k]


def _smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest entries of each row of `scores` `(B, N)`, unsorted, and their columns."""
    queries, width = scores.shape
    groups = width // _GROUP
    if groups < 4 * count:
        return scores.topk(count, dim=1, largest=False, sorted=False)
    grouped = scores[:, : groups * _GROUP].view(queries, groups, _GROUP)
    best = grouped.amin(dim=2).topk(count, dim=1, largest=False, sorted=False).indices  # (B, count)
    candidates = grouped.gather(1, best[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    columns = (best[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(groups * _GROUP, width, device=scores.device).expand(queries, -1)
    candidates = torch.cat([candidates, scores[:, groups * _GROUP :]], dim=1)
    columns = torch.cat([columns, rest], dim=1)
    values, chosen = candidates.topk(count, dim=1, largest=False, sorted=False)
    return values, columns.gather(1, chosen)
