import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from denselab import zoo
from denselab.catalog import ROWS, Compression, Network, Row
from denselab.cli import main
from denselab.compress.names import MethodName

ROOT = Path(__file__).resolve().parents[1]


NETWORKS = [row for row in ROWS if isinstance(row, Network)]


@pytest.mark.parametrize("row", NETWORKS, ids=lambda row: row.id)
def test_every_network_builds_and_labels_an_odd_sized_image(row: Network) -> None:
    model = zoo.build(row.model, (row.task,), num_classes=5, choices={"backbone": row.backbone}).eval()
    with torch.no_grad():
        out = model(torch.rand(1, 3, 65, 97))
    stride = model.spec.mask_stride
    assert out.mask_logits.shape[:2] == (1, model.spec.num_queries)
    assert out.mask_logits.shape[2] * stride >= 65
    assert out.mask_logits.shape[3] * stride >= 97
    assert out.mask_logits.isfinite().all()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_row_names_a_test_that_exists_and_a_command_that_parses(row: Row) -> None:
    assert (ROOT / row.test).is_file()
    words = shlex.split(row.run)
    match row:
        case Network():
            assert words[:2] == ["denselab", "fit"]
            assert row.task in zoo.MODELS[words[words.index("--model") + 1]].tasks
        case Compression():
            assert words[:2] == ["denselab", "compress"]
            assert words[words.index("--method") + 1] in list(MethodName)


def test_ids_are_unique_and_follow_the_list_of_systems(shared_data: Path) -> None:
    known = set(re.findall(r"^- (R\d{3}) ", (shared_data.parent / "SYSTEMS.md").read_text(), re.MULTILINE))
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)
    assert {each for each in ids if not re.fullmatch(r"N\d{3}", each)} <= known


def test_catalog_command_lists_every_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["denselab", "catalog", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [row.id for row in ROWS]
