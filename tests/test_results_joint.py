import json
from pathlib import Path

import numpy as np
import pytest

from denselab.classes import Classes
from denselab.errors import InputError
from denselab.results import DepthMap, JointResult, SemanticMap

CLASSES = Classes.named(["a", "b"])
LABELS = SemanticMap(np.zeros((4, 5), np.uint8), CLASSES, model="m", timing_ms={"total": 3.0})
DEPTH = DepthMap(np.ones((2, 5), np.float32), np.ones((2, 5), bool), "m", {"total": 3.0}, source_hw=(4, 5))


def test_a_mapping_from_task_to_result(tmp_path: Path) -> None:
    joint = JointResult({"semantic": LABELS, "depth": DEPTH})
    assert joint["depth"] is DEPTH
    assert dict(joint) == {"semantic": LABELS, "depth": DEPTH}
    assert (joint.task, joint.model, joint.timing_ms, joint.hw) == ("semantic+depth", "m", {"total": 3.0}, (4, 5))
    joint.save(tmp_path / "a.png")
    joint.save(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.depth.png", "a.json", "a.semantic.png"]
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["task"] == "semantic+depth"
    assert figures["results"]["depth"] == DEPTH.to_dict()
    picture = joint.overlay(np.zeros((4, 5, 3), np.uint8), legend=False)
    assert picture.size == (10, 4)


def test_timing_reaches_every_part_and_copies_nothing() -> None:
    joint = JointResult({"semantic": LABELS, "depth": DEPTH}).with_timing({"total": 5.0})
    assert [part.timing_ms for part in joint.values()] == [{"total": 5.0}] * 2
    assert LABELS.timing_ms == {"total": 3.0}
    assert joint["semantic"].to_array() is LABELS.class_ids


def test_refusals() -> None:
    with pytest.raises(InputError, match="wanted at least one result, got none"):
        JointResult({})
    with pytest.raises(InputError, match="wanted the semantic result under 'semantic', got one of depth"):
        JointResult({"semantic": DEPTH})
    with pytest.raises(InputError, match="wanted results of one image, got sizes"):
        JointResult({"semantic": LABELS, "depth": DepthMap(np.ones((1, 1), np.float32), np.ones((1, 1), bool))})
