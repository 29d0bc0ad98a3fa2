"""Every example runs as a user runs it, in its own process, and does what it says."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae import MLP
from pyro_vae.testing import check_likelihood, check_prior

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(script, folder, *options):
    """The output of a script run in `folder`."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        cwd=folder, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["quickstart.py", "conditional.py"])
def test_plain_pyro_trains_and_draws(script, tmp_path):
    output = run(script, tmp_path)
    bounds = [float(value) for value in re.findall(r"epoch +\d+: ELBO (\S+)", output)]
    assert len(bounds) == 10
    assert bounds[-1] > bounds[0] + 2
    assert (tmp_path / output.splitlines()[-1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("script", "least"), [("new_prior.py", -28), ("new_likelihood.py", 30)])
def test_a_part_of_ones_own_trains(script, least, tmp_path):
    assert float(re.search(r"ELBO (\S+)", run(script, tmp_path))[1]) > least


def test_parts_of_ones_own_keep_the_contract(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    check_prior(importlib.import_module("new_prior").Ring(2, components=5))
    decoder = MLP(2, [8], (1, 2, 2))
    check_likelihood(
        importlib.import_module("new_likelihood").Logistic(decoder), torch.randn(3, 2)
    )


@pytest.mark.parametrize("option", ["prior new_prior.Ring", "likelihood new_likelihood.Logistic"])
def test_it_trains_from_the_command_line_too(option, tmp_path):
    kind, path = option.split()
    command = [sys.executable, "-m", "pyro_vae", "train", f"--{kind}", path, "--epochs", "2"]
    command += ["--latent", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert path.split(".")[1] in done.stdout


def test_the_handlers_agree_on_the_posterior(tmp_path):
    output = run("pyro_handlers.py", tmp_path)
    found = {
        line.split()[0]: [float(value) for value in re.findall(r"-?\d+\.\d+", line)]
        for line in output.splitlines()
        if line.startswith(("NUTS", "amortised"))
    }
    # Two estimates of one posterior, close but not equal: q is a diagonal Gaussian.
    for exact, amortised in zip(found["NUTS"], found["amortised"], strict=True):
        assert abs(exact - amortised) < 1.0
    assert "z -> x" in output


def test_the_reference_benchmark_runs_on_a_few_images(data_dir, tmp_path):
    options = [
        "--data-dir",
        str(data_dir),
        "--rows",
        "1000",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    output = run("benchmarks/reference_values.py", tmp_path, *options)
    assert output.count("| Pyro tutorial |") == 3
    assert (tmp_path / "reference_values.json").exists()


def test_the_frey_face_benchmark_runs_for_a_moment(data_dir, tmp_path):
    options = ["--data-dir", str(data_dir), "--samples", "5000", "--out", str(tmp_path)]
    assert run("benchmarks/frey_face.py", tmp_path, *options).count("| never |") == 3
    assert len(list(tmp_path.glob("*.png"))) == 3
