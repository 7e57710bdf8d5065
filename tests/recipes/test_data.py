"""Datasets: masks, packing, padding; and the measurements made on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from lowrank_ft.calibration import texts
from lowrank_ft.errors import ConfigError, NonFiniteError
from lowrank_ft.recipes import data, evaluation
from lowrank_ft.recipes.data import IGNORED, DataConfig
from tests.tiny import TINY, VOCAB


def decode(tokenizer: Any, row: dict[str, Any]) -> str:
    return tokenizer.decode(
        [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    )


def test_only_the_assistants_words_have_labels(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "now then"},
        {"role": "user", "content": "who is the cat"},
        {"role": "assistant", "content": "a red cat"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "home now"},
    ]
    row = data.encode_chat(messages, tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    # With each answer comes the token that ends it, so that the model learns to stop.
    assert decode(tokenizer, row).split() == ["a", "red", "cat", "</s>", "home", "now", "</s>"]
    assert all(
        label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )


def test_a_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }} " + tokenizer.chat_template
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    other.chat_template = "{% if messages|length > 1 %}old {% endif %}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        data.encode_chat(chat, other)
    other.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        data.encode_chat(chat, other)


def test_prompts_have_no_labels(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "the cat", "completion": "sat on"}])
    (row,) = data.tokenize_for_generation(rows, DataConfig("", packing=False), tokenizer)
    assert row["labels"][:2] == [IGNORED, IGNORED]
    assert decode(tokenizer, row) == "sat on </s>"


def test_packing_keeps_every_token_in_order() -> None:
    rows = {"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]], "labels": [[1, IGNORED, 3], [4, 5], [6, 7, 8, 9]]}
    packed = data.pack(rows, 4)
    assert packed["input_ids"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert packed["labels"] == [[1, IGNORED, 3, 4], [5, 6, 7, 8]]


def test_documents_end_with_the_end_token(tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([{"text": "the cat"}, {"text": "a dog run"}])
    packed = data.tokenize_for_generation(rows, DataConfig("", max_length=7), tokenizer)
    assert tokenizer.decode(packed[0]["input_ids"]) == "the cat </s> a dog run </s>"


def test_padding_is_masked_and_has_no_label() -> None:
    batch = data.Collator(9)(
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert data.Collator(9)([{"input_ids": [1], "labels": 2}])["labels"].tolist() == [2]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_local_files(suffix: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "the cat"}, {"text": "a dog"}])
    path = tmp_path / f"rows{suffix}"
    {
        ".jsonl": lambda: rows.to_json(path),
        ".csv": lambda: rows.to_csv(path),
        ".parquet": lambda: rows.to_parquet(path),
        ".txt": lambda: path.write_text("the cat\na dog\n"),
    }[suffix]()
    assert texts.read(str(path), None, "train")["text"][:] == ["the cat", "a dog"]
    rows.save_to_disk(tmp_path / "disk")
    assert texts.read(str(tmp_path / "disk"), None, "train")["text"][:] == ["the cat", "a dog"]


def test_formats_and_labels_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("")
    with pytest.raises(ConfigError, match=r"x.xml is of no known format"):
        texts.read(str(tmp_path / "x.xml"), None, "train")
    rows = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    with pytest.raises(ConfigError, match="has one class only"):
        data.classes_of(rows, "text", "label")
    with pytest.raises(ConfigError, match="no column 'lable'. Did you mean 'label'"):
        data.classes_of(rows, "text", "lable")


# Measurements -----------------------------------------------------------------------------------------------


def naive_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """−log p of each token after the first, all seen at once."""
    with torch.no_grad():
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -logp[torch.arange(len(ids) - 1), ids[1:]]


def test_one_window_equals_the_definition() -> None:
    model, ids = TINY["llama"].model(), torch.randint(3, VOCAB, (20,))
    found = evaluation.perplexity(model, ids, window=64)
    assert found.tokens == 19
    assert found.loss == pytest.approx(naive_losses(model, ids).mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 3), (8, 1), (9, 9)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_score_each_token_once_with_its_context(window: int, stride: int, batch_size: int) -> None:
    model, ids = TINY["llama"].model(), torch.randint(3, VOCAB, (45,))
    found = evaluation.perplexity(model, ids, window=window, stride=stride, batch_size=batch_size)
    total, scored, start, done = 0.0, 0, 0, 1
    while done < len(ids):  # by hand, one window at a time
        end = min(start + window, len(ids))
        losses = naive_losses(model, ids[max(0, end - window) : end])
        new = min(end - done, len(losses))
        total, scored, done, start = total + losses[-new:].sum().item(), scored + new, end, start + stride
    assert found.tokens == scored
    assert scored == (len(ids) - 1 if stride < window else 45 - 45 // 9)
    assert found.loss == pytest.approx(total / scored, rel=1e-5)
    assert not model.training


def test_bad_windows_and_broken_models() -> None:
    model, ids = TINY["llama"].model(), torch.randint(3, VOCAB, (20,))
    with pytest.raises(ConfigError, match=r"stride must lie in 1..window = 8, but is 9"):
        evaluation.perplexity(model, ids, window=8, stride=9)
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        evaluation.perplexity(model, ids[:1])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss on this text is nan"):
        evaluation.perplexity(model, ids)
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(NonFiniteError, match="loss in 'x' is nan"):
        evaluation.mean_loss(model, rows, data.Collator(0), 1, "x")
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}])
    with pytest.raises(ConfigError, match="no labels to score"):
        evaluation.mean_loss(TINY["llama"].model(), rows, data.Collator(0), 1, "x")


def test_mean_loss_counts_every_label_the_same() -> None:
    """Trainer's own mean weighs a short batch's tokens more; this one does not."""
    model = TINY["llama"].model().train()
    rows = [torch.randint(3, VOCAB, (n,)).tolist() for n in (3, 9, 5, 12, 2)]
    dataset = datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    model.eval()
    wanted = torch.cat([naive_losses(model, torch.tensor(row)) for row in rows])
    model.train()
    for size in (1, 2, 5):
        found = evaluation.mean_loss(model, dataset, data.Collator(0), size, "x")
        assert found.count == len(wanted) == 26
        assert found.loss == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert model.training
