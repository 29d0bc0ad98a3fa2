"""Every example runs as a user runs it, in its own process, and does what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


OWN = {
    "prior": "new_prior.Gumbel",
    "likelihood": "new_likelihood.Logistic",
    "posterior": "new_posterior.Laplace",
    "objective": "new_objective.Capacity",
}


def test_parts_of_ones_own_keep_the_contract_and_train(tmp_path):
    output = run("new_parts.py", tmp_path)
    elbo, kl = map(float, re.search(r"ELBO (\S+) and KL (\S+) nats", output).groups())
    assert elbo > 15
    assert kl == pytest.approx(15, abs=2)  # the capacity, met on average over a batch


@pytest.mark.parametrize("path", OWN.values())
def test_a_part_of_ones_own_is_one_short_file(path):
    file = (EXAMPLES / path.split(".")[0]).with_suffix(".py")
    assert len(file.read_text().splitlines()) <= 15


@pytest.mark.parametrize("kind", OWN)
def test_it_trains_from_the_command_line_too(kind, tmp_path):
    command = [sys.executable, "-m", "pyro_vae", "train", f"--{kind}", OWN[kind], "--epochs", "2"]
    command += ["--latent", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert OWN[kind] in (tmp_path / "run" / "config.yaml").read_text()


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


def test_the_comparisons_are_paired(data_dir, tmp_path):
    options = ["--data-dir", str(data_dir), "--rows", "200", "--epochs", "1", "--seeds", "0", "1"]
    options += ["--variants", "VampPrior", "--out", str(tmp_path)]
    first = run("benchmarks/comparisons.py", tmp_path, *options)
    assert len(json.loads((tmp_path / "comparisons.json").read_text())) == 4
    again = run("benchmarks/comparisons.py", tmp_path, *options)  # from the file
    assert again.splitlines() == first.splitlines()[4:]
    row = next(line for line in again.splitlines() if line.startswith("| VampPrior | 2 |"))
    assert re.search(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", row)


def test_signal_and_noise_are_measured(tmp_path):
    options = ["--particles", "1", "2", "--draws", "10", "--epochs", "1", "--out", str(tmp_path)]
    run("benchmarks/signal_to_noise.py", tmp_path, *options)
    assert (tmp_path / "signal_to_noise.png").exists()
    rows = json.loads((tmp_path / "signal_to_noise.json").read_text())
    assert rows


def test_the_evaluation_benchmark_runs_on_a_few_images(data_dir, tmp_path):
    options = ["--data-dir", str(data_dir), "--rows", "200", "--epochs", "1", "--count", "2"]
    options += ["--rounds", "1", "--parts", "estimators", "full", "--out", str(tmp_path)]
    run("benchmarks/evaluation.py", tmp_path, *options)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["full"]["images"] == 200
    # Of a decoder that has hardly been trained: lower bounds are below, in the mean.
    first = results["estimators"]["estimators"][0]
    assert first["estimator"] == "L_5000"
    assert first["apart"] < 0.1
