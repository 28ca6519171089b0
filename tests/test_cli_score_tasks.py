"""denselab score for panoptic, instance, depth and normals: figures from files, and every refusal."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from denselab.cli.score import score
from denselab.errors import InputError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(score)

CATEGORIES = [{"id": 7, "name": "cell", "isthing": 1}, {"id": 3, "name": "ground", "isthing": 0}]


def run(*arguments: object) -> Result:
    """Run the command; an InputError is raised, other endings are in `exit_code`."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def figures(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """Every figure of a run that ends well."""
    result = run(*arguments, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    return json.loads((tmp_path / "out.json").read_text())


# panoptic


def save_panoptic(folder: Path, images: dict[int, tuple[object, Sequence[dict[str, Any]]]], **more: Any) -> Path:
    """A COCO panoptic JSON beside its folder of PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for image_id, (ids, segments) in images.items():
        ids = np.array(ids, np.uint32)
        colours = np.stack((ids % 256, ids // 256 % 256, ids // 65536), axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(folder / f"{image_id}.png")
        entries.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": list(segments)})
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"annotations": entries, "categories": CATEGORIES, **more}))
    return path


def info(number: int, category: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "category_id": category, **more}


BIG = 200 * 65536 + 100 * 256 + 5


@pytest.fixture
def panoptic(tmp_path: Path) -> list[object]:
    """Two images: a cell of IoU 3/4 and ground of 1, then a missed cell and a false one."""
    truths = {
        1: ([[BIG, BIG, BIG, BIG], [3, 3, 3, 3]], [info(BIG, 7, iscrowd=0, area=4), info(3, 3, iscrowd=0, area=4)]),
        2: ([[9, 9, 0, 0, 0, 0]], [info(9, 7, iscrowd=0, area=2)]),
    }
    preds = {
        1: ([[1, 1, 1, 0], [2, 2, 2, 2]], [info(1, 7), info(2, 3)]),
        2: ([[0, 5, 5, 0, 0, 0]], [info(5, 3)]),
    }
    gt, pred = save_panoptic(tmp_path / "gt", truths), save_panoptic(tmp_path / "pred", preds)
    return ["--task", "panoptic", "--pred", pred, "--gt", gt]


def test_panoptic_table_and_json(panoptic: list[object], tmp_path: Path) -> None:
    data = figures(tmp_path, *panoptic)
    assert [c["name"] for c in data["classes"]] == ["cell", "ground"]
    assert [(c["tp"], c["fp"], c["fn"]) for c in data["classes"]] == [(1, 0, 1), (1, 1, 0)]
    assert data["things"]["pq"] == pytest.approx(0.75 / 1.5)
    assert data["pq"] == pytest.approx((0.75 / 1.5 + 1 / 1.5) / 2)
    assert (data["task"], data["pairs"], data["failed"], data["unmatched"]) == ("panoptic", 2, [], [])
    # cell: 4 px of image 1 covered by 3/4, 2 of 6 px of image 2 by nothing; ground: 4 px covered whole
    covering = data["parsing_covering"]
    assert covering["things_pc"] == pytest.approx(0.5 * 0.75 / (0.5 + 1 / 3))
    assert (covering["stuff_pc"], covering["pc"]) == (1, pytest.approx((covering["things_pc"] + 1) / 2))
    assert [c["name"] for c in covering["classes"]] == ["cell", "ground"]
    shown = run(*panoptic, "--boundary").stdout
    assert "boundary PQ" in shown
    assert "boundary RQ      PC" in shown
    assert shown.splitlines()[1].split()[7] == "45.00"
    assert "2 pairs" in shown
    assert figures(tmp_path, *panoptic, "--jobs", 2) == data
    (tmp_path / "pred").rename(tmp_path / "elsewhere")
    assert figures(tmp_path, *panoptic, "--pred-masks", tmp_path / "elsewhere") == data


def test_panoptic_agrees_with_panopticapi_through_files(shared_data: Path, tmp_path: Path) -> None:
    golden_path = shared_data.parent / "golden" / "panoptic_quality.npz"
    if not golden_path.is_file():
        pytest.skip(f"no golden numbers at {golden_path}")
    with np.load(golden_path, allow_pickle=False) as golden:
        paths = []
        for side in ("gt", "pred"):
            segments = json.loads(str(golden[f"{side}_segments"]))
            images = {index: (ids, segments[index]) for index, ids in enumerate(golden[f"{side}_ids"])}
            categories = json.loads(str(golden["categories"]))
            paths.append(save_panoptic(tmp_path / side, images, categories=categories))
        data = figures(tmp_path, "--task", "panoptic", "--gt", paths[0], "--pred", paths[1])
        assert (data["pq"], data["sq"], data["rq"]) == pytest.approx(tuple(golden["all_pq_sq_rq_n"][:3]), abs=1e-12)
        assert data["stuff"]["pq"] == pytest.approx(float(golden["stuff_pq_sq_rq_n"][0]), abs=1e-12)


def test_panoptic_images_that_cannot_be_scored_are_listed(panoptic: list[object], tmp_path: Path) -> None:
    good = [[1, 1]], [info(1, 7)]
    truths = dict.fromkeys(range(8), good) | {5: ([[1, 1]], [info(1, 7), info(44, 3)])}
    preds = dict.fromkeys(range(8), good) | {
        1: ([[1, 12]], [info(1, 7)]),
        2: ([[1, 1]], [info(1, 7), info(8, 3)]),
        3: ([[1, 1]], [info(1, 99)]),
        4: ([[1, 1, 1]], [info(1, 7)]),
    }
    save_panoptic(tmp_path / "gt", truths)
    save_panoptic(tmp_path / "pred", preds)
    (tmp_path / "pred" / "6.png").unlink()
    Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / "pred" / "7.png")
    result = run(*panoptic, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert "7 of 8 pairs could not be scored" in result.stderr
    for text in (
        "image 1: prediction: wanted a segment for every id in the map, got none for 12; list those segments too",
        "image 2: prediction: wanted pixels of every segment, got none of 8; leave those segments out (prediction: ",
        "wanted categories of the truth, got 99 (segment 1); list them in --gt, or renumber them",
        "image 4: prediction is 3x1 px but truth is 2x1 px; write the prediction at the size of the truth",
        "image 5: truth: wanted pixels of every segment, got none of 44; remove those segments from the JSON",
        "6.png: wanted segment ids (R + 256 G + 65536 B), got no such file; check the path",
        "7.png: wanted segment ids (R + 256 G + 65536 B), got a picture of mode L; save the ids as an RGB PNG",
    ):
        assert text in result.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["pairs"], data["pq"]) == (1, 1)
    assert data["failed"][0]["name"] == "image 1"


def test_panoptic_images_without_partner(panoptic: list[object], tmp_path: Path) -> None:
    save_panoptic(tmp_path / "pred", {1: ([[1, 1, 1, 0], [2, 2, 2, 2]], [info(1, 7), info(2, 3)]), 6: ([[0]], [])})
    with pytest.raises(InputError, match=r"2 images without a partner: image 2 of .*gt.json, image 6 of .*pred.json; "):
        run(*panoptic)
    result = run(*panoptic, "--allow-missing")
    assert result.exit_code == 0
    assert "1 pairs, 2 images without a partner left out" in result.stdout
    save_panoptic(tmp_path / "pred", {6: ([[0]], [])})
    with pytest.raises(InputError, match=r"pred\.json: wanted predictions for the images of .*gt\.json, got none"):
        run(*panoptic, "--allow-missing")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("pred", "{", r"--pred: wanted a JSON file, got .*pred\.json, which is not one \("),
        ("gt", [1], r"--gt: .*gt\.json: wanted a COCO file with a list 'categories', got list"),
        ("pred", {"images": []}, r"--pred: .*: wanted a COCO file with a list 'annotations', got images"),
        ("gt", {"categories": [{"id": 1}], "annotations": []}, r"category id 1: wanted COCO's fields, got no 'name'"),
        ("gt", {"categories": [], "annotations": []}, "wanted at least one category, got none"),
        ("gt", {"categories": CATEGORIES + CATEGORIES[:1], "annotations": []}, "every category once, got 7 more than"),
        ("pred", {"annotations": [{"image_id": 4}]}, "annotation of image_id 4: .*, got no 'segments_info'"),
        (
            "pred",
            {"annotations": [{"image_id": 4, "file_name": "4.png", "segments_info": [info(1, 3), info(1, 3)]}]},
            r"annotation of image_id 4: .* segment ids that repeat or are below 1: \[1, 1\]",
        ),
        (
            "pred",
            {"annotations": [], "categories": [{"id": 3, "name": "road"}, {"id": 8, "name": "sky"}]},
            r"wanted the categories of .*gt\.json, got others: 3 road, 8 sky; score it against the truth",
        ),
    ],
)
def test_panoptic_files_that_are_none(panoptic: list[object], tmp_path: Path, name: str, data: Any, text: str) -> None:
    (tmp_path / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(InputError, match=text):
        run(*panoptic)


def test_panoptic_paths_that_are_wrong(panoptic: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--pred: wanted a JSON file, got .*no\.json, which does not exist"):
        run("--task", "panoptic", "--pred", tmp_path / "no.json", "--gt", panoptic[-1])
    with pytest.raises(InputError, match=r"--pred: wanted a JSON file, got .*, which cannot be read \(Is a"):
        run("--task", "panoptic", "--pred", tmp_path / "pred", "--gt", panoptic[-1])
    with pytest.raises(InputError, match=r"--gt-masks: wanted the folder of the PNGs of .*gt\.json, got .*nowhere"):
        run(*panoptic, "--gt-masks", tmp_path / "nowhere")


# instance


def save_instances(tmp_path: Path, results: Any, **truth: Any) -> list[object]:
    square = [[0, 0, 20, 0, 20, 20, 0, 20]]
    crowd = {"size": [50, 60], "counts": [0, 50 * 20, 50 * 40]}
    data = {
        "images": [{"id": 5, "height": 50, "width": 60}, {"id": 2, "height": 40, "width": 40}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "segmentation": square, "area": 390.5, "bbox": [0, 0, 20, 20],
             "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "segmentation": crowd, "area": 1000, "bbox": [0, 0, 20, 50],
             "iscrowd": 1},
            {"id": 3, "image_id": 2, "category_id": 3, "segmentation": [[5, 5, 38, 6, 30, 39.5, 4, 20]],
             "area": 1100.25, "bbox": [4, 5, 34, 34.5], "iscrowd": 0},
        ],
        "categories": CATEGORIES,
        **truth,
    }  # fmt: skip
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return ["--task", "instance", "--pred", tmp_path / "results.json", "--gt", tmp_path / "instances.json"]


def result(image_id: int, category: int, mask: np.ndarray, score: float, **more: Any) -> dict[str, Any]:
    runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    segmentation = {"size": runs["size"], "counts": runs["counts"].decode()}
    return {"image_id": image_id, "category_id": category, "segmentation": segmentation, "score": score, **more}


def rectangle(hw: tuple[int, int], y: int, x: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(hw, np.bool_)
    mask[y : y + height, x : x + width] = True
    return mask


RESULTS = [
    result(5, 7, rectangle((50, 60), 1, 0, 20, 19), 0.9),
    result(5, 7, rectangle((50, 60), 30, 30, 9, 9), 0.9),
    result(5, 3, rectangle((50, 60), 3, 3, 9, 9), 0.7),
    result(2, 3, rectangle((40, 40), 6, 5, 30, 28), 0.6),
    result(2, 7, rectangle((40, 40), 6, 5, 30, 28), 0.95),
]
BAD_RUNS = {"size": [50, 60], "counts": "zzz"}  # would keep faster-coco-eval busy for ever
NO_MASK = {"id": 9, "image_id": 5, "category_id": 3, "segmentation": []}


@pytest.mark.parametrize("with_boxes", [False, True])
def test_instance_agrees_with_pycocotools_on_the_same_files(tmp_path: Path, with_boxes: bool) -> None:
    results = [dict(entry) for entry in RESULTS]
    if with_boxes:
        for entry in results:
            x, y, width, height = coco_mask.toBbox(entry["segmentation"]).tolist()
            entry["bbox"] = [x - 1, y, width + 4, height + 40]
    arguments = save_instances(tmp_path, results)
    data = figures(tmp_path, *arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "instances.json"))
        found = truth.loadRes(str(tmp_path / "results.json"))
        for kind, name in (("segm", "mask"), ("bbox", "box")):
            theirs = COCOeval(truth, found, kind)
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
            ours = [-1 if value is None else value for value in data[name].values()]
            assert ours == pytest.approx(theirs.stats, abs=1e-9)
    assert (data["images"], data["predicted"], data["true"]) == (2, 5, 3)
    assert [c["name"] for c in data["classes"]] == ["cell", "ground"]
    assert 0 < data["mask"]["ap"] < 1


def test_boundary_ap_falls_with_the_edge_alone(tmp_path: Path) -> None:
    """A mask that is right but for its rim: mask IoU 0.9025 (of 10 thresholds 9 reached), boundary IoU 0.2."""
    hw, square = (100, 100), [0, 0, 40, 0, 40, 40, 0, 40]  # 2 % of the diagonal are 3 px
    truth = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [square], "area": 1600, "iscrowd": 0}
    images = [{"id": 5, "height": 100, "width": 100}]
    arguments = save_instances(
        tmp_path, [result(5, 7, rectangle(hw, 1, 1, 38, 38), 0.9)], images=images, annotations=[truth]
    )
    plain = figures(tmp_path, *arguments)
    assert "boundary" not in plain
    assert plain["mask"]["ap"] == pytest.approx(0.9)
    data = figures(tmp_path, *arguments, "--boundary")
    assert (data["mask"], data["box"]) == (plain["mask"], plain["box"])
    rim, inner = 40**2 - 34**2, 38**2 - 32**2
    shared = 38**2 - 34**2
    reached = int((shared / (rim + inner - shared) - 0.5) / 0.05) + 1
    assert data["boundary"]["ap"] == pytest.approx(reached / 10)
    assert data["classes"][0]["boundary_ap50"] == data["boundary"]["ap50"] == 1
    shown = run(*arguments, "--boundary").stdout
    assert shown.splitlines()[0].split("  ")[-2:] == ["boundary AP", "boundary AP50"]


def test_instance_without_results_and_with_crowds_only(tmp_path: Path) -> None:
    assert figures(tmp_path, *save_instances(tmp_path, []))["mask"]["ap"] == 0
    crowd = {"id": 1, "image_id": 5, "category_id": 7, "segmentation": {"size": [50, 60], "counts": [0, 3000]}}
    data = figures(tmp_path, *save_instances(tmp_path, RESULTS, annotations=[crowd | {"iscrowd": 1}]))
    assert data["mask"]["ap"] is None
    assert figures(tmp_path, *save_instances(tmp_path, RESULTS, annotations=[]))["box"]["ap50"] is None


@pytest.mark.parametrize(
    ("results", "truth", "text"),
    [
        (
            {"annotations": []},
            {},
            r"--pred: .*results\.json: wanted a list of results \[{image_id, .*, got dict",
        ),
        ([RESULTS[0] | {"image_id": 77}], {}, r"1 images or categories without a partner: image 77 of .*results\.json"),
        ([RESULTS[0] | {"category_id": 1}], {}, r"without a partner: category 1 of .*; add them, or leave them out"),
        ([RESULTS[0] | {"image_id": 2}], {}, r"result image_id 2: .*got a mask of 60x50 px for an image of 40x40 px"),
        ([{"image_id": 5, "category_id": 7, "score": 1}], {}, r"result image_id 5: wanted .*, got no 'segmentation'"),
        ([RESULTS[0] | {"score": "high"}], {}, "result image_id 5: wanted COCO's fields, got could not convert string"),
        (
            [RESULTS[0] | {"segmentation": {"size": [50, 60], "counts": "zzz"}}],
            {},
            "result image_id 5: .*, got counts: wanted runs",
        ),
        ([7], {}, "result number 0: wanted COCO's fields, got "),
        ([], {"images": []}, r"--gt: .*instances\.json: wanted at least one image, got none"),
        ([], {"annotations": [{"id": 9, "image_id": 1}]}, "annotation id 9: .*, got image 1, which is not among its"),
        (
            [],
            {"annotations": [NO_MASK]},
            "annotation id 9: .*, got a polygon of fewer than three points, or none",
        ),
        (
            [],
            {"annotations": [NO_MASK | {"segmentation": {"size": [50, 60], "counts": [5]}}]},
            "annotation id 9: .*, got counts: wanted runs that fill 60x50 px, got 5 px",
        ),
    ],
)
def test_instance_files_that_are_refused(tmp_path: Path, results: Any, truth: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(*save_instances(tmp_path, results, **truth))


def test_instance_leaves_out_what_has_no_partner(tmp_path: Path) -> None:
    strange = [RESULTS[0] | {"image_id": 77}, RESULTS[0] | {"category_id": 1}]
    expected = figures(tmp_path, *save_instances(tmp_path, RESULTS))
    shown = run(*save_instances(tmp_path, [*RESULTS, *strange]), "--allow-missing", "--json", tmp_path / "out.json")
    assert "2 images, 2 images or categories without a partner left out" in shown.stdout
    assert json.loads((tmp_path / "out.json").read_text())["mask"] == expected["mask"]


# depth


@pytest.fixture
def depth(tmp_path: Path) -> list[object]:
    """Truth in millimetres, 0 and 65535 unknown; predictions in metres."""
    for side in ("pred", "gt"):
        (tmp_path / side).mkdir()
    Image.fromarray(np.array([[1000, 2000, 0, 65535]], np.uint16)).save(tmp_path / "gt" / "a.depth.png")
    np.save(tmp_path / "pred" / "a.npy", np.array([[1.1, 2.0, 9, 9]]))
    return ["--task", "depth", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt"]


def test_depth_of_png_against_arrays(depth: list[object], tmp_path: Path) -> None:
    options = ("--scale", 0.001, "--invalid", "65535")
    data = figures(tmp_path, *depth, *options)
    assert (data["abs_rel"], data["known_pixels"]) == (pytest.approx(0.05), 2)
    assert (data["scale"], data["invalid"], data["max_depth"], data["align"]) == (0.001, [65535], 80, "none")
    assert figures(tmp_path, *depth, "--scale", 0.001)["known_pixels"] == 3  # 65.5 m
    assert figures(tmp_path, *depth, "--scale", 0.001, "--max-depth", 1.5)["known_pixels"] == 1
    assert figures(tmp_path, *depth, *options, "--align", "scale_shift")["abs_rel"] == pytest.approx(0, abs=1e-6)
    (tmp_path / "pred" / "a.npy").unlink()
    np.savez(tmp_path / "pred" / "a.npz", np.array([[[110, 200, 900, 900]]], np.int64))
    assert figures(tmp_path, *depth, *options, "--pred-scale", 0.01)["rmse_m"] == pytest.approx(data["rmse_m"])


def test_depth_of_a_real_room(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "rgbd_7scenes" / "data"
    (tmp_path / "pred").mkdir()
    (tmp_path / "gt").mkdir()
    for name in ("frame-000000", "frame-000005"):
        with Image.open(folder / f"{name}.depth.png") as picture:
            stored = np.array(picture)
        Image.fromarray(stored).save(tmp_path / "gt" / f"{name}.depth.png")
        Image.fromarray(np.where(stored == 65535, 0, stored * 1.1).astype(np.uint16)).save(
            tmp_path / "pred" / f"{name}.png"
        )
    data = figures(
        tmp_path, "--task", "depth", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--scale", 0.001,
        "--invalid", "0,65535", "--max-depth", 10,
    )  # fmt: skip
    assert data["abs_rel"] == pytest.approx(0.1, abs=1e-3)
    assert data["silog"] < 0.1
    assert (data["images"], data["bad_pixels"]) == (2, 0)


def test_depth_files_that_cannot_be_scored_are_listed(depth: list[object], tmp_path: Path) -> None:
    arrays = {
        "wide": np.ones((1, 5)), "deep": np.ones((2, 2, 2)), "text": np.array([["a"]]),
        "pickled": np.array([[{}]], object), "whole": np.ones((1, 4)), "colour": np.ones((1, 4)),
    }  # fmt: skip
    for name, array in arrays.items():
        Image.fromarray(np.full((1, 4), 1000, np.uint16)).save(tmp_path / "gt" / f"{name}.png")
        np.save(tmp_path / "pred" / f"{name}.npy", array)
    Image.fromarray(np.zeros((1, 4, 3), np.uint8)).save(tmp_path / "gt" / "colour.png")
    np.savez(tmp_path / "pred" / "whole.npz", a=np.ones(1), b=np.ones(1))
    (tmp_path / "pred" / "whole.npy").unlink()
    shown = run(*depth, "--scale", 0.001)
    assert shown.exit_code == 1
    assert "6 of 7 pairs could not be scored" in shown.stderr
    for text in (
        "wide: prediction is 5x1 px but truth is 4x1 px; write the prediction at the size of the truth",
        "deep.npy: wanted depths [H, W], got float64 [2, 2, 2]; store one map of numbers a file",
        "text.npy: wanted depths [H, W], got <U1 [1, 1]",
        "pickled.npy: wanted an array, got a file that does not read (",
        "whole.npz: wanted one array in it, got a, b; store one map a file",
        "colour.png: wanted depths (one grey channel), got a picture of mode RGB; save one grey channel of 16 bits",
    ):
        assert text in shown.stderr


def test_depth_that_nobody_knows(depth: list[object]) -> None:
    with pytest.raises(InputError, match=r"wanted depths between 0\.001 and 80 m, got none in 1 files; check --scale"):
        run(*depth, "--scale", 1)
    shown = run(*depth)
    assert shown.exit_code == 1
    assert "wanted to know how many metres one unit is, got no --scale; add it: 0.001 for millimetres" in shown.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--align", "best"], "--align: wanted none, median, scale_shift, inverse, got best"),
        (["--invalid", "none"], "--invalid: wanted stored values separated by commas, such as 0,65535, got 'none'"),
        (["--max-depth", 0], "min_m, max_m: wanted 0 < min_m < max_m, both finite, got 0.001 and 0"),
        (["--boundary"], "--boundary: wanted only with --task semantic, instance, panoptic, got it with depth; leave"),
        (["--num-classes", 3], "--num-classes: wanted only with --task semantic, got it with depth"),
        (["--task", "boxes"], "--task: wanted one of semantic, instance, panoptic, depth, normals, got boxes"),
    ],
)
def test_misuse_says_what_to_do(depth: list[object], options: list[object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(*depth, *options)


# normals


def test_normals_of_png_against_arrays(tmp_path: Path) -> None:
    for side in ("pred", "gt"):
        (tmp_path / side / "sub").mkdir(parents=True)
    np.save(tmp_path / "gt" / "sub" / "a.npy", np.array([[[0, 0, 1.0], [0, 0, 0], [np.nan, 0, 0], [1, 0, 0]]]))
    Image.fromarray(np.array([[[128, 128, 255], [1, 1, 1], [1, 1, 1], [128, 255, 128]]], np.uint8)).save(
        tmp_path / "pred" / "sub" / "a.normals.png"
    )
    arguments = ["--task", "normals", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt"]
    data = figures(tmp_path, *arguments)
    assert data["mean_deg"] == pytest.approx(45, abs=0.5)
    assert (data["under_11_25"], data["known_pixels"]) == (0.5, 2)

    np.save(tmp_path / "gt" / "sub" / "flat.npy", np.ones((3, 1, 4)))
    np.save(tmp_path / "pred" / "sub" / "flat.npy", np.ones((1, 4, 3)))
    shown = run(*arguments)
    assert shown.exit_code == 1
    assert (
        "flat.npy: wanted normals as floats [H, W, 3], got float64 [3, 1, 4]; move the components last" in shown.stderr
    )
    np.save(tmp_path / "gt" / "sub" / "flat.npy", np.ones((1, 4, 3)))
    Image.fromarray(np.zeros((1, 4, 3), np.uint8)).save(tmp_path / "gt" / "a.png")
    assert run(*arguments, "--allow-missing").exit_code == 0

    np.save(tmp_path / "gt" / "sub" / "a.npy", np.zeros((1, 4, 3)))
    np.save(tmp_path / "gt" / "sub" / "flat.npy", np.zeros((1, 4, 3)))
    with pytest.raises(InputError, match=r"wanted normals, got only unknown pixels in 2 files; \(0, 0, 0\) means"):
        run(*arguments, "--allow-missing")


def test_files_of_several_tasks_are_told_apart(tmp_path: Path) -> None:
    from denselab.scoring.depth import DEPTHS
    from denselab.scoring.folders import match_folders

    for folder, names in (
        (
            "pred",
            ("a.depth.labels.png", "a.panoptic.labels.png", "a.depth.overlay.png", "b.labels.png", "b.png", "c.npy"),
        ),
        ("gt", ("a.depth.png", "b.png", "c.png")),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    pairs, unmatched = match_folders(tmp_path / "pred", tmp_path / "gt", DEPTHS, allow_missing=False)
    assert [(pair.name, pair.pred.name, pair.truth.name) for pair in pairs] == [
        ("a", "a.depth.labels.png", "a.depth.png"),
        ("b", "b.labels.png", "b.png"),
        ("c", "c.npy", "c.png"),
    ]
    assert unmatched == []
