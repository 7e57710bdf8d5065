"""Checkpoints that earlier versions wrote load to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowrank_ft
from lowrank_ft.checkpoint import files
from tests.frozen import make

KINDS = sorted(path.parent.name for path in make.FROZEN.glob("*/expected.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_checkpoint_loads_to_the_same_bits(kind: str) -> None:
    expected = json.loads((make.FROZEN / kind / "expected.json").read_text(encoding="utf-8"))
    model = make.loaded(kind, expected["base"])
    assert make.digests(model) == expected["digests"]
    # Another processor may sum in another order: float32 rounding of logits of order one.
    answers = torch.tensor(expected["answers"])
    torch.testing.assert_close(make.answers(model, expected["base"]), answers, rtol=1e-5, atol=1e-5)


def test_every_kind_is_there() -> None:
    assert set(KINDS) == {*make.KINDS, *make.PEFT}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_again_is_the_same(kind: str, tmp_path: Path) -> None:
    """The format has not moved: same tensors in the same files, same manifest."""
    expected = json.loads((make.FROZEN / kind / "expected.json").read_text(encoding="utf-8"))
    before = files.read_index(make.FROZEN / kind)
    if before["content"] == "peft":
        return
    lowrank_ft.save(make.loaded(kind, expected["base"]), tmp_path / "again")
    after = files.read_index(tmp_path / "again")
    for part in ("schema", "content", "manifest", "active", "digests", "stages", "adapters"):
        assert after.get(part) == before.get(part)
    weights = [name for name in before["files"] if name.endswith(".safetensors")]
    assert [after["files"][name]["sha256"] for name in weights] == [
        before["files"][name]["sha256"] for name in weights
    ]
