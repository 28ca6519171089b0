"""Models that come with the package."""

from pathlib import Path

PACKAGED = {"street": Path(__file__).parent / "assets" / "street.onnx"}
