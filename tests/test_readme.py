"""The README's Python blocks run, in order, and its figures are those of the results."""

import importlib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_blocks(page):
    """The names that a page's Python blocks leave, and how many there are."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names, len(blocks)


@pytest.mark.filterwarnings("default")
def test_python_blocks_run_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names, count = run_blocks("README.md")
    assert count == 6
    assert names["metrics"][-1]["elbo"] < 0


def test_the_figure_in_short_shows_the_bound(capsys):
    _, count = run_blocks("examples/paper/README.md")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert count == 1
    assert [(name, int(seen)) for name, seen, _ in lines] == [
        (name, 1437 * passes) for name in ("Trace_ELBO", "WakeSleep") for passes in range(7)
    ]
    first, last = (float(lines[at][2]) for at in (0, 6))
    assert -64 * 0.7 < first < last - 10  # from coins, by AEVB


def test_the_programs_shown_are_those_of_the_package():
    (shown,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    source = (ROOT / "pyro_vae" / "vae.py").read_text()
    programs = shown.strip().split("\n\n\n")
    assert len(programs) == 2
    assert all(textwrap.indent(program, "    ") in source for program in programs)


PAGES = ["README.md", "examples/combinations.md"]
PAGES += [f"examples/{name}/README.md" for name in ("benchmarks", "paper")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert targets
    for target in targets:
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_table_of_reference_values_is_that_of_the_results():
    folder = ROOT / "examples" / "benchmarks"
    table = (folder / "README.md").read_text()
    for row in json.loads((folder / "results" / "reference_values.json").read_text()):
        mean = sum(row["values"]) / len(row["values"])
        values = ", ".join(f"{value:.2f}" for value in row["values"])
        line = f"| {row['setup']} | {row['passes']} | {row['published']} | {mean:.2f} | {values} |"
        assert line in table


def test_the_table_of_frey_face_is_that_of_the_results():
    folder = ROOT / "examples" / "benchmarks"
    table = (folder / "README.md").read_text()
    for row in json.loads((folder / "results" / "frey_face.json").read_text()):
        bound = f"{row['elbo']:.0f} ± {row['standard_error']:.0f}"
        halves = f"{row['reconstruction']:.0f} | {row['kl']:.1f}"
        line = f"| {row['run']} | {row['passed']} | {row['samples']} | {bound} | {halves} |"
        assert line in table


def test_the_table_of_comparisons_is_that_of_the_results(monkeypatch):
    folder = ROOT / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    results = json.loads((folder / "results" / "comparisons.json").read_text())
    table = importlib.import_module("comparisons").table(results)
    assert table in (folder / "README.md").read_text()
    gains = [
        line.split("(")[1]
        for line in table.splitlines()
        if "published" not in line and "(" in line
    ]
    assert len(gains) == 4
    assert all(gain.startswith("+") for gain in gains)  # as the page says, no interval contains 0


def test_the_table_of_signal_and_noise_is_that_of_the_results():
    folder = ROOT / "examples" / "benchmarks"
    rows = json.loads((folder / "results" / "signal_to_noise.json").read_text())
    lines = (folder / "README.md").read_text().splitlines()
    for row in rows:
        (line,) = [x for x in lines if x.startswith(f"| {row['trained']} | {row['gradient']} |")]
        assert f" {row['signal_to_noise']:.2f} |" in line


def test_the_gain_of_doubly_reparameterised_gradients_is_that_of_the_results():
    folder = ROOT / "examples" / "benchmarks"
    rows = json.loads((folder / "results" / "signal_to_noise.json").read_text())
    ratios = {(r["trained"], r["particles"], r["gradient"]): r["signal_to_noise"] for r in rows}
    gains = [
        ratios[trained, count, "doubly reparameterised"] / value
        for (trained, count, gradient), value in ratios.items()
        if gradient == "pathwise"
    ]
    page = (folder / "README.md").read_text()
    assert f"{min(gains):.1f} to {max(gains):.1f} times as strong" in page


@pytest.mark.parametrize("name", ["speed", "speed_gpu"])
def test_the_tables_of_speed_are_those_of_the_results(name, monkeypatch):
    folder = ROOT / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    results = json.loads((folder / "results" / f"{name}.json").read_text())
    report = importlib.import_module("speed").report(results)
    assert report in (folder / "README.md").read_text()


PAPER = {
    "figure2_lower_bound": "figure2",
    "figure3_marginal_likelihood": "figure3",
    "figure4_manifold": "figure4",
    "figure5_samples": "figure5",
    "appendix_f_full_vb": "appendix_f",
    "iwae_table": "iwae",
    "vampprior_table": "vampprior",
}


@pytest.mark.parametrize(("script", "section"), PAPER.items())
def test_a_section_on_the_paper_is_what_its_results_give(
    script, section, monkeypatch, capsys, tmp_path
):
    folder = ROOT / "examples" / "paper"
    monkeypatch.syspath_prepend(str(folder))
    shutil.copytree(folder / "results", tmp_path / "results")
    words = [script, "--report", "--threads", "1", "--out", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(script).main()
    printed = capsys.readouterr().out.strip()
    none = f"there are no such results in {tmp_path / 'results'}"
    page = (folder / "README.md").read_text()
    shown = page.split(f"<!-- {section} writes from here -->")[1].split("<!-- to here -->")[0]
    assert shown.strip() == ("" if printed == none else printed)


def test_a_trial_of_speed_leaves_the_results_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    speed = importlib.import_module("speed")
    for words, kept in (([], True), (["--small"], False)):
        monkeypatch.setattr(sys, "argv", ["speed.py", *words])
        assert (speed.arguments().out == speed.FOLDER / "results") == kept


def test_the_tables_of_scale_and_of_processes_are_those_of_the_results(monkeypatch):
    folder = ROOT / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    names = ("scale", "processes")
    disk, several = (
        json.loads((folder / "results" / f"{name}.json").read_text()) for name in names
    )
    scale, processes = map(importlib.import_module, names)
    page = (folder / "README.md").read_text()
    assert scale.report(disk) in page
    assert scale.limit(disk, several) in page
    assert processes.table(several) in page


def test_the_table_of_estimators_is_that_of_the_results():
    folder = ROOT / "examples" / "benchmarks"
    results = json.loads((folder / "results" / "evaluation.json").read_text())
    page = (folder / "README.md").read_text()
    for row in results["estimators"]["estimators"]:
        share = f"{row['within_3_errors']:.0%}"
        line = f"| {row['estimator']} | {row['mean']:.2f} | {row['apart']:+.2f} | {share} |"
        assert line in page
    for rate in results["speed"]["draws_per_second"].values():
        assert f" {rate:,.0f} |" in page


def test_what_is_said_of_kills_is_in_the_results():
    folder = ROOT / "examples" / "benchmarks"
    results = json.loads((folder / "results" / "kill.json").read_text())
    kills = results["kills"]
    assert all(row["equal"] for row in kills)
    assert (
        f"{results['equal']} of {len(kills)} have the last" in (folder / "README.md").read_text()
    )
    assert f"[{results['equal']} of {len(kills)} kills]" in (ROOT / "README.md").read_text()
    assert sum(row["writing"] for row in kills) == 10
