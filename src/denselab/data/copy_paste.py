"""Copy-paste: objects of one image pasted onto another (Ghiasi et al. 2021, section 3)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from denselab.data.sample import Sample


def copy_paste(sample: Sample, source: Sample, things: Sequence[int]) -> Sample:
    """Paste things of `source`, each with probability 1/2, over a sample of the same size that has segments.

    What they cover is cut out of the segments below; segments that vanish are dropped. Depth and normals become
    unknown there: pasted objects have no place in space. Edges are not blurred, which the paper found to matter
    little. things: class ids. Draws from torch's generator.
    """
    assert sample.layers is not None
    assert source.layers is not None
    there = [segment for segment in source.segments if segment.class_id in things and not segment.is_crowd]
    first = max((segment.id for segment in sample.segments), default=0) + 1
    pasted = torch.zeros_like(sample.layers[0])
    classes = torch.zeros_like(source.image[0])
    new = [replace(segment, id=first + place) for place, segment in enumerate(there) if torch.rand(()) < 0.5]
    for segment in new:
        mask = (source.layers == there[segment.id - first].id).any(dim=0)
        pasted = pasted.masked_fill(mask, segment.id)
        classes = classes.masked_fill(mask, segment.class_id)
    covered = pasted > 0
    layers = sample.layers.masked_fill(covered, 0)
    layers[0] += pasted
    seen = set(layers.unique().tolist())
    return replace(
        sample,
        image=torch.where(covered, source.image, sample.image),
        class_ids=None if sample.class_ids is None else torch.where(covered, classes, sample.class_ids),
        layers=layers,
        segments=tuple(segment for segment in (*sample.segments, *new) if segment.id in seen),
        void=None if sample.void is None else sample.void & ~covered,
        depth_m=_without(sample.depth_m, covered),
        normals=_without(sample.normals, covered),
    )


def _without(plane: Tensor | None, covered: Tensor) -> Tensor | None:
    return None if plane is None else plane.masked_fill(covered, 0)
