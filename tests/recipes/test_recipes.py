"""The recipes and the command line, end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import cli
from lowrank_ft.algorithms.base import Family
from lowrank_ft.errors import ConfigError
from lowrank_ft.recipes import compression, evaluation, training
from lowrank_ft.structure import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(base: Path, texts: Path, tmp_path: Path) -> Path:
    """A config file, as users write them."""
    content = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": str(texts / "train.jsonl"), "eval": str(texts / "heldout.jsonl"), "max_length": 16},
        "method": {"name": "lora", "rank": 2, "alpha": 4},
        "train": {"max_steps": 6, "learning_rate": 0.02, "per_device_train_batch_size": 2, "logging_steps": 1,
                  "eval_steps": 3, "extra": {"disable_tqdm": True}},
        "output": str(tmp_path / "out"),
        "check_reload": False,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(recipe: Path, *overrides: str) -> dict[str, Any]:
    cli.main(["finetune", "--config", str(recipe), *overrides])
    out = next((o.split("=")[1] for o in overrides if o.startswith("--output=")), None)
    directory = Path(out or yaml.safe_load(recipe.read_text())["output"])
    return json.loads((directory / "report.json").read_text())


def test_finetune(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(recipe, "--method.rank", "3", "--check_reload", "true")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["steps"] == 6
    assert report["trainable_parameters"] == 3 * (2 * (64 + 48 + 48 + 64) + 2 * 3 * 80)
    assert report["reload_difference"] == 0.0
    assert report["tokens_per_second"] > 0
    index = json.loads((tmp_path / "out" / "adapter" / "lowrank_ft.json").read_text())
    assert report["adapter_bytes"] == sum(
        (tmp_path / "out" / "adapter" / name).stat().st_size
        for name in ("adapter.safetensors", "lowrank_ft.json")
    )
    assert index["adapters"]["default"]["options"]["rank"] == 3
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 5000
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "library_name: lowrank_ft" in card
    assert "held-out perplexity" in card
    assert "| rank            | 3 " in card
    printed = capsys.readouterr().out
    for figure in ("held-out loss", "held-out perplexity", "training tokens/s", "peak memory",
                   "trainable parameters", "adapter on disk", "logits equal to the last bit"):  # fmt: skip
        assert f"| {figure}" in printed or figure in printed


def test_a_model_trained_under_autocast_reloads_with_equal_logits(recipe: Path) -> None:
    report = run(recipe, "--train.bf16", "true", "--check_reload", "true")
    assert report["reload_difference"] == 0.0


def test_a_rerun_gives_the_same_numbers(recipe: Path, tmp_path: Path) -> None:
    first = run(recipe, "--method.dropout", "0.1")
    second = run(recipe, "--method.dropout", "0.1", f"--output={tmp_path / 'again'}")
    third = run(recipe, "--method.dropout", "0.1", "--seed", "1", f"--output={tmp_path / 'other'}")
    assert [first["before"], first["after"]] == [second["before"], second["after"]]
    assert first["after"] != third["after"]
    a, b = (tmp_path / d / "adapter" / "adapter.safetensors" for d in ("out", "again"))
    assert a.read_bytes() == b.read_bytes()


def test_resume(recipe: Path, tmp_path: Path) -> None:
    whole = run(recipe, "--train.save_steps", "3", "--method.dropout", "0.1")
    half = ("--train.save_steps", "3", "--method.dropout", "0.1", f"--output={tmp_path / 'half'}")
    run(recipe, *half)
    checkpoints = tmp_path / "half" / "checkpoints"
    import shutil

    shutil.rmtree(checkpoints / "checkpoint-6")  # as if it had been stopped after step 3
    resumed = run(recipe, *half, "--train.resume", "true")
    assert resumed["after"] == whole["after"]
    losses = [[e["loss"] for e in r["curve"] if "loss" in e] for r in (whole, resumed)]
    assert losses[0][3:] == losses[1][3:]


CORDA = ("--method.name", "corda", "--method.rank", "2")


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_corda_calibrates_on_one_text_and_trains_on_another(
    recipe: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["method"] = {
        "name": "corda",
        "mode": mode,
        "rank": 2,
        "calibration": {"length": 16, "samples": 12},
    }
    content["keep"] = {"what was known": str(texts / "heldout.jsonl")}
    content |= {"keep_window": 16, "keep_windows": 3, "check_reload": True}
    if mode == "knowledge":
        content["calibration_data"] = str(texts / "heldout.jsonl")
    recipe.write_text(yaml.safe_dump(content))
    report = run(recipe)
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0
    before, after = report["kept"]["what was known"]
    model = AutoModelForCausalLM.from_pretrained(content["model"]["path"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(content["model"]["path"])
    windows = evaluation.windows_of(str(texts / "heldout.jsonl"), tokenizer, 16, 3)
    assert before == pytest.approx(evaluation.window_loss(model, windows, "again"), rel=1e-5)
    lowrank_ft.load(model, tmp_path / "out" / "adapter")
    assert after == pytest.approx(evaluation.window_loss(model.eval(), windows, "again"), rel=1e-5)
    assert "| perplexity of what was known, to be kept" in capsys.readouterr().out
    where = ["--adapter", str(tmp_path / "out" / "adapter"), "--output", str(tmp_path / "peft")]
    cli.main(["export", "--model", content["model"]["path"], *where, "--rank", "2"])
    assert "Relative error: 0." in capsys.readouterr().out
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("name", ["chats.jsonl", "pairs.jsonl"])
def test_corda_calibrates_on_what_it_trains_on(recipe: Path, texts: Path, name: str) -> None:
    report = run(
        recipe,
        *CORDA,
        "--data.train",
        str(texts / name),
        "--data.eval",
        "null",
        "--data.eval_fraction",
        "0.25",
    )
    assert report["after"]["loss"] < report["before"]["loss"]


def test_corda_for_a_classifier(recipe: Path) -> None:
    report = run(recipe, *CORDA, "--task", "sequence-classification", "--train.max_steps", "30")
    assert report["after"]["loss"] < report["before"]["loss"]


@pytest.mark.parametrize("name", ["chats.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_chats_and_prompts(recipe: Path, texts: Path, name: str, packing: str) -> None:
    report = run(
        recipe,
        *("--data.train", str(texts / name), "--data.packing", packing),
        *("--data.eval", "null", "--data.eval_fraction", "0.25"),
    )
    assert report["after"]["loss"] < report["before"]["loss"]


def test_classification(recipe: Path, tmp_path: Path) -> None:
    report = run(
        recipe, "--task", "sequence-classification", "--train.max_steps", "30", "--check_reload", "true"
    )
    assert report["after"]["count"] == 8
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["after"]["accuracy"] >= report["before"]["accuracy"]
    confusion = torch.tensor(report["after"]["confusion"])
    assert report["classes"] == ["a", "b", "c"]
    assert (confusion.sum().item(), confusion.trace().item() / 8) == (8, report["after"]["accuracy"])
    assert (tmp_path / "out" / "confusion.png").stat().st_size > 5000
    index = json.loads((tmp_path / "out" / "adapter" / "lowrank_ft.json").read_text())
    assert index["adapters"]["default"]["options"]["modules_to_save"] == ["score"]
    assert any(group["modules"] == ["score"] for group in index["manifest"])
    assert report["reload_difference"] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        ["--train.bf16", "true"],
        ["--train.gradient_checkpointing", "true"],
        ["--model.dtype", "bfloat16"],
        ["--method.dora", "true"],
        ["--method.init", "pissa"],
        ["--targets", "[q_proj,v_proj]", "--layers", "[1]"],
        ["--train.extra", '{"adam_beta2": 0.9}'],
    ],
    ids=str,
)
def test_options(recipe: Path, options: list[str]) -> None:
    report = run(recipe, *options)
    assert report["after"]["loss"] < report["before"]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.text_column", "txet"], "Did you mean 'text'.*Set data.text_column"),
        (["--data.train", "/no/such.jsonl"], "There is no data at /no/such.jsonl"),
        (["--model.path", "/no/such/model"], "There is no model at /no/such/model"),
        (["--data.max_length", "100000"], "tokens, too few for one block of 100000"),
        (["--method.rank", "0"], "must be at least 1, but rank is 0"),
        (["--targets", "q_porj"], "matches no layer. Did you mean 'q_proj'"),
        (["--train.extra", '{"lerning_rate": 1}'], "no field 'lerning_rate'. Did you mean"),
        (["--method.name", "lorra"], "no method 'lorra'. Did you mean 'lora'"),
        (["--calibration_data", "/no/such.jsonl"], "looks at no data: leave out calibration_data"),
        (["--keep", '{"a": "/no/such.jsonl"}'], "There is no data at /no/such.jsonl"),
        (
            ["--keep", '{"a": "b"}', "--task", "sequence-classification"],
            "keep measures the perplexity of text",
        ),
        (["--data.eval", "null", "--data.eval_fraction", "2"], r"must lie in \(0, 1\)"),
        (["--data.kind", "chat"], "neither 'messages'"),
    ],
)
def test_bad_options_end_with_their_reason(
    recipe: Path, options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune", "--config", str(recipe), *options])
    import re

    assert re.search(message, str(stopped.value)), stopped.value
    assert not (tmp_path / "out" / "adapter").exists()


def test_evaluate_merge_export_inspect(
    recipe: Path, base: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(recipe)
    adapter = tmp_path / "out" / "adapter"
    given = ["--model", str(base), "--adapter", str(adapter)]
    measure = ["--text", str(texts / "heldout.jsonl"), "--window", "16", "--stride", "16"]
    cli.main(["evaluate", *given, *measure, "--output", str(tmp_path / "eval.json")])
    found = json.loads((tmp_path / "eval.json").read_text())["perplexity"]
    assert (found["window"], found["stride"]) == (16, 16)
    assert found["loss"] < report["before"]["loss"]

    cli.main(["merge", *given, "--output", str(tmp_path / "merged")])
    cli.main(
        ["evaluate", "--model", str(tmp_path / "merged"), *measure, "--output", str(tmp_path / "m.json")]
    )
    merged = json.loads((tmp_path / "m.json").read_text())["perplexity"]
    assert merged["loss"] == pytest.approx(found["loss"], abs=1e-5)

    cli.main(["export", *given, "--output", str(tmp_path / "peft"), "--format", "peft"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    ours = lowrank_ft.load(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=0, atol=1e-5)

    capsys.readouterr()
    cli.main(["inspect", str(adapter)])
    printed = capsys.readouterr().out
    assert "lora: seed=0, rank=2, alpha=4.0" in printed
    assert "q_proj" in printed
    cli.main(["inspect", str(adapter), "--json", "true"])
    content = json.loads(capsys.readouterr().out)
    assert content["adapter_parameters"] == report["trainable_parameters"]
    with pytest.raises(SystemExit, match="no export format 'pfet'. Did you mean 'peft'"):
        cli.main(["export", *given, "--output", str(tmp_path / "x"), "--format", "pfet"])
    with pytest.raises(SystemExit, match=r"has no lowrank_ft.json"):
        cli.main(["inspect", str(tmp_path)])
    with pytest.raises(SystemExit, match="no model at /no/such"):
        cli.main(["merge", "--model", "/no/such", "--adapter", str(adapter), "--output", str(tmp_path / "x")])


def test_report_of_a_live_model() -> None:
    from tests.tiny import TINY

    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", rank=2, modules_to_save=["norm"])
    found = lowrank_ft.report(model)
    assert (
        found.trainable_parameters
        == found.adapter_parameters
        == sum(row.parameters or 0 for row in found.rows)
    )
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    assert {row.role for row in found.rows} == {"q", "k", "v", "o", "gate", "up", "down", "other"}
    assert found.rows[0].parts == {"default": "lora r=2"}
    assert "| lora: " in str(found).replace("default (active) ", "") or "lora: seed=0" in str(found)
    assert lowrank_ft.report(TINY["llama"].model()).rows == []


def test_lm_eval_runs_on_the_patched_model(base: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"q": "the cat sat on", "a": 0}, {"q": "a mat and", "a": 1}]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tasks / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{test: {tasks}/rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: ['a mat', 'saw old']\nmetric_list: [{metric: acc}]\n"
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    lowrank_ft.save(lowrank_ft.wrap(model, "lora", rank=2), tmp_path / "adapter")
    result = evaluation.evaluate(
        evaluation.EvaluateConfig(
            model=str(base), adapter=str(tmp_path / "adapter"), tasks=("tiny_choice",), task_dir=str(tasks)
        )
    )
    assert 0 <= result.tasks["tiny_choice"]["acc,none"] <= 1


def test_evaluating_nothing_is_an_error(base: Path) -> None:
    with pytest.raises(SystemExit, match="Nothing to measure"):
        cli.main(["evaluate", "--model", str(base)])


# The command line itself ----------------------------------------------------------------------------------


def test_help_is_there_at_once() -> None:
    """Nothing heavy is imported for it (how long that takes is the benchmark's matter, not a test's)."""
    code = "import sys; from lowrank_ft.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    for command in cli.COMMANDS:
        assert command in done.stdout


def test_options_are_documented_by_the_configs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_ft.cli", "finetune", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(done.stdout.split())
    assert "Rank of the update, from 1 to min(out, in) of the layer." in text
    assert "Peak learning rate of AdamW." in text


def choices() -> list[tuple[str, str, Any]]:
    """Every choice of every adapter's options."""
    found = []
    for name, method in registry.methods.items():
        if method.family is not Family.ADAPTER:
            continue
        for option, hint in typing.get_type_hints(method.Config).items():
            if typing.get_origin(hint) is typing.Literal:
                found += [(name, option, choice) for choice in typing.get_args(hint)]
    return found


@pytest.mark.parametrize(("method", "option", "choice"), choices(), ids=str)
def test_every_choice_of_a_method_can_be_made(method: str, option: str, choice: Any) -> None:
    """The parser reads annotations by name, and two files could mean different things by one."""
    args = ["--model.path", "m", "--data.train", "d", "--output", "o", "--method.name", method]
    config = cli.parse(training.FinetuneConfig, [*args, f"--method.{option}", str(choice)], "finetune")
    assert type(config.method) is registry.methods[method].Config
    assert getattr(config.method, option) == choice


def test_unknown_commands_name_the_nearest() -> None:
    with pytest.raises(SystemExit, match="no command 'fintune'. Did you mean 'finetune'"):
        cli.main(["fintune"])


def test_every_config_in_the_repo_parses() -> None:
    for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml")):
        if not isinstance(yaml.safe_load(path.read_text())["data"], dict):  # text alone: compress
            recipe = cli.parse(compression.CompressConfig, ["--config", str(path)], "compress")
            assert [compression.parse_stage(stage).name for stage in recipe.stages]
            continue
        config = cli.parse(training.FinetuneConfig, ["--config", str(path)], "finetune")
        training.training_arguments(config)
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        args = ["--config", str(ROOT / "configs/recipes/demo.yaml"), "--method", str(path)]
        config = cli.parse(training.FinetuneConfig, args, "finetune")
        assert type(config.method).__name__


def test_configs_reject_typos() -> None:
    with pytest.raises((SystemExit, ConfigError)):
        cli.parse(training.FinetuneConfig, ["--method.rnak", "3"], "finetune")
