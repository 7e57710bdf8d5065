"""Image classification by the recipe: tiny random models, a few generated pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from lowrank_ft import cli
from lowrank_ft.calibration import texts
from lowrank_ft.errors import ConfigError
from lowrank_ft.recipes import evaluation, images, models
from lowrank_ft.recipes.data import DataConfig

SIZE, NAMES = 32, ["dark", "light", "striped"]


def picture(i: int, mode: str = "RGB") -> Image.Image:
    """Dark, light or striped, with noise, of changing size."""
    noise = np.random.default_rng(i).integers(0, 60, (20 + i % 3, 24, 3))
    base = {0: 0, 1: 180, 2: 180 * (np.arange(24)[None, :, None] % 6 < 3)}[i % 3]
    return Image.fromarray((noise + base).astype(np.uint8)).convert(mode)


def write(path: Path, numbers: range, **columns: str) -> Path:
    image, label = columns.get("image", "image"), columns.get("label", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    rows = {image: [picture(i, "L" if i % 2 else "RGB") for i in numbers], label: [i % 3 for i in numbers]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    write(directory / "train.parquet", range(15))
    write(directory / "heldout.parquet", range(15, 24))
    return directory


def efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=SIZE, width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, hidden_act="relu6",
        kernel_sizes=[3, 5, 3], in_channels=[32, 32, 48], out_channels=[32, 48, 64], strides=[1, 2, 1],
        num_block_repeats=[1, 1, 2], expand_ratios=[1, 2, 2], batch_norm_momentum=0.1, num_labels=7,
        dropout_rate=0.0, drop_connect_rate=0.0,
    )  # fmt: skip
    model = EfficientNetForImageClassification(config)
    for module in model.modules():
        # As transformers draws them, an untrained model's features vanish.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=SIZE, patch_size=8
    )
    return Dinov2Model(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIZE,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=SIZE, layer_scale_init_value=1.0
    )
    return ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7
    )
    return ResNetForImageClassification(config)


CONV: dict[str, Any] = {"targets": "all-conv"}
NARROW: dict[str, Any] = {**CONV, "exclude": ["*.squeeze_excite.*"]}  # for a rank of 2
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "efficientnet": (efficientnet, NARROW),
    "resnet": (resnet, CONV),
    "convnext": (convnext, CONV),
    "dinov2": (dinov2, {}),
    "vit": (vit, {}),
}


def saved(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name][0]().save_pretrained(directory)
    return directory


@pytest.fixture
def recipe(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task": "image-classification",
        "model": {"path": str(saved("vit", tmp_path / "vit")), "dtype": "float32"},
        "data": {"train": str(pictures / "train.parquet"), "eval": str(pictures / "heldout.parquet"),
                 "image_size": SIZE},
        "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 12, "learning_rate": 0.02, "per_device_train_batch_size": 4,
                  "per_device_eval_batch_size": 4, "logging_steps": 1, "eval_steps": 6,
                  "extra": {"disable_tqdm": True}},
        "output": str(tmp_path / "out"),
    }  # fmt: skip


def run(recipe: dict[str, Any], path: Path, *overrides: str) -> dict[str, Any]:
    path.write_text(yaml.safe_dump(recipe))
    cli.main(["finetune", "--config", str(path), *overrides])
    return json.loads((Path(recipe["output"]) / "report.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_every_family_learns(
    name: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["model"]["path"] = str(saved(name, tmp_path / "base"))
    reloads = name in ("efficientnet", "dinov2")  # in a fresh process: batch norms, and a head that was none
    recipe |= {**MODELS[name][1], "check_reload": reloads}
    report = run(recipe, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == (0.0 if reloads else None)
    assert report["classes"] == NAMES
    for when in ("before", "after"):
        counts = torch.tensor(report[when]["confusion"])
        assert counts.sum(1).tolist() == [3, 3, 3]
        assert counts.trace().item() / 9 == report[when]["accuracy"]
        assert report[when]["count"] == 9
    assert report["tokens_per_second"] is None
    assert report["images_per_second"] * report["train_seconds"] == pytest.approx(3 * 15)  # 12 steps of 4
    out = tmp_path / "out"
    assert (out / "confusion.png").stat().st_size > 5000
    index = json.loads((out / "adapter" / "lowrank_ft.json").read_text())
    assert index["adapters"]["default"]["options"]["modules_to_save"] == ["classifier"]
    assert index["base"]["labels"] == dict(zip("012", NAMES, strict=True))
    printed = capsys.readouterr().out
    assert "training images/s" in printed
    assert "held-out accuracy" in printed
    assert ("logits equal to the last bit" in printed) is reloads


def test_a_merged_model_is_stock_and_has_the_processor(recipe: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    recipe["model"]["path"] = str(saved("efficientnet", tmp_path / "base"))
    recipe |= {**NARROW, "check_reload": False}
    report = run(recipe, tmp_path / "recipe.yaml")
    where = ["--adapter", str(tmp_path / "out" / "adapter"), "--output", str(tmp_path / "merged")]
    cli.main(["merge", "--model", recipe["model"]["path"], *where])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    assert (processor.size["height"], processor.size["width"]) == (SIZE, SIZE)
    assert model.config.id2label == dict(enumerate(NAMES))
    rows = images.examples(
        texts.read(recipe["data"]["eval"], None, "train"), DataConfig("", image_size=SIZE), [0, 1, 2]
    )
    collate = images.Collator(processor, torch.float32)
    found = evaluation.mean_loss(model, rows, collate, 4, "merged", classes=3)
    assert found.loss == pytest.approx(report["after"]["loss"], rel=1e-4)


def test_the_models_own_processor_is_used(tmp_path: Path, pictures: Path) -> None:
    base = saved("vit", tmp_path / "vit")
    facts = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 24}, "resample": 0,
        "image_mean": [0.0, 0.5, 1.0], "image_std": [1.0, 0.5, 2.0],
    }  # fmt: skip
    (base / "preprocessor_config.json").write_text(json.dumps(facts))
    train = texts.read(str(pictures / "train.parquet"), None, "train")
    rows = images.examples(train, DataConfig(""), [0, 1, 2])
    batch = images.Collator(images.load_processor(str(base), None, SIZE), torch.float32)([rows[1], rows[4]])
    assert batch["labels"].tolist() == [1, 1]
    grey = picture(1, "L").convert("RGB").resize((24, 16), Image.Resampling.NEAREST)
    wanted = (torch.tensor(np.array(grey)) / 255 - torch.tensor([0.0, 0.5, 1.0])) / torch.tensor([1, 0.5, 2])
    torch.testing.assert_close(batch["pixel_values"][0], wanted.permute(2, 0, 1))
    larger = images.Collator(images.load_processor(str(base), 40, SIZE), torch.bfloat16)([rows[0]])
    assert larger["pixel_values"].shape == (1, 3, 40, 40)
    assert larger["pixel_values"].dtype == torch.bfloat16


def test_processors_that_resize_the_shorter_side(tmp_path: Path) -> None:
    base = saved("convnext", tmp_path / "convnext")
    facts = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}}
    (base / "preprocessor_config.json").write_text(json.dumps(facts))
    rows = [{"image": picture(0), "labels": 0}]
    for size, side in ((None, 48), (SIZE, SIZE)):
        collate = images.Collator(images.load_processor(str(base), size, SIZE), torch.float32)
        assert collate(rows)["pixel_values"].shape == (1, 3, side, side)


def test_paths_of_files_are_images_too(tmp_path: Path) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{"file": str(tmp_path / f"{i}.png"), "label": "ab"[i % 2]} for i in range(4)]
    found = images.examples(datasets.Dataset.from_list(rows), DataConfig("", image_column="file"), ["a", "b"])
    assert found["labels"][:] == [0, 1, 0, 1]
    assert found[2]["image"].tobytes() == picture(2).tobytes()


def test_corda_calibrates_on_the_training_images(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["method"] = {"name": "corda", "rank": 2, "calibration": {"samples": 8, "batch_size": 4}}
    report = run(recipe, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_column", "imgae"], "no column 'imgae'. Did you mean 'image'"),
        (["--data.label_column", "lable"], "no column 'lable'. Did you mean 'label'"),
        (["--data.image_column", "label"], "'label' holds ClassLabel.*neither images nor paths"),
        (["--data.image_size", "0"], "data.image_size must be at least 1, but is 0"),
        (["--calibration_data", "x.jsonl"], "calibration_data is text, and this task is on images"),
        (["--keep", '{"a": "b"}'], "keep measures the perplexity of text"),
        (["--targets", "qurey"], "matches no layer"),
    ],
)
def test_bad_options_end_with_their_reason(
    recipe: dict[str, Any], options: list[str], message: str, tmp_path: Path
) -> None:
    import re

    with pytest.raises(SystemExit) as stopped:
        run(recipe, tmp_path / "recipe.yaml", *options)
    assert re.search(message, str(stopped.value), re.DOTALL), stopped.value
    assert not (tmp_path / "out" / "adapter").exists()


def test_models_and_files_that_do_not_fit(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="is a 'llama' model, which transformers has no image classifier"):
        models.load_image_classifier(str(base), "float32", NAMES)
    directory = saved("vit", tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ConfigError, match="does not fit its own config: vit.* and 5 more differ"):
        models.load_image_classifier(str(directory), "float32", NAMES)
    (directory / "config.json").write_text(json.dumps({**config, "num_channels": 1}))
    with pytest.raises(ConfigError, match="takes images of 1 channels, and only 3"):
        models.load_image_classifier(str(directory), "float32", NAMES)
    with pytest.raises(ConfigError, match="has no image processor: set data.image_size"):
        images.load_processor(str(directory), None, None)
    lost = datasets.Dataset.from_list([{"image": str(tmp_path / "no.png"), "label": 0}])
    with pytest.raises(ConfigError, match="first image of the column 'image' cannot be read: .*no.png"):
        images.examples(lost, DataConfig(""), [0])
    rows = datasets.Dataset.from_list([{"image": str(tmp_path / "no.png"), "label": 2}])
    with pytest.raises(ConfigError, match="has the label 2, which the training data lacks"):
        images.examples(rows, DataConfig(""), [0, 1])
