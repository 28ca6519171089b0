"""Every published system that DenseLab implements: what it is, how to run it, which test shows that it works."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A published network, or a part of one. id: N... where the numbered list of systems does not name it.

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


@dataclass(frozen=True)
class Compression:
    """A published way to make a network small. method: what `denselab compress --method METHOD` takes."""

    id: str
    name: str
    paper: str
    method: str
    test: str
    part: str = "compress"

    @property
    def run(self) -> str:
        """The command that makes a model small so."""
        return f"denselab compress RUN.ckpt --calibrate DIR --budget 4bits --method {self.method} -o small.onnx"


Row = Network | Compression

_CONTRACT = "tests/test_contract.py"
_DECODERS = "tests/test_pixel_decoders.py"
_ROWS = "tests/test_catalog.py"
_KMAX, _MAX = "tests/test_kmax.py", "tests/test_losses_max_deeplab.py"
_RECONSTRUCTED = "tests/test_compress_methods_reconstruct.py"
_SEGMENT, _DENSE = "panoptic", "depth"

ROWS: tuple[Row, ...] = (
    Network(
        "R001", "PolyMaX", "Yang et al. 2024", "head", "polymax", "convnext_tiny", "tests/test_heads_polymax.py", _DENSE
    ),
    Network("R006", "OCR", "Yuan et al. 2020", "head", "ocr", "hrnet_w18", "tests/test_ocr.py"),
    Network("R211", "DPT", "Ranftl et al. 2021", "head", "dpt", "vit_small_patch16_224", "tests/test_dpt.py", _DENSE),
    Network("R362", "kMaX-DeepLab", "Yu et al. 2022", "head", "kmax", "resnet50", _KMAX, _SEGMENT),
    Network(
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
    Network("R378", "MaX-DeepLab (objective)", "Wang et al. 2021", "loss", "kmax", "resnet50", _MAX, _SEGMENT),
    Network(
        "R398",
        "Panoptic-DeepLab",
        "Cheng et al. 2020",
        "head",
        "panoptic_deeplab",
        "resnet50",
        "tests/test_panoptic_deeplab.py",
        _SEGMENT,
    ),
    Network(
        "N001",
        "Mask2Former (masked attention)",
        "Cheng et al. 2022",
        "head",
        "mask2former",
        "resnet50",
        "tests/test_heads_masked_attention.py",
        _SEGMENT,
    ),
    Network(
        "N002",
        "EoMT",
        "Kerssies et al. 2025",
        "head",
        "eomt",
        "vit_small_patch16_224",
        "tests/test_heads_eomt.py",
        _SEGMENT,
    ),
    Network("R036", "SegNet", "Badrinarayanan et al. 2017", "head", "segnet", "vgg16_bn", _DECODERS),
    Network("R178", "FCN-32s/16s/8s", "Long et al. 2015", "head", "fcn8s", "vgg16", _DECODERS),
    Network("R263", "LinkNet", "Chaurasia and Culurciello 2017", "head", "linknet", "resnet18", _DECODERS),
    Network("R381", "DeepLabv3+", "Chen et al. 2018", "head", "deeplabv3plus", "resnet50", _DECODERS),
    Network(
        "R401", "MobileNetV3 (LR-ASPP)", "Howard et al. 2019", "head", "lraspp", "mobilenetv3_large_100", _DECODERS
    ),
    Network("R409", "DeepLabv3 (ASPP)", "Chen et al. 2017", "head", "deeplabv3", "resnet50", _DECODERS),
    Network("R241", "Swin Transformer", "Liu et al. 2021", "backbone", "fpn", "swin_tiny_patch4_window7_224", _ROWS),
    Network("R242", "ConvNeXt", "Liu et al. 2022", "backbone", "fpn", "convnext_tiny", _ROWS),
    Network("R289", "ViT", "Dosovitskiy et al. 2021", "backbone", "fpn", "vit_small_patch16_224", _ROWS),
    Network("R341", "DeiT III", "Touvron et al. 2022", "backbone", "fpn", "deit3_small_patch16_224", _ROWS),
    Network(
        "R406", "MobileNetV2 (DeepLabv3)", "Sandler et al. 2018", "backbone", "deeplabv3", "mobilenetv2_100", _ROWS
    ),
    Compression("R079", "RepQ-ViT", "Li et al. 2023", "repq-vit", "tests/test_compress_methods.py"),
    Compression("R050", "AdaLog", "Wu et al. 2024", "adalog", "tests/test_compress_method_adalog.py"),
    Compression("R098", "I&S-ViT", "Zhong et al. 2023", "is-vit", _RECONSTRUCTED),
    Compression("R041", "DopQ-ViT", "Yang et al. 2024", "dopq-vit", "tests/test_compress_method_dopq.py"),
    Compression("R091", "APHQ-ViT", "Wu et al. 2025", "aphq-vit", _RECONSTRUCTED),
    Compression("R039", "LRP-QViT", "Ranjan and Savakis 2024", "lrp-qvit", "tests/test_compress_methods_lrp.py"),
    Compression("R353", "Mix-QViT", "Ranjan and Savakis 2025", "mix-qvit", "tests/test_compress_methods_lrp.py"),
    Compression("R099", "I-ViT", "Li and Gu 2023", "i-vit", "tests/test_compress_method_ivit.py"),
)
