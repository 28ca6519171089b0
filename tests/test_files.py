import subprocess
import sys
import threading
from pathlib import Path

import pytest

from denselab.errors import InputError
from denselab.files import atomic_path, find_images


def touch(folder: Path, *names: str):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(found) -> list[str]:
    return [image.relative.as_posix() for image in found]


def test_atomic_path_writes_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a.txt"
    with atomic_path(path) as partial:
        assert (partial.parent, partial.suffix, partial.name[0]) == (tmp_path, ".txt", ".")
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"

    def fail():
        with atomic_path(path) as partial:
            partial.write_text("second, hal")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_of_long_names_in_threads(tmp_path: Path):
    paths = [tmp_path / ("ä" * 60 + "x" * 100 + f"{i}.txt") for i in range(8)]

    def write(path: Path):
        with atomic_path(path) as partial:
            partial.write_text(path.name)

    threads = [threading.Thread(target=write, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text() for path in paths] == [path.name for path in paths]


def test_killed_writer_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = """
import os, signal, sys
from pathlib import Path
from denselab.files import atomic_path
with atomic_path(Path(sys.argv[1])) as partial:
    partial.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
    (left,) = (other for other in tmp_path.iterdir() if other != path)
    assert left.name.startswith(".a.")
    assert ".part" in left.name
    touch(tmp_path, ".b.1-0.part.png", "c.png")
    assert names(find_images([tmp_path])) == ["c.png"]


def test_find_images(tmp_path: Path):
    touch(tmp_path, "b.JPG", "a.png", "sub/deep/c.tif", "notes.txt", ".hidden.png", ".git/d.png", "odd [1] ü.png")
    assert names(find_images([tmp_path])) == ["a.png", "b.JPG", "odd [1] ü.png", "sub/deep/c.tif"]
    assert names(find_images([f"{tmp_path}/*.png"])) == ["a.png", "odd [1] ü.png"]
    assert names(find_images([f"{tmp_path}/s*/**/*.tif"])) == ["sub/deep/c.tif"]
    assert names(find_images([tmp_path / "sub/deep/c.tif", tmp_path / "notes.txt"])) == ["c.tif", "notes.txt"]
    assert names(find_images([tmp_path / "odd [1] ü.png"])) == ["odd [1] ü.png"]


def test_find_images_once_in_order(tmp_path: Path):
    touch(tmp_path, "a.png", "b.png", "sub/notes.txt")
    assert names(find_images([tmp_path / "b.png", tmp_path, tmp_path / "sub/../a.png"])) == ["b.png", "a.png"]


def test_find_images_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a.png", "x/b.png")
    monkeypatch.chdir(tmp_path)
    assert names(find_images(["*.png", "x"])) == ["a.png", "b.png"]
    assert names(find_images(["."])) == ["a.png", "x/b.png"]


def test_find_images_refusals(tmp_path: Path):
    touch(tmp_path, "only/notes.txt")
    with pytest.raises(InputError, match=r"none\.jpg: wanted an image, .* got a path that does not exist; check it"):
        find_images([tmp_path / "none.jpg"])
    for empty in (tmp_path / "only", f"{tmp_path}/only/*"):
        with pytest.raises(InputError, match=r"wanted at least one image there \(.*\.png.*\), got none"):
            find_images([empty])
