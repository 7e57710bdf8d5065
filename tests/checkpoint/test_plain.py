"""Modules that are not transformers', and whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft.errors import CheckpointError, StateError
from tests.tiny import TINY, logits, perturb


class Net(nn.Module):
    """Convolutions, a batch norm, an embedding, a tie and a head: any module will do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.mix(self.embed(ids).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.relu(self.up(x)))


def net(width: int = 16) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net(width).eval()


IDS = torch.arange(12).view(2, 6)
TARGETS = ["all-linear", "all-conv", "all-embedding"]


def trained() -> Net:
    model = lowrank_ft.wrap(net(), "lora", rank=3, targets=TARGETS)
    with torch.no_grad():
        model.train()(IDS)  # moves the batch norm's statistics
    perturb(model.eval(), 0.3)
    return model


def test_adapters_on_a_plain_module(tmp_path: Path) -> None:
    model = trained()
    lowrank_ft.save(model, tmp_path / "a")
    again = lowrank_ft.load(net(), tmp_path / "a")
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.allclose(net()(IDS), model(IDS))
    lowrank_ft.unload(again)
    assert torch.equal(again(IDS), net()(IDS))


def test_a_merged_plain_module(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(net(), "lora", rank=3)
    perturb(model, 0.3)
    lowrank_ft.merge(model, reversible=False)
    lowrank_ft.save(model, tmp_path / "whole")
    again = lowrank_ft.load(net(), tmp_path / "whole")
    assert torch.equal(again(IDS), model(IDS))
    assert again.head.weight is again.embed.weight
    with pytest.raises(CheckpointError, match="was saved from another module: .*differ"):
        lowrank_ft.load(net(8), tmp_path / "whole")
    with pytest.raises(StateError, match="load it onto a fresh base"):
        lowrank_ft.load(lowrank_ft.wrap(net(), "lora", rank=2), tmp_path / "whole")
    with pytest.raises(CheckpointError, match="holds a whole model, so name='x' has no meaning"):
        lowrank_ft.load(net(), tmp_path / "whole", name="x")


def test_modules_registered_in_another_order(tmp_path: Path) -> None:
    """Ranks differ, so that a mix-up of order could not go unseen."""
    model = lowrank_ft.wrap(net(), "lora", rank=3, targets=TARGETS, rank_pattern={"up": 2, "mix": 5})
    perturb(model, 0.3)
    lowrank_ft.save(model, tmp_path / "a")
    other = net()
    other._modules = dict(reversed(other._modules.items()))
    assert [n for n, _ in other.named_children()] != [n for n, _ in net().named_children()]
    assert torch.equal(lowrank_ft.load(other, tmp_path / "a")(IDS), model(IDS))


def test_a_whole_transformers_model_onto_a_fresh_one(tmp_path: Path) -> None:
    tiny = TINY["gpt2"]
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2))
    lowrank_ft.merge(model)
    lowrank_ft.save(model, tmp_path / "whole")
    fresh = tiny.model()
    assert lowrank_ft.load(fresh, tmp_path / "whole") is fresh
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(logits(fresh, tiny.inputs()), logits(model, tiny.inputs()))


def test_inference_mode_and_empty_batches() -> None:
    model = trained()
    with torch.inference_mode():
        out = model(IDS)
    torch.testing.assert_close(out, model(IDS))
    adapted = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(4, 6)), "lora", rank=2))
    assert adapted(torch.empty(0, 4)).shape == (0, 6)
    assert adapted(torch.randn(4)).shape == (6,)
    strided = torch.randn(4, 10).T  # not contiguous
    torch.testing.assert_close(adapted(strided), adapted(strided.contiguous()))


def test_an_offloaded_base_is_not_taken_on_trust(tmp_path: Path) -> None:
    lowrank_ft.save(trained(), tmp_path / "a")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(StateError, match="on the meta device .*so it cannot be compared"):
        lowrank_ft.load(empty, tmp_path / "a")


def test_the_model_card_names_a_hub_base(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "lora", rank=2)
    model.config._name_or_path = "someone/some-model"
    lowrank_ft.save(
        model, tmp_path / "a", figures={"held-out perplexity": "9.1 → 8.2", "Speed": {"tokens/s": 120}}
    )
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model: someone/some-model" in card
    assert "| held-out perplexity | 9.1 → 8.2 |" in card
    assert "## Speed" in card
    assert "2 × q_proj" in card
