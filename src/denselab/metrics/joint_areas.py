"""How many pixels two maps of segments share, pair by pair: what their scores are counted from."""

import numpy as np
from numpy.typing import NDArray

JointAreas = dict[tuple[int, int], int]
"""Pixels by (true id, predicted id)."""


def joint_areas(truth_ids: NDArray[np.int32], pred_ids: NDArray[np.int32]) -> JointAreas:
    """Pixels of every pair (true id, predicted id) that meets in the id maps [H, W].

    Maps of segments are long runs of one pair, so only the runs are sorted, not the pixels.
    """
    truth, pred = truth_ids.ravel(), pred_ids.ravel()
    last = np.append(np.flatnonzero((truth[1:] != truth[:-1]) | (pred[1:] != pred[:-1])), truth.size - 1)
    lengths_px = np.diff(last, prepend=-1)
    codes = (truth.take(last).astype(np.int64) << 32) + pred.take(last)
    by_pair = codes.argsort(kind="stable")
    codes = codes.take(by_pair)
    first = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    areas_px = np.add.reduceat(lengths_px.take(by_pair), first)
    pred_of_pair = codes.take(first).astype(np.int32)
    truth_of_pair = (codes.take(first) - pred_of_pair) >> 32
    pairs = zip(truth_of_pair.tolist(), pred_of_pair.tolist(), strict=True)
    return dict(zip(pairs, areas_px.tolist(), strict=True))
