"""The layout of the package: who may import whom, and how long files and functions may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def arrows() -> list[house.Arrow]:
    return house.arrows_of()


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {house.folder_of(module) for module in house.files_of()} == set(house.ORDER)


def test_no_import_runs_back(arrows: list[house.Arrow]) -> None:
    assert len(arrows) > 500  # they were found at all
    assert [arrow for arrow in arrows if arrow.runs_back] == []


def test_no_modules_import_each_other(arrows: list[house.Arrow]) -> None:
    assert house.circles_of(arrows) == []


def test_our_own_modules_are_imported_at_the_top(arrows: list[house.Arrow]) -> None:
    assert [arrow for arrow in arrows if arrow.late] == []


def test_files_and_functions_stay_short() -> None:
    assert {name: count for name, count in house.lines_of().items() if count > 700} == {}
    assert [(name, count) for count, name in house.functions_of() if count > 70] == []


def test_the_table_in_contributing_is_the_one_of_the_source(arrows: list[house.Arrow]) -> None:
    """It is what ``table_of`` makes: paste that in where this fails."""
    assert house.table_of(arrows, counted=False) in CONTRIBUTING.read_text(encoding="utf-8")


def test_what_breaks_the_rule_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "lowrank_ft"
    (root / "solve").mkdir(parents=True)
    (root / "engine").mkdir()
    (root / "__init__.py").touch()
    (root / "solve" / "__init__.py").write_text("from lowrank_ft.engine import state\n")
    (root / "engine" / "__init__.py").touch()
    (root / "engine" / "state.py").write_text("def late():\n    from lowrank_ft import solve\n")
    arrows = house.arrows_of(root)
    assert [(a.source, a.target, a.late, a.runs_back) for a in arrows] == [
        ("engine.state", "solve", True, False),
        ("solve", "engine.state", False, True),
    ]
    assert house.circles_of(arrows) == [["engine.state", "solve"]]
    assert house.functions_of(root) == [(2, "engine.state.late")]
    assert house.lines_of(root)["solve"] == 1
