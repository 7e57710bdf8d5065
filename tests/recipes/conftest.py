"""A tiny model and tokenizer on disk, and small files of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank_ft import cli
from tests.tiny import TINY, VOCAB

SENTENCE = "the cat sat on a mat and saw old red dog run far away home now then who is what why not"
WORDS = SENTENCE.split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    assert len(vocabulary) <= VOCAB
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sentence(i: int, length: int = 12) -> str:
    return " ".join(WORDS[(i * 5 + j * (1 + i % 3)) % len(WORDS)] for j in range(length + i % 5))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command: str, recipe: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a recipe as users do, run it from the command line, and return its report."""
    path.write_text(yaml.safe_dump(recipe))
    cli.main([command, "--config", str(path)])
    report: dict[str, Any] = json.loads((Path(recipe["output"]) / "report.json").read_text())
    return report


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama, as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("base")
    model = TINY["llama"].model()
    model.config.pad_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    rows = [{"text": f"{sentence(i)} {WORDS[i % 3]}", "label": "abc"[i % 3]} for i in range(48)]
    write_jsonl(directory / "train.jsonl", rows[:40])
    write_jsonl(directory / "heldout.jsonl", rows[40:])
    chats = [
        {
            "messages": [
                {"role": "user", "content": sentence(i, 5)},
                {"role": "assistant", "content": sentence(i + 1, 4)},
            ]
        }
        for i in range(16)
    ]
    write_jsonl(directory / "chats.jsonl", chats)
    pairs = [{"prompt": sentence(i, 4), "completion": sentence(i + 1, 4)} for i in range(16)]
    write_jsonl(directory / "pairs.jsonl", pairs)
    return directory


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def compression(base: Path, texts: Path, tmp_path: Path) -> dict[str, Any]:
    """A compression recipe without stages."""
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "data": str(texts / "train.jsonl"),
        "eval": {"held-out": str(texts / "heldout.jsonl")},
        "window": 16,
        "windows": 4,
        "output": str(tmp_path / "out"),
    }
