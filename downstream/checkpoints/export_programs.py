"""Programs that run without this project's code, at any batch size: TorchScript, torch.export and ONNX.

They compute features or logits of (B, C, H, W) float32 pixels, standardized by the encoder's mean and deviation
(ImageNet's, if it has no others), at the one image size that they were exported for. Each is read back and compared in
float32, at two batch sizes.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from downstream.checkpoints.compare import max_difference, random_images
from downstream.checkpoints.exported import Export

# In float32, sums in another order differ by up to 2e-5 (see compare.py).
FLOAT32_TOLERANCE = 1e-4
_BATCHES = (1, 3)  # the program is made from a batch of two
_ONNX_LIMIT = 2**31  # bytes that a protocol buffer may have


def to_torchscript(export: Export, out: Path) -> tuple[float, str]:
    """Writes a traced program for `torch.jit.load`."""
    images = _example(export)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are meant to become constants; that tracing is dated is known
        torch.jit.save(torch.jit.trace(export.model, images), str(out), _extra_files=_encoded(export))
        program = torch.jit.load(str(out))
    return _check(export, program), 'import torch\ntorch.jit.load("{out}")(images)'


def to_torch_export(export: Export, out: Path) -> tuple[float, str]:
    """Writes a program for `torch.export.load`."""
    with torch.no_grad():
        program = torch.export.export(export.model, (_example(export),), dynamic_shapes=_any_batch())
    torch.export.save(program, str(out), extra_files=export.metadata)
    loaded = torch.export.load(str(out)).module()
    return _check(export, loaded), 'import torch\ntorch.export.load("{out}").module()(images)'


def to_onnx(export: Export, out: Path) -> tuple[float, str]:
    """Writes an ONNX model with the input `images` and the output `features` or `logits`."""
    try:
        import onnx
        import onnxscript
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        raise ValueError("ONNX needs: pip install -e '.[onnx]'; torch_export needs nothing more") from None
    assert onnxscript  # torch's exporter uses it
    if (size := sum(tensor.nbytes for tensor in export.tensors.values())) >= _ONNX_LIMIT:
        raise ValueError(f"{export.report.path} has {size / 1e9:.1f} GB, but an ONNX file at most 2: use torch_export")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own deprecations
        torch.onnx.export(
            export.model,
            (_example(export),),
            str(out),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["images"],
            output_names=[export.what],
            external_data=False,
            verbose=False,
        )
    model = onnx.load(str(out))
    onnx.helper.set_model_props(model, export.metadata)
    onnx.save(model, str(out))
    evaluator = ReferenceEvaluator(model)
    difference = _check(export, lambda images: torch.tensor(evaluator.run(None, {"images": images.numpy()})[0]))
    return difference, 'import onnxruntime\nonnxruntime.InferenceSession("{out}").run(None, {"images": images.numpy()})'


def _example(export: Export) -> Tensor:
    images = random_images(*export.spec.image_size, export.spec.pixels.channels).float()
    with torch.no_grad():
        export.model(images)  # fills timm_models' cache of buckets with tensors before they are traced
    return images


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


def _encoded(export: Export) -> dict[str, bytes]:
    return {name: value.encode() for name, value in export.metadata.items()}


@torch.no_grad()
def _check(export: Export, compute: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of the program's outputs from the model's, in float32; raises ValueError like `accept`."""
    images = random_images(*export.spec.image_size, export.spec.pixels.channels).float()
    differences = []
    for batch in _BATCHES:
        some = images[:1].repeat(batch, 1, 1, 1) * torch.linspace(1, 2, batch)[:, None, None, None]
        differences.append(max_difference(compute(some), export.model(some)))
    worst = float(torch.tensor(differences).max())  # NaN if one of them is
    return export.accept(worst, FLOAT32_TOLERANCE, "float32")
