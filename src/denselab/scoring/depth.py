"""Depth maps in files against depth maps in files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from denselab.errors import InputError
from denselab.metrics.depth import Align, DepthScore
from denselab.scoring.count import Scored, Track, count
from denselab.scoring.folders import FileKind, FilePair, match_folders
from denselab.scoring.rasters import FLOAT_SUFFIXES, read_depth

DEPTHS = FileKind("depth maps (16-bit PNG, .npy or .npz)", "depth", (".png", *FLOAT_SUFFIXES))


@dataclass(frozen=True)
class DepthScale:
    """What stored numbers mean. true_m: metres per unit of integers, floats are metres; pred_m: metres per unit of the
    predictions, whatever they are stored as, or None for the same as the truth (of inverse depths, which are in no
    unit: as stored); invalid: stored true values that are unknown besides 0."""

    true_m: float | None = None
    pred_m: float | None = None
    invalid: tuple[float, ...] = ()


def score_depth(
    pred: Path,
    gt: Path,
    scale: DepthScale,
    min_m: float,
    max_m: float,
    how: Align,
    jobs: int,
    allow_missing: bool,
    track: Track,
) -> Scored:
    """Depth errors over two folders. Raises InputError as `match_folders` does, and where no truth is known at all."""
    pairs, unmatched = match_folders(pred, gt, DEPTHS, allow_missing)
    total = DepthScore(min_m, max_m, how)
    counting = partial(_count, scale=scale, min_m=min_m, max_m=max_m, how=how)
    failures = count([(pair.name, pair) for pair in pairs], counting, total, jobs, track)
    figures = total.compute()
    if figures.skipped_images and not figures.images:
        raise InputError(
            f"--gt: {gt}: wanted depths between {min_m:g} and {max_m:g} m, got none in {figures.skipped_images} files; "
            "check --scale (metres per unit), --invalid, --min-depth and --max-depth"
        )
    settings = {
        "scale": scale.true_m,
        "pred_scale": scale.pred_m,
        "invalid": list(scale.invalid),
        "min_depth": min_m,
        "max_depth": max_m,
        "align": how.value,
    }
    return Scored(figures, None, len(pairs) - len(failures), failures, unmatched, settings)


def _count(pair: FilePair, scale: DepthScale, min_m: float, max_m: float, how: Align) -> DepthScore | str:
    counted = DepthScore(min_m, max_m, how)
    pred_m = 1.0 if scale.pred_m is None and how is Align.INVERSE else scale.pred_m
    integer_m, float_m = (scale.true_m, 1.0) if pred_m is None else (pred_m, pred_m)
    try:
        pred = read_depth(pair.pred, integer_m, float_m)
        counted.update(pred, read_depth(pair.truth, scale.true_m, invalid=scale.invalid))
    except InputError as error:
        return str(error)
    return counted


def parse_invalid(texts: Sequence[str]) -> tuple[float, ...]:
    """The numbers of --invalid. Raises InputError for anything else."""
    try:
        return tuple(sorted({float(text) for text in texts if text.strip()}))
    except ValueError as error:
        raise InputError(
            f"--invalid: wanted stored values separated by commas, such as 0,65535, got {','.join(texts)!r}"
        ) from error
