"""Every example runs as a user runs it, in its own process, and does what it says."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_vae import data
from pyro_vae.evaluation import quadrature

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
    results = json.loads((tmp_path / "comparisons.json").read_text())
    assert [each["rows"] for each in results] == [200] * 4
    assert re.search(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", row)


def test_comparisons_of_fewer_images_are_kept_apart(data_dir, tmp_path):
    full = {"variant": "standard", "seed": 0, "epochs": 1, "L_200": -50.0, "test_elbo": -60.0}
    (tmp_path / "comparisons.json").write_text(json.dumps([full]))
    options = [
        "--data-dir",
        str(data_dir),
        "--epochs",
        "1",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    options += ["--variants", "standard"]
    for rows, count in (([], 1), (["--rows", "100"], 2), (["--rows", "100"], 2), ([], 2)):
        printed = run("benchmarks/comparisons.py", tmp_path, *options, *rows)
        assert ("| standard | 1 | -50.00 | -60.00 |" in printed) == (not rows)
        assert len(json.loads((tmp_path / "comparisons.json").read_text())) == count


def test_signal_and_noise_are_measured(tmp_path):
    options = ["--particles", "1", "2", "--draws", "10", "--epochs", "1", "--out", str(tmp_path)]
    run("benchmarks/signal_to_noise.py", tmp_path, *options)
    assert (tmp_path / "signal_to_noise.png").exists()
    rows = json.loads((tmp_path / "signal_to_noise.json").read_text())
    assert rows


def test_a_killed_run_is_the_run_that_was_not(tmp_path):
    options = ["--kills", "1", "--epochs", "20", "--mode", "eager", "--out", str(tmp_path)]
    output = run("benchmarks/kill.py", tmp_path, *options)
    assert output.splitlines()[-1].startswith("1 of 1 equal")
    results = json.loads((tmp_path / "kill.json").read_text())
    assert results["steps"] == 20 * 12
    assert all(0 < row["step"] < 240 for row in results["kills"])


def test_two_processes_are_measured_against_one(tmp_path):
    options = ["--data", "digits", "--hidden", "16", "--batch-size", "64", "--mode", "eager"]
    options += ["--epochs", "1", "--steps", "3", "--rounds", "1", "--kills", "1"]
    output = run("benchmarks/processes.py", tmp_path, *options, "--out", str(tmp_path))
    assert "two that train together" in output
    results = json.loads((tmp_path / "processes.json").read_text())
    assert [row["step"] for row in results["numbers"]] == [1, 2, 3]
    # Sums of 64 rows in float32, in whatever order, and steps of 1e-3.
    assert all(row["loss"] < 1e-5 and row["weights"] < 1e-4 for row in results["numbers"])
    assert results["exchange"]["bytes"] > 0


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the benchmarks as a place to import from."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))


def test_the_speed_benchmark_runs_for_a_moment(tmp_path):
    trained = ["pyro_vae", "Pyro", "pytorch/examples"]
    options = ["--small", "--sizes", "784-400-20", "--out", str(tmp_path)]
    output = run("benchmarks/speed.py", tmp_path, *options, "--contenders", "floor", *trained)
    rows = json.loads((tmp_path / "speed.json").read_text())["sizes"]["784-400-20"]
    assert list(rows) == ["floor", *trained]
    for name in trained:
        assert len(rows[name]["epochs"]) == 1
        assert len(rows[name]["to_steps"]) == (name == "pyro_vae")
        # Random images are coins: nobody codes them in less than log 2 a pixel.
        assert 784 * math.log(2) - 1 < rows[name]["loss"] < 784 * math.log(2) + 20
    assert (tmp_path / "speed.png").exists()
    assert run("benchmarks/speed.py", tmp_path, "--report", "--out", str(tmp_path)) == output


# Layers of 31,360 weights and more have three products, or two where the input is data: 784-400,
# 400-784, with two layers 400-100 too. Of the convolutions' 90,317 multiplications and more there
# are 3136-256, 256-3136, and two convolutions, whose gradients are one call.
@pytest.mark.parametrize(
    ("size", "products"),
    [("784-400-20", 5), ("784-500-20", 5), ("IWAE", 5), ("two layers", 8), ("convolutions", 10)],
)
def test_the_floor_is_the_large_products(size, products, benchmarks):
    contenders = importlib.import_module("contenders")
    floor = importlib.import_module("contenders.floor")
    assert len(floor.Floor(contenders.SIZES[size], ".", "cpu").products) == products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_floor_by_onednn_has_the_same_products(benchmarks, monkeypatch):
    floor = importlib.import_module("contenders.floor")
    for a, b in (
        (torch.randn(20, 30), torch.randn(30, 40)),
        (torch.randn(30, 20).T, torch.randn(40, 30).T),
    ):
        assert torch.allclose(floor.by_onednn(a, b, None), a @ b, atol=1e-5)
    size = importlib.import_module("contenders").SIZES["784-400-20"]
    seen = []
    monkeypatch.setattr(floor, "by_onednn", lambda a, b, out: seen.append((a @ b).shape))
    for product in floor.Floor(size, ".", "cpu", onednn=True).products:
        product()
    large = [(128, 400), (128, 784), (400, 784), (784, 400)]
    assert sorted(set(seen)) == large
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["784-400-20", "convolutions", "IWAE", "two layers"])
def test_what_is_written_by_hand_is_the_same_bound(name, benchmarks):
    size = importlib.import_module("contenders").SIZES[name]
    programs = importlib.import_module("contenders.programs")
    by_hand = importlib.import_module("contenders.with_torch")
    families = {"IWAE": by_hand.IWAE, "two layers": by_hand.TwoLayers}
    model, pair = families.get(name, by_hand.GaussianVAE)(size), programs.pair(size)
    parts = {"decoder": pair.likelihood, "encoder": getattr(pair, "posterior", None)}
    if size.above:
        up, encoder = pair.posteriors
        parts |= {"encoder": encoder, "up": up, "down": pair.priors[1]}
    with torch.no_grad():
        for half, part in parts.items():
            theirs = list(getattr(model, half).parameters())
            for ours, weight in zip(part.parameters(), theirs, strict=True):
                weight.copy_(ours)
        if not size.above and size.particles == 1:
            for weight in list(model.encoder.parameters())[-2:]:
                weight[size.latent :] *= 2  # log s^2 there, log s here
        x = (torch.rand(20, 1, 28, 28) > 0.5).float()
        bound = programs.objective(size)
        if families.get(name) is None:
            bound = TraceMeanField_ELBO(max_plate_nesting=1)  # its KL is in closed form, too
        torch.manual_seed(1)
        ours = bound.loss(pair.model, pair.guide, x)
        torch.manual_seed(1)  # both draw their noise in one order
        assert model(x).item() == pytest.approx(ours, rel=1e-5)


def test_the_scale_benchmark_runs_for_a_moment(tmp_path):
    options = ["--sizes", "250", "--images", "500", "--rounds", "1", "--threads", "1"]
    options += ["--mode", "eager", "--scratch", str(tmp_path), "--out", str(tmp_path / "results")]
    output = run("benchmarks/scale.py", tmp_path, *options)
    assert output.count("| 250 | 0.0002 | ") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # the images are gone
    for row in json.loads((tmp_path / "results" / "scale.json").read_text())["rows"]:
        assert [each["images"] for each in row["rounds"]] == [500]


def test_the_report_reckons_ratios_and_lines(benchmarks):
    speed = importlib.import_module("speed")

    def row(step, epoch, peak, start):  # the machine is twice as fast, or slow, in some rounds
        return {
            "batch": 100, "rows": 30_000, "steps": [step, step / 2, 2 * step],
            "epochs": [epoch], "loss": 100.0, "memory": {"host": peak * 2**20, "device": None},
            "start": {"cold": {"stepped": start}, "warm": {"stepped": start}},
        }  # fmt: skip

    rows = {"floor": row(2, 1, 1, 1), "pyro_vae": row(3, 1, 100, 9), "pythae": row(9, 4, 50, 1)}
    rows["floor"]["epochs"] = []
    blocks = iter([1.0, 2.0])  # of 500 steps, around an epoch of one second
    asked = []

    def process(request, *arguments):
        asked.append((request, *arguments))
        return 1.0 if request == "epoch" else next(blocks)

    seconds, to_steps = speed.beside_steps(process, {**rows["pyro_vae"], "count": 500})
    assert asked == [("timed", 500), ("epoch",), ("timed", 500)]
    assert seconds == 1.0
    rows["pyro_vae"]["to_steps"] = [to_steps]
    results = {"sizes": {"784-400-20": rows}}
    kept = dict(
        line.strip("| ").split(" | ", 1) for line in speed.promises(results).splitlines()[2:]
    )
    # 300 steps of 3 ms are .9 s.
    assert kept == {
        "step, to the floor": "1.50 | 1.4 | NO",
        "epoch, to pythae": "0.25 | 0.6 | yes",
        "epoch, to our own bare steps": "1.11 | 1.05 | NO",
        "start-up, cold": "9.00 s | 15 s | yes",
        "start-up, warm": "9.00 s | 5 s | NO",
    }
    pyro = {"784-400-20": {**rows, "Pyro": row(20, 8, 50, 1)}}
    assert speed.promises({"sizes": pyro, "device": "cuda"}).splitlines()[2:] == [
        "| step, to `pyro.infer.SVI` | 0.15 | 0.1 | NO |"
    ]
    assert "| pythae | 9.00 | 11,111 | 4.50 | 0.33 | 8.0 | 0.25 |" in speed.table(
        "784-400-20", rows
    )
    assert speed.line([1, 2, 3], [5.0, 7.0, 9.0]) == pytest.approx((2, 3, 1))


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


def rows_of(script, folder, *options):
    """The rows that a script of the paper's writes, and what it prints; a rerun adds nothing."""
    folder.mkdir(exist_ok=True)
    options = ["--small", "--out", str(folder), *options]
    first = run(f"paper/{script}.py", folder, *options)
    (file,) = [each for each in folder.glob("*.json") if "quadrature" not in each.name]
    written = file.read_text()
    again = run(f"paper/{script}.py", folder, *options)
    assert file.read_text() == written
    assert again == first
    rows = json.loads(written)
    assert all(math.isfinite(row["value_nats"]) for row in rows)
    return rows, first


def curves_of(rows):
    """Values by method and split, in the order of training samples."""
    found = {}
    for row in rows:
        found.setdefault((row["method"], row["split"]), []).append(row["value_nats"])
    return found


def test_figure_2_has_both_methods_in_the_axes_of_the_paper(tmp_path):
    options = ["--data", "MNIST", "--latents", "3", "--binarisation", "static"]
    rows, printed = rows_of("figure2_lower_bound", tmp_path, *options)
    header = (EXAMPLES / "paper" / "published.csv").read_text().splitlines()[0].split(",")
    assert all({*header, "seed", "binarisation"} <= row.keys() for row in rows)
    curves = curves_of(rows)
    assert set(curves) == {(m, s) for m in ("AEVB", "wake-sleep") for s in ("train", "test")}
    for values in curves.values():  # 12 passes over 1,617 digits, which begin as coins
        assert -0.6 * 64 * math.log(2) < values[-1] < -10
        assert values[-1] > values[0]
    # As in the paper; half a nat is several standard errors of 180 test images' differences.
    assert curves["AEVB", "test"][-1] > curves["wake-sleep", "test"][-1] - 0.5
    assert (tmp_path / "figure2_MNIST.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("| MNIST Nz=3 |") == 2


@pytest.mark.parametrize("figure", ["2", "3"])
def test_aevb_comes_where_it_is_published(figure, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    reporting = importlib.import_module("reporting")
    how = {"figure": figure, "primary": ["static", "none, random split"]}
    rows = json.loads((EXAMPLES / "paper" / "results" / f"figure{figure}.json").read_text())
    rows = [row for row in rows if row["seed"] == 0 and row.get("given") is None]
    turned = [{**row, "value_nats": -row["value_nats"]} for row in rows]
    found, contrary = (
        [each for each in reporting.order(some, **how) if "AEVB" in each["order"]]
        for some in (rows, turned)
    )
    points = {"2": 18 * [6], "3": [6, 4, 6, 2, 5, 3]}[figure]
    assert [each["points"] for each in found] == points
    missed = [each for each in found if each["agree"] < each["points"]]
    if figure == "3":  # as the page says: at its end AEVB has come down to wake-sleep
        (level,) = missed
        assert (level["panel"], level["split"], level["agree"]) == ("Ntrain=1000", "test", 5)
        assert level["order"] == ("AEVB", "wake-sleep")
        assert -0.2 < level["lead"] < 0
    else:
        assert not missed
    assert all(each["lead"] > 0 for each in found if each not in missed)
    assert sum(each["agree"] for each in contrary) == len(missed)


def test_monte_carlo_em_comes_where_it_is_published_with_the_step_size_that_the_page_says(
    monkeypatch,
):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    reporting = importlib.import_module("reporting")
    rows = json.loads((EXAMPLES / "paper" / "results" / "figure3.json").read_text())
    rows = [row for row in rows if row["panel"] == "Ntrain=1000" and row["seed"] == 0]
    agreed = {}
    for step in (None, 0.02):
        curves = [
            row for row in rows if row.get("given") == (step if row["method"] == "MCEM" else None)
        ]
        found = reporting.order(curves, figure="3", primary=["static"])
        agreed[step] = {
            (each["split"], other): (each["agree"], each["points"])
            for each in found
            for other in ("AEVB", "wake-sleep")
            if set(each["order"]) == {"MCEM", other}
        }
    expected = {("train", "AEVB"): 4, ("train", "wake-sleep"): 3}
    expected |= {("test", "AEVB"): 2, ("test", "wake-sleep"): 3}
    assert agreed[0.02] == {key: (count, count) for key, count in expected.items()}
    assert agreed[None]["test", "wake-sleep"] == (2, 3)  # as the page says, behind at 2e6


def test_a_panel_shows_the_curves_of_its_own_binarisation(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    reporting = importlib.import_module("reporting")
    script = importlib.import_module("figure2_lower_bound")
    about = {"panel": "FreyFace Nz=10", "method": "AEVB", "split": "test"}
    block = [
        {**about, "binarisation": "none, final block", "training_samples": n, "value_nats": -n}
        for n in (10**6, 10**7)
    ]
    random = [{**row, "binarisation": "none, random split", "value_nats": 7} for row in block]
    both = {"FreyFace Nz=10": [7, 7], "FreyFace Nz=10: none, final block": [-(10**6), -(10**7)]}
    for rows, shown in ((block + random, list(both)), (block, list(both)[1:])):
        every = reporting.draw(rows, script.PANELS, figure="2").axes
        axes = {each.get_title(): each for each in every if each.axison}
        assert list(axes) == shown
        for title, each in axes.items():
            assert [10**6, 10**7] in [list(line.get_xdata()) for line in each.lines]
            assert both[title] in [list(line.get_ydata()) for line in each.lines]
            low, high = each.get_ylim()
            assert all(low <= value <= high for value in both[title])


def test_other_curves_leave_the_page_and_its_pictures_alone(tmp_path, monkeypatch):
    shutil.copytree(EXAMPLES / "paper", tmp_path / "paper")
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    protocol = importlib.import_module("protocol")
    monkeypatch.setattr(protocol, "FOLDER", tmp_path / "paper")
    kept = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    names = ["figure2_lower_bound", "figure3_marginal_likelihood", "appendix_f_full_vb"]
    for name in names:
        for how in (["--seed", "9"], ["--step-size", "0.1"]):
            monkeypatch.setattr(sys, "argv", [name, "--report", "--threads", "1", *how])
            importlib.import_module(name).main()
    now = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    assert {each: now.pop(each) for each in kept} == kept
    # There is a curve of Figure 2 with that step size, and none with that seed.
    assert [each.name for each in now] == ["figure2_MNIST-given-0.1.png"]


def test_two_scripts_do_not_lose_each_others_curves(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    protocol = importlib.import_module("protocol")
    one, other = (protocol.Results(tmp_path / "rows.json") for _ in range(2))
    one.add([{"method": "AEVB", "budget": 1}])
    other.add([{"method": "wake-sleep", "budget": 1}])
    assert [row["method"] for row in other.read()] == ["AEVB", "wake-sleep"]


@pytest.mark.parametrize(
    ("script", "option", "words"),
    [
        ("figure2_lower_bound", "--step-size=0", "--step-size must be positive and finite, not 0"),
        ("figure2_lower_bound", "--step-size=nan", "--step-size must be positive and finite, not"),
        ("figure2_lower_bound", "--samples=-5", "--samples must be positive and finite, not -5"),
        ("figure2_lower_bound", "--threads=0", "--threads must be positive and finite, not 0"),
        ("figure2_lower_bound", "--latents=7", "the figure has no such panel; leave out --data, "),
        ("figure3_marginal_likelihood", "--rows=50", "--rows must be a minibatch of 100 or more"),
        ("iwae_table", "--stages=0", "--stages must be positive and finite, not 0"),
        ("vampprior_table", "--epochs=0", "--epochs must be positive and finite, not 0"),
    ],
)
def test_what_no_script_of_the_paper_can_do_is_refused(
    script, option, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["script", "--small", "--out", str(out), option])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(out.rglob("*.*"))


def test_results_of_other_images_are_no_results(tmp_path, monkeypatch):
    """By which tables would pair models that were scored on different images."""
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    script = importlib.import_module("iwae_table")
    monkeypatch.setattr(script, "train", lambda *given: [2])
    options = ["--small", "--out", str(tmp_path), "--seeds", "0", "--k", "1"]
    for images, count in (([], 1), (["--images", "5"], 2), (["--images", "5"], 2), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["script", *options, *images])
        script.main()
        rows = json.loads((tmp_path / "iwae_table.json").read_text())
        assert len({row["images"] for row in rows}) == len(rows) == count


def test_a_larger_budget_runs_a_curve_anew_and_a_smaller_one_does_not(tmp_path):
    options = ["--data", "FreyFace", "--latents", "2", "--methods", "AEVB"]
    for budget, last in ((1000, 1000), (2000, 2000), (1500, 2000)):
        run(
            "paper/figure2_lower_bound.py", tmp_path, "--small", "--out", str(tmp_path),
            "--samples", str(budget), *options,
        )  # fmt: skip
        rows = json.loads((tmp_path / "figure2.json").read_text())
        assert max(row["training_samples"] for row in rows) == last
        assert {row["budget"] for row in rows} == {last}


def test_a_step_size_that_is_given_has_a_curve_of_its_own(tmp_path):
    options = ["--small", "--out", str(tmp_path), "--samples", "1000"]
    options += ["--data", "FreyFace", "--latents", "2", "--methods", "AEVB"]
    run("paper/figure2_lower_bound.py", tmp_path, *options)
    printed = run("paper/figure2_lower_bound.py", tmp_path, *options, "--step-size", "0.03")
    rows = json.loads((tmp_path / "figure2.json").read_text())
    for row in rows:
        values = {float(size): nats for size, nats in row["tried"].items()}
        assert row["given"] or row["step_size"] == max(values, key=values.get)
    found = {(row["given"], row["step_size"]) for row in rows}
    assert len(found) == 2
    assert len(list(tmp_path.glob("figure2_FreyFace*.png"))) == 2  # neither in place of the other
    assert (0.03, 0.03) in found
    assert next(step for given, step in found if given is None) in {0.01, 0.02, 0.1}
    assert "| 0.03 (given) |" in printed


def test_figure_3_learns_by_monte_carlo_em_and_agrees_with_quadrature(tmp_path):
    options = ["--rows", "1000", "--methods", "MCEM"]
    rows, printed = rows_of("figure3_marginal_likelihood", tmp_path, *options)
    curves = curves_of(rows)
    # Better than coins by far, of whose pixels each costs log 2.
    assert curves["MCEM", "train"][-1] > -0.7 * 64 * math.log(2)
    assert len(list((tmp_path / "weights").iterdir())) == 1
    (check,) = json.loads((tmp_path / "figure3_quadrature.json").read_text())
    # Two images and 3 errors: a false alarm has a probability below 1e-2, and the seed is fixed.
    assert check["within_3_errors"] == 1
    assert "| Ntrain=1000, MCEM |" in printed


@pytest.mark.parametrize("last", [1000, 3000])
@pytest.mark.parametrize("method", ["AEVB", "wake-sleep", "MCEM"])
def test_a_curve_that_is_stopped_goes_on_as_if_it_had_not_been(
    method, last, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    protocol = importlib.import_module("protocol")
    script = importlib.import_module("figure3_marginal_likelihood")
    monkeypatch.setitem(protocol.OBJECTIVES, "MCEM", lambda: None)
    run = script.monte_carlo_em if method == "MCEM" else protocol.train

    def curve(name, run):
        words = ["script", "--small", "--samples", "3000", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", words)
        options = protocol.ready(protocol.arguments("A trial.", 3000))
        data = protocol.load("static", options)
        found = []
        protocol.curve(
            lambda: script.make(method, data.shape, 0.01), method, {"train": data.train}, options,
            about={"figure": "", "panel": "trial", "binarisation": "static"},
            points=[500, 1000, 2000], run=run, keep=lambda *given: found.extend(given),
        )  # fmt: skip
        rows, pair = found
        assert not list(options.out.glob("unfinished/*"))
        return [row.pop("seconds") for row in rows], rows, pair.state_dict()

    def stopped(*args, **kwargs):
        for seen, state in run(*args, **kwargs):
            yield seen, state
            if seen == last and kwargs["points"]:
                raise KeyboardInterrupt

    _, rows, weights = curve("whole", run)
    with pytest.raises(KeyboardInterrupt):
        curve("parts", stopped)
    times, again, others = curve("parts", run)
    assert again == rows
    assert [row["training_samples"] for row in rows] == [500, 1000, 2000, 3000]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert times == sorted(times)


def test_figures_4_and_5_are_drawn_from_weights_that_are_kept(tmp_path):
    options = ["--small", "--samples", "1000", "--out", str(tmp_path)]
    run("paper/figure5_samples.py", tmp_path, *options)
    kept = sorted((tmp_path / "weights").iterdir())
    times = [each.stat().st_mtime_ns for each in kept]
    assert len(kept) == len(list(tmp_path.glob("figure5_*.png"))) == 4
    run("paper/figure4_manifold.py", tmp_path, *options)
    assert len(list(tmp_path.glob("figure4_*.png"))) == 2
    assert "![MNIST Nz=2](results/figure4_MNIST-seed-3.png)" in run(
        "paper/figure4_manifold.py", tmp_path, *options, "--seed", "3"
    )
    assert [each.stat().st_mtime_ns for each in kept] == times  # the one with 2 latents, too


def test_a_trial_leaves_the_results_alone(tmp_path):
    kept = {each: each.read_bytes() for each in EXAMPLES.glob("paper/results/*.json")}
    page = (EXAMPLES / "paper" / "README.md").read_text()
    options = ["--small", "--samples", "500", "--data", "FreyFace", "--latents", "2"]
    printed = run("paper/figure2_lower_bound.py", tmp_path, *options, "--methods", "AEVB")
    assert printed.count("| FreyFace Nz=2 |") == 1
    assert {each: each.read_bytes() for each in EXAMPLES.glob("paper/results/*.json")} == kept
    assert (EXAMPLES / "paper" / "README.md").read_text() == page


def test_appendix_f_pays_for_the_weights(tmp_path):
    curves = curves_of(rows_of("appendix_f_full_vb", tmp_path)[0])
    local, whole = (curves["weights inferred", s] for s in ("train", "train, with weights"))
    assert all(one > other for one, other in zip(local, whole, strict=True))
    assert local[-1] > local[0] + 1
    assert whole[-1] > whole[0] + 2
    assert len(curves["weights inferred", "test, log p(x)"]) == 1  # at the end


def test_appendix_f_gives_the_likelihood_at_its_weights(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    script = importlib.import_module("appendix_f_full_vb")
    pyro.set_rng_seed(0)
    pair = script.Inferred((1, 8, 8), 1000, 0.1)
    for each in pair.log_scale:
        torch.nn.init.constant_(each, -20.0)  # every draw is the same decoder
    images = data.load("digits", view=data.threshold).test[:5]
    truth = quadrature(pair.drawn(), images.batch(), tolerance=1e-3).log_likelihood.mean()
    # The tolerance is five times the estimate's standard deviation over seeds, 0.06 nats.
    for each in (pair, pair.drawn()):
        assert script.marginal(each, images) == pytest.approx(float(truth), abs=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("figure2_lower_bound", ["--data", "FreyFace", "--latents", "5"]),
        ("figure3_marginal_likelihood", ["--rows", "1000"]),
        ("appendix_f_full_vb", []),
        ("iwae_table", ["--seeds", "0", "--k", "5"]),
        ("vampprior_table", ["--seeds", "0"]),
    ],
)
def test_a_script_of_the_paper_runs_on_a_gpu(script, options, tmp_path):
    rows, _ = rows_of(script, tmp_path, "--device", "cuda", *options)
    assert {row["device"] for row in rows} == {"cuda"}


def test_the_tables_after_the_paper_are_paired(tmp_path):
    options = ["--seeds", "0", "1"]
    rows, printed = rows_of("iwae_table", tmp_path / "iwae", *options, "--k", "1", "5")
    assert {(row["k"], row["seed"]) for row in rows} == {(k, s) for k in (1, 5) for s in (0, 1)}
    assert all(0 < row["active_units"] <= 50 for row in rows)
    assert re.search(r"\| 5 \| 4 \| 2 \|.*\([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", printed)
    rows, printed = rows_of("vampprior_table", tmp_path / "vamp", *options)
    assert len(rows) == 4
    assert re.search(r"\| VampPrior \| 2 \| 2 \|.*\([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", printed)
