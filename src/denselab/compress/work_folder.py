"""A folder of saved stages: what was made before, of the same, is not made again, and the user is told which.

`stages.json` notes of every file what it was made with and its hash. A file that changed since then was edited by a
person; whether that is welcome the stage says (`plan.json` alone is meant to be edited).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from denselab.compress.saved_file import check_version, reading
from denselab.compress.sites import ModelHash
from denselab.errors import InputError
from denselab.files import write_json

STAGES = "stages.json"
_FORMAT = 1

Held = TypeVar("Held")


def file_sha256(path: Path) -> str:
    """The hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WorkFolder:
    """Stages of the compression of one model.

    Raises InputError: a folder of another model, or one that cannot be written.
    """

    def __init__(self, folder: Path, model: ModelHash, say: Callable[[str], None]) -> None:
        self.folder = folder
        self._model = model
        self._say = say
        self._noted: dict[str, Any] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror or error}); give another --work") from error
        stages = folder / STAGES
        if stages.is_file():
            with reading(stages, "notes of saved stages", "delete the folder or give another --work"):
                data = json.loads(stages.read_bytes())
                check_version(stages, data["format_version"], _FORMAT)
                of, self._noted = ModelHash(**data["model"]), dict(data["stages"])
            if of != model:
                other = "other weights" if of.architecture == model.architecture else "another model"
                raise InputError(
                    f"{folder}: wanted a work folder of this model, got one of {other}; give another --work or delete "
                    "the folder"
                )

    def stage(
        self,
        name: str,
        made_with: Mapping[str, Any],
        make: Callable[[], Held],
        write: Callable[[Held, Path], object] | None,
        read: Callable[[Path], Held],
        may_be_edited: bool = False,
    ) -> Held:
        """What a file holds: read where it was made with the same, else made, written and noted.

        made_with: plain data; hashes of the files that it is made of among them; None counts as absent. write: None
        where `make` writes it. Raises InputError for an edited file that would have to be made again, and for a full
        disk; and what the three functions raise.
        """
        path = self.folder / name
        asked = json.loads(json.dumps(made_with))
        noted = self._noted.get(name)
        if noted is not None and path.is_file():
            edited = file_sha256(path) != noted["sha256"]
            changed = [each for each in asked if asked[each] != noted["made_with"].get(each)]
            if edited and may_be_edited and changed:
                raise InputError(
                    f"{path}: was edited by hand, and would be lost as {_listed(changed)} changed; give --plan {path} "
                    "to use it as it is, or delete it"
                )
            if not changed and (may_be_edited or not edited):
                held = read(path)
                self._say(f"{path}: {'edited by hand, used as it is' if edited else 'kept'}")
                return held
            self._say(f"{path}: made again, for {_listed(changed) if changed else 'the file'} changed")
        try:
            held = make()
            if write is not None:
                write(held, path)
            self._noted[name] = {"made_with": asked, "sha256": file_sha256(path)}
            write_json(
                self.folder / STAGES,
                {"format_version": _FORMAT, "model": vars(self._model), "stages": self._noted},
            )
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error}); give another --work") from error
        return held

    def sha256(self, name: str) -> str:
        """The hash of a stage's file as it is now."""
        return file_sha256(self.folder / name)


def _listed(names: list[str]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)
