"""Several processes: the numbers of one that does their parts in turn, and what ends them all."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import together
import torch

from pyro_vae import bound, checkpoints, fit
from pyro_vae.cli import main
from pyro_vae.distributed import Exchange, Ranks, joined

SCRIPT = Path(together.__file__)
SENT = ("plain", "buffers")  # of them, with what is sent through the machine's network
COMMAND = [sys.executable, "-m", "pyro_vae"]


def port():
    """A port of this machine that is free."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


def processes(command, count, *, folder=None):
    """Start a command as so many processes of one job; what each has printed, and its status."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(count)}
    job |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    started = [
        subprocess.Popen(
            command, env={**os.environ, **job, "RANK": str(k), "LOCAL_RANK": str(k)}, **pipes
        )
        for k in range(count)
    ]
    said = [each.communicate(timeout=300) for each in started]
    return [(*texts, each.returncode) for texts, each in zip(said, started, strict=True)]


def run(folder, case, count=2):
    """Have so many processes do a case of `together.py`, all of them without an error."""
    found = processes([sys.executable, str(SCRIPT), str(folder), case], count)
    assert [status for *_, status in found] == [0] * count, found


def torchrun(*options, **environment):
    """Run the command line as two processes of torchrun, and return what it has come to."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", str(port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([*launch, *map(str, options)], env=env, check=False, **pipes)


def in_turn(make, options, size=2):
    """The weights and the metrics of one process that goes through the shares in turn."""
    pair, data = together.seeded(make), together.rows()
    drawn = int(torch.randint(2**31, ()))
    states = [torch.get_rng_state()]
    for rank in range(1, size):
        pyro.set_rng_seed(drawn + rank)
        states.append(torch.get_rng_state())
    shares = [Ranks(rank, size).shard(data) for rank in range(size)]
    orders = [torch.Generator().manual_seed(together.WITH["seed"]) for _ in shares]
    parameters = list(pair.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-3)
    best, rows, steps = (-torch.inf, None), [], 0
    budget = 0.1 * together.WITH["epochs"] * 3  # of 20 rows in batches of 7
    for _ in range(together.WITH["epochs"]):
        pair.train()
        total, seen = 0.0, 0
        streams = (
            share.train.batches(together.WITH["batch_size"], order, shuffle=True)
            for share, order in zip(shares, orders, strict=True)
        )
        for batches in zip(*streams, strict=True):
            slopes, kept = [], None
            for rank, batch in enumerate(batches):
                torch.set_rng_state(states[rank])
                weight = min(steps / budget, 1.0)
                loss = annealed(pair, batch, weight)
                slopes.append(torch.autograd.grad(loss, parameters))
                states[rank] = torch.get_rng_state()
                total, seen = total + loss.item(), seen + len(batch[0])
                kept = kept or [buffer.clone() for buffer in pair.buffers()]
            for buffer, value in zip(pair.buffers(), kept, strict=True):
                buffer.copy_(value)
            for parameter, each in zip(parameters, zip(*slopes, strict=True), strict=True):
                parameter.grad = torch.stack(each).mean(0)
            if "clip" in options:
                torch.nn.utils.clip_grad_norm_(parameters, options["clip"])
            adam.step()
            steps += 1
        pair.eval()
        values = []
        for rank, share in enumerate(shares):
            torch.set_rng_state(states[rank])
            values.append(bound(pair, share.validation.batches(100)).elbo)
            states[rank] = torch.get_rng_state()
        rows.append((total / seen, float(torch.cat(values).mean())))
        if rows[-1][1] > best[0]:
            best = rows[-1][1], {key: each.clone() for key, each in pair.state_dict().items()}
    return best[1], rows


def annealed(pair, batch, weight):
    """Minus the bound with a weight on the KL, from draws that `Trace_ELBO` would make."""
    guide = pyro.poutine.trace(pair.guide).get_trace(*batch)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    score = {name: model.nodes[name]["fn"].log_prob(model.nodes[name]["value"]) for name in "zx"}
    entropy = -guide.nodes["z"]["fn"].log_prob(guide.nodes["z"]["value"])
    return -(score["x"] + weight * (score["z"] + entropy)).sum()


@pytest.mark.parametrize(("case", "names"), [("train", together.CASES), ("send", SENT)])
def test_processes_are_their_shares_in_turn(case, names, tmp_path):
    run(tmp_path, case)
    first, second = (checkpoints.decode((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    for name in names:
        weights, rows = in_turn(*together.CASES[name])
        for found in (first[name], second[name]):
            for key, value in weights.items():
                # Twelve steps of Adam, whose gradients differ by the rounding of sums.
                torch.testing.assert_close(found["weights"][key], value, rtol=1e-4, atol=1e-6)
            values = [(row["loss"], row["elbo"]) for row in found["rows"]]
            torch.testing.assert_close(torch.tensor(values), torch.tensor(rows), rtol=1e-5, atol=0)
        assert [row["samples"] for row in first[name]["rows"]] == [40, 80, 120]
        assert all(
            torch.equal(value, second[name]["weights"][key])
            for key, value in first[name]["weights"].items()
        )


def test_messages_and_rows_reach_every_process(tmp_path):
    run(tmp_path, "exchange", 3)
    assert len(list(tmp_path.iterdir())) == 3


def test_other_arguments_in_one_process_are_refused_in_all(tmp_path):
    run(tmp_path, "differ")
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_that_were_not_joined_are_told_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="one of 2 processes, and each trains by itself"):
        fit(together.CASES["plain"][0](), together.rows(), **{**together.WITH, "epochs": 1})


def test_one_process_is_asked_to_stop_and_all_do_and_go_on(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "resume")
    stopped = processes([sys.executable, str(SCRIPT), str(broken), "stop"], 2)
    assert [status for *_, status in stopped] == [143, 143], stopped
    kept = json.loads((broken / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert kept["epoch"] == 1
    assert (broken / "run" / "checkpoints" / "000000004.safetensors").exists()
    run(broken, "resume")
    for name in ("best", "last"):
        files = [folder / "run" / f"{name}.safetensors" for folder in (whole, broken)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_process_that_dies_ends_the_others_in_a_sentence(tmp_path):
    (_, said, status), (*_, killed) = processes(
        [sys.executable, str(SCRIPT), str(tmp_path), "die"], 2
    )
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "ConnectionError: another process of this job has ended" in said


FRAGILE = """
import os, signal
from pyro_vae import priors

class Fragile(priors.Normal):
    calls = 0

    def forward(self):
        self.calls += 1
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.calls == 60 and first and os.environ["RANK"] == os.environ.get("DIES"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward()
"""
TRAIN = ["-m", "pyro_vae", "train", "--epochs", "4", "--latent", "2", "--hidden", "8", "--mode"]
TRAIN += ["eager", "--batch-size", "64", "--checkpoint", "0", "--prior", "fragile.Fragile"]


def test_torchrun_starts_a_job_again_that_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.chdir(tmp_path)
    whole = torchrun(*TRAIN, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("digits:") == 1  # one writer
    assert "2 processes, each with batches of 64" in whole.stdout
    again = torchrun("--max-restarts", "1", *TRAIN, "--out", "again", DIES="1")
    assert again.returncode == 0, again.stderr
    # Torchrun may end the other process before it finds out: what it would say is tested above.
    assert Path("died").exists()
    assert again.stderr.count("| 0.00/") == 1  # the second start did not begin at the first image
    # Started again, a job does not take the run of another one for its own.
    kept = {path: path.read_bytes() for path in Path("whole").rglob("*") if path.is_file()}
    refused = torchrun("--max-restarts", "1", *TRAIN, "--epochs", "8", "--out", "whole")
    assert refused.returncode != 0
    assert refused.stderr.count("'whole' exists and is no empty folder") >= 2
    assert all(path.read_bytes() == content for path, content in kept.items())
    for name in ("best", "last"):
        files = [Path(folder) / f"{name}.safetensors" for folder in ("whole", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line, by one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    options = ["--epochs", "1", "--latent", "2", "--hidden", "8", "--mode", "eager"]
    subprocess.run([*COMMAND, "train", *options, "--out", folder], check=True, capture_output=True)
    return folder


def test_an_estimate_is_the_same_for_any_number_of_processes(trained, tmp_path):
    folders = [Path(shutil.copytree(trained, tmp_path / str(count))) for count in (1, 3)]
    estimates = ["evaluate", "--split", "train", "--samples", "40", "--json"]
    alone = processes([*COMMAND, *estimates, str(folders[0])], 1)
    several = processes([*COMMAND, *estimates, str(folders[1])], 3)
    assert [status for *_, status in several] == [0, 0, 0], several
    assert [bool(out) for out, *_ in several] == [True, False, False]
    tables = [json.loads(found[0][0]) for found in (alone, several)]
    assert {**tables[0], "run": ""} == {**tables[1], "run": ""}
    one, three = (np.load(folder / "evaluation-train.npz") for folder in folders)
    assert len(one["log_likelihood"]) == 1437  # five blocks and a part of one
    for name in one.files:
        np.testing.assert_array_equal(one[name], three[name], name)


def test_a_job_that_may_start_again_must_name_its_run(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main(["train"]) == 2
    assert "give --out under --max-restarts" in capsys.readouterr().err


def test_what_one_process_does_says_so(trained):
    (_, said, status), (_, other, _) = processes([*COMMAND, "sample", str(trained)], 2)
    assert status == 2
    assert said == "pyro-vae: 'sample' is done by one process; run it without torchrun\n"
    assert other.startswith("pyro-vae (process 1): 'sample' is done")


def test_another_number_of_processes_is_another_run(trained):
    found = processes([*COMMAND, "train", "--resume", str(trained), "--epochs", "2"], 2)
    assert [status for *_, status in found] == [2, 2]
    assert "began with 1 process and cannot go on with 2, whose" in found[0][1]


def test_splits_too_small_for_the_processes_are_refused():
    with pytest.raises(ValueError, match="13 validation data cannot be shared out among 20 proc"):
        Ranks(3, 20).shard(together.rows())


def test_one_process_alone_is_left_alone():
    with joined() as ranks:
        assert ranks == Ranks(0, 1) == Ranks.here()
        data = together.rows()
        assert ranks.shard(data) is data
        layer, before = torch.nn.Linear(1, 1), torch.get_rng_state()
        ranks.align(layer)
        assert torch.equal(torch.get_rng_state(), before)
    weight = torch.nn.Parameter(torch.ones(2))
    loss, due = Exchange(Ranks(), [weight], [])(torch.tensor(1.0), True)
    assert (float(loss), due, weight.grad) == (1.0, True, None)
