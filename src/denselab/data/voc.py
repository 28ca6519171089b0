"""Pascal VOC: JPEGImages, SegmentationClass and SegmentationObject, split by ImageSets/Segmentation/*.txt.

0 is background, 255 (the outlines) void in both kinds of masks. Source: Everingham et al. 2010, VOC2012 kit.
"""

from denselab.classes import VOID, Classes
from denselab.data.class_masks import ClassMask, MaskCoding
from denselab.data.dataset import Dataset, Item, Labels, LeftOut
from denselab.data.description import Description
from denselab.data.id_maps import IdMap, IdMapRule
from denselab.data.splits import SPLITS
from denselab.errors import InputError

IMAGES, MASKS, OBJECTS, LISTS = "JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"
NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def open_voc(described: Description) -> Dataset:
    """Semantic truth, and instance and panoptic where SegmentationObject is there. Raises InputError.

    Classes are VOC's twenty and background, unless the descriptor has `names`; all but the first are things, unless
    it has `things`.
    """
    root = described.root
    lists = {split: root / LISTS / f"{split}.txt" for split in SPLITS if (root / LISTS / f"{split}.txt").is_file()}
    if not lists:
        raise InputError(f"{root}: wanted {LISTS}/train.txt or the like, got none; unpack the whole development kit")
    if "names" in described:
        classes, class_of = described.named_classes()
    else:
        classes = Classes.named(NAMES)
        class_of = {class_id: class_id for class_id in range(len(NAMES))} | {VOID: VOID}
    classes = described.with_things(classes, range(1, len(classes)))
    coding = MaskCoding(tuple(class_of.items()), described.rgb_masks, described.source)
    rule = IdMapRule(classes.things, ignored=(VOID,))
    has_objects = (root / OBJECTS).is_dir()
    splits: dict[str, tuple[Item, ...]] = {}
    left_out: list[LeftOut] = []
    for split, path in lists.items():
        items: list[Item] = []
        for name in path.read_text("utf-8").split():
            image, mask, objects = (root / f"{folder}/{name}" for folder in (IMAGES, MASKS, OBJECTS))
            image, mask, objects = image.with_suffix(".jpg"), mask.with_suffix(".png"), objects.with_suffix(".png")
            if not image.is_file():
                left_out.append(LeftOut(mask, "image"))
            elif not mask.is_file() or (has_objects and not objects.is_file()):
                left_out.append(LeftOut(image, "mask"))
            else:
                class_mask = ClassMask(mask, coding)
                labels: Labels = IdMap(objects, rule, class_mask) if has_objects else class_mask
                items.append(Item(name, image, labels))
        if items:
            splits[split] = tuple(items)
    if not splits:
        raise InputError(f"{root}: wanted {IMAGES}/NAME.jpg with {MASKS}/NAME.png for the names in {LISTS}, got none")
    tasks = frozenset({"semantic", "instance", "panoptic"} if has_objects else {"semantic"})
    notes = (f"listed images without a file or a mask are left out: {len(left_out)}",) if left_out else ()
    return Dataset(root, classes, tasks, splits, notes, tuple(left_out))
