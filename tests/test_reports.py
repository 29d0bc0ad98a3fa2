"""The commands evaluate and compare: what they print, keep and refuse."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from pyro_vae import checkpoints, data, load, reports
from pyro_vae.cli import main
from pyro_vae.evaluation import log_likelihood

TRAIN = "train --epochs 1 --hidden 16 --latent 2"
pytestmark = pytest.mark.filterwarnings("ignore:the importance weights")


def call(line):
    return main(line.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two priors, two seeds each, all evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        for prior in ("Normal", "Laplace"):
            run = folder / f"{prior}-{seed}"
            assert call(f"{TRAIN} --prior {prior} --seed {seed} --out {run}") == 0
            assert call(f"evaluate {run} --samples 50") == 0
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    """A copy of a run that a test may change."""
    return shutil.copytree(runs / "Normal-0", tmp_path / "run")


def arrays(run):
    with np.load(run / "evaluation-test.npz") as file:
        return {name: file[name] for name in file.files}


def test_the_table_the_json_and_the_arrays_agree(copy, capsys):
    assert call(f"evaluate {copy} --samples 50 --json") == 0
    found = json.loads(capsys.readouterr().out)
    kept = arrays(copy)
    assert found["L_50"] == pytest.approx(kept["log_likelihood"].mean())
    assert found["elbo"] == pytest.approx((kept["reconstruction"] - kept["kl"]).mean())
    assert found["L_50_standard_error"] == pytest.approx(stats.sem(kept["log_likelihood"]))
    assert found["bits_per_dimension"] == pytest.approx(-found["L_50"] / 64 / np.log(2))
    assert found["bits"] == "1 bit"
    assert kept["ranks"].shape == (500, 3)
    assert call(f"evaluate {copy} --samples 50") == 0
    table = capsys.readouterr().out
    assert f"{found['L_50']:.2f}  ± {found['L_50_standard_error']:.2f} over data" in table
    assert found["verdict"] in table
    for name in ("k_hat", "kl", "calibration", "latents"):
        picture = copy / f"evaluation-test-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert str(picture) in table


@pytest.mark.parametrize(
    ("k", "reliable", "words"),
    [
        (
            0.3,
            True,
            "by the draws of z\n  k-hat, median                0.10  too high for 0.0% of",
        ),
        (0.9, False, "unreliable where k-hat is high\n"),
        (
            np.nan,
            None,
            "too few for a k-hat\n  k-hat, median                none  too few draws\n",
        ),
    ],
)
def test_a_program_can_tell_what_the_table_says_of_trust(
    k, reliable, words, copy, monkeypatch, capsys
):
    def estimated(*arguments, **options):
        found = log_likelihood(*arguments, **options)
        found.pareto_k[:] = 0.1
        found.pareto_k[0] = k
        return found

    monkeypatch.setattr(reports, "log_likelihood", estimated)
    assert call(f"evaluate {copy} --samples 40 --json") == 0
    assert json.loads(capsys.readouterr().out)["reliable"] is reliable
    assert call(f"evaluate {copy} --samples 40") == 0
    assert words in capsys.readouterr().out
    assert call(f"evaluate {copy} --samples 0 --json") == 0
    assert "reliable" not in json.loads(capsys.readouterr().out)


def test_the_estimates_are_those_of_the_vae_that_load_gives(copy):
    part = data.load("digits", view=data.dynamic).test
    batch = next(part.batches(1000, torch.Generator().manual_seed(0)))
    estimate = log_likelihood(load(copy), batch, samples=2000)
    apart = np.abs(arrays(copy)["log_likelihood"] - estimate.log_likelihood.numpy())
    error = np.hypot(arrays(copy)["monte_carlo_error"], estimate.monte_carlo_error.numpy())
    assert np.median(apart / error) < 2


def test_a_stopped_estimate_goes_on_and_ends_the_same(copy, monkeypatch, capsys):
    monkeypatch.setattr(reports, "_BLOCK", 50)
    stop = 0
    true, counts = reports.log_likelihood, []

    def stopping(vae, rows, **options):
        counts.append(len(rows[0]))
        if len(counts) == stop:
            raise KeyboardInterrupt
        return true(vae, rows, **options)

    monkeypatch.setattr(reports, "log_likelihood", stopping)
    assert call(f"evaluate {copy} --samples 40") == 0
    expected = arrays(copy)["log_likelihood"]
    (copy / "evaluation-test.npz").unlink()
    counts.clear()
    stop = 3
    assert call(f"evaluate {copy} --samples 40") == 130
    stop = 0
    assert (copy / "evaluation-test.part.npz").exists()
    assert call(f"evaluate {copy} --samples 40") == 0
    assert counts == [50, 50, 50, 50, 30]
    assert np.array_equal(arrays(copy)["log_likelihood"], expected)
    assert not (copy / "evaluation-test.part.npz").exists()
    counts.clear()
    assert call(f"evaluate {copy} --samples 40") == 0  # all of it is there
    assert counts == []
    assert call(f"evaluate {copy} --samples 30") == 0  # another estimate
    assert counts == [50, 50, 50, 30]


def test_an_estimate_outlives_what_fails_after_it(copy, monkeypatch, capsys):
    def stopping(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reports.plots, "scatter", stopping)
        assert call(f"evaluate {copy} --samples 40") == 130
    monkeypatch.setattr(reports, "log_likelihood", None)  # what is kept is not estimated again
    assert call(f"evaluate {copy} --samples 40") == 0
    assert "L_40" in capsys.readouterr().out
    assert not (copy / "evaluation-test.part.npz").exists()


def test_a_stopped_estimate_goes_on_after_a_cheap_one(copy, monkeypatch):
    monkeypatch.setattr(reports, "_BLOCK", 100)
    true, counts = reports.log_likelihood, []

    def stopping(vae, rows, **options):
        counts.append(len(rows[0]))
        if len(counts) == 2:
            raise KeyboardInterrupt
        return true(vae, rows, **options)

    monkeypatch.setattr(reports, "log_likelihood", stopping)
    for samples, status in ((60, 130), (10, 0), (60, 0)):
        assert call(f"evaluate {copy} --samples {samples}") == status
    assert counts == [100, 80, 100, 80, 80]
    assert len(arrays(copy)["log_likelihood"]) == 180


def test_threads_are_those_asked_for_and_put_back(copy, monkeypatch):
    seen, true = [], reports.bound

    def watched(*arguments, **options):
        seen.append(torch.get_num_threads())
        return true(*arguments, **options)

    monkeypatch.setattr(reports, "bound", watched)
    before = torch.get_num_threads()
    for options in ("", "--threads 3", "--threads 1"):
        assert call(f"evaluate {copy} --samples 20 {options}") == 0
        assert torch.get_num_threads() == before
    assert seen == [before, 3, 1]


def test_new_weights_make_a_new_estimate(copy):
    before = arrays(copy)["log_likelihood"]
    vae = load(copy)
    with torch.no_grad():
        vae.likelihood.network.last.bias.add_(1)
    checkpoints.save(vae, copy / "best.safetensors")
    assert call(f"evaluate {copy} --samples 50") == 0
    assert arrays(copy)["log_likelihood"].mean() < before.mean() - 1


def test_differences_are_paired(runs, tmp_path, capsys):
    places = " ".join(
        str(runs / f"{prior}-{s}") for prior in ("Normal", "Laplace") for s in (0, 1)
    )
    assert call(f"compare {places} --by prior --pair seed --out {tmp_path}") == 0
    means = {
        path.name: arrays(path)["log_likelihood"].mean()
        for path in runs.iterdir()
        if path.is_dir()
    }
    gains = [means[f"Laplace-{s}"] - means[f"Normal-{s}"] for s in (0, 1)]
    low, high = stats.t.interval(0.95, 1, np.mean(gains), stats.sem(gains))
    first, second = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())
    assert first["pairs"] == second["pairs"] == "2"
    assert float(second["L_50 difference"]) == pytest.approx(np.mean(gains))
    assert float(second["L_50 low"]) == pytest.approx(low)
    assert float(second["L_50 high"]) == pytest.approx(high)
    shown = f"{np.mean(gains):+.2f} ({low:+.2f} to {high:+.2f})"
    assert shown in capsys.readouterr().out
    latex = (tmp_path / "comparison.tex").read_text()
    assert shown in latex
    assert latex.count("&") == 15
    assert r"L\_50" in latex


def test_rows_of_the_latex_table_begin_with_no_option(runs, copy, tmp_path):
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**settings, "hidden": [200]}))
    assert call(f"compare {runs / 'Normal-0'} {copy} --by hidden --out {tmp_path}") == 0
    rows = (tmp_path / "comparison.tex").read_text().splitlines()
    assert [row.partition(" & ")[0] for row in rows[2:6]] == [
        "{hidden}",
        r"\hline",
        "{[16]}",
        "{[200]}",
    ]
    assert r"{1\%\_\&\#\$} & 2 \\" in reports._latex([{"data": "1%_&#$", "pairs": 2}] * 2)


def test_one_pair_has_no_interval_and_says_so(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    places = {name: runs / name for name in ("Normal-0", "Laplace-0", "Normal-1", "Laplace-1")}
    assert call(f"compare {places['Normal-0']} {places['Laplace-0']}") == 0
    table = capsys.readouterr().out
    said = table.splitlines()[-1]
    assert said.startswith("no interval for Laplace, with one pair each: it takes two")
    assert said.endswith("train and evaluate with another seed too")
    assert " to " not in table
    assert call(f"compare {' '.join(map(str, places.values()))}") == 0
    assert "no interval" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # nothing is written that was not asked for


def test_runs_without_a_partner_are_named_and_left_out(runs, tmp_path, capsys):
    places = [runs / name for name in ("Normal-0", "Normal-1", "Laplace-1")]
    capsys.readouterr()
    assert call(f"compare {' '.join(map(str, places))} --out {tmp_path}") == 0
    said = f"without a partner of the same seed, and left out: {places[0]}\n"
    assert said in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    means = [arrays(place)["log_likelihood"].mean() for place in places[1:]]
    assert [row["pairs"] for row in rows] == ["1", "1"]
    assert [float(row["L_50"]) for row in rows] == pytest.approx(means)
    assert float(rows[1]["L_50 difference"]) == pytest.approx(means[1] - means[0])


def test_estimates_that_are_not_to_be_trusted_are_named(runs, copy, capsys):
    kept = arrays(copy)
    places = [runs / "Laplace-0", copy]
    for high, said in ((0, None), (9, f"{9 / 180:.1%}")):
        k_hat = np.where(np.arange(180) < high, 0.9, 0.1)
        np.savez(copy / "evaluation-test.npz", **{**kept, "pareto_k": k_hat})
        sound = arrays(places[0]) | {"pareto_k": np.zeros(180)}
        other = shutil.copytree(places[0], copy.parent / f"other-{high}")
        np.savez(other / "evaluation-test.npz", **sound)
        capsys.readouterr()
        assert call(f"compare {other} {copy}") == 0
        table = capsys.readouterr().out
        assert ("k-hat is high" in table) == bool(said)
        if said:
            assert f"k-hat is high for data of Laplace 0.0%, Normal {said} (of a run" in table


def test_an_evaluation_of_other_weights_is_not_compared(runs, copy, capsys):
    line = f"compare {runs / 'Laplace-0'} {copy}"
    assert call(line) == 0
    vae = load(copy)
    with torch.no_grad():
        vae.likelihood.network.last.bias.add_(1)
    checkpoints.save(vae, copy / "best.safetensors")
    assert "other weights than when it was evaluated: run `pyro-vae" in sentence(line, capsys)
    assert call(f"evaluate {copy} --samples 50 --weights last") == 0
    assert "evaluated with weights that are best and last; eval" in sentence(line, capsys)


def test_scores_in_other_units_are_not_compared(runs, copy, capsys):
    np.savez(copy / "evaluation-test.npz", **{**arrays(copy), "unit": np.array("nats, no bound")})
    said = sentence(f"compare {runs / 'Laplace-0'} {copy}", capsys)
    assert "were evaluated with another unit; evaluate them alike" in said


def test_how_long_and_by_how_many_runs_were_trained_is_compared(runs, copy, capsys):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2}) + "\n")
    config = copy / "config.yaml"
    config.write_text(config.read_text() + "# By 2 processes, of torchrun 1\n")
    assert call(f"compare {runs / 'Laplace-0'} {copy}") == 0
    assert "runs of a pair differ in epochs done, processes too" in capsys.readouterr().out


def test_a_cheap_estimate_does_not_take_the_place_of_a_dear_one(copy, monkeypatch, capsys):
    before = arrays(copy)["log_likelihood"]
    assert call(f"evaluate {copy} --samples 0 --json") == 0
    assert "log_likelihood" not in arrays(copy)
    capsys.readouterr()
    with np.load(copy / "evaluation-test-L_50.npz") as file:
        assert np.array_equal(file["log_likelihood"], before)
    assert call(f"evaluate {copy} --samples 60") == 0
    names = {path.name for path in copy.glob("*.npz")}
    assert names == {"evaluation-test.npz", "evaluation-test-L_50.npz"}
    assert call(f"evaluate {copy} --samples 20") == 0
    assert str(copy / "evaluation-test-L_60.npz") in capsys.readouterr().out
    monkeypatch.setattr(reports, "log_likelihood", None)  # what is kept is not estimated again
    assert call(f"evaluate {copy} --samples 60") == 0
    assert "L_60" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["--data {x}", "--weights last", "--seed 1"])
def test_another_evaluation_does_not_take_the_place_of_the_runs_own(
    other, copy, tmp_path, monkeypatch, capsys
):
    kept = {50: arrays(copy)["log_likelihood"]}
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 2, size=(60, 1, 8, 8)))
    other = other.format(x=tmp_path / "x.npy")
    if other == "--weights last":
        vae = load(copy)
        with torch.no_grad():
            vae.likelihood.network.last.bias.add_(1)
        checkpoints.save(vae, copy / "last.safetensors")
    for samples in (50, 10):
        assert call(f"evaluate {copy} --samples {samples} {other}") == 0
    names = {"evaluation-test.npz", "evaluation-test-L_50.npz", "evaluation-test-L_50-2.npz"}
    assert {path.name for path in copy.glob("*.npz")} == names
    monkeypatch.setattr(reports, "log_likelihood", None)  # what is kept is not estimated again
    kept[10] = arrays(copy)["log_likelihood"]
    for samples, options in ((50, ""), (10, other), (50, "")):
        assert call(f"evaluate {copy} --samples {samples} {options}") == 0
        assert np.array_equal(arrays(copy)["log_likelihood"], kept[samples])
    assert {path.name for path in copy.glob("*.npz")} == names | {"evaluation-test-L_10.npz"}


def test_a_run_is_not_evaluated_on_data_that_have_grown(tmp_path, capsys):
    """Of which it may have trained on any."""
    x = np.random.default_rng(0).random((60, 5))
    np.save(tmp_path / "x.npy", x[:50])
    options = f"--data {tmp_path / 'x.npy'} --batch-size 10 --likelihood Normal"
    assert call(f"{TRAIN} {options} --out {tmp_path / 'run'}") == 0
    np.save(tmp_path / "x.npy", x)
    said = sentence(f"evaluate {tmp_path / 'run'} --samples 10", capsys)
    assert "'x' has 48 training data and had 40 when" in said
    assert call(f"evaluate {tmp_path / 'run'} --samples 10 --data {tmp_path / 'x.npy'}") == 0


def test_the_help_says_what_no_samples_leave_out(copy, capsys):
    with pytest.raises(SystemExit):
        call("evaluate --help")
    said = "0 to leave it out, and without --json all but a line on the bound"
    assert said in " ".join(capsys.readouterr().out.split())
    (copy / "evaluation-test.npz").unlink()
    assert call(f"evaluate {copy} --samples 0") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("test: ELBO")
    assert not (copy / "evaluation-test.npz").exists()
    assert call(f"evaluate {copy} --samples 0 --json") == 0
    assert (copy / "evaluation-test.npz").exists()


@pytest.mark.filterwarnings("default:.* holds other values")
def test_data_that_have_changed_are_noticed(tmp_path, capsys):
    x = np.random.default_rng(0).random((60, 5))
    np.save(tmp_path / "x.npy", x)
    options = f"--data {tmp_path / 'x.npy'} --batch-size 10 --likelihood Normal"
    assert call(f"{TRAIN} {options} --out {tmp_path / 'run'}") == 0
    for changed, said in ((x, ""), (x[::-1], "'x' holds other values than when")):
        np.save(tmp_path / "x.npy", changed)
        capsys.readouterr()
        assert call(f"evaluate {tmp_path / 'run'} --samples 0") == 0
        assert said in (warned := capsys.readouterr().err)
        assert bool(said) == bool(warned)
    assert call(f"evaluate {tmp_path / 'run'} --samples 0 --data {tmp_path / 'x.npy'}") == 0
    assert not capsys.readouterr().err


def test_a_single_datum_is_refused_before_its_estimate(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((12, 5)))
    options = f"--data {tmp_path / 'x.npy'} --batch-size 4 --likelihood Normal"
    assert call(f"{TRAIN} {options} --out {tmp_path / 'run'}") == 0
    monkeypatch.setattr(reports, "log_likelihood", None)
    said = sentence(f"evaluate {tmp_path / 'run'} --samples 10", capsys)
    assert f"'{tmp_path / 'run'}' has a single test datum, which has no spread" in said


def test_parts_are_named_by_what_they_differ_in():
    def part(name, **options):
        return {"class_path": name, "init_args": options}

    one, many = (
        part("pyro_vae.importance.IWAE", particles=k, max_plate_nesting=1) for k in (5, 50)
    )
    elbo = part("pyro.infer.Trace_ELBO", num_particles=1)
    variants = {"one": one, "many": many, "elbo": elbo, "none": None}
    named = ["IWAE(particles=5)", "IWAE(particles=50)", "Trace_ELBO", "None"]
    assert list(reports._short(variants, "objective").values()) == named
    mine = part("mine.IWAE", particles=5)
    assert list(reports._short({"one": one, "mine": mine}, "objective").values()) == [
        "one",
        "mine",
    ]


def sentence(line, capsys):
    capsys.readouterr()
    assert call(line) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_compared_is_said(runs, copy, tmp_path, capsys):
    one, other = runs / "Normal-0", runs / "Laplace-1"
    assert "have no seed in common" in sentence(f"compare {one} {other}", capsys)
    said = sentence(f"compare {one} {copy} {other}", capsys)
    assert "cannot be paired: two have prior Normal" in said
    said = sentence(f"compare {one} {runs / 'Normal-1'}", capsys)
    assert "cannot be compared by prior: all have Normal" in said
    assert "has no setting 'hue'" in sentence(f"compare {one} --by hue", capsys)
    assert "no folder 'nowhere'" in sentence(f"compare {one} --out nowhere", capsys)
    assert "'compare' needs RUNS: the folders of runs" in sentence("compare", capsys)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**settings, "lr": 0.5}))
    assert call(f"evaluate {copy} --samples 20") == 0
    said = sentence(f"compare {one} {copy} --by lr", capsys)
    assert "another number of samples; evaluate them alike" in said
    np.save(tmp_path / "x.npy", np.eye(8)[np.random.default_rng(0).integers(8, size=(50, 1, 8))])
    assert call(f"evaluate {copy} --samples 50 --data {tmp_path / 'x.npy'}") == 0
    said = sentence(f"compare {one} {copy} --by lr", capsys)
    assert f"'{one}' and '{copy}' were evaluated with different data; evaluate them" in said
    (copy / "evaluation-test.npz").unlink()
    said = sentence(f"compare {one} {copy} --by lr", capsys)
    assert said.endswith("--split test` first")


def test_what_else_the_compared_runs_differ_in_is_said(runs, copy, capsys):
    line = f"compare {runs / 'Laplace-0'} {copy} --by prior"
    assert call(line) == 0
    assert "pair differ" not in capsys.readouterr().out
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    other = {**settings, "lr": 0.5, "epochs": 7, "out": "elsewhere", "threads": 1}
    (copy / "config.yaml").write_text(yaml.safe_dump(other))
    assert call(f"evaluate {copy} --samples 50") == 0
    capsys.readouterr()
    assert call(line) == 0
    said = "runs of a pair differ in epochs, lr too, so that it may not be prior alone"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "harm", [lambda raw: b"", lambda raw: raw[:-40], lambda raw: raw[:200] + b"?" + raw[201:]]
)
def test_a_damaged_evaluation_is_done_again(harm, copy):
    path = copy / "evaluation-test.npz"
    before = arrays(copy)["log_likelihood"]
    path.write_bytes(harm(path.read_bytes()))
    assert call(f"evaluate {copy} --samples 50") == 0
    assert np.array_equal(arrays(copy)["log_likelihood"], before)


def test_bad_runs_are_refused_in_a_sentence(copy, capsys):
    assert "0 to leave it out, not -1" in sentence(f"evaluate {copy} --samples -1", capsys)
    said = sentence(f"evaluate {copy} --threads 0", capsys)
    assert "a command takes at least 1 thread, not 0" in said
    np.save(copy / "wide.npy", np.zeros((50, 9, 9), np.float32))
    said = sentence(f"evaluate {copy} --data {copy / 'wide.npy'}", capsys)
    assert "was trained on data of shape (1, 8, 8)" in said
    (copy / "best.safetensors").unlink()
    assert "there are no weights at" in sentence(f"evaluate {copy}", capsys)


def test_dequantised_pixels_have_bits_as_an_upper_bound(tmp_path, capsys):
    run, place = tmp_path / "noisy", tmp_path / "bytes.npy"
    np.save(place, (255 * data.load("digits").train.x.numpy()).round().astype(np.uint8))
    options = f"--data {place} --likelihood Normal --binarisation dequantised"
    assert call(f"{TRAIN} {options} --out {run}") == 0
    capsys.readouterr()
    assert call(f"evaluate {run} --samples 20 --json") == 0
    found = json.loads(capsys.readouterr().out)
    bits = -(found["L_20"] / 64 + np.log(1 / 256)) / np.log(2)
    assert found["bits_per_dimension"] == pytest.approx(bits)
    assert found["bits"] == "upper bound, 8 bit"
    assert call(f"evaluate {run} --samples 20") == 0  # what was kept
    table = capsys.readouterr().out
    assert f"{bits:.2f}  upper bound, 8 bit" in table
    assert "total correlation" in table


def test_dequantised_values_of_fewer_levels_have_no_bits(tmp_path, capsys):
    run = tmp_path / "noisy"  # of the embedded digits, which have 17 levels
    options = "--likelihood Normal --binarisation dequantised"
    assert call(f"{TRAIN} {options} --out {run}") == 0
    capsys.readouterr()
    assert call(f"evaluate {run} --samples 20 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_dimension"] is None
    assert found["bits"] == "x is not stored as whole numbers up to 255"
    assert call(f"evaluate {run} --samples 20") == 0
    assert re.search(f"bits per dimension +none  {found['bits']}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("likelihood", "bits"), [("Poisson", "whole numbers"), ("DiscretizedLogistic", "8 bit")]
)
def test_bits_are_those_of_the_support_and_not_of_the_data(likelihood, bits, tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 2, size=(50, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    top = 1 if likelihood == "Poisson" else 255
    options = f"--data {tmp_path / 'x.npy'} --top {top} --batch-size 10 --likelihood {likelihood}"
    assert call(f"{TRAIN} {options} --out {tmp_path / 'run'}") == 0
    capsys.readouterr()
    assert call(f"evaluate {tmp_path / 'run'} --samples 10 --json") == 0
    assert json.loads(capsys.readouterr().out)["bits"] == bits


def test_grey_levels_are_labelled_and_have_no_calibration(tmp_path, capsys):
    run = tmp_path / "grey"
    options = "--likelihood.greyscale true --binarisation none"
    assert call(f"{TRAIN} --likelihood Bernoulli {options} --out {run}") == 0
    assert call(f"evaluate {run} --samples 20") == 0
    table = capsys.readouterr().out
    assert "cross-entropy of grey levels and not a likelihood" in table
    assert "draws black and white where the data are grey" in table
    assert "bits per dimension" not in table
