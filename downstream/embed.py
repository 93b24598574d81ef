"""Features of images: `python -m downstream.embed ENCODER IMAGES OUT`.

ENCODER is whatever `downstream.checkpoints.weights.load_encoder` reads: a run's folder, or a file of this project or of
others. IMAGES is a folder with images at any depth, one image, or shards. OUT is

    OUT.npy        an array with a row for each image, in the order of OUT.csv: key (a file's path, or the key in the
                   shards), label and class where they are known, and whether the image could be decoded
    OUT.parquet    the columns of that table, and `features`

An image that cannot be decoded has a row of NaN. Features are computed in fp32. Works with torchrun, srun or deepspeed,
on any number of processes, which must see the same folder. The last line of the output is a JSON object.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.eval_loader import EvalLoader
from data.scan import NO_LABEL
from downstream.checkpoints.weights import build_encoder, read_encoder
from downstream.classify.evaluation_cli import add_loading_options, block_numbers, build_loader, run_on_ranks
from downstream.own_images import count_images, load_images, sample_name, write_csv
from pretrain.models.features import Kind, image_features
from pretrain.models.vit import ViT
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import computed_batches, sum_over_ranks

COLUMNS = ("key", "label", "class", "readable")
CHUNK_BYTES = 1 << 26  # of features in memory at once, when they are copied into a table


def embed(
    encoder: ViT,
    loader: EvalLoader,
    path: Path,
    *,
    kind: Kind = "mean",
    blocks: Sequence[int] = (),
    norm_after_pool: bool = False,
    dtype: str = "float32",
    device: torch.device,
) -> Tensor:
    """Writes the features of all images as one .npy file; called by all ranks together, which share its folder.

    Each rank writes the rows of its own images in place, so that memory does not grow with their number.

    Args:
        encoder: in eval mode, on the device.
        loader: all images of a set.
        path: of the file, which exists only once it is complete.
        kind, blocks, norm_after_pool: as in `image_features`.
        dtype: float32 or float16.
        device: where to compute.

    Returns:
        bool (N,), whether each image can be decoded; the rows of the others are NaN.

    Raises:
        ValueError: there is no room for the file, no such block, or no image.
    """

    def compute(images: Tensor, _: Tensor) -> Tensor:
        return image_features(encoder, images, kind, blocks, norm_after_pool)

    unfinished = path.with_name(f"{path.name}.unfinished")
    if loader.rank == 0:
        black = torch.zeros((1, *encoder.image_size, encoder.pixels.channels), device=device)
        with torch.no_grad():
            (row,) = compute(black, torch.empty(0))
        _allocate(unfinished, (len(loader.indices), *row.shape), dtype)
    _wait(loader)
    offset = np.load(unfinished, mmap_mode="r").offset  # after the header
    readable = torch.zeros(len(loader.indices), dtype=torch.int64)
    with unfinished.open("r+b", buffering=0) as file:
        for at, values, can_be_decoded in computed_batches(compute, loader, device, "embedding"):
            if not len(at):
                continue
            values[~can_be_decoded] = torch.nan
            readable[at] += can_be_decoded.long()
            rows = values.numpy().astype(dtype)
            _write(file.fileno(), rows.tobytes(), offset + int(at[0]) * rows[0].nbytes)
        os.fsync(file.fileno())
    sum_over_ranks(readable, loader.world_size, device)
    if loader.rank == 0:
        unfinished.replace(path)
    _wait(loader)
    return readable.bool()


def _wait(loader: EvalLoader) -> None:
    if loader.world_size > 1:
        dist.barrier()


def _write(file: int, data: bytes, start: int) -> None:
    """Writes bytes in place; unlike a memory map, never touches the rows of other ranks, even on a network disk."""
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _allocate(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(
            f"the features take {needed / 1e9:.1f} GB, but {path.parent} has {free / 1e9:.1f} GB free: use another "
            f"disk, --dtype float16, or --features mean"
        )
    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()


def describe_rows(loader: EvalLoader, readable: Tensor) -> Iterator[tuple[str, str, str, int]]:
    """Yields `COLUMNS` of each row; a missing label or class is an empty string, several are joined by semicolons."""
    samples, classes = loader.samples, loader.samples.classes
    for sample, can_be_decoded in zip(loader.indices.tolist(), readable.tolist(), strict=True):
        labels = [int(samples.label[sample])] if samples.multi_labels is None else samples.multi_labels[sample]
        known = [label for label in labels if label != NO_LABEL]
        names = [classes[label] for label in known if label < len(classes)]
        yield sample_name(samples, sample), ";".join(map(str, known)), ";".join(names), int(can_be_decoded)


def write_parquet(features: Path, loader: EvalLoader, readable: Tensor, path: Path) -> None:
    """Copies the rows of a .npy file into a Parquet file with `COLUMNS`, some at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    array = np.load(features, mmap_mode="r")
    kind = pa.from_numpy_dtype(array.dtype)
    for side in reversed(array.shape[1:]):
        kind = pa.list_(kind, side)
    one_label = loader.samples.multi_labels is None
    types = (pa.string(), pa.int32() if one_label else pa.string(), pa.string(), pa.bool_(), kind)
    schema = pa.schema(list(zip((*COLUMNS, "features"), types, strict=True)))
    described = describe_rows(loader, readable)
    step = max(CHUNK_BYTES // array[0].nbytes, 1)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(array), step):
            chunk = np.ascontiguousarray(array[start : start + step])
            lists = pa.array(chunk.reshape(-1))
            for side in reversed(array.shape[1:]):
                lists = pa.FixedSizeListArray.from_arrays(lists, side)
            keys, labels, names, can_be_decoded = zip(*(next(described) for _ in chunk), strict=True)
            columns = [
                list(keys),
                [(int(label) if one_label else label) if label else None for label in labels],
                [name or None for name in names],
                [bool(value) for value in can_be_decoded],
            ]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=False)]
            writer.write_table(pa.Table.from_arrays([*arrays, lists], schema=schema))


def check_out(out: Path) -> None:
    """Raises ValueError if features cannot be written to this file."""
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"OUT is {out}: give a name that ends in .npy or .parquet")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{out}: Parquet needs pyarrow, which is not installed: pip install 'lomar-deepspeed[parquet]', or "
                f"give a name that ends in .npy"
            ) from None


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    out: Path = options.out
    check_out(out)
    samples = load_images(options.images)
    found = read_encoder(options.encoder, weights=options.weights)
    encoder, _ = build_encoder(found, image_size=options.size)
    loader = build_loader(samples, encoder.image_size, options, world, encoder.pixels.format)
    array = out if out.suffix == ".npy" else out.with_name(f"{out.name}.npy")
    readable = embed(
        encoder.to(device),
        loader,
        array,
        kind=options.features,
        blocks=options.block,
        norm_after_pool=found.pool_norm,
        dtype=options.dtype,
        device=device,
    )
    counts = count_images(loader, readable, "have rows of NaN")
    if not world.is_main:
        return {}
    shape = list(np.load(array, mmap_mode="r").shape)
    if array == out:
        write_csv(out.with_suffix(".csv"), COLUMNS, describe_rows(loader, readable))
    else:
        write_parquet(array, loader, readable, out)
        array.unlink()
    return {**counts, "shape": shape, "out": str(out)}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", metavar="ENCODER")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument(
        "--features",
        choices=get_args(Kind),
        default="mean",
        help="the mean of the patch tokens, the class token, both concatenated, the mean of class token and registers "
        "(prefix), or all patch tokens in raster order; default: mean",
    )
    parser.add_argument(
        "--block",
        type=block_numbers,
        default=(),
        metavar="N[,N...]",
        help="outputs of these blocks (1 is the first), concatenated; default: the encoder's, after its norm",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images; default: the file's")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="online, ema, or an encoder's name in the file; default: the one its authors evaluate",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="data type of the file")
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
