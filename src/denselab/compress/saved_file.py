"""What every saved step of a compression says when its file cannot be used."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from denselab.errors import InputError


def check_version(path: Path, found: int, newest: int) -> None:
    """Raise InputError for a file of a later format than this program reads."""
    if found > newest:
        raise InputError(
            f"{path}: format version {found} is newer than this DenseLab, which reads versions up to {newest}; "
            "upgrade with: pip install --upgrade denselab"
        )


@contextmanager
def reading(path: Path, wanted: str, mend: str, *damage: type[Exception]) -> Generator[None]:
    """What goes wrong while a file is taken apart becomes an InputError that names it.

    wanted: what it should hold, in words. damage: what a reader raises beside Python's own errors.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (AttributeError, KeyError, TypeError, ValueError, *damage) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise InputError(f"{path}: wanted {wanted}, but it {problem}; {mend}") from error
