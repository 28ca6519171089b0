"""COCO panoptic JSON and PNGs against the same."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from denselab.errors import InputError
from denselab.metrics.panoptic import PanopticScore
from denselab.scoring.coco_files import Categories, PanopticImage, check_same_categories, read_categories, read_json
from denselab.scoring.coco_files import read_panoptic as read_images
from denselab.scoring.count import Scored, Track, count
from denselab.scoring.folders import refuse_unmatched
from denselab.scoring.rasters import read_segment_ids
from denselab.segments import Segment, Segments


@dataclass(frozen=True)
class PanopticFiles:
    """A panoptic JSON and the folder of its PNGs; None: the path of the JSON without its suffix, as in COCO."""

    json: Path
    masks: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the PNGs are."""
        return self.json.with_suffix("") if self.masks is None else self.masks


def score_panoptic(
    pred: PanopticFiles, gt: PanopticFiles, boundary: bool, jobs: int, allow_missing: bool, track: Track
) -> Scored:
    """Panoptic quality and Parsing Covering over two COCO panoptic files; the classes are the categories of the truth.

    Areas are those of the pixels; panopticapi takes a true segment's from the JSON, which says the same in whole files.
    Raises InputError for files that are no such files, for other categories, and for images without a partner unless
    they are allowed.
    """
    truth_data = read_json("--gt", gt.json)
    pred_data = read_json("--pred", pred.json)
    categories = read_categories("--gt", gt.json, truth_data)
    truths = read_images("--gt", gt.json, truth_data, gt.folder)
    preds = read_images("--pred", pred.json, pred_data, pred.folder)
    check_same_categories(pred.json, pred_data, gt.json, categories)
    unmatched = [f"image {image_id} of {gt.json}" for image_id in truths if image_id not in preds]
    unmatched += [f"image {image_id} of {pred.json}" for image_id in preds if image_id not in truths]
    refuse_unmatched("images", unmatched, allow_missing)
    pairs = [(preds[image_id], truth) for image_id, truth in truths.items() if image_id in preds]
    if not pairs:
        raise InputError(f"--pred: {pred.json}: wanted predictions for the images of {gt.json}, got none for any")
    total = PanopticScore(len(categories.ids), categories.things, boundary, covering=True)
    counting = partial(_count, categories=categories, boundary=boundary)
    named = [(f"image {truth.image_id}", (pred, truth)) for pred, truth in pairs]
    failures = count(named, counting, total, jobs, track)
    return Scored(total.compute(), categories.names, len(pairs) - len(failures), failures, unmatched)


def _count(pair: tuple[PanopticImage, PanopticImage], categories: Categories, boundary: bool) -> PanopticScore | str:
    pred_image, truth_image = pair
    counted = PanopticScore(len(categories.ids), categories.things, boundary, covering=True)
    try:
        pred, truth = (_segments(image, categories) for image in pair)
    except InputError as error:
        return str(error)
    try:
        matches = counted.update(pred, truth)
        if matches.unseen_ids:
            raise InputError(
                f"truth: wanted pixels of every segment, got none of {', '.join(map(str, matches.unseen_ids[:8]))}; "
                "remove those segments from the JSON"
            )
    except InputError as error:
        return f"{error} (prediction: {pred_image.png}, truth: {truth_image.png})"
    return counted


def _segments(image: PanopticImage, categories: Categories) -> Segments:
    classes = categories.classes()
    unknown = [segment for segment in image.segments if segment.category_id not in classes]
    if unknown:
        shown = ", ".join(f"{segment.category_id} (segment {segment.id})" for segment in unknown[:8])
        raise InputError(
            f"{image.png}: wanted categories of the truth, got {shown}; list them in --gt, or renumber them"
        )
    segments = [Segment(each.id, classes[each.category_id], is_crowd=each.is_crowd) for each in image.segments]
    return Segments(read_segment_ids(image.png)[None], tuple(segments))
