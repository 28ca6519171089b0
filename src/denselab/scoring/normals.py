"""Normal maps in files against normal maps in files."""

from pathlib import Path

from denselab.errors import InputError
from denselab.metrics.normals import NormalScore
from denselab.scoring.count import Scored, Track, count
from denselab.scoring.folders import FileKind, FilePair, match_folders
from denselab.scoring.rasters import FLOAT_SUFFIXES, read_normals

NORMALS = FileKind("normal maps (RGB PNG, .npy or .npz)", "normals", (".png", *FLOAT_SUFFIXES))


def score_normals(pred: Path, gt: Path, jobs: int, allow_missing: bool, track: Track) -> Scored:
    """Angles over two folders. Raises InputError as `match_folders` does, and where no truth is known at all."""
    pairs, unmatched = match_folders(pred, gt, NORMALS, allow_missing)
    total = NormalScore()
    failures = count([(pair.name, pair) for pair in pairs], _count, total, jobs, track)
    figures = total.compute()
    if figures.skipped_images and not figures.images:
        raise InputError(
            f"--gt: {gt}: wanted normals, got only unknown pixels in {figures.skipped_images} files; "
            "(0, 0, 0) means unknown, so check what wrote them"
        )
    return Scored(figures, None, len(pairs) - len(failures), failures, unmatched)


def _count(pair: FilePair) -> NormalScore | str:
    counted = NormalScore()
    try:
        counted.update(read_normals(pair.pred), read_normals(pair.truth))
    except InputError as error:
        return str(error)
    return counted
