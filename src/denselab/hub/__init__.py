"""Published weights under our names."""

HUGGING_FACE = "hf:"
KMAX = "kmax:"
"""What stands before the NAME of `hugging_face.from_hf`, and before the FILE of `kmax.from_kmax`."""


def is_published(source: str) -> bool:
    """Whether a source names published weights."""
    return source.startswith((HUGGING_FACE, KMAX))
