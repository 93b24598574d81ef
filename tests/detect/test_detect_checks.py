"""Tests of the checks of COCO data sets: defects planted in a correct set raise a clear error or are counted."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_coco import make_coco
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as run_lengths

from downstream.dense.data_checks import find_missing
from downstream.detect.coco_checks import check
from downstream.detect.detector_keys import propagate_keys

CONFIG = Path(__file__).parents[2] / "downstream" / "detect" / "configs" / "vitdet_vitb_lomar_25ep.py"
TRAIN, VAL = "annotations/instances_train2017.json", "annotations/instances_val2017.json"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.fromfile(CONFIG, import_custom_modules=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path)


@pytest.fixture
def cfg(config: Config, root: Path) -> Config:
    copied = Config(json.loads(json.dumps(config.to_dict())))
    copied.merge_from_dict({"data_root": str(root), "classes": ["disc", "box"]})
    propagate_keys(copied)
    return copied


def change(root: Path, edit: Callable[[Content], object], file: str = TRAIN) -> None:
    content = json.loads((root / file).read_text())
    edit(content)
    (root / file).write_text(json.dumps(content))


def test_correct_data_set_passes(cfg: Config, root: Path):
    train, val = check(cfg)
    boxes = len(json.loads((root / TRAIN).read_text())["annotations"])
    assert train == f"train_dataloader.dataset: 8 of 8 images, {boxes} boxes"
    assert val.startswith("val_dataloader.dataset: 4 of 4 images, ")
    assert check(cfg, ["test"]) == [val.replace("val_", "test_")]


def first(content: Content) -> Content:
    return content["annotations"][0]


def set_run_length_mask(content: Content, size: list[int] | None = None) -> None:
    height, width = content["images"][0]["height"], content["images"][0]["width"]
    coded = run_lengths.frPyObjects(first(content)["segmentation"], height, width)[0]
    first(content)["segmentation"] = {"size": size or coded["size"], "counts": coded["counts"].decode()}


BAD = {
    "no categories": (lambda c: c.update(categories=[]), r"no categories: is it an instances file"),
    "no annotations": (lambda c: c.update(annotations=[]), r"train_dataloader.dataset.ann_file: .*no annotations"),
    "a list": (lambda c: c["images"].clear(), r"no images"),
    "no size": (lambda c: c["images"][3].pop("height"),
                r"an entry of images lacks one of id, file_name, height, width"),
    "images twice": (lambda c: c["images"].append(c["images"][2]), r"images share the id 2: "),
    "annotations twice": (lambda c: c["annotations"].append(c["annotations"][4]), r"annotations share the id 5: "),
    "other names": (lambda c: c["categories"][0].update(name="ring"), r"\(ring, box\), not the classes disc"),
    "another order": (lambda c: c["categories"].reverse(), r"order box, disc, but .* give classes='\[\"box\""),
    "a name twice": (lambda c: c["categories"].append({"id": 9, "name": "box"}), r"two categories the same name"),
    "no file": (lambda c: c["images"][5].update(file_name="gone.jpg"), r"1 of the 8 images .*train2017.*: gone.jpg"),
    "other pixels": (lambda c: c["images"][0].update(width=96, height=128),
                     r"is 128 x 96 pixels, but .* says 96 x 128"),
    "box of three": (lambda c: first(c).update(bbox=[1, 2, 3]), r"annotations 1 lack bbox"),
    "box of nan": (lambda c: first(c).update(bbox=[1, 2, float("nan"), 3]), r"annotations 1 lack bbox"),
    "no area": (lambda c: first(c).pop("area"), r"annotations 1 lack bbox .*, area or"),
    "no mask": (lambda c: first(c).update(segmentation=[]), r"1 of \d+ annotations have no .* give with_masks=false"),
    "flat mask": (lambda c: first(c).update(segmentation=[1, 2, 3, 4, 5, 6]), r"annotations 1 .* list of polygons"),
    "runs": (lambda c: first(c).update(segmentation={"size": [96, 128], "counts": [7]}), r"1 have masks of"),
    "lines": (lambda c: [a.update(segmentation=[[1, 2, 3, 4]]) for a in c["annotations"]], r"no mask has a polygon of"),
    "text as size": (lambda c: c["images"][0].update(height="96"),
                     r"an entry of images has .*, or a height or width that"),
    "name of a class": (lambda c: c["categories"][0].update(name=7),
                        r"an entry of categories .* a name that is not text"),
    "list as id": (lambda c: first(c).update(id=[1]), r"an entry of annotations has an id that is neither"),
    "other image ids": (
        lambda c: [a.update(image_id=f"{a['image_id']}") for a in c["annotations"]], r"no image .* image_id='0'; "
    ),
    "other category ids": (
        lambda c: [a.update(category_id=f"{a['category_id']}") for a in c["annotations"]],
        r"category_id looks like '\d', but the ids of categories are 1, 2",
    ),
    "fractions": (lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]], r"boxes are in pixels"),
    "another suffix": (lambda c: c["images"][5].update(file_name="000000000005.png"), r"there is 000000000005.jpg: "),
    "Windows' path": (lambda c: c["images"][5].update(file_name="a\\000000000005.jpg"), r"there is 000000000005.jpg: "),
    "other mask": (lambda c: set_run_length_mask(c, [5, 7]), r"annotations 1 have masks of a different size"),
    "all outside": (lambda c: [a.update(bbox=[500, 500, 9, 9]) for a in c["annotations"]], r"no box of the classes"),
    "only crowds": (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], r"no box of the classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_data_raises_an_error_that_names_the_file(cfg: Config, root: Path, name: str):
    edit, message = BAD[name]
    change(root, edit)
    with pytest.raises(ValueError, match=message) as caught:
        check(cfg)
    error = str(caught.value)
    assert error.startswith("train_dataloader.dataset")
    assert "\n" not in error
    assert TRAIN in error


def test_errors_of_all_data_sets_are_reported_at_once(cfg: Config, root: Path):
    change(root, lambda c: c["images"][5].update(file_name="gone.jpg"))
    change(root, lambda c: c.update(annotations=[]), VAL)
    with pytest.raises(ValueError, match=r"gone\.jpg.*\nval_dataloader\.dataset\.ann_file: .*no annotations"):
        check(cfg)


UNUSUAL = {
    "crowd": (lambda c: first(c).update(iscrowd=1), -1, "1 crowds (ignored)"),
    "outside": (lambda c: first(c).update(bbox=[128, 10, 9, 9]), -1, "1 boxes outside their image or without area"),
    "left of it": (lambda c: first(c).update(bbox=[-9, 10, 9, 9]), -1, "1 boxes outside"),
    "thin": (lambda c: first(c).update(bbox=[5, 5, 0.5, 9]), -1, "1 boxes outside"),
    "no area": (lambda c: first(c).update(area=0), -1, "1 boxes outside"),
    "reaching": (lambda c: first(c).update(bbox=[100, 10, 30, 9]), 0, "1 boxes extend beyond their image (clipped)"),
    "by half a pixel": (lambda c: first(c).update(bbox=[100, 10, 28.5, 9]), 0, ""),
    "another category": (lambda c: first(c).update(category_id=77), -1, "1 boxes of other categories (skipped)"),
    "another image": (lambda c: first(c).update(image_id=77), -1, "1 annotations of images that are not listed"),
    "to ignore": (lambda c: first(c).update(ignore=1), -1, "1 boxes are marked with ignore (skipped)"),
    "text as id": (lambda c: first(c).update(id="a"), 0, ""),
    "0 as id": (lambda c: first(c).update(id=0), 0, ""),
    "no counts": (lambda c: first(c).update(segmentation={"size": [96, 128]}), 0, "1 masks without a polygon"),
    "two points": (lambda c: first(c).update(segmentation=[[1, 2, 3, 4]]), 0, "1 masks without a polygon"),
    "run lengths": (set_run_length_mask, 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_used_boxes_are_counted_as_mmdet_does(cfg: Config, root: Path, name: str):
    """The reported number of boxes matches what mmdet's own data set keeps."""
    from mmdet.datasets import CocoDataset

    edit, count_change, note = UNUSUAL[name]
    before = len(json.loads((root / TRAIN).read_text())["annotations"])
    change(root, edit)
    line = check(cfg, ["train"])[0]
    assert f" {before + count_change} boxes" in line
    assert (note in line) if note else line.endswith("boxes")
    loaded = CocoDataset(
        ann_file=TRAIN,
        data_root=str(root),
        data_prefix={"img": "train2017"},
        metainfo={"classes": ("disc", "box")},
        serialize_data=False,
    )
    instances = [instance for number in range(len(loaded)) for instance in loaded.get_data_info(number)["instances"]]
    assert sum(not instance["ignore_flag"] for instance in instances) == before + count_change


def test_used_images_are_counted_as_mmdet_does(cfg: Config, root: Path):
    """Image 0 loses its only annotation, so it is used only with filter_empty_gt=false."""
    from mmdet.datasets import CocoDataset

    def load() -> int:
        keys = {key: value for key, value in cfg.train_dataloader.dataset.items() if key not in ("type", "pipeline")}
        return len(CocoDataset(**keys, serialize_data=False))

    change(root, lambda c: c.update(annotations=c["annotations"][1:]))
    cfg.train_dataloader.dataset.filter_cfg.min_size = 32
    line = check(cfg, ["train"])[0]
    assert f"{load()} of 8 images" in line
    assert "1 images without boxes are left out (train_dataloader.dataset.filter_cfg.filter_empty_gt=false" in line
    cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt = False
    assert check(cfg, ["train"])[0].startswith(f"train_dataloader.dataset: {load()} of 8 images")
    assert load() == 8


def test_classes_without_boxes_are_named(cfg: Config, root: Path):
    change(root, lambda c: [a.update(category_id=1) for a in c["annotations"]])
    assert check(cfg)[0].endswith(", 1 classes without boxes: box")


def test_only_training_can_use_part_of_a_data_set(cfg: Config, root: Path):
    """In validation, pycocotools would count all objects in the other images as missed."""
    cfg.train_dataloader.dataset.indices = 3
    assert check(cfg)[0].endswith("limited by train_dataloader.dataset.indices=3")
    cfg.val_dataloader.dataset.indices = 2
    with pytest.raises(ValueError, match=r"val_dataloader.dataset.indices=2: COCO's metrics count all images of"):
        check(cfg)


def test_boxes_given_as_two_corners_are_suspected(cfg: Config, root: Path):
    change(root, lambda c: [a.update(bbox=[a["bbox"][0], a["bbox"][1], 120, 110]) for a in c["annotations"]])
    assert "are they [x1, y1, x2, y2]?" in check(cfg)[0]


def test_boxes_without_masks_need_with_masks_false(cfg: Config, root: Path):
    change(root, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    change(root, lambda c: [a.pop("segmentation") for a in c["annotations"]], VAL)
    with pytest.raises(ValueError, match="give with_masks=false") as caught:
        check(cfg)
    assert "val_dataloader.dataset" in str(caught.value)
    cfg.with_masks = False
    propagate_keys(cfg)
    assert "8 of 8 images" in check(cfg)[0]


def test_annotation_ids_that_pycocotools_mishandles_are_renumbered(cfg: Config, root: Path):
    """Our metric renumbers the annotations and scores every box. With mmdet's own metric, they are rejected."""
    from downstream.detect.coco_metric import AnyIdsCocoMetric

    def renumber(content: Content) -> None:
        for number, annotation in enumerate(content["annotations"]):
            annotation.update(id=number if number < 2 else f"box {number}")
            del annotation["iscrowd"]

    change(root, renumber, VAL)
    assert check(cfg)[1].endswith("annotations are renumbered from 1 to measure AP (one has the id 0)")
    metric = AnyIdsCocoMetric(ann_file=str(root / VAL), metric="bbox")
    metric.dataset_meta = {"classes": ("disc", "box")}
    content = json.loads((root / VAL).read_text())
    for image in content["images"]:
        boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([a["bbox"] for a in boxes]).T
        found = {"bboxes": torch.stack([x, y, x + w, y + h], 1), "scores": torch.ones(len(boxes))}
        found["labels"] = torch.tensor([a["category_id"] - 1 for a in boxes])
        size = (image["height"], image["width"])
        metric.process({}, [{"img_id": image["id"], "ori_shape": size, "pred_instances": found}])
    assert metric.evaluate(len(content["images"]))["coco/bbox_mAP"] == 1
    cfg.val_evaluator.type = "CocoMetric"
    with pytest.raises(ValueError, match=r"annotation 0 has no iscrowd.*give val_evaluator\.type=AnyIdsCocoMetric"):
        check(cfg)


def test_other_categories_of_the_file_are_skipped(cfg: Config, root: Path):
    change(root, lambda c: (c["categories"].append({"id": 3, "name": "star"}), first(c).update(category_id=3)))
    assert "1 boxes of other categories (skipped)" in check(cfg)[0]


def test_run_length_masks_need_bitmaps(cfg: Config, root: Path):
    change(root, set_run_length_mask)
    cfg.train_dataloader.dataset.pipeline[1].poly2mask = False
    with pytest.raises(ValueError, match=r"1 masks of .* give train_dataloader.dataset.pipeline.1.poly2mask=True"):
        check(cfg)
    cfg.merge_from_dict({"train_dataloader.dataset.pipeline.1.poly2mask": True})
    check(cfg)


def test_classes_and_heads_must_agree(cfg: Config, config: Config, root: Path):
    cfg.model.roi_head.mask_head.num_classes = 80
    with pytest.raises(
        ValueError, match=r"mask_head.num_classes=80, but train_dataloader.dataset has 2 classes \(disc, box\)"
    ):
        check(cfg)
    cfg.classes = None
    del cfg.train_dataloader.dataset.metainfo  # the default is COCO's classes
    with pytest.raises(
        ValueError, match=r"\(disc, box\), not the classes person, .* and 75 more: give classes='\[\"disc\", \"box\"\]'"
    ):
        check(cfg)


def test_missing_files_and_folders_are_reported(cfg: Config, root: Path):
    cfg.train_dataloader.dataset.data_prefix.img = "photos/"
    cfg.val_dataloader.dataset.ann_file = cfg.val_evaluator.ann_file = f"{root}/val.json"
    with pytest.raises(ValueError, match=r"train_dataloader.dataset.data_prefix.img: no folder .*/photos/ ") as caught:
        check(cfg)
    assert "\nval_dataloader.dataset.ann_file: no file" in str(caught.value)


def test_evaluator_with_another_file_is_rejected(cfg: Config, root: Path):
    cfg.val_evaluator.ann_file = f"{root}/{TRAIN}"
    with pytest.raises(ValueError, match=r"val_evaluator.ann_file=.* is not the file of val_dataloader"):
        check(cfg)


@pytest.mark.parametrize("content", ["{", '{"images": [1', "[]", '"text"', "\x80"])
def test_truncated_and_non_coco_files_are_rejected(cfg: Config, root: Path, content: str):
    (root / TRAIN).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train_dataloader.dataset.ann_file: .*(not JSON|no images)"):
        check(cfg)


def test_small_and_narrow_images_are_reported(cfg: Config, root: Path):
    """Images of 96 x 128 and 120 x 90 pixels fill a 224-pixel window if their long side is 2048; 12 x 120 does not."""
    change(root, lambda c: c["images"][1].update(width=12, height=120, file_name="narrow.jpg"))
    Image.new("RGB", (12, 120)).save(root / "train2017" / "narrow.jpg")
    change(root, lambda c: [a.update(bbox=[1, 1, 9, 9]) for a in c["annotations"]])
    dataset = cfg.train_dataloader.dataset
    dataset.filter_cfg.min_size = 32
    line = check(cfg)[0]
    assert "7 of 8 images" in line
    assert "window" not in line
    dataset.filter_cfg.min_size = 8
    assert check(cfg)[0].endswith("1 images never fill a window of 224 pixels and are padded")
    dataset.pipeline[2].ratio_range = (0.003, 2.0)
    with pytest.raises(ValueError, match=r"narrow\.jpg would be resized to a height or width of 0"):
        check(cfg)
    dataset.filter_cfg.min_size = 500
    with pytest.raises(ValueError, match=r"all images with boxes are smaller than filter_cfg.min_size=500"):
        check(cfg)


def rotate_first_image(root: Path) -> None:
    """Set an EXIF orientation that turns the first training image of 128 x 96 pixels to 96 x 128."""
    path = root / "train2017" / f"{0:012d}.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def test_rotated_images_must_have_the_size_that_mmcv_decodes(cfg: Config, root: Path):
    rotate_first_image(root)
    with pytest.raises(ValueError, match=r"is 96 x 128 pixels, but .* says 128 x 96"):
        check(cfg)
    change(root, lambda c: c["images"][0].update(width=96, height=128))
    check(cfg)


def test_boxes_drawn_without_the_exif_orientation_are_reported(cfg: Config, root: Path):
    """The error names the key that stops mmcv from rotating images. With this key, the check does not rotate either."""
    rotate_first_image(root)
    key = "train_dataloader.dataset.pipeline.0.color_type"
    with pytest.raises(ValueError, match=f"the boxes were drawn without: give {key}=color_ignore_orientation"):
        check(cfg)
    cfg.train_dataloader.dataset.pipeline[0].color_type = "color_ignore_orientation"
    check(cfg)
    change(root, lambda c: c["images"][0].update(width=96, height=128))
    with pytest.raises(ValueError, match=f"the boxes were drawn on rotated images: leave out {key}"):
        check(cfg)


def test_file_that_is_not_an_image_is_rejected(cfg: Config, root: Path):
    (root / "train2017" / f"{0:012d}.jpg").write_text("oops")
    with pytest.raises(ValueError, match=r"000000000000.jpg cannot be read as an image"):
        check(cfg)


def test_mmcv_without_operators_is_rejected(cfg: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "mmcv._ext", None)
    with pytest.raises(ValueError, match=r"operators cannot be loaded .*python -m downstream.doctor"):
        check(cfg)


def test_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of two folders with as many names as COCO's, 118,287, is listed only once, and the search is fast."""
    listed = []
    names = [f"{half}/{number:012d}.jpg" for number in range(118_287) for half in "ab"]
    monkeypatch.setattr(
        os, "listdir", lambda folder: listed.append(folder) or [f"{n:012d}.jpg" for n in range(118_286)]
    )
    for half in "ab":
        (tmp_path / half).mkdir()
    start = time.perf_counter()
    assert find_missing(str(tmp_path), names) == [f"{half}/000000118286.jpg" for half in "ab"]
    assert len(listed) == 2
    assert time.perf_counter() - start < 5
