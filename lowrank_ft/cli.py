"""The command line: one thin layer over the library. The options are the configs' own fields and docstrings.

Nothing heavy is imported before a command is chosen, so that ``lowrank-ft --help`` is there at once.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_ft._version import __version__
from lowrank_ft.errors import LowRankError, did_you_mean


@dataclass(frozen=True)
class ExportConfig:
    """Write a model, with an adapter or compressed, in a form that other tools read."""

    model: str
    """The base model: a directory, or a name on the hub; or a directory with a model that was compressed."""
    output: str
    """Directory to write."""
    adapter: str | None = None
    """The adapter's directory, ours or PEFT's; none for a compressed model."""
    format: str = "peft"
    """"peft" (a LoRA for the unmodified base), "dense" (stock weights of the stock sizes, adapter folded in),
    "hf-uniform" (a stock model with smaller MLPs) or "deci" (MLPs of several widths, as block_configs)."""
    rank: int | None = None
    """For "peft": replace updates of a larger rank by the nearest of this one; the error is printed."""
    dtype: str = "auto"
    """"auto" (as saved), "float32", "bfloat16" or "float16"."""


@dataclass(frozen=True)
class MergeConfig:
    """Fold an adapter into its base model and write the whole: a stock model that serves anywhere."""

    model: str
    """The base model: a directory, or a name on the hub."""
    adapter: str
    """The adapter's directory, ours or PEFT's."""
    output: str
    """Directory to write."""
    dtype: str = "auto"
    """"auto" (as saved), "float32", "bfloat16" or "float16"."""


@dataclass(frozen=True)
class InspectConfig:
    """Say what is in a checkpoint, without loading a model."""

    directory: str
    """What :func:`lowrank_ft.save` wrote."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``lowrank-ft`` with the given arguments, those of the process by default."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return
    if args[0] == "--version":
        print(__version__)
        return
    command = COMMANDS.get(args[0])
    if command is None:
        hint = did_you_mean(args[0], COMMANDS)
        sys.exit(f"lowrank-ft: there is no command {args[0]!r}.{hint} See lowrank-ft --help.")
    try:
        command.run(args[1:])
    except LowRankError as error:
        sys.exit(f"lowrank-ft {args[0]}: {error}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: lowrank-ft COMMAND [options]\n\n{lines}\n\n"
        f"lowrank-ft COMMAND --help lists a command's options. Several processes: accelerate launch "
        f"recipes/finetune.py …"
    )


# Commands ---------------------------------------------------------------------------------------------------


def _module(name: str) -> Any:
    """Import one of the package's modules: most of them cost torch and transformers, and some a command."""
    return importlib.import_module(f"lowrank_ft.{name}")


def _finetune(args: Sequence[str]) -> None:
    training = _module("recipes.training")
    training.finetune(parse(training.FinetuneConfig, args, "finetune"))
    training.leave_process_group()


def _compress(args: Sequence[str]) -> None:
    compression = _module("recipes.compression")
    compression.compress(parse(compression.CompressConfig, args, "compress"))


def _evaluate(args: Sequence[str]) -> None:
    evaluation = _module("recipes.evaluation")
    evaluation.evaluate(parse(evaluation.EvaluateConfig, args, "evaluate"))


def _export(args: Sequence[str]) -> None:
    config = parse(ExportConfig, args, "export")
    _write(config.model, config.adapter, config.output, config.format, config.dtype, config.rank)


def _merge(args: Sequence[str]) -> None:
    config = parse(MergeConfig, args, "merge")
    _write(config.model, config.adapter, config.output, "dense", config.dtype)


def _write(
    model: str, adapter: str | None, output: str, format: str, dtype: str, rank: int | None = None
) -> None:
    checkpoint = _module("checkpoint")
    checkpoint.check_format(format)
    loaded, tokenizer = _module("checkpoint.loading").load_any(model, adapter, dtype)
    facts = checkpoint.export(loaded, output, format, tokenizer=tokenizer, rank=rank)
    size = sum(file.stat().st_size for file in Path(output).iterdir() if file.is_file())
    print(f"Wrote {output} ({format}, {size:,} bytes).")
    for what, value in facts.items():
        print(f"{what.capitalize()}: {value:.4g}.")


def _inspect(args: Sequence[str]) -> None:
    config = parse(InspectConfig, args, "inspect", positional=("directory",))
    content = _module("recipes.reporting").report(config.directory)
    print(json.dumps(asdict(content), indent=1) if config.json else content)


def _methods(args: Sequence[str]) -> None:
    from tabulate import tabulate

    if args:
        sys.exit("usage: lowrank-ft methods")
    rows = _module("recipes.reporting").methods().items()
    print(tabulate(rows, ("method", "what it is"), "github"))


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, and the function that does it."""

    summary: str
    run: Callable[[Sequence[str]], None]


COMMANDS = {
    "finetune": Command("train an adapter on text, chats, labelled examples or images", _finetune),
    "compress": Command("compress a model, stage by stage, and recover it", _compress),
    "evaluate": Command("measure perplexity, or lm-eval tasks", _evaluate),
    "merge": Command("fold an adapter into its base model", _merge),
    "export": Command("write an adapter for PEFT, or a whole model for everything else", _export),
    "inspect": Command("say what is in a checkpoint", _inspect),
    "methods": Command("list the methods", _methods),
}


# Parsing ----------------------------------------------------------------------------------------------------


def parse(cls: type[Any], args: Sequence[str], command: str, positional: Sequence[str] = ()) -> Any:
    """Return a config from ``--config FILE.yaml`` and dotted overrides such as ``--method.rank 8``.

    A field ``method`` takes the options of the method that ``method.name`` names, LoRA's by default.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=f"lowrank-ft {command}", description=cls.__doc__)
    has_method = "method" in cls.__dataclass_fields__
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    for name in positional:
        parser.add_argument(name, type=str)
    parser.add_class_arguments(
        cls, skip={*positional, *({"method"} if has_method else ())}, fail_untyped=False
    )
    if has_method:
        method = _method_config(args)
        parser.add_argument("--method.name", default=method.name, help="The method.")
        parser.add_class_arguments(method.Config, "method")
    arguments = parser.parse_args(list(args))
    if has_method:
        arguments.method.pop("name")
    values = vars(parser.instantiate(arguments))
    values.pop("config", None)
    return cls(**values)


def _method_config(args: Sequence[str]) -> Any:
    """Find which method is meant before its options can be parsed."""
    import yaml

    name = "lora"
    given = dict(_options(args))
    for key in ("config", "method"):  # a recipe's file, then a method's own, then the command line
        if key in given and Path(given[key]).is_file():
            content = yaml.safe_load(Path(given[key]).read_text(encoding="utf-8")) or {}
            section = content.get("method", {}) if key == "config" else content
            name = section.get("name", name)
    return _module("structure.registry").methods[given.get("method.name", name)]


def _options(args: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for i, arg in enumerate(args):
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            pairs.append((key, value if equals else (args[i + 1] if i + 1 < len(args) else "")))
    return pairs


if __name__ == "__main__":
    main()
