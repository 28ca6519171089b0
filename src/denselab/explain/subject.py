"""What is explained: a class, a segment, or what is said of one pixel, as cells of the mask grid and a start there."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from denselab.classes import Classes
from denselab.compress.relevance.start import Dense, depth, normals
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.explain.question import Asked, AtPoint, Largest, OfClass
from denselab.tasks.blend import mask_probs
from denselab.tasks.semantic import class_scores
from denselab.types import HeadSpec, QueryOutput, ValueKind

SURE_SCORE = 0.5
"""Instances of at least this score count as seen; the best one where none has it."""

_SHOWN_CLASSES = 40


@dataclass(frozen=True)
class Subject:
    """text: what is explained, in words. cells: bool [h, w], where on the mask grid it is said. component: its class
    id; None where the answer has no classes. note: what a user should know.
    """

    text: str
    cells: Bool[Tensor, "h w"]
    component: int | None
    note: str = ""

    def start(self, spec: HeadSpec) -> Dense:
        """What relevance begins with: the mean over the cells of the logit, the metres or the cosine to the answer.

        Where queries say classes: class logit plus mean mask logit of each query that says most of some of the
        cells, summed over these queries. Of centres and offsets the class logits alone.
        """

        def begin(output: QueryOutput) -> Tensor:
            here = replace(output, mask_logits=output.mask_logits[:, :, self.cells][:, :, None])
            if self.component is None:
                return normals(spec)(here) / self.cells.sum()
            return said(here, spec, self.component)

        return begin


def said(output: QueryOutput, spec: HeadSpec, component: int) -> Float[Tensor, "B"]:
    """How strongly an output says one component of its answer, as `Subject.start` has it."""
    match spec.value_kind:
        case ValueKind.IDENTITY | ValueKind.CENTRE_OFFSET:
            return output.mask_logits[:, component].mean(dim=(1, 2))
        case ValueKind.BLENDED:
            alone = replace(output, values=output.values[..., component : component + 1])
            return depth(spec)(alone) / output.mask_logits[0, 0].numel()
        case ValueKind.CLASS_LOGITS:
            class_probs = output.values.softmax(dim=-1)[:, :, component, None, None]
            speaker = (class_probs * mask_probs(output.mask_logits, spec.mask_norm)).argmax(dim=1, keepdim=True)
            queries = torch.arange(spec.num_queries, device=speaker.device)[None, :, None, None]
            own = (speaker == queries).to(output.mask_logits.dtype)
            cells = own.sum(dim=(2, 3))
            mask_logits = (output.mask_logits * own).sum(dim=(2, 3)) / cells.clamp(min=1)
            return ((output.values[..., component] + mask_logits) * (cells > 0)).sum(dim=1)
        case _:
            assert_never(spec.value_kind)


@dataclass(frozen=True)
class Said:
    """What a model says of one photo, and what is needed to find a subject in it.

    answers: of the task, at the size that the network saw, [1, ...] each, in the order of `outputs_of`. source_hw: of
    the photo in px. classes, unit: of the model.
    """

    task: str
    output: QueryOutput
    spec: HeadSpec
    answers: tuple[Tensor, ...]
    source_hw: tuple[int, int]
    classes: Classes | None
    unit: DepthUnit

    def find(self, asked: Asked) -> Subject:
        """What is asked about. Raises InputError: unknown class, a point outside of the photo or where nothing is."""
        if isinstance(asked, AtPoint):
            self._check_inside(asked)
        if self.classes is None:
            return self._of_numbers(asked)
        match asked:
            case OfClass():
                class_id = class_id_of(asked.name, self.classes)
                parts = [region for region, found in self._regions() if found == class_id]
                return self._covering(class_id, torch.stack(parts).any(dim=0)) if parts else self._not_there(class_id)
            case AtPoint():
                return self._of_point(asked)
            case Largest():
                regions = self._regions()
                if not regions:
                    names = _listed(self.classes.names)
                    raise InputError(f"class: wanted one, for nothing was found in the photo; give one of {names}")
                region, class_id = max(regions, key=lambda each: int(each[0].sum()))
                return self._covering(class_id, region)
            case _:
                assert_never(asked)

    def _regions(self) -> list[tuple[Bool[Tensor, "H W"], int]]:
        """Pixels and class of everything found: classes, segments or objects, the surest object first."""
        match self.task:
            case "semantic":
                ids = self.answers[0][0]
                return [(ids == class_id, int(class_id)) for class_id in ids.unique()]
            case "panoptic":
                ids, class_ids = self.answers[0][0], self.answers[1][0]
                return [(ids == each, int(class_ids[each - 1])) for each in ids.unique() if each > 0]
            case _:
                masks, class_ids, scores = (answer[0] for answer in self.answers)
                order = [int(i) for i in scores.argsort(descending=True) if scores[i] > 0 and masks[i].any()]
                sure = [i for i in order if scores[i] >= SURE_SCORE] or order[:1]
                return [(masks[i] > 0, int(class_ids[i])) for i in sure]

    def _of_numbers(self, asked: Asked) -> Subject:
        component = 0 if self.task == "depth" else None
        answer = self.answers[0][0]
        match asked:
            case OfClass():
                raise InputError(
                    f"class: wanted nothing, for the model says {self.task} and no classes, got {asked.name!r}; "
                    "give a point instead"
                )
            case Largest():
                return Subject(f"{self.task} of the whole photo", self._inside(), component)
            case AtPoint():
                y, x = self._seen(asked)
                values = ", ".join(f"{each:.3g}" for each in answer[..., y, x].reshape(-1).tolist())
                value = f"{values} m" if self.task == "depth" and self.unit is DepthUnit.METRES else values
                return Subject(f"{self.task} at {asked.x_px},{asked.y_px}: {value}", self._cell(y, x), component)
            case _:
                assert_never(asked)

    def _of_point(self, point: AtPoint) -> Subject:
        """The class at a pixel of semantic labels; the whole segment or object that it belongs to."""
        y, x = self._seen(point)
        there = next((each for each in self._regions() if each[0][y, x]), None)
        if there is None:
            kind = "object" if self.task == "instance" else "segment"
            raise InputError(
                f"point: wanted a pixel in {kind}s that the model found, got {point.x_px},{point.y_px}, which is in "
                "none; choose another, or a class"
            )
        region, class_id = there
        name = cast("Classes", self.classes).names[class_id]
        where = f"{name} at {point.x_px},{point.y_px}"
        if self.task == "semantic":
            return Subject(where, self._cell(y, x), class_id)
        return self._subject(class_id, region, f"the {name} around {point.x_px},{point.y_px}")

    def _covering(self, class_id: int, region: Bool[Tensor, "H W"]) -> Subject:
        name = cast("Classes", self.classes).names[class_id]
        return self._subject(class_id, region, f"{name}, {100 * region.float().mean().item():.1f} % of the photo")

    def _subject(self, class_id: int, region: Bool[Tensor, "H W"], text: str) -> Subject:
        """The cells of which at least half is in the region; the fullest one where there are none."""
        stride = self.spec.mask_stride
        height, width = self.output.mask_logits.shape[-2:]
        bottom, right = height * stride - region.shape[0], width * stride - region.shape[1]
        share = F.avg_pool2d(F.pad(region[None].float(), (0, right, 0, bottom)), stride)[0]
        cells = share >= min(0.5, share.max().item())
        return Subject(text, cells, class_id)

    def _not_there(self, class_id: int) -> Subject:
        """The one cell that comes closest to a class that the model found nowhere."""
        name = cast("Classes", self.classes).names[class_id]
        scores = class_scores(self.output, self.spec)[0]
        probs = scores if self.spec.value_kind is ValueKind.CLASS_LOGITS else scores.softmax(dim=0)
        best = probs[class_id].masked_fill(~self._inside(), -1).argmax().item()
        row, column = divmod(int(best), probs.shape[-1])
        cells = torch.zeros_like(self._inside())
        cells[row, column] = True
        return Subject(
            f"{name}, found nowhere: where it is least unlikely",
            cells,
            class_id,
            f"the model finds no {name} in the photo; explained is the place where that is least unlikely",
        )

    def _inside(self) -> Bool[Tensor, "h w"]:
        """The cells that are not padding."""
        rows, columns = (-(-side // self.spec.mask_stride) for side in self._network_hw())
        inside = torch.zeros(self.output.mask_logits.shape[-2:], dtype=torch.bool)
        inside[:rows, :columns] = True
        return inside

    def _cell(self, y: int, x: int) -> Bool[Tensor, "h w"]:
        cells = torch.zeros_like(self._inside())
        cells[y // self.spec.mask_stride, x // self.spec.mask_stride] = True
        return cells

    def _seen(self, point: AtPoint) -> tuple[int, int]:
        """Row and column of a point of the photo in what the network saw."""
        rows, columns = self._network_hw()
        height, width = self.source_hw
        return (2 * point.y_px + 1) * rows // (2 * height), (2 * point.x_px + 1) * columns // (2 * width)

    def _network_hw(self) -> tuple[int, int]:
        height, width = self.answers[0].shape[-2:]
        return height, width

    def _check_inside(self, point: AtPoint) -> None:
        height, width = self.source_hw
        if not (0 <= point.x_px < width and 0 <= point.y_px < height):
            raise InputError(
                f"point: wanted X,Y within the photo, 0..{width - 1},0..{height - 1}, got {point.x_px},{point.y_px}"
            )


def class_id_of(name: str, classes: Classes) -> int:
    """The id of a class by its name, whatever its case. Raises InputError that says which there are."""
    folded = [each.casefold() for each in classes.names]
    if name in classes.names:
        return classes.names.index(name)
    if name.casefold() in folded:
        return folded.index(name.casefold())
    close = difflib.get_close_matches(name.casefold(), folded, 1)
    hint = f"; did you mean {classes.names[folded.index(close[0])]!r}?" if close else ""
    raise InputError(f"class: wanted one of {_listed(classes.names)}, got {name!r}{hint}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return ", ".join(names[:_SHOWN_CLASSES]) + more
