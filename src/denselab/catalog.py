"""Every published system that DenseLab implements: what it is, how to run it, which test shows that it works."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One published system. id: N... where the numbered list of systems does not name it.

    model, backbone, task: what `denselab fit --task TASK --model MODEL --backbone BACKBONE` takes. test: the test that
    shows it works. options: what more it takes.
    """

    id: str
    name: str
    paper: str
    part: str
    model: str
    backbone: str
    test: str
    task: str = "semantic"
    options: str = ""

    @property
    def run(self) -> str:
        """The command that trains it."""
        task = "" if self.task == "semantic" else f" --task {self.task}"
        model = f"--model {self.model} --backbone {self.backbone}"
        return f"denselab fit --data DIR{task} {model}{self.options} -o runs/{self.model}"


_CONTRACT = "tests/test_contract.py"
_DECODERS = "tests/test_pixel_decoders.py"
_ROWS = "tests/test_catalog.py"
_KMAX, _MAX = "tests/test_kmax.py", "tests/test_losses_max_deeplab.py"
_SEGMENT, _DENSE = "panoptic", "depth"

ROWS = (
    Row(
        "R001", "PolyMaX", "Yang et al. 2024", "head", "polymax", "convnext_tiny", "tests/test_heads_polymax.py", _DENSE
    ),
    Row("R006", "OCR", "Yuan et al. 2020", "head", "ocr", "hrnet_w18", "tests/test_ocr.py"),
    Row("R211", "DPT", "Ranftl et al. 2021", "head", "dpt", "vit_small_patch16_224", "tests/test_dpt.py", _DENSE),
    Row("R362", "kMaX-DeepLab", "Yu et al. 2022", "head", "kmax", "resnet50", _KMAX, _SEGMENT),
    Row(
        "R366",
        "ReMaX",
        "Sun et al. 2023",
        "loss",
        "kmax",
        "resnet50",
        "tests/test_losses_remax.py",
        _SEGMENT,
        " --remax",
    ),
    Row("R378", "MaX-DeepLab (objective)", "Wang et al. 2021", "loss", "kmax", "resnet50", _MAX, _SEGMENT),
    Row(
        "R398",
        "Panoptic-DeepLab",
        "Cheng et al. 2020",
        "head",
        "panoptic_deeplab",
        "resnet50",
        "tests/test_panoptic_deeplab.py",
        _SEGMENT,
    ),
    Row(
        "N001",
        "Mask2Former (masked attention)",
        "Cheng et al. 2022",
        "head",
        "mask2former",
        "resnet50",
        "tests/test_heads_masked_attention.py",
        _SEGMENT,
    ),
    Row(
        "N002",
        "EoMT",
        "Kerssies et al. 2025",
        "head",
        "eomt",
        "vit_small_patch16_224",
        "tests/test_heads_eomt.py",
        _SEGMENT,
    ),
    Row("R036", "SegNet", "Badrinarayanan et al. 2017", "head", "segnet", "vgg16_bn", _DECODERS),
    Row("R178", "FCN-32s/16s/8s", "Long et al. 2015", "head", "fcn8s", "vgg16", _DECODERS),
    Row("R263", "LinkNet", "Chaurasia and Culurciello 2017", "head", "linknet", "resnet18", _DECODERS),
    Row("R381", "DeepLabv3+", "Chen et al. 2018", "head", "deeplabv3plus", "resnet50", _DECODERS),
    Row("R401", "MobileNetV3 (LR-ASPP)", "Howard et al. 2019", "head", "lraspp", "mobilenetv3_large_100", _DECODERS),
    Row("R409", "DeepLabv3 (ASPP)", "Chen et al. 2017", "head", "deeplabv3", "resnet50", _DECODERS),
    Row("R241", "Swin Transformer", "Liu et al. 2021", "backbone", "fpn", "swin_tiny_patch4_window7_224", _ROWS),
    Row("R242", "ConvNeXt", "Liu et al. 2022", "backbone", "fpn", "convnext_tiny", _ROWS),
    Row("R289", "ViT", "Dosovitskiy et al. 2021", "backbone", "fpn", "vit_small_patch16_224", _ROWS),
    Row("R341", "DeiT III", "Touvron et al. 2022", "backbone", "fpn", "deit3_small_patch16_224", _ROWS),
    Row("R406", "MobileNetV2 (DeepLabv3)", "Sandler et al. 2018", "backbone", "deeplabv3", "mobilenetv2_100", _ROWS),
)
