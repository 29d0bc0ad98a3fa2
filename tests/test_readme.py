"""The README's Python blocks run, in order, and its figures are those of the results."""

import json
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("default")
def test_python_blocks_run_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["metrics"][-1]["elbo"] < 0


def test_the_programs_shown_are_those_of_the_package():
    (shown,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    source = (ROOT / "pyro_vae" / "vae.py").read_text()
    programs = shown.strip().split("\n\n\n")
    assert len(programs) == 2
    assert all(textwrap.indent(program, "    ") in source for program in programs)


@pytest.mark.parametrize("page", ["README.md", "examples/benchmarks/README.md"])
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
