"""Damaged, lying and hostile checkpoints: refused with their reason, the model untouched."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ft
from lowrank_ft.checkpoint import files
from lowrank_ft.errors import CheckpointError, LowRankError, StateError, TargetError
from tests.tiny import TINY, logits, perturb

tiny = TINY["llama"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2))
    lowrank_ft.save(model, directory)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and make its checksum right again, as an attacker or a buggy tool would."""
    path = directory / files.INDEX
    index = json.loads(path.read_text())
    change(index)
    index["checksum"] = files._self_checksum(index)
    path.write_text(json.dumps(index))


def refuse(directory: Path, message: str, error: type[LowRankError] = CheckpointError) -> None:
    model = tiny.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        lowrank_ft.load(model, directory)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")


def test_missing_index(saved: Path) -> None:
    (saved / files.INDEX).unlink()
    refuse(saved, "has no lowrank_ft.json")


def test_missing_weights(saved: Path) -> None:
    (saved / "adapter.safetensors").unlink()
    refuse(saved, "adapter.safetensors is missing: the checkpoint is incomplete")


def test_truncated_weights(saved: Path) -> None:
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(saved, r"has \d+ bytes instead of \d+: it was truncated or changed")


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_flipped_bit_in_the_weights(saved: Path, place: float) -> None:
    path = saved / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    refuse(saved, "adapter.safetensors is damaged: its SHA-256 does not match")


def test_every_flipped_byte_in_the_index_is_noticed(saved: Path) -> None:
    """Except in white space, which means nothing."""
    path = saved / files.INDEX
    original = path.read_bytes()
    for position in range(0, len(original), 37):
        if chr(original[position]).isspace():
            continue
        data = bytearray(original)
        data[position] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            files.read_index(saved)


def test_truncated_index(saved: Path) -> None:
    path = saved / files.INDEX
    path.write_text(path.read_text()[:-30])
    refuse(saved, "lowrank_ft.json is damaged")


def test_newer_schema(saved: Path) -> None:
    rewrite(saved, lambda index: index.update(schema=99))
    refuse(saved, "has schema 99; this version reads up to 1. Upgrade")


@pytest.mark.parametrize("name", ["../adapter.safetensors", "/etc/hostname", "sub/../x", "..", ""])
def test_file_outside_the_directory(saved: Path, name: str) -> None:
    rewrite(saved, lambda index: index["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    refuse(saved, "outside its directory; refusing to read it")


@pytest.mark.parametrize("name", ["..", "a..b", "../x", "model/layers", ".x", ""])
def test_module_name_that_is_no_path(saved: Path, name: str) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["modules"].append(name))
    refuse(saved, "which is not a dotted path")


def test_module_named_twice(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["modules"].append(index["manifest"][0]["modules"][0]))
    refuse(saved, "describes the module .* twice")


def test_module_the_model_lacks(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["modules"].append("model.layers.0.self_attn.x_proj"))
    refuse(saved, "no module 'model.layers.0.self_attn.x_proj'. Did you mean", TargetError)


def test_node_of_unknown_kind(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["node"].update(kind="pickle"))
    refuse(saved, "a node of unknown kind 'pickle'")


def test_delta_of_unknown_kind(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["node"]["deltas"]["default"].update(kind="lorra"))
    refuse(saved, "a node of unknown kind 'lorra'")


def test_node_in_the_wrong_place(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["node"]["deltas"].update(default={"kind": "dense"}))
    refuse(saved, "adapted.deltas cannot hold a 'dense' node")


@pytest.mark.parametrize("field", ["rank", "alpha", "dropout"])
def test_field_of_the_wrong_type(saved: Path, field: str) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["node"]["deltas"]["default"].update({field: "x"}))
    refuse(saved, f"malformed 'lora' node.*{field}")


def test_unknown_field(saved: Path) -> None:
    rewrite(saved, lambda index: index["manifest"][0]["node"]["deltas"]["default"].update(rnk=3))
    refuse(saved, "has no option 'rnk'. Did you mean 'rank'")


@pytest.mark.parametrize("rank", [1, 3, 10**12])
def test_shape_that_lies(saved: Path, rank: int) -> None:
    """A rank that the tensors do not have, however absurd, allocates nothing."""
    rewrite(saved, lambda index: index["manifest"][0]["node"]["deltas"]["default"].update(rank=rank))
    refuse(saved, "elements, but the manifest on this model describes")


def test_tensors_the_manifest_does_not_know(saved: Path) -> None:
    path = saved / "adapter.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "default.lora.C": torch.zeros(3)}, path)
    rewrite(saved, lambda index: index["files"].update({path.name: facts(path)}))
    refuse(saved, "do not fit its manifest: missing .*, unexpected .*default.lora.C")


def test_adapter_the_manifest_does_not_know(saved: Path) -> None:
    path = saved / "adapter.safetensors"
    save_file({**load_file(path), "other.lora.A": torch.zeros(3)}, path)
    rewrite(saved, lambda index: index["files"].update({path.name: facts(path)}))
    refuse(saved, "holds the adapters .'default', 'other'.")


def facts(path: Path) -> dict[str, Any]:
    return {"sha256": files.sha256(path), "bytes": path.stat().st_size}


def test_base_of_another_shape(saved: Path) -> None:
    model = TINY["qwen3"].model()
    with pytest.raises(CheckpointError, match="made for another model: LlamaForCausalLM, .* This is a Qwen3"):
        lowrank_ft.load(model, saved)


def test_base_of_another_digest(saved: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01  # one element of one weight
    with pytest.raises(CheckpointError, match="the digest of the base differs"):
        lowrank_ft.load(model, saved)
    lowrank_ft.load(model, saved, check_base=False)


def test_base_in_another_dtype_is_the_same_base(saved: Path) -> None:
    lowrank_ft.load(tiny.model(torch.bfloat16), saved)
    with pytest.raises(CheckpointError, match=r"It was float32 and is float16 now, which may be the reason"):
        lowrank_ft.load(tiny.model(torch.float16), saved)


def test_base_without_weights(saved: Path) -> None:
    with torch.device("meta"):
        model = tiny.build()
    with pytest.raises(StateError, match="on the meta device: load the model's weights first"):
        lowrank_ft.load(model, saved, check_base=False)


def test_name_that_is_taken(saved: Path) -> None:
    model = lowrank_ft.load(tiny.model(), saved)
    with pytest.raises(StateError, match="already has an adapter 'default'. Choose another name="):
        lowrank_ft.load(model, saved)
    lowrank_ft.load(model, saved, name="second")


def test_adapter_that_is_not_in_the_directory(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(lowrank_ft.wrap(tiny.model(), "lora", name="math"), "lora", name="code")
    lowrank_ft.save(model, tmp_path / "both")
    with pytest.raises(CheckpointError, match="no adapter 'maths'. Did you mean 'math'"):
        lowrank_ft.load(tiny.model(), tmp_path / "both", name="maths")
    with pytest.raises(StateError, match="no adapter 'coda'. Did you mean 'code'"):
        lowrank_ft.save(model, tmp_path / "one", name="coda")


# Saving that fails ----------------------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A write past 8 KB fails with EFBIG, as one on a full disk fails with ENOSPC."""
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, old_signal)


def test_full_disk_leaves_the_old_checkpoint(saved: Path, small_disk: None) -> None:
    before = content(saved.parent)
    model = lowrank_ft.wrap(tiny.model(), "lora", rank=16)
    with pytest.raises(CheckpointError, match="Could not save to .*: .*Nothing was written there"):
        lowrank_ft.save(model, saved)
    with pytest.raises(CheckpointError, match="Could not save to"):
        lowrank_ft.save(model, saved.parent / "new")
    assert content(saved.parent) == before


def test_full_disk_leaves_the_old_model(tmp_path: Path, small_disk: None) -> None:
    model = tiny.model()
    with pytest.raises(CheckpointError, match="Could not save to"):
        lowrank_ft.save(model, tmp_path / "model")
    assert content(tmp_path) == {}


def test_read_only_directory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_make(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    before = content(saved.parent)
    monkeypatch.setattr(
        files.tempfile, "mkdtemp", refuse_to_make
    )  # tests run as root, whom modes do not stop
    with pytest.raises(CheckpointError, match="Read-only file system. Nothing was written there"):
        lowrank_ft.save(lowrank_ft.wrap(tiny.model(), "lora"), saved)
    assert content(saved.parent) == before


@pytest.mark.parametrize("atomic_swap", [True, False])
def test_replacing_keeps_what_users_put_beside(
    saved: Path, monkeypatch: pytest.MonkeyPatch, atomic_swap: bool
) -> None:
    if not atomic_swap:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (saved / "notes.txt").write_text("mine")
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=3))
    lowrank_ft.save(model, saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    batch = tiny.inputs()
    assert torch.equal(logits(lowrank_ft.load(tiny.model(), saved), batch), logits(model, batch))


def test_a_failed_swap_puts_the_old_checkpoint_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    before = content(saved.parent)
    rename = files.os.rename

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        lowrank_ft.save(lowrank_ft.wrap(tiny.model(), "lora", rank=3), saved)
    assert content(saved.parent) == before


def test_never_overwrites_what_is_not_ours(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(tiny.model(), "lora")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no checkpoint of lowrank_ft"):
        lowrank_ft.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="is a file: choose a directory"):
        lowrank_ft.save(model, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_refuses_to_save_what_diverged(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(tiny.model(), "lora")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.parts["default"].B[0, 0] = float("nan")
    with pytest.raises(StateError, match="default.lora.B has NaN or infinite values"):
        lowrank_ft.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# from_pretrained ------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2))
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def from_pretrained(directory: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def test_without_its_manifest_it_does_not_load(whole: Path) -> None:
    """What a stock transformers sees: it must fail, not draw the replaced layers at random."""
    edit_config(whole, lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained(whole)


def test_with_a_node_missing_from_its_manifest_it_does_not_load(whole: Path) -> None:
    edit_config(whole, lambda config: config["quantization_config"]["manifest"][0]["modules"].pop())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained(whole)


def test_with_a_tensor_missing_it_does_not_load(whole: Path) -> None:
    path = whole / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.parts.default.B")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors that its manifest calls for"):
        from_pretrained(whole)


def test_with_another_rank_in_its_manifest_it_does_not_load(whole: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["manifest"][0]["node"]["deltas"]["default"]["rank"] = 5

    edit_config(whole, change)
    with pytest.raises(CheckpointError, match=r"has the shape \(2, 32\) in the files, but \(5, 32\)"):
        from_pretrained(whole)


def test_with_an_unknown_module_in_its_manifest_it_does_not_load(whole: Path) -> None:
    edit_config(whole, lambda c: c["quantization_config"]["manifest"][0]["modules"].append("model.nothing"))
    with pytest.raises(
        CheckpointError, match="names a module 'model.nothing' that LlamaForCausalLM does not"
    ):
        from_pretrained(whole)


def test_sharded_and_in_half_precision(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2, modules_to_save=["model.norm"]))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    adapter = reloaded.model.layers[0].mlp.up_proj
    assert adapter.base.weight.dtype == torch.bfloat16
    assert adapter.parts["default"].A.dtype == torch.float32
    assert torch.equal(adapter.parts["default"].A, model.model.layers[0].mlp.up_proj.parts["default"].A)
    assert reloaded.model.norm.parts["default"].weight.dtype == torch.bfloat16
    loss = reloaded.train()(**tiny.inputs()).loss
    loss.backward()


def test_a_copied_directory_loads(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "elsewhere")
    lowrank_ft.load(tiny.model(), tmp_path / "elsewhere")
