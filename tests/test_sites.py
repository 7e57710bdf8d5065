"""Targets: what they match, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.anatomy import layouts, sites
from lowrank_ft.errors import ConfigError, StateError, TargetError
from tests.tiny import TINY, logits, perturb


def names(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return [site.names[0] for site in sites.select(model, *args, **kwargs)]


def test_all_linear_takes_every_linear_but_the_head() -> None:
    for name, tiny in TINY.items():
        model = tiny.model()
        linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
        head = [n for n in linear if n.split(".")[0] in layouts.HEADS]
        assert head, name
        if name != "resnet":
            assert names(model) == [n for n in linear if n not in head]


def test_the_head_is_taken_when_named() -> None:
    assert names(TINY["llama"].model(), "lm_head") == ["lm_head"]
    assert names(TINY["resnet"].model(), "classifier.1") == ["classifier.1"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.0.self_attn.q_proj", 1),
        (["q_proj", "v_proj"], 4),
        ("*.layers.1.*", 7),
        ("*_proj", 14),
        (r"re:.*\.(q|v)_proj", 4),
        ("all-embedding", 1),
        (["all-linear", "embed_tokens"], 15),
    ],
)
def test_patterns(targets: Any, count: int) -> None:
    assert len(names(TINY["llama"].model(), targets)) == count


def test_exclude_and_layers() -> None:
    model = TINY["llama"].model()
    assert len(names(model, exclude="mlp")) == 8  # a container takes what is in it
    assert len(names(model, exclude=["q_proj", "re:.*down_proj"])) == 10
    assert names(model, "q_proj", layers=1) == ["model.layers.1.self_attn.q_proj"]
    assert names(model, "q_proj", layers=[-1]) == ["model.layers.1.self_attn.q_proj"]
    assert len(names(model, "q_proj", layers=range(2))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_porj"}, "The target 'q_porj' matches no layer. Did you mean 'q_proj'"),
        ({"targets": "*.attention.*"}, "matches no layer"),
        ({"targets": "all-linaer"}, "no target keyword 'all-linaer'. Did you mean 'all-linear'"),
        ({"targets": "all-conv"}, "'all-conv' matches no layer of this model .'all-linear' would match 14"),
        ({"targets": "self_attn"}, "is a LlamaAttention, which cannot be adapted"),
        ({"targets": "input_layernorm"}, "is a LlamaRMSNorm, which cannot be adapted"),
        ({"targets": "re:(q"}, "is not a regular expression"),
        ({"targets": ["q_proj", "x_proj"]}, "The target 'x_proj' matches no layer"),
        ({"exclude": "x_proj"}, "exclude='x_proj' matches no module"),
        ({"exclude": "*"}, "leaves no layer to act on"),
        ({"layers": 2}, r"asks for blocks \[2\], but the targets lie in \[0, 1\]"),
        ({"layers": []}, "asks for blocks"),
        ({"targets": []}, "leaves no layer to act on"),
    ],
)
def test_what_matches_nothing_is_an_error(options: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        sites.select(TINY["llama"].model(), **options)


def test_a_model_of_convolutions_says_so() -> None:
    with pytest.raises(TargetError, match="'all-conv' would match .*'classifier.1'. belong to the head"):
        sites.select(TINY["resnet"].model())


def test_rank_and_alpha_patterns() -> None:
    model = lowrank_ft.wrap(
        TINY["llama"].model(), "lora", rank=4, alpha=8.0,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "*.mlp.*": 5},
        alpha_pattern={"v_proj": 1.0},
    )  # fmt: skip
    nodes = {n: h.nodes["default"] for n, h in engine.hosts(model).items()}
    assert [nodes[f"model.layers.{i}.self_attn.q_proj"].rank for i in (0, 1)] == [3, 2]
    assert nodes["model.layers.0.mlp.up_proj"].rank == 5
    assert nodes["model.layers.0.self_attn.k_proj"].rank == 4
    assert nodes["model.layers.0.self_attn.v_proj"].scale == pytest.approx(1 / 4)
    with pytest.raises(TargetError, match="alpha_pattern 'w_proj' matches none of the targeted layers"):
        lowrank_ft.wrap(TINY["llama"].model(), "lora", alpha_pattern={"w_proj": 1.0})
    with pytest.raises(ConfigError, match="rank_pattern|q_proj is 0"):
        lowrank_ft.wrap(TINY["llama"].model(), "lora", rank_pattern={"q_proj": 0})


def test_multihead_attentions_projection_is_never_taken() -> None:
    """nn.MultiheadAttention reads its out_proj's weight: an adapter there would do nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.attention(x, x, x)[0])

    assert names(Net()) == ["up"]
    with pytest.raises(TargetError, match=r"attention.out_proj is read by its nn.MultiheadAttention"):
        sites.select(Net(), "out_proj")


def test_code_that_reads_a_replaced_weight_fails_loudly() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.up.weight)

    net = lowrank_ft.wrap(Net(), "lora", rank=2)
    assert net.up.weight.dtype == torch.float32
    assert net.up.in_features == 16
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 16))


def test_a_shared_module_is_replaced_everywhere() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    net = Net()
    x = torch.randn(3, 8)
    perturb(lowrank_ft.wrap(net, "lora", rank=2), 0.5)
    assert net.first is net.second
    adapted = net(x)
    lowrank_ft.merge(net)
    assert net.first is net.second
    torch.testing.assert_close(net(x), adapted)
    lowrank_ft.unmerge(net)
    lowrank_ft.unload(net)
    assert net.first is net.second
    assert type(net.first) is nn.Linear


# What cannot be wrapped -----------------------------------------------------------------------------------


def test_tied_weights_are_refused_under_merge() -> None:
    model = perturb(
        lowrank_ft.wrap(TINY["llama"].model(), "lora", rank=2, targets=["all-linear", "embed_tokens"])
    )
    with pytest.raises(
        StateError, match=r"model.embed_tokens is shared with lm_head.weight.*merge\(untie=True\)"
    ):
        lowrank_ft.merge(model)
    before = logits(model, TINY["llama"].inputs())
    lowrank_ft.merge(model, untie=True)
    torch.testing.assert_close(logits(model, TINY["llama"].inputs()), before)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_tied_weights_cannot_be_trained_in_full() -> None:
    with pytest.raises(TargetError, match="model.embed_tokens shares its weight with lm_head.weight"):
        lowrank_ft.wrap(TINY["llama"].model(), "lora", modules_to_save=["embed_tokens"])


def test_a_target_cannot_be_trained_in_full_too() -> None:
    with pytest.raises(TargetError, match="is both a target and in modules_to_save"):
        lowrank_ft.wrap(TINY["llama"].model(), "lora", modules_to_save=["q_proj"])
    with pytest.raises(TargetError, match="cannot both be adapted: one lies inside the other"):
        lowrank_ft.wrap(TINY["llama"].model(), "lora", modules_to_save=["self_attn"])
    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", modules_to_save=["norm"])
    with pytest.raises(TargetError, match="cannot both be adapted|cannot be adapted"):
        lowrank_ft.wrap(model, "lora", name="b", modules_to_save=["layers"])


def test_models_in_the_wrong_state() -> None:
    tiny = TINY["llama"]
    with pytest.raises(StateError, match="itself a single layer"):
        lowrank_ft.wrap(nn.Linear(4, 4), "lora", rank=2)
    with pytest.raises(StateError, match="compiled: wrap it first"):
        lowrank_ft.wrap(torch.compile(tiny.model()), "lora")
    with torch.device("meta"):
        empty = tiny.build()
    with pytest.raises(StateError, match="on the meta device: load the model's weights first"):
        lowrank_ft.wrap(empty, "lora")
    quantised = tiny.model()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(StateError, match="quantised by another library"):
        lowrank_ft.wrap(quantised, "lora")
    merged = lowrank_ft.merge(lowrank_ft.wrap(tiny.model(), "lora"))
    with pytest.raises(StateError, match="holds a reversible merge"):
        lowrank_ft.wrap(merged, "lora", name="b")
    with pytest.raises(StateError, match="merged already"):
        lowrank_ft.merge(merged)
    with pytest.raises(StateError, match=r"unmerge\(\) first"):
        lowrank_ft.unload(merged)
    lowrank_ft.merge(merged, reversible=False)
    with pytest.raises(StateError, match="has no adapter"):
        lowrank_ft.unmerge(merged)
    with pytest.raises(StateError, match="no adapter on this model to disable"), lowrank_ft.disable(merged):
        pass
    with pytest.raises(StateError, match="Embedding with max_norm|has no adapter"):
        lowrank_ft.merge(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TargetError, match="max_norm"):
        lowrank_ft.wrap(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "lora", rank=2, targets="0")


def test_set_adapter_and_delete_name_the_nearest() -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", name="math")
    for verb in (lowrank_ft.set_adapter, lowrank_ft.delete_adapter):
        with pytest.raises(StateError, match="no adapter 'maths'. Did you mean 'math'"):
            verb(model, "maths")


def test_a_permanent_merge_loses_no_adapter_silently() -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", name="a")
    lowrank_ft.wrap(model, "lora", name="b")
    with pytest.raises(StateError, match=r"would lose the inactive adapters \['a'\]: delete_adapter"):
        lowrank_ft.merge(model, reversible=False)


def test_batch_norm_statistics_belong_to_the_adapter() -> None:
    """Trained with batch statistics, a ResNet's running ones move; the base's must not."""
    tiny = TINY["resnet"]
    model = lowrank_ft.wrap(tiny.model(), "lora", rank=2, targets="all-conv").train()
    before = {k: v.clone() for k, v in engine.stock_tensors(model).items()}
    with torch.no_grad():
        model(**tiny.inputs())
    after = engine.stock_tensors(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    norm = model.resnet.embedder.embedder.normalization
    assert not torch.equal(norm.parts["default"].running_mean, norm.base.running_mean)
    assert not norm.parts["default"].weight.requires_grad


def test_custom_forwards_are_respected() -> None:
    """What a subclass does to its weight's output it also does to the update's."""

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3.0

    class Padded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.pad(x, (0, 1, 0, 1))
            return nn.functional.conv2d(x, self.weight, self.bias, self.stride)

    for model, x in (
        (nn.Sequential(Scaled(10, 8)), torch.randint(0, 10, (3, 4))),
        (nn.Sequential(Padded(3, 8, 3, stride=2)), torch.randn(2, 3, 9, 9, dtype=torch.float64)),
    ):
        model = perturb(lowrank_ft.wrap(model.double(), "lora", rank=2, targets="0"), 0.5)
        out = model(x)
        lowrank_ft.merge(model)
        torch.testing.assert_close(model(x), out)
