"""PEFT, both ways: tensors bit for bit, logits to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.errors import CheckpointError, ConfigError, StateError
from lowrank_ft.modules.adapted import Adapted
from tests.contract.cases import Case
from tests.tiny import TINY, logits, perturb

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

CLOSE = {"rtol": 0, "atol": 1e-5}

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4, "alpha": 7.0},
    "rslora": {"rank": 4, "alpha": 3.0, "scaling": "rslora"},
    "dora": {"rank": 2, "dora": True},
    "pissa": {"rank": 2, "alpha": 6.0, "init": "pissa"},
    "olora": {"rank": 3, "init": "olora"},
    "patterns": {"rank": 4, "alpha": 2.0, "rank_pattern": {"layers.0.mlp.up_proj": 2},
                 "alpha_pattern": {"v_proj": 9.0}},
}  # fmt: skip
CASES = [(way, "llama") for way in WAYS] + [(way, model) for way in ("plain", "dora") for model in TINY]


def options(way: str, model: str) -> dict[str, Any]:
    chosen = dict(WAYS[way])
    chosen["targets"] = TINY[model].targets
    if model == "resnet":
        chosen["rank"] = 2  # its narrowest layer has two channels
    if model == "convnext":  # PEFT convolves depthwise layers in another way; see below
        chosen["targets"] = "all-linear"
    return chosen


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_peft_loads_corda_on_the_untouched_base(name: str, tmp_path: Path) -> None:
    """As a LoRA of twice the rank, with no need to know what it started from."""
    case = Case("corda", name, options={"rank": 2, "alpha": 5.0, "scaling": "rslora"})
    model, batch = perturb(case.wrap(case.tiny.model())), case.tiny.inputs()
    lowrank_ft.export(model, tmp_path / "peft", "peft")
    theirs = PeftModel.from_pretrained(case.tiny.model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **CLOSE)
    assert theirs.peft_config["default"].r == 4


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_peft_loads_nola_as_a_lora(name: str, bits: int, tmp_path: Path) -> None:
    """The factors as they are, of the rounded coefficients where those are what is run."""
    case = Case("nola", name, options={"rank": 2, "bases": 6, "alpha": 5.0, "bits": bits})
    model, batch = perturb(case.wrapped(), scale=1.0), case.tiny.inputs()
    lowrank_ft.export(model.train(), tmp_path / "peft", "peft")
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    path, host = next(iter(engine.hosts(model.eval()).items()))
    written = held[f"base_model.model.{path}.lora_A.weight"].view(2, -1)
    assert torch.equal(written, host.deltas["default"].as_lora().A)
    theirs = PeftModel.from_pretrained(case.tiny.model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=0, atol=5e-5)
    assert theirs.peft_config["default"].r == 2


@pytest.mark.parametrize("ranks", [{"rank": 2}, {"rank_out": 3, "rank_in": 2}, {"rank": 99}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "resnet"])
def test_peft_loads_a_tucker_update_as_a_lora(name: str, ranks: dict[str, int], tmp_path: Path) -> None:
    """Of the output channels' rank on convolutions, of the smaller rank on linear layers."""
    case = Case("flora", name, options={**ranks, "alpha": 5.0})
    model, batch = perturb(case.wrapped()), case.tiny.inputs()
    lowrank_ft.export(model, tmp_path / "peft", "peft")
    theirs = PeftModel.from_pretrained(case.tiny.model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=0, atol=5e-5)


def test_an_update_of_twice_the_rank_can_be_cut_and_says_what_that_loses(tmp_path: Path) -> None:
    case = Case("corda", "llama", options={"rank": 2, "alpha": 5.0})
    model, batch = perturb(case.wrap(case.tiny.model(torch.float64))), case.tiny.inputs()
    facts = lowrank_ft.export(model, tmp_path / "cut", "peft", rank=2)
    back = lowrank_ft.load(case.tiny.model(torch.float64), tmp_path / "cut")
    lost = whole = 0.0
    for path, host in engine.hosts(model).items():
        update, cut = (h.deltas["default"].weight().detach() for h in (host, engine.hosts(back)[path]))
        best = torch.linalg.svdvals(update)
        torch.testing.assert_close(
            (update - cut).square().sum(), best[2:].square().sum(), rtol=1e-6, atol=1e-12
        )
        lost, whole = lost + float(best[2:].square().sum()), whole + float(best.square().sum())
        assert engine.hosts(back)[path].deltas["default"].node.rank == 2
    assert facts["relative error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert 0.01 < facts["relative error"] < 1
    assert (
        f"Cut to rank 2: relative error {facts['relative error']:.4f}."
        in (tmp_path / "cut/README.md").read_text()
    )
    exact = lowrank_ft.export(model, tmp_path / "whole", "peft", rank=4)
    assert exact["relative error"] < 1e-6
    back = lowrank_ft.load(case.tiny.model(torch.float64), tmp_path / "whole")
    torch.testing.assert_close(logits(back, batch), logits(model, batch), **CLOSE)
    for wrong in ({"rank": 0}, {"rank": 2, "format": "dense"}):
        with pytest.raises(ConfigError, match="is for format='peft', and at least 1"):
            lowrank_ft.export(model, tmp_path / "no", **wrong)


@pytest.mark.parametrize(("way", "name"), CASES)
def test_peft_loads_ours(way: str, name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model, batch = perturb(lowrank_ft.wrap(tiny.model(), "lora", **options(way, name))), tiny.inputs()
    lowrank_ft.export(model, tmp_path / "peft", "peft")
    theirs = PeftModel.from_pretrained(tiny.model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **CLOSE)

    stored = {n: p for n, p in theirs.named_parameters() if ".default" in n}
    if way in ("plain", "rslora", "dora", "patterns"):
        for path, host in engine.hosts(model).items():
            if isinstance(host, Adapted):
                for key, ours in (("A", host.deltas["default"].A), ("B", host.deltas["default"].B)):
                    (match,) = [
                        p
                        for n, p in stored.items()
                        if f".{path}.lora_{key}" in n or f".{path}.lora_embedding_{key}" in n
                    ]
                    assert torch.equal(match.flatten(), ours.flatten())

    back = lowrank_ft.load(tiny.model(), tmp_path / "peft", name="again")
    torch.testing.assert_close(logits(back, batch), logits(model, batch), **CLOSE)
    if way not in ("pissa", "olora"):  # those come back with twice the rank
        assert torch.equal(logits(back, batch), logits(model, batch))


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "c_attn": 2},
        "alpha_pattern": {"v_proj": 16, "c_fc": 16},
    },
}


@pytest.mark.parametrize("way", THEIRS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3"])
def test_we_load_peft(way: str, name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    targets: Any = "all-linear" if name != "gemma3" else ["q_proj", "down_proj", "embed_tokens"]
    saved = ["pooler"] if name == "bert" else None
    config = LoraConfig(target_modules=targets, modules_to_save=saved, **THEIRS[way])
    theirs = perturb(get_peft_model(tiny.model(), config), 0.1).eval()
    theirs.save_pretrained(tmp_path)
    ours, batch = lowrank_ft.load(tiny.model(), tmp_path), tiny.inputs()
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), **CLOSE)
    assert not torch.allclose(logits(tiny.model(), batch), logits(ours, batch), **CLOSE)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    hosts = engine.hosts(ours)
    for key, tensor in tensors.items():
        path, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if kind.startswith(("A", "B", "embedding_A", "embedding_B")):
            part = "A" if "A" in kind.split(".")[0] else "B"
            assert torch.equal(getattr(hosts[path].parts["default"], part), tensor)


def test_what_peft_exports_from_an_import_is_what_peft_wrote(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    theirs = perturb(get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear")), 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    lowrank_ft.export(lowrank_ft.load(tiny.model(), tmp_path / "theirs"), tmp_path / "ours")
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    a, b = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours"))
    assert {k: b[k] for k in ("r", "lora_alpha", "use_rslora", "use_dora")} == {
        k: a[k] for k in ("r", "lora_alpha", "use_rslora", "use_dora")
    }


def test_a_trained_head_goes_both_ways(tmp_path: Path) -> None:
    tiny = TINY["bert"]
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2, modules_to_save=["classifier"]))
    lowrank_ft.export(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(tiny.model(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, tiny.inputs()), logits(model, tiny.inputs()), **CLOSE)
    back = lowrank_ft.load(tiny.model(), tmp_path / "peft")
    assert torch.equal(logits(back, tiny.inputs()), logits(model, tiny.inputs()))


# What does not cross --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "problem"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "groups=8"),
        (nn.Conv2d(8, 8, 3, dilation=2), r"dilation=\(2, 2\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_convolutions_that_peft_computes_differently_are_refused(
    conv: nn.Module, problem: str, tmp_path: Path
) -> None:
    model = lowrank_ft.wrap(nn.Sequential(conv), "lora", rank=2, targets="0")
    with pytest.raises(
        StateError, match=f"0 is a convolution with {problem}, which PEFT's LoRA does not compute"
    ):
        lowrank_ft.export(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_export_needs_one_active_adapter(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", name="a", rank=2)
    lowrank_ft.wrap(model, "lora", name="b", rank=2)
    lowrank_ft.set_adapter(model, ["a", "b"])
    with pytest.raises(StateError, match=r"PEFT form holds one adapter, but \['a', 'b'\] are active"):
        lowrank_ft.export(model, tmp_path / "peft")
    with pytest.raises(lowrank_ft.errors.ConfigError, match="no export format 'pfet'. Did you mean 'peft'"):
        lowrank_ft.export(model, tmp_path / "peft", "pfet")


def peft_directory(directory: Path, **changes: Any) -> Path:
    lowrank_ft.export(perturb(lowrank_ft.wrap(TINY["llama"].model(), "lora", rank=2)), directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "PEFT adapter of type IA3; only LORA"),
        ({"bias": "all"}, "PEFT's option bias='all', which is not supported"),
        ({"lora_bias": True}, "PEFT's option lora_bias=True"),
        ({"layer_replication": [[0, 2]]}, "PEFT's option layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base model.*Convert it in PEFT first"),
    ],
)
def test_peft_options_without_a_meaning_here_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft", **changes)
    with pytest.raises(CheckpointError, match=message):
        lowrank_ft.load(TINY["llama"].model(), directory)


def test_peft_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    with pytest.raises(
        CheckpointError, match=r"for a layer 'model.layers.0.*' that this model does not have"
    ):
        lowrank_ft.load(TINY["gpt2"].model(), directory)
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, path)
    with pytest.raises(
        CheckpointError, match=r"has \(47, 2\) for B of model.layers.0.mlp.up_proj, which needs \(48, 2\)"
    ):
        lowrank_ft.load(TINY["llama"].model(), directory)
    save_file({k: v for k, v in tensors.items() if k != key}, path)
    with pytest.raises(CheckpointError, match="has nothing for B of model.layers.0.mlp.up_proj"):
        lowrank_ft.load(TINY["llama"].model(), directory)
    save_file({**tensors, "base_model.model.odd.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="'base_model.model.odd.weight' that belongs to no layer"):
        lowrank_ft.load(TINY["llama"].model(), directory)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        lowrank_ft.load(TINY["llama"].model(), directory)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"is missing. Adapters saved with pickle \(.bin\) are not read"
    ):
        lowrank_ft.load(TINY["llama"].model(), directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is damaged"):
        lowrank_ft.load(TINY["llama"].model(), directory)


def test_a_model_with_peft_on_it_is_not_wrapped(tmp_path: Path) -> None:
    theirs = get_peft_model(TINY["llama"].model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(StateError, match="PEFT adapters are on this model"):
        lowrank_ft.wrap(theirs, "lora")
