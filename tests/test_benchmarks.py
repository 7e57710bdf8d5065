"""The benchmarks' program: its suites, its runner on a toy suite, and the tables in the documents."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import suite as suites
from benchmarks.suite import Lab, Row, Suite, of_parts
from benchmarks.tables import BLOCK, Plot, Table, at_best_rate, count, lowest, mean, rewritten

ROOT = Path(__file__).parents[1]
# Published rows of methods and rates that are not among the contestants any more.
RETIRED = {
    ("FLoRA, paper's start, 33 layers", 0.003),
    ("FLoRA, paper's start, 33 layers", 0.01),
    ("FLoRA", 0.03),
}


@pytest.mark.parametrize("name", suites.names())
def test_a_suite_is_complete(name):
    suite, doc = suites.load(name)
    assert doc.count("\n") >= 3, "the docstring is the help"
    assert suite.tables
    jobs = list(suite.jobs([]))
    assert jobs
    assert any(dict(suite.quick) == dict(job) for job in jobs)
    assert inspect.isgeneratorfunction(suite.measure) or suite.measure.__name__ == "<lambda>"


@pytest.mark.parametrize("name", suites.names())
def test_every_published_row_is_of_a_job_and_is_shown(name):
    suite, _ = suites.load(name)
    rows = program.results_of(name, ROOT)
    assert rows
    assert len({str(dict(row.key)) for row in rows}) == len(rows), "two rows have one key"
    jobs = list(suite.jobs(rows))
    strays = [row for row in rows if not any(row.belongs_to(job) for job in jobs)]
    assert all((row.get("method"), row.get("rate")) in RETIRED for row in strays), strays
    for job in jobs:
        assert any(row.belongs_to(job) for row in rows), f"{job} is not published"
    for title, table in suite.tables.items():
        lines = table.markdown(rows).splitlines()
        assert len(lines) > 2, title
        assert len({line.count(" | ") for line in lines[::2]}) == 1, title


def test_the_documents_show_the_published_results(capsys):
    assert program.update_documents(ROOT, write=False) == 0, capsys.readouterr().out
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    shown = {match[2] for text in texts for match in BLOCK.finditer(text)}
    assert {"corda", "e2e", "forgetting", "nola", "pictures", "quantization", "tucker"} <= shown


def toy(measured):
    """A suite of three learning rates, and two more seeds at the best of them."""

    def jobs(rows):
        yield from ({"method": "toy", "seed": 0, "rate": rate} for rate in (0.1, 0.2, 0.3))
        best = min(rows, key=lowest("loss"), default=None)
        yield from ({"method": "toy", "seed": seed, "rate": best["rate"]} for seed in (1, 2) if best)

    def measure(job, lab):
        measured.append(dict(job))
        for bits in (32, 4):
            yield {"bits": bits}, {"loss": abs(job["rate"] - 0.2) + job["seed"] + bits}

    table = Table(
        by=("method",),
        columns={"method": "", "{} bits": mean("loss", ".1f"), "runs": count("loss")},
        across=("bits", (4, 32)),
        prepare=at_best_rate(lowest("loss"), "method"),
    )
    return Suite(jobs, measure, {"all": table}, {"method": "toy", "seed": 0, "rate": 0.1})


def test_the_runner_follows_the_best_rate_and_skips_what_is_done(tmp_path):
    measured: list[dict[str, object]] = []
    path = tmp_path / "results" / "toy.jsonl"
    program.run(toy(measured), Lab(), path, {"torch": "1"}, only="rate=0.[12]")
    assert [(job["seed"], job["rate"]) for job in measured] == [(0, 0.1), (0, 0.2), (1, 0.2), (2, 0.2)]
    program.run(toy(measured), Lab(), path, {"torch": "1"})
    assert [(job["seed"], job["rate"]) for job in measured[4:]] == [(0, 0.3)]
    rows = suites.read(path)
    assert len(rows) == 10
    assert rows[0] == Row(
        {"method": "toy", "seed": 0, "rate": 0.1, "bits": 32}, {"loss": 32.1}, {"torch": "1"}
    )
    expected = "| method | 4 bits | 32 bits | runs |\n|---|---|---|---|\n| toy | 5.0 ± 1.0 | 33.0 ± 1.0 | 6 |"
    assert toy([]).tables["all"].markdown(rows) == expected


def test_a_suite_of_parts_runs_each(tmp_path):
    parts = {
        "one": lambda lab: iter([({"what": "a"}, {"figure": 1})]),
        "two": lambda lab: iter([({}, {"x": 2})]),
    }
    suite = of_parts(parts, {}, quick="two")
    program.run(suite, Lab(), tmp_path / "r.jsonl", {})
    assert [dict(row.key) for row in suites.read(tmp_path / "r.jsonl")] == [
        {"part": "one", "what": "a"}, {"part": "two"},
    ]  # fmt: skip


def test_a_document_is_rewritten_between_its_markers_only():
    empty = "<!-- benchmarks: toy all -->\n<!-- end -->\n"
    full = "<!-- benchmarks: toy some -->\n\nold\n\n<!-- end -->\n"
    new = rewritten(f"before\n{empty}between\n{full}after", lambda suite, table: f"{suite}/{table}")
    first, second = empty.replace("-->\n<", "-->\n\ntoy/all\n\n<"), full.replace("old", "toy/some")
    assert new == f"before\n{first}between\n{second}after"
    assert rewritten(new, lambda suite, table: f"{suite}/{table}") == new


@pytest.mark.parametrize("name", [name for name in suites.names() if suites.load(name)[0].plot])
def test_a_plot_draws(name):
    figure = pytest.importorskip("matplotlib.figure")
    suite, _ = suites.load(name)
    axes = figure.Figure().subplots()
    assert isinstance(suite.plot, Plot)
    suite.plot.draw(program.results_of(name, ROOT), axes)
    assert len(axes.containers) > 3
