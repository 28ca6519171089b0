"""The five tasks: what each asks of a head, its loss, and the answer that an artifact gives."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from denselab.classes import VOID, Classes
from denselab.errors import InputError
from denselab.losses.depth import DepthLossWeights, depth_loss
from denselab.losses.normals import normals_loss
from denselab.losses.pixel import LossWeights, cross_entropy, pixel_loss
from denselab.losses.remax import ReMax
from denselab.runtime.artifact import TASKS
from denselab.tasks import depth, instance, normals, panoptic, semantic
from denselab.tasks.grouping import GroupingRules, group_centres, instances_of_centres
from denselab.tasks.segment_loss import Loss, class_maps, segment_loss, segments_of_classes
from denselab.types import HeadSpec, QueryOutput, SegmentTargets, Targets, ValueKind

Hw = tuple[int, int]

AUX_WEIGHT = 0.4
"""Of per-pixel auxiliary classifiers (PSPNet, Zhao et al. 2017, section 4; OCR takes the same)."""


class Task(Protocol):
    """One dense task. name: as in `--task`."""

    name: str

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """What training minimises; targets at the size of the images."""
        ...

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """The answer at source size, in the order of `outputs_of` and in operations that export.

        network_hw: see `at_source`.
        """
        ...


@dataclass(frozen=True)
class SemanticTask:
    """A class for every pixel. class_weights: [K] of the cross entropy. class_loss: None: as published."""

    num_classes: int
    class_loss: LossWeights | None = None
    class_weights: Tensor | None = None
    name = "semantic"

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """Of pixels; of masks where the head says classes of masks."""
        assert targets.class_ids is not None
        if spec.value_kind in (ValueKind.CLASS_LOGITS, ValueKind.CENTRE_OFFSET):
            segments = segments_of_classes(targets.class_ids, self.num_classes)
            return segment_loss(output, spec, segments, targets.class_ids, (), class_loss=self.class_loss)
        size_hw = (targets.class_ids.shape[-2], targets.class_ids.shape[-1])
        weights = None if self.class_weights is None else self.class_weights.to(output.mask_logits.device)
        logits = semantic.logits_at_source(output, spec, size_hw)
        total, parts = pixel_loss(logits, targets.class_ids, self.class_loss or LossWeights(), VOID, weights)
        for aux, aux_spec in zip(output.aux, spec.aux, strict=bool(output.aux)):
            aux_logits = semantic.logits_at_source(aux, aux_spec, size_hw)
            total = total + AUX_WEIGHT * cross_entropy(aux_logits, targets.class_ids, VOID, weights)
        return total, parts

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """class_ids uint8 [B, H, W]."""
        return (semantic.decode(output, spec, size_hw, network_hw),)


@dataclass(frozen=True)
class PanopticTask:
    """A segment for every pixel. things: ids of the classes whose objects are told apart.

    class_loss: of the classes per pixel, for heads of centres and offsets; None: as published.
    """

    num_classes: int
    things: tuple[int, ...]
    rules: panoptic.MergeRules = field(default_factory=panoptic.MergeRules)
    remax: ReMax | None = None
    class_loss: LossWeights | None = None
    grouping: GroupingRules = field(default_factory=GroupingRules)
    name = "panoptic"

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """See `segment_loss`."""
        assert targets.segments is not None
        class_ids = class_maps(targets.segments)
        return segment_loss(output, spec, targets.segments, class_ids, self.things, self.remax, self.class_loss)

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """panoptic_ids int32 [B, H, W], 0 void and n for slot n - 1; classes int32 and scores [B, S] of the slots."""
        if spec.value_kind is not ValueKind.CENTRE_OFFSET:
            return panoptic.decode(output, spec, size_hw, self.things, self.rules, network_hw)
        ids, classes, scores = group_centres(output, spec, network_hw or size_hw, self.things, self.grouping)
        return (ids if network_hw is None else _nearest(ids[:, None], size_hw)[:, 0]), classes, scores


@dataclass(frozen=True)
class InstanceTask:
    """Every object by itself. The head has one class more than there are, the last: background.

    things: ids of the classes that have objects. class_loss: as that of `PanopticTask`.
    """

    num_classes: int
    things: tuple[int, ...]
    rules: instance.InstanceRules = field(default_factory=instance.InstanceRules)
    remax: ReMax | None = None
    class_loss: LossWeights | None = None
    grouping: GroupingRules = field(default_factory=GroupingRules)
    name = "instance"

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """That of panoptic segmentation, with what is no object as one segment of stuff."""
        assert targets.segments is not None
        segments = tuple(map(self._with_background, targets.segments))
        return segment_loss(output, spec, segments, class_maps(segments), self.things, self.remax, self.class_loss)

    def _with_background(self, segments: SegmentTargets) -> SegmentTargets:
        if segments.void is None:
            return segments
        background = ~segments.masks.any(dim=0) & ~segments.void
        if not background.any():
            return segments
        class_id = segments.class_ids.new_full((1,), self.num_classes)
        return SegmentTargets(
            torch.cat([segments.masks, background[None]]), torch.cat([segments.class_ids, class_id]), segments.void
        )

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """masks uint8 [B, N, H, W] of 0 and 1, classes int32 [B, N], scores [B, N], best first."""
        if spec.value_kind is not ValueKind.CENTRE_OFFSET:
            return instance.decode(output, spec, size_hw, self.things, self.rules, network_hw)
        masks, classes, scores = instances_of_centres(
            output, spec, network_hw or size_hw, self.things, self.grouping, self.rules.max_instances
        )
        return (masks if network_hw is None else _nearest(masks, size_hw)), classes, scores


@dataclass(frozen=True)
class DepthTask:
    """Metres along the optical axis for every pixel."""

    loss_weights: DepthLossWeights = field(default_factory=DepthLossWeights)
    name = "depth"

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """See `depth_loss`; of the outputs of earlier layers too."""
        known = targets.depth_m
        assert known is not None
        size_hw = (known.shape[-2], known.shape[-1])
        total, parts = depth_loss(depth.depth_m(output, spec, size_hw), known, self.loss_weights)
        for aux, aux_spec in zip(output.aux, spec.aux, strict=bool(output.aux)):
            total = total + depth_loss(depth.depth_m(aux, aux_spec, size_hw), known, self.loss_weights)[0]
        return total, parts

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """depth_m float32 [B, H, W]."""
        return (depth.depth_m(output, spec, size_hw, network_hw),)


@dataclass(frozen=True)
class NormalsTask:
    """A unit vector for every pixel: x right, y down, z forward."""

    name = "normals"

    def loss(self, output: QueryOutput, spec: HeadSpec, targets: Targets) -> Loss:
        """See `normals_loss`; of the outputs of earlier layers too."""
        known = targets.normals
        assert known is not None
        size_hw = (known.shape[-2], known.shape[-1])
        total, parts = normals_loss(normals.raw_normals(output, spec, size_hw), known)
        for aux, aux_spec in zip(output.aux, spec.aux, strict=bool(output.aux)):
            total = total + normals_loss(normals.raw_normals(aux, aux_spec, size_hw), known)[0]
        return total, parts

    def decode(
        self, output: QueryOutput, spec: HeadSpec, size_hw: Hw, network_hw: Hw | None = None
    ) -> tuple[Tensor, ...]:
        """normals float32 [B, 3, H, W]."""
        return (normals.normals(output, spec, size_hw, network_hw),)


def make_task(name: str, classes: Classes | None) -> Task:
    """The task of that name over those classes. Raises InputError for another name, or where it lacks classes."""
    match name:
        case "depth":
            return DepthTask()
        case "normals":
            return NormalsTask()
        case "semantic" | "panoptic" | "instance":
            if classes is None:
                raise InputError(f"task: {name} needs classes, got data without; name them in dataset.yaml (names:)")
        case _:
            raise InputError(f"task: wanted one of {', '.join(TASKS)} or some joined by +, got {name!r}")
    match name:
        case "semantic":
            return SemanticTask(len(classes))
        case "panoptic":
            return PanopticTask(len(classes), classes.things)
        case "instance":
            return InstanceTask(len(classes), classes.things or tuple(range(len(classes))))


def _nearest(values: Tensor, size_hw: Hw) -> Tensor:
    return F.interpolate(values.float(), size=size_hw, mode="nearest-exact").to(values.dtype)
