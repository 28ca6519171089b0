"""How an artifact stores its numbers; apart from the rest, so that `denselab export --help` needs no torch."""

from enum import StrEnum


class Precision(StrEnum):
    """fp32: as trained.

    bf16: weights rounded to bfloat16, half the file; engines widen them when they load it and compute as they do
    for fp32 (OpenVINO in bf16 where the CPU has it, ONNX Runtime in fp32), so it is no faster than fp32.
    int8: weights and activations of convolutions in 8 bits, a quarter of the file, integer kernels; the rest as fp32.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


MIXED = "mixed"
"""What a compressed artifact says instead: every tensor has the bits of its plan."""
