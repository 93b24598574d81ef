"""Tests of the checks of masks: defects planted in a correct data set raise a clear error or are counted."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_ade import CLASSES, make_ade
from mmengine.config import Config
from PIL import Image

from downstream.dense.mmengine.config_file import load_job
from downstream.segment import check_masks as checks
from downstream.segment.check_masks import check
from downstream.segment.mask_pairs import find_pairs
from downstream.segment.segmentor_keys import propagate_keys

CONFIGS = Path(checks.__file__).parent / "configs"
IMAGES, MASKS = "images/training", "annotations/training"


@functools.cache
def _read(name: str) -> Config:
    return load_job(name, [], CONFIGS, lambda cfg: None).cfg


def config(root: Path, name: str = "upernet_tiny_camvid", **top: object) -> Config:
    cfg = copy.deepcopy(_read(name))
    cfg.update(data_root=str(root), classes=list(CLASSES), size=64, stride=43, scale=(256, 64))
    cfg.update(top)
    propagate_keys(cfg)
    return cfg


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_ade(tmp_path / "set")


def name(number: int) -> str:
    return f"{number:08d}.png"


def paint(root: Path, number: int, label: int, rows: slice = slice(10, 12)) -> None:
    path = root / MASKS / name(number)
    mask = np.array(Image.open(path))
    mask[rows] = label
    Image.fromarray(mask).save(path)


def test_correct_data_set_passes(root: Path):
    cfg = config(root)
    train, val = check(cfg)
    assert train == "train_dataloader.dataset: 8 images, 8 masks read"
    assert val == "val_dataloader.dataset: 4 images, 4 masks read"
    assert check(cfg, ["test"]) == [val.replace("val_", "test_")]


def no_mask(root: Path) -> None:
    (root / MASKS / name(5)).unlink()


def no_images(root: Path) -> None:
    for path in (root / IMAGES).iterdir():
        path.rename(path.with_suffix(".tex"))


def other_masks(root: Path) -> None:
    for path in (root / MASKS).iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def two_images(root: Path) -> None:
    Image.new("RGB", (128, 96)).save(root / IMAGES / "00000002.png")


def white(root: Path) -> None:
    """Reduce the masks to two classes, the second one drawn as 255."""
    for path in (root / "annotations").glob("*/*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)


def other_size(root: Path) -> None:
    Image.new("L", (128, 95)).save(root / MASKS / name(0))


def colours(root: Path) -> None:
    Image.open(root / MASKS / name(2)).convert("RGB").save(root / MASKS / name(2))


def alpha(root: Path) -> None:
    Image.open(root / MASKS / name(2)).convert("LA").save(root / MASKS / name(2))


def deep(root: Path) -> None:
    """mmseg would read 256 as 0."""
    mask = np.array(Image.open(root / MASKS / name(1))).astype(np.uint16)
    mask[20] = 256
    Image.fromarray(mask).save(root / MASKS / name(1))


def empty(root: Path) -> None:
    for path in (root / MASKS).iterdir():
        Image.new("L", Image.open(path).size, 255).save(path)


def turned(root: Path) -> None:
    """mmcv's decoder rotates the image, but not the mask."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / IMAGES / "00000000.jpg"
    Image.open(path).save(path, exif=exif)


def from_one(root: Path) -> None:
    for path in (root / MASKS).iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask + 1).astype(np.uint8)).save(path)


BAD = {
    "no mask": (no_mask, r"1 of the 8 images have no mask in .*annotations/training: 00000005.png; are .*seg_map_path"),
    "no folder": (lambda r: (r / MASKS).rename(r / "x"), r"dataset.data_prefix.seg_map_path: no folder"),
    "no images": (no_images, r"no image \* in .*images/training; it has no other images"),
    "two images": (two_images, r"00000002.jpg and 00000002.png in .* would share a mask: give .*dataset.img_suffix"),
    "other masks": (other_masks, r"8 of the 8 images have no mask .*dataset.seg_map_suffix=_mask.png"),
    "alpha": (alpha, r"00000002.png has 2 channels: a mask has one"),
    "white": (white, r"all labeled pixels .* are ground, so nothing .*; \d+% of the pixels are 255, which means"),
    "other size": (other_size, r"00000000.png is 128 x 95 pixels, its image is 128 x 96"),
    "turned": (turned, r"is 128 x 96 pixels, its image is 96 x 128: .* color_type=color_ignore_orientation"),
    "colours": (colours, r"00000002.png has 3 channels: a mask has one"),
    "beyond": (lambda r: paint(r, 4, 7), r"labels 7 in masks 00000004.png: with 3 classes .* must be 0 to 2, or 255"),
    "16 bits": (deep, r"labels 256 in masks 00000001.png"),
    "from one": (from_one, r"labels 3 in masks .*are they numbered from 1\? then give reduce_zero_label=true"),
    "nothing": (empty, r"no pixel of the masks read has a class: is reduce_zero_label=False right"),
    "no mask at all": (lambda r: (r / MASKS / name(3)).write_text("oops"), r"00000003.png cannot be read as an"),
    "cut off": (lambda r: (r / MASKS / name(3)).write_bytes((r / MASKS / name(3)).read_bytes()[:60]), r"00000003.png"),
    "no image": (lambda r: (r / IMAGES / "00000003.jpg").write_text("oops"), r"00000003.jpg cannot be read as an"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_raises_a_one_line_error(root: Path, kind: str):
    damage, message = BAD[kind]
    damage(root)
    with pytest.raises(ValueError, match=message) as caught:
        check(config(root))
    assert str(caught.value).startswith("train_dataloader.dataset")
    assert "\n" not in str(caught.value)


def test_mask_values_are_mapped_to_classes(root: Path):
    """Masks of 0 and 255, the values that most tools use for two classes, are read as 0 and 1 by check and mmseg."""
    from mmseg.registry import DATASETS

    white(root)
    two = {"classes": ["background", "lesion"]}
    with pytest.raises(ValueError, match=r"if it means lesion, give mask_values=\[0,255\]"):
        check(config(root, **two))
    cfg = config(root, **two, mask_values=[0, 255], reduce_zero_label=True)  # mask_values has precedence
    assert check(cfg)[0] == "train_dataloader.dataset: 8 images, 8 masks read"
    pipeline = [{"type": "LoadAnnotations"}]
    loaded = DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": pipeline})
    assert {label for n in range(8) for label in np.unique(loaded[n]["gt_seg_map"])} == {0, 1}
    paint(root, 3, 128)
    with pytest.raises(ValueError, match=r"labels 128 in masks 00000003.png: mask_values allows 0, 255"):
        check(cfg)
    for values in ([0], [0, 0], [0, 256], "0,255"):
        with pytest.raises(ValueError, match=r"mask_values=.*: give a distinct value from 0 to 255 for each of the"):
            config(root, **two, mask_values=values)


def test_images_of_any_suffix_are_used(root: Path):
    """Images are paired with masks as in mmseg's data set. If a suffix is set, images with other ones are counted."""
    from mmseg.registry import DATASETS

    for number, suffix in enumerate((".JPG", ".png", ".jpeg")):
        path = root / IMAGES / f"{number:08d}.jpg"
        Image.open(path).save(root / IMAGES / f"{number:08d}{suffix}")
        path.unlink()
    cfg = config(root)
    assert check(cfg)[0] == "train_dataloader.dataset: 8 images, 8 masks read"
    loaded = DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": []})
    pairs, _ = find_pairs("key", cfg.train_dataloader.dataset, type(loaded))
    assert [(str(root / IMAGES / a), str(root / MASKS / b)) for a, b in pairs] == [
        (loaded[n]["img_path"], loaded[n]["seg_map_path"]) for n in range(8)
    ]
    cfg.train_dataloader.dataset.img_suffix = ".jpg"
    line = check(cfg)[0]
    assert "5 images, " in line
    assert "3 images with a suffix other than .jpg (.JPG, .jpeg, .png) are not used" in line
    assert len(DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": []})) == 5


def test_classes_without_pixels_are_reported(root: Path):
    four = ["ground", "disc", "box", "star"]
    assert "masks read, 1 classes without a pixel in them: star" in check(config(root, classes=four))[0]
    line = check(config(root, classes=["disc", "box", "star"], reduce_zero_label=True))[0]
    hint = "are labels numbered from 0? then give reduce_zero_label=false"
    assert line.endswith(f"1 classes without a pixel in them: star; {hint}")


def test_rare_classes_are_searched_in_all_masks(root: Path):
    """If all sampled masks have the same class, the remaining masks are searched for others."""
    for path in (root / MASKS).iterdir():
        Image.new("L", Image.open(path).size, 0).save(path)
    with pytest.raises(ValueError, match=r"all labeled pixels .* are ground"):
        check(config(root), opened=2)
    paint(root, 1, 2)
    assert "8 images, 8 masks read, 1 classes without a pixel in them: disc" in check(config(root), opened=2)[0]


def test_more_classes_than_fit_in_8_bits_are_rejected(root: Path):
    """mmseg would read label 300 as 44."""
    names = [f"class {number}" for number in range(256)]
    with pytest.raises(ValueError, match=r"256 classes: mmseg reads masks as 8 bits, .* at most 255"):
        check(config(root, classes=names))
    check(config(root, classes=names[:255]))


def test_errors_of_all_data_sets_are_reported_at_once(root: Path):
    no_mask(root)
    (root / "images" / "validation" / "00000001.jpg").write_text("oops")
    with pytest.raises(ValueError, match=r"00000005.png.*\nval_dataloader.dataset: .*00000001.jpg"):
        check(config(root))


def test_reduce_zero_label_expects_labels_from_one(root: Path):
    """With `reduce_zero_label`, 0 and 255 are ignored, and labels start at 1."""
    from_one(root)
    train, _ = check(config(root, reduce_zero_label=True))
    assert train.endswith("8 masks read")
    paint(root, 4, 4)
    with pytest.raises(ValueError, match=r"labels 4 in masks 00000004.png: .* they must be 1 to 3, or 0 or 255"):
        check(config(root, reduce_zero_label=True))


def test_checks_read_masks_as_mmseg_does(root: Path):
    """Compares names, labels and classes with mmseg's own loader, for masks with a palette and labels from 1."""
    from mmseg.registry import DATASETS

    from downstream.segment.mask_counts import count_masks

    from_one(root)
    for path in (root / MASKS).iterdir():
        mask = Image.open(path)
        mask.putpalette(list(range(255, -1, -1)) * 3)  # colors of the labels, which must not be read
        mask.save(path)
    cfg = config(root, reduce_zero_label=True)
    loaded = DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": [{"type": "LoadAnnotations"}]})
    pairs, _ = find_pairs("key", cfg.train_dataloader.dataset, type(loaded))
    paths = [(str(root / IMAGES / image), str(root / MASKS / mask)) for image, mask in pairs]
    assert paths == [(loaded[n]["img_path"], loaded[n]["seg_map_path"]) for n in range(len(loaded))]
    counts = count_masks("key", paths, [1, 2, 3], {0, 255})
    seen = np.bincount(np.concatenate([loaded[n]["gt_seg_map"].ravel() for n in range(len(loaded))]), minlength=256)
    assert [counts.pixels[label] for label in (1, 2, 3)] == seen[:3].tolist()
    assert counts.pixels[0] == seen[255]
    assert loaded.metainfo["classes"] == CLASSES


def test_unused_masks_and_small_images_are_counted(root: Path):
    Image.new("L", (128, 96), 255).save(root / MASKS / name(0))
    Image.new("L", (9, 9)).save(root / MASKS / "beside.png")
    (root / IMAGES / "._00000000.jpg").write_text("hidden")
    train, _ = check(config(root, scale=(256, 48)))
    assert train.endswith("1 masks have no image (not used), 1 masks without a labeled pixel")
    # With (256, 40), short sides become up to 2 * 40 > 64. With (64, 64), long sides are limited to 2 * 64, so images
    # of 64 x 150 get only 54 rows.
    assert "never fill" not in check(config(root, scale=(256, 40)))[0]
    assert "2 images never fill a crop of 64 x 64 pixels and are padded" in check(config(root, scale=(64, 64)))[0]


def test_crops_larger_than_every_image_are_rejected(root: Path):
    with pytest.raises(ValueError, match=r"no image fills a crop of 512 x 512 .* give a smaller size, or a larger"):
        check(config(root, size=512))
    cfg = config(root)
    cfg.train_dataloader.dataset.pipeline[2].ratio_range = (0.001, 2.0)
    with pytest.raises(ValueError, match="would be resized to a height or width of 0"):
        check(cfg)


def test_heads_and_classes_must_agree(root: Path):
    cfg = config(root)
    cfg.model.auxiliary_head.num_classes = 150
    with pytest.raises(ValueError, match=r"model.auxiliary_head.num_classes=150, but .* has 3 classes \(ground, disc"):
        check(cfg)
    cfg = config(root)
    cfg.model.decode_head.ignore_index = 0
    with pytest.raises(ValueError, match=r"decode_head.ignore_index=0: mmseg gives padded pixels the label 255"):
        check(cfg)
    cfg = config(root)
    del cfg.val_dataloader.dataset.metainfo
    with pytest.raises(ValueError, match=r"val_dataloader.dataset: name the classes"):
        check(cfg)


def test_settings_that_would_fail_later_in_mmseg_are_rejected(root: Path):
    cfg = config(root)
    cfg.val_dataloader.batch_size = 2
    with pytest.raises(ValueError, match=r"val_dataloader.batch_size=2: evaluated images differ in size: give 1"):
        check(cfg)
    cfg = config(root)
    cfg.train_dataloader.dataset.pipeline[1].reduce_zero_label = True
    with pytest.raises(ValueError, match=r"LoadAnnotations has reduce_zero_label=True, its data set False"):
        check(cfg)
    cfg = config(root)
    cfg.model.backbone.frozen = True
    with pytest.raises(ValueError, match=r"would freeze random weights: give start.checkpoint=FILE"):
        check(cfg)
    check(cfg, ["test"])
    cfg.model.backbone.init_cfg = {"type": "EncoderCheckpoint", "checkpoint": "runs/x"}
    check(cfg)


def test_small_config_needs_the_classes_of_a_custom_data_set(root: Path):
    """It does not default to ADE20K's classes, and its labels start at 0."""
    with pytest.raises(ValueError, match=r"train_dataloader.dataset: name the classes, in the order of their labels"):
        check(config(root, "upernet_vits_lomar_small", classes=None))
    assert check(config(root, "upernet_vits_lomar_small"))[0] == "train_dataloader.dataset: 8 images, 8 masks read"


def test_defaults_of_a_data_set_type_apply(root: Path):
    """A config need not repeat the suffixes and `reduce_zero_label` of mmseg's data set types."""
    cfg = config(root, reduce_zero_label=None)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pop("reduce_zero_label", None)
    cfg.train_dataloader.dataset.type = "CityscapesDataset"
    with pytest.raises(ValueError, match=r"no image \*_leftImg8bit.png in .*only .jpg"):
        check(cfg)
    cfg.train_dataloader.dataset.type = "ADE20KDataset"  # has 150 classes of its own
    assert "masks read" in check(cfg, ["val"])[0]
    paint(root, 0, 200)
    with pytest.raises(ValueError, match=r"labels 200 in .* with 150 classes .*=True they must be 1 to 150"):
        check(cfg, ["train"])


def test_list_of_image_names_selects_a_subset(root: Path):
    """With mmseg's `ann_file`, other masks are not reported as unused, and missing images are an error."""
    (root / "train.txt").write_text("00000001\n00000003\n")
    cfg = config(root)
    cfg.train_dataloader.dataset.ann_file = "train.txt"
    assert check(cfg)[0] == "train_dataloader.dataset: 2 images, 2 masks read"
    (root / "train.txt").write_text("00000001\n00000009\n")
    with pytest.raises(ValueError, match=r"1 images listed in .*train.txt are not in .*: 00000009"):
        check(cfg)


def test_training_reads_some_masks_and_the_command_reads_all(root: Path, capfd: pytest.CaptureFixture[str]):
    paint(root, 3, 9)  # only the even ones of eight masks are read
    assert "8 images, 4 masks read" in check(config(root), opened=4)[0]
    sizes = [f"data_root={root}", "size=64", "stride=43", "scale=[256,64]"]
    assert checks.main(["upernet_tiny_camvid", *sizes, 'classes=["ground", "disc", "box"]']) == 1
    assert "labels 9 in masks 00000003.png" in capfd.readouterr().err
    paint(root, 3, 0)
    assert checks.main(["upernet_tiny_camvid", *sizes, 'classes=["ground", "disc", "box", "star"]']) == 0
    assert "8 images, 8 masks read, 1 classes without a pixel in them: star" in capfd.readouterr().out


def test_data_that_cannot_be_checked_is_reported(root: Path):
    cfg = config(root)
    cfg.train_dataloader.dataset.type = "BaseCDDataset"
    cfg.val_dataloader.dataset.data_root = "s3://bucket/set"
    train, val = check(cfg)
    assert train == "train_dataloader.dataset: type BaseCDDataset is not checked"
    assert val == "val_dataloader.dataset: s3://bucket/set/images/validation is not on this machine and is not checked"
