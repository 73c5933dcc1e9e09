"""The Pareto front: what nothing else beats in every objective. Smaller is better."""

from __future__ import annotations

import numpy as np


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """bool [points]: True where no other point is at least as good in all columns of
    ``costs``, float [points, objectives], and better in one. Equal points stay together.

    Exact. In lexicographic order a point can be beaten only by one before it, and if by any
    then by one of the front so far. Raises ValueError for a figure that is not finite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if costs.ndim != 2 or costs.shape[1] == 0:
        raise ValueError(f"costs are [points, objectives], got {list(costs.shape)}")
    if not np.isfinite(costs).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(costs))[0])
        raise ValueError(f"costs must be finite, got {costs[place]} at {list(place)}")
    on_front = np.zeros(len(costs), dtype=bool)
    front = np.empty_like(costs)
    count = 0
    for index in np.lexsort(costs.T[::-1]):
        point, kept = costs[index], front[:count]
        beaten = (kept <= point).all(axis=1) & (kept < point).any(axis=1)
        if not beaten.any():
            on_front[index] = True
            front[count] = point
            count += 1
    return on_front
