"""Metadata of artifacts, read by our own reader from what the onnx package wrote."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

import denselab
from artifacts import METADATA, tiny_artifact
from denselab.classes import Classes
from denselab.depth_unit import DepthUnit
from denselab.errors import InputError
from denselab.runtime.artifact import FORMAT_VERSION, TASKS, ArtifactInfo, read_info


def test_reads_what_the_onnx_package_wrote(tmp_path: Path) -> None:
    score = {"miou": 0.6, "data": "Köln"}
    info = read_info(tiny_artifact(tmp_path / "tiny.onnx", score=score, train_hw=None))
    assert info.name == "tiny"
    assert info.classes == Classes(("other", "red"), ((0, 0, 200), (200, 0, 0)))
    assert (info.void, info.size_multiple, info.train_hw, info.score) == (255, 8, None, score)


def test_round_trip_through_json(tmp_path: Path) -> None:
    info = read_info(tiny_artifact(tmp_path / "tiny.onnx"))
    assert info.train_hw == (360, 480)
    assert ArtifactInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    assert info.to_dict() == METADATA


def test_the_first_version_knew_one_task(tmp_path: Path) -> None:
    first = {key: value for key, value in METADATA.items() if key != "tasks"} | {"format_version": 1}
    info = ArtifactInfo.from_dict({**first, "task": "semantic"})
    assert (info.tasks, info.task) == (("semantic",), "semantic")
    assert ArtifactInfo.from_dict(info.to_dict()) == info
    with pytest.raises(InputError, match="lacks 'task'"):
        ArtifactInfo.from_dict(first)


def test_the_packaged_model_opens() -> None:
    info = read_info(Path(denselab.__file__).parent / "assets" / "street.onnx")
    assert info.tasks == ("semantic",)
    assert info.classes is not None
    assert len(info.classes) == 11


def test_joint_tasks_and_no_classes() -> None:
    joint = ArtifactInfo.from_dict({**METADATA, "tasks": ["panoptic", "depth"]})
    assert joint.task == "panoptic+depth"
    geometry = ArtifactInfo.from_dict({**METADATA, "tasks": ["depth", "normals"], "classes": None})
    assert geometry.classes is None
    assert ArtifactInfo.from_dict(geometry.to_dict()) == geometry


def test_the_unit_of_depth() -> None:
    depth = {**METADATA, "tasks": ["depth"], "classes": None}
    relative = ArtifactInfo.from_dict({**depth, "depth_unit": "relative"})
    assert relative.depth_unit is DepthUnit.RELATIVE
    assert relative.to_dict()["depth_unit"] == "relative"
    older = ArtifactInfo.from_dict({key: value for key, value in depth.items() if key != "depth_unit"})
    assert older.depth_unit is DepthUnit.METRES
    assert older.to_dict()["depth_unit"] == "metres"
    with pytest.raises(InputError, match=r"has a wrong field .*'feet'.*; export the model again"):
        ArtifactInfo.from_dict({**depth, "depth_unit": "feet"})


def test_other_metadata_and_unknown_fields_do_not_disturb(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx", added_by_a_later_version=1)
    model = onnx.load(path)
    model.metadata_props.add(key="author", value="")
    model.functions.add(name="f", domain="d")  # a field after the metadata
    onnx.save(model, path)
    assert read_info(path).name == "tiny"


def test_weights_are_skipped_not_read(tmp_path: Path) -> None:
    """A graph of 3 GB with a hole in it: field 7 with its length, then the metadata."""
    entry = onnx.StringStringEntryProto(key="denselab", value=json.dumps(METADATA)).SerializeToString()
    length = 3_000_000_000
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.write(b"\x08\x09" + b"\x3a" + _varint(length))
        file.seek(length, 1)
        file.write(b"\x72" + _varint(len(entry)) + entry)
    assert read_info(tmp_path / "huge.onnx").name == "tiny"


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, 35, 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty file"),
        (b"hello, I am a text\n", "not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not an ONNX file"),
        (bytes(range(255, 0, -1)), "not an ONNX file"),
        (b"\x08\x09", "damaged or cut short"),
        (b"\xff" * 20, "not an ONNX file"),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"model.onnx: .*{problem}.*export the model again"):
        read_info(path)


def test_cut_short_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"empty|not an ONNX file|cut short|plain ONNX model"):
            read_info(path)


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model file; check the path"):
        read_info(tmp_path / "none.onnx")
    with pytest.raises(InputError, match=r"cannot be read .*check its kind and rights"):
        read_info(tmp_path)


def test_plain_onnx_says_how_to_make_an_artifact(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "plain.onnx")
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"a plain ONNX model, without DenseLab's metadata.*denselab export"):
        read_info(path)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (
            {"format_version": FORMAT_VERSION + 1},
            "format version 3 is newer than this DenseLab, which reads versions up to 2; upgrade",
        ),
        ({"tasks": ["depth", "tea"]}, f"unknown task 'tea'; this DenseLab runs {', '.join(TASKS)}"),
        ({"tasks": []}, r"tasks: wanted one or more distinct ones, got \[\]"),
        ({"tasks": ["depth", "depth"]}, "tasks: wanted one or more distinct ones, got .*depth.*depth"),
        ({"tasks": ["depth", "panoptic"], "classes": None}, "classes: wanted those of the task panoptic, got none"),
        ({"tasks": 3}, "has a wrong field"),
        ({"size_multiple": 0}, "size_multiple: wanted 1 or more px, got 0"),
        ({"size_multiple": "many"}, "has a wrong field .*many"),
        ({"train_hw": [360]}, "has a wrong field"),
        ({"classes": {"names": ["a", "a"]}}, "wanted distinct names"),
    ],
)
def test_wrong_fields(tmp_path: Path, metadata: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=f"tiny.onnx: .*{text}"):
        read_info(tiny_artifact(tmp_path / "tiny.onnx", **metadata))


@pytest.mark.parametrize("field", sorted(METADATA.keys() - {"depth_unit"}))
def test_missing_fields_are_named(field: str) -> None:
    with pytest.raises(InputError, match=f"lacks '{field}'; export the model again"):
        ArtifactInfo.from_dict({key: value for key, value in METADATA.items() if key != field})


@pytest.mark.parametrize(("text", "problem"), [('{"format_version": 1', "damaged"), ("[1]", "not a JSON object")])
def test_broken_json(tmp_path: Path, text: str, problem: str) -> None:
    path = tiny_artifact(tmp_path / "tiny.onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"denselab": text})
    onnx.save(model, path)
    with pytest.raises(InputError, match=f"its DenseLab metadata is damaged.*{problem}|{problem}"):
        read_info(path)
