"""Make `import torchvision` work beside a CPU build of torch; import this before torchvision, timm or Lightning.

torchvision's wheels are built against CUDA and load their C++ operators while they are imported. Beside a CPU
build of torch that library does not load, and the import dies with "operator torchvision::nms does not exist",
which takes timm and Lightning's metrics with it. Declaring the two schemas that torchvision decorates at import
is enough for transforms.v2, tv_tensors and models; the operators themselves (nms, deform_conv2d, decode_jpeg)
stay missing. Nothing is declared where torchvision imports by itself.
"""

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def import_torchvision() -> None:
    """Import torchvision, declaring its missing operators first if its own library does not load."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        importlib.import_module("torchvision")


import_torchvision()
