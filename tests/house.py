"""The structure of the package, read off its source: who imports whom, how long files and functions are.

python -m tests.house            # the table of folders, circles, files and functions
python -m tests.house PATH       # the same of another checkout's package, without the table
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

PACKAGE = "lowrank_ft"
ROOT = Path(__file__).parent.parent / PACKAGE

# Each imports only from those before it. What lies directly in the package is "ground", but for the door.
ORDER = (
    "ground",
    "solve",
    "quant",
    "basis",
    "structure",
    "modules",
    "anatomy",
    "calibration",
    "algorithms",
    "engine",
    "checkpoint",
    "recipes",
    "cli",
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Arrow:
    """One import of one of the package's modules by another.

    Attributes:
        source: the module that imports, such as ``engine.surgery``.
        target: the module that is imported.
        line: of the import statement.
        late: whether it stands inside a function.
    """

    source: str
    target: str
    line: int
    late: bool

    @property
    def runs_back(self) -> bool:
        """Whether it leads to a folder that stands later in the order."""
        return ORDER.index(folder_of(self.target)) > ORDER.index(folder_of(self.source))


def files_of(root: Path = ROOT) -> dict[str, Path]:
    """Return the files by the module's name inside the package; a folder's own file goes by the folder."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def arrows_of(root: Path = ROOT) -> list[Arrow]:
    """Return every import of the package's own modules: late ones, and those for types alone, too."""
    files, arrows = files_of(root), []
    for source, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
        for node in ast.walk(tree):
            for target in _targets(node, files):
                if target != source:
                    arrows.append(Arrow(source, target, node.lineno, id(node) in inside))  # type: ignore[attr-defined]
    return arrows


def _targets(node: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    """The modules that an import statement names; ``from lowrank_ft.solve import factors`` names a file."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        inner = ".".join(parts[1:])
        while inner not in files:  # a name in a module
            inner = inner.rpartition(".")[0]
        yield inner


def folder_of(module: str) -> str:
    """Return the folder that a module lies in."""
    first, dot, _ = module.partition(".")
    if module in ("cli", ""):
        return "cli"  # the door: the package's own file names the verbs
    return first if dot or (ROOT / first).is_dir() else "ground"


def table_of(arrows: Sequence[Arrow], *, counted: bool = True) -> str:
    """Return a Markdown table: a column's folder imports from the folders of its rows.

    Args:
        arrows: the imports.
        counted: show how many imports there are, else only that there are some, which changes less often.
    """
    counts = [[0] * len(ORDER) for _ in ORDER]
    for arrow in arrows:
        counts[ORDER.index(folder_of(arrow.target))][ORDER.index(folder_of(arrow.source))] += 1
    rows = [
        [f"**{name}**", *((count if counted else "●") if count else "" for count in row)]
        for name, row in zip(ORDER, counts, strict=True)
    ]
    return tabulate(rows, ["is imported by →", *ORDER], "github", disable_numparse=True)


def circles_of(arrows: Sequence[Arrow]) -> list[list[str]]:
    """Return the groups of modules that import each other, round and round."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows:
        graph.setdefault(arrow.source, set()).add(arrow.target)
        graph.setdefault(arrow.target, set())
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach[other]))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += graph[node]
    return reached


def functions_of(root: Path = ROOT) -> list[tuple[int, str]]:
    """Return how many lines each function has, the longest first."""
    functions = []
    for name, path in files_of(root).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, FUNCTIONS):
                assert node.end_lineno is not None
                functions.append((node.end_lineno - node.lineno + 1, f"{name}.{node.name}"))
    return sorted(functions, reverse=True)


def lines_of(root: Path = ROOT) -> dict[str, int]:
    """Return how many lines each file has."""
    return {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files_of(root).items()}


def main() -> None:
    """Print what the tests hold the package to; of another checkout, what can be said of it."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    arrows = arrows_of(root)
    if root == ROOT:
        print(table_of(arrows) + "\n")
    late = [arrow for arrow in arrows if arrow.late]
    print(f"{len(arrows)} imports, {len(late)} of them inside functions, {len(circles_of(arrows))} circles")
    for group in circles_of(arrows):
        print(f"circle: {', '.join(group)}")
    by_file = lines_of(root)
    by_folder: dict[str, int] = {}
    for name, count in by_file.items():
        key = name.partition(".")[0] if "." in name or (name and (root / name).is_dir()) else "(top)"
        by_folder[key] = by_folder.get(key, 0) + count
    print(f"{len(by_file)} files, {sum(by_file.values())} lines: {by_folder}")
    longest = sorted(by_file.items(), key=lambda item: -item[1])[:6]
    print("longest files: " + ", ".join(f"{name} {count}" for name, count in longest))
    print("longest functions: " + ", ".join(f"{name} {count}" for count, name in functions_of(root)[:6]))


if __name__ == "__main__":
    main()
