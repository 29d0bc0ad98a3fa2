"""Runs that are stopped: gone on with bit for bit, or refused in a sentence."""

import contextlib
import errno
import fcntl
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear import linear_vae
from torch import nn
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from pyro_vae import MLP, VAE, checkpoints, data, fit, likelihoods, posteriors, priors, training
from pyro_vae.objectives import IWAE, BetaELBO
from pyro_vae.progress import Progress, Standing, Stopped
from pyro_vae.splits import Data, Split
from pyro_vae.vae import declare

ROWS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
WITH = {"epochs": 5, "batch_size": 7, "progress": False, "seed": 4, "mode": "eager"}


def rows():
    """30 training data, in five batches, the last one smaller."""
    return data.split(ROWS, validation=0.25, test=0)


def linear():
    return linear_vae(4, 2)


def trained(make=linear, **options):
    """Weights and metrics of a run, begun in one random state, and the random state it leaves."""
    pyro.set_rng_seed(1)
    vae = make()
    pyro.set_rng_seed(2)
    random.seed(3)
    found = fit(vae, rows(), **{**WITH, **options})
    state = torch.rand(()).item(), random.random(), np.random.rand()
    return vae.state_dict(), [timeless(row) for row in found], state


def timeless(row):
    return {key: value for key, value in row.items() if key != "images_per_second"}


@contextlib.contextmanager
def stopped(step, number=signal.SIGTERM):
    """Send a signal to the process itself while it takes that step of its training."""
    count = Standing.count

    def counting(self, weight):
        count(self, weight)
        if self.step == step:
            os.kill(os.getpid(), number)

    Standing.count = counting
    try:
        with pytest.raises(Stopped if number == signal.SIGTERM else KeyboardInterrupt) as caught:
            yield caught
    finally:
        Standing.count = count


def interrupted(step, run, *arguments, **options):
    """What `trained` returns where the run is stopped in that step, and then gone on with."""
    with stopped(step):
        trained(*arguments, run=run, **options)
    pyro.set_rng_seed(77)  # whatever there was in the other process
    found = trained(*arguments, run=run, resume=True, **options)
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    assert [timeless(json.loads(line)) for line in lines] == found[1]
    return found


def same(first, second):
    return (
        first[1:] == second[1:]
        and first[0].keys() == second[0].keys()
        and all(torch.equal(value, second[0][key]) for key, value in first[0].items())
    )


class Drawing(nn.Module):
    """A layer that draws from every generator there is."""

    def forward(self, x):
        return x + (random.random() + np.random.rand()) * torch.rand(())


class Transposed(nn.Module):
    """A layer whose weight lies in memory by columns, with statistics and a hidden buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2).t() / 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, x):
        if x.dim() == 2 and self.training:
            self.seen += x.detach().mean(0)
        return self.norm(x + (x @ self.weight).sum(-1, keepdim=True) + 0.1 * self.seen)


def with_layer(layer):
    """A VAE with a layer before its decoder."""
    vae = linear_vae(4, 2)
    decoder = nn.Sequential(layer(), vae.likelihood.network)
    return VAE(vae.prior, likelihoods.Normal(decoder), vae.posterior)


def with_vamp_prior():
    posterior = posteriors.Normal(MLP(4, [], (2, 2)))
    prior = priors.VampPrior(posterior, components=3, data=ROWS)
    return VAE(prior, likelihoods.Normal(MLP(2, [], 4)), posterior)


def sequential(optimizer):
    parts = [StepLR(optimizer, 1, 0.5), CosineAnnealingLR(optimizer, 3)]
    return SequentialLR(optimizer, parts, milestones=[2])


RUNS = {
    "captured": {"mode": "captured"},
    "momentum": {"optimizer": partial(SGD, lr=1e-4, momentum=0.9)},
    "not fused": {"optimizer": partial(RMSprop, lr=1e-3)},
    "rate a tensor": {"optimizer": partial(Adam, lr=torch.tensor(1e-3))},
    "milestones": {"schedule": partial(MultiStepLR, milestones=[1, 1, 3], gamma=0.5)},
    "function": {"schedule": partial(LambdaLR, lr_lambda=lambda epoch: 0.9**epoch)},
    "one cycle": {"schedule": partial(OneCycleLR, max_lr=0.1, total_steps=9)},
    "sequence": {"schedule": sequential},
    "clip": {"clip": 1.0, "warmup": 0},
    "weight": {"objective": lambda: BetaELBO(2.0, start=0.5, steps=20), "warmup": 0},
    "weight, captured": {
        "objective": lambda: BetaELBO(2.0, start=0.5, steps=20, elbo=IWAE(2)),
        "warmup": 0,
        "mode": "captured",
    },
    "patience": {"optimizer": partial(SGD, lr=1e-12), "patience": 1, "epochs": 50},
    "skipping": {"skip_nonfinite": 3},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_is_the_run(name, tmp_path):
    options = RUNS[name]

    def run(function, *arguments, **more):
        return function(
            *arguments,
            **{**options, **more}
            | ({"objective": options["objective"]()} if "objective" in options else {}),
        )

    whole = run(trained)
    # In the first epoch, within an epoch, at the end of one; capturing takes a second each time.
    for step in (8,) if "mode" in options else (1, 8, 10):
        with stopped(step):
            run(trained, run=tmp_path / str(step))
        assert same(run(trained, run=tmp_path / str(step), resume=True), whole)


@pytest.mark.parametrize(
    "make", [partial(with_layer, Drawing), partial(with_layer, Transposed), with_vamp_prior]
)
def test_whatever_a_pair_holds_goes_on(make, tmp_path):
    assert same(interrupted(8, tmp_path, make), trained(make))
    if make is with_vamp_prior or make.args == (Transposed,):
        captured = {"mode": "captured"}
        whole = trained(make, **captured)
        assert same(interrupted(8, tmp_path / "captured", make, **captured), whole)


def test_a_compiled_run_goes_on(tmp_path):
    options = {"mode": "compiled", "batch_size": 10, "epochs": 3}
    assert same(interrupted(4, tmp_path, **options), trained(**options))


def test_a_run_may_be_stopped_many_times(tmp_path):
    whole, resume = trained(), False
    for step in (3, 4, 9, 11, 20):
        with stopped(step):
            trained(run=tmp_path, resume=resume)
        resume = True
    assert same(trained(run=tmp_path, resume=True), whole)
    # A run that is over is gone on with to no effect, but for the random state.
    assert same(trained(run=tmp_path, resume=True)[:2], whole[:2])


def test_a_mode_that_was_given_up_stays_so(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if float(x.detach().sum()) > 0 else 2 * x

    make = partial(with_layer, Branching)
    with pytest.warns(UserWarning, match="cannot be captured and runs eagerly"):
        whole = trained(make, mode="captured")
    with pytest.warns(UserWarning, match="cannot be captured"), stopped(8):
        trained(make, mode="captured", run=tmp_path)
    assert same(trained(make, mode="captured", run=tmp_path, resume=True), whole)


def test_more_epochs_change_nothing_before_them(tmp_path):
    _, before, _ = trained(run=tmp_path, warmup=0.6)
    _, after, _ = trained(run=tmp_path, resume=True, warmup=0.6, epochs=8)
    assert after[:5] == before
    assert [row["epoch"] for row in after] == list(range(1, 9))
    assert [row["weight"] for row in after[3:]] == [1.0] * 5
    trained(run=tmp_path / "again", warmup=0.6)
    with stopped(30):
        trained(run=tmp_path / "again", resume=True, warmup=0.6, epochs=8)
    again = trained(run=tmp_path / "again", resume=True, warmup=0.6, epochs=8)
    assert again[1] == after
    with pytest.raises(ValueError, match="has 8 epochs, more than 7"):
        trained(run=tmp_path, resume=True, warmup=0.6, epochs=7)


def test_the_bar_of_a_run_that_goes_on_counts_what_it_does(tmp_path, monkeypatch):
    shown = []

    class Bar(training.tqdm):
        def close(self):
            shown.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr(training, "tqdm", Bar)
    interrupted(8, tmp_path, progress=True)  # 5 batches, which are 30 data, and 3 of 7 data
    assert [*dict.fromkeys(shown)] == [(0, 51, 150), (51, 150, 150)]


def test_no_minutes_between_checkpoints_are_one_after_each_step(tmp_path, monkeypatch):
    kept, keep = [], checkpoints.keep
    monkeypatch.setattr(checkpoints, "keep", lambda *args: kept.append(args[1]) or keep(*args))
    trained(run=tmp_path, epochs=2, checkpoint=0)
    assert [*dict.fromkeys(kept)] == [*range(11)]
    assert "checkpoints, 0 for one after each step" in str(fit.__doc__)


def test_resuming_begins_where_there_is_no_run(tmp_path):
    assert same(trained(run=tmp_path / "new", resume=True), trained())


def changed(**modules):
    """The pair of these tests with other modules, and weights of the same shapes."""
    vae = linear()
    for name, module in modules.items():
        setattr(vae, name, module)
    return vae


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 8}, "other batch_size: it was 7 and is 8"),
        ({"warmup": 0.2}, "other warmup: it was 0.1 and is 0.2"),
        ({"clip": 1.0}, "other clip: it was inf and is 1.0"),
        ({"patience": 3}, "other patience: it was None and is 3"),
        ({"seed": 5}, "other seed: it was 4 and is 5"),
        ({"mode": "captured"}, "other mode: it was eager and is captured"),
        ({"objective": IWAE(2)}, "other objective: it was {'class': 'Trace_ELBO'"),
        (
            {"optimizer": partial(Adam, lr=1e-2)},
            "other optimizer.groups.0.lr: it was 0.001 and is 0.01",
        ),
        ({"optimizer": partial(SGD, lr=1e-3)}, "other optimizer.class: it was Adam and is SGD"),
        ({"schedule": partial(StepLR, step_size=3)}, "other schedule: it was None and is {'cl"),
        ({"make": partial(linear_vae, 4, 3)}, "other weights; only epochs"),
        (
            {"make": lambda: changed(prior=type("Own", (priors.Normal,), {})(2))},
            "other parts.prior: it was Normal and is Own; only epochs",
        ),
        ({"make": lambda: changed(activation=nn.ReLU())}, "other parts; only epochs"),
    ],
)
def test_what_would_be_another_run_is_named_and_refused(options, words, tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"cannot go on with {words}"):
        trained(run=tmp_path, resume=True, **options)
    assert contents(tmp_path) == before
    assert same(trained(run=tmp_path, resume=True), trained())


def test_another_view_of_one_name_is_refused(tmp_path):
    def trained_on(power, **options):
        def view(values, generator=None):
            return values**power

        shown = data.split(ROWS.sigmoid(), validation=0.25, test=0, view=view)
        return fit(linear(), shown, **WITH, run=tmp_path, **options)

    with stopped(8):
        trained_on(1)
    with pytest.raises(ValueError, match="cannot go on with other view; only epochs"):
        trained_on(2, resume=True)
    assert len(trained_on(1, resume=True)) == 5


def test_a_folder_of_other_weights_or_checkpoints_is_left_alone(tmp_path):
    trained(run=tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    before = contents(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"holds weights or checkpoints, 0000.* choose anoth"
    ):
        trained(run=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"holds weights or checkpoints, best.safetenso"):
            trained(run=tmp_path, resume=resume)
    kept = {path: content for path, content in before.items() if "checkpoints" not in str(path)}
    assert contents(tmp_path) == kept


def test_other_data_are_refused(tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    others = data.split(ROWS, validation=0.25, test=0, seed=1)
    with pytest.raises(ValueError, match="cannot go on with other data; only epochs"):
        fit(linear_vae(4, 2), others, run=tmp_path, resume=True, **WITH)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_be_the_same_to_the_last_digit_is_said(tmp_path, monkeypatch):
    with stopped(8):
        trained(run=tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.warns(UserWarning, match=f"began under threads {threads}, which is another now"):
        trained(run=tmp_path, resume=True)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_says_how_to_go_on(number, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stopped(8, number) as caught:
        trained(run=tmp_path)
    words = f"stopped after step 8; go on by fit(..., run='{tmp_path}', resume=True)"
    assert words in str(caught.value)
    assert getattr(caught.value, "code", 143) == 143
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert "000000008.safetensors" in steps
    assert len(steps) == 2


def test_a_second_signal_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "pause", lambda self: None)  # a step that takes for ever
    count = Standing.count

    def counting(self, weight):
        count(self, weight)
        if self.step > 7:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Standing, "count", counting)
    with pytest.raises(KeyboardInterrupt) as caught:
        trained(run=tmp_path)
    assert not str(caught.value)
    steps = {int(path.stem) for path in (tmp_path / "checkpoints").iterdir()}
    assert max(steps) == 0  # nothing is written of a step that is not over


def test_signals_are_left_alone_without_a_folder_in_threads_and_where_they_are_ignored(tmp_path):
    seen = []

    def watching(optimizer):
        seen.append([signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)])
        return LambdaLR(optimizer, lambda epoch: (seen.append(state()), 1.0)[1])

    def state():
        return [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    before = state()
    trained(schedule=watching)
    thread = threading.Thread(target=trained, kwargs={"schedule": watching, "run": tmp_path / "a"})
    thread.start()
    thread.join()
    assert all(each == before for each in seen)
    assert (tmp_path / "a" / "last.safetensors").exists()
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        seen.clear()
        trained(schedule=watching, run=tmp_path / "b")
        assert all(each[0] == signal.SIG_IGN for each in seen)
        assert seen[-1][1] != before[1]
    finally:
        signal.signal(signal.SIGINT, kept)
    assert state() == before


# Files that are damaged, and places that cannot be written to


def damaged(path, rng):
    """A file with one byte changed, or without its end."""
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw))
    if rng.random() < 0.5:
        raw[place] ^= 1 << rng.randrange(8)
    else:
        del raw[place:]
    path.write_bytes(raw)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(seed, tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    old, new = sorted((tmp_path / "checkpoints").iterdir())
    damaged(new, random.Random(seed))
    with pytest.warns(UserWarning, match=f"{new.name}' is damaged.*'{old.name}' before it is"):
        found = trained(run=tmp_path, resume=True)
    assert same(found, trained())
    assert new.with_suffix(".damaged").exists()


def test_damaged_checkpoints_alone_are_refused(tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(pickle.dumps(Path))
    with (
        pytest.warns(UserWarning, match="put aside"),
        pytest.raises(ValueError, match=r"is damaged: .*there is no other checkpoint"),
    ):
        trained(run=tmp_path, resume=True)


def test_a_run_without_checkpoints_is_refused_and_left(tmp_path):
    trained(run=tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint to go on from; train anew"):
        trained(run=tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_unfinished_files_are_cleared_away(tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    (tmp_path / "download.part").touch()  # of another program
    leftovers = ["best.safetensors.0123abcd.part", "checkpoints/9.safetensors.0123abcd.part"]
    for path in (tmp_path / each for each in leftovers):
        path.write_bytes(b"half")
    trained(run=tmp_path, resume=True)
    assert [path.name for path in tmp_path.rglob("*.part")] == ["download.part"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(resume, tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    before = contents(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        words = "another process trains in" if resume else "holds another run"
        with pytest.raises(FileExistsError, match=words):
            trained(run=tmp_path, resume=resume)
    assert contents(tmp_path) == before
    trained(run=tmp_path, resume=True)  # and the lock is gone with its holder


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*checkpoints"):
        trained(run=tmp_path, checkpoint=0)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    assert same(trained(run=tmp_path, resume=True), trained())


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 400 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only a superuser who may mount disks has one to fill")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_keeps_the_checkpoint_before(disk, monkeypatch):
    pause, filler = Progress.pause, disk / "filler"

    def filling(self):
        if self.now.step == 9:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        pause(self)

    monkeypatch.setattr(Progress, "pause", filling)
    with pytest.raises(OSError, match="No space left on device"):
        trained(run=disk / "run", checkpoint=0)
    monkeypatch.undo()
    for name in ("run", "new"):  # the same again, and a run that never came to a step
        with pytest.raises(OSError, match="No space left on device"):
            trained(run=disk / name, resume=name == "run")
    steps = [int(path.stem) for path in (disk / "run" / "checkpoints").iterdir()]
    assert sorted(steps) == [7, 8]
    assert not list(disk.rglob("*.part"))
    filler.unlink()
    assert same(trained(run=disk / "run", resume=True), trained())


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_progress import Progress, trained
pause = Progress.pause

def limited(self):
    if self.now.step == 9:  # half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    pause(self)

Progress.pause = limited
try:
    trained(run=sys.argv[1], checkpoint=0)
except OSError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_keeps_the_checkpoint_before(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert "File too large" in done.stdout
    steps = sorted(int(path.stem) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [7, 8]
    assert same(trained(run=tmp_path, resume=True), trained())


@pytest.fixture
def read_only():
    """A run's folder that the process may read and not write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        run = Path(folder) / "run"
        with stopped(8):
            trained(run=run)
        places = [run, *run.rglob("*")]
        for path in places:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if was_root := os.geteuid() == 0:  # to whom all is allowed
            os.seteuid(65534)
        yield run
        if was_root:
            os.seteuid(0)
        for path in places:
            path.chmod(0o755)


def test_a_folder_that_is_read_only_is_one_sentence(read_only):
    before = contents(read_only)
    for run, resume in ((read_only, True), (read_only / "new", False)):
        with pytest.raises(PermissionError):
            trained(run=run, resume=resume)
    assert contents(read_only) == before


# What a state may be


class Odd(SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["seen"] = {1, 2}
        return super().step(closure)


def test_a_state_that_no_file_can_have_is_refused_at_the_first_step(tmp_path):
    words = r"could not be resumed: 'optimizer.state.0.seen' is a set, which is neither"
    with pytest.raises(TypeError, match=words):
        trained(optimizer=partial(Odd, lr=1e-3), run=tmp_path)
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_options_that_no_file_can_have_are_refused_before_the_first_step(tmp_path):
    class Oddly(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.param_groups[0]["name"] = object()

    with pytest.raises(TypeError, match=r"'optimizer.param_groups.0.name' is a object"):
        trained(optimizer=partial(Oddly, lr=1e-3), run=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("weights"),
        lambda state: state["weights"].popitem(),
        lambda state: state["now"].update(other=1),
        lambda state: state["now"].pop("rows"),
        lambda state: state["optimizer"]["param_groups"][0].pop("lr"),
        lambda state: state["optimizer"]["param_groups"][0].update(step=1),
        lambda state: state["schedule"].update(step=1),
        lambda state: state["generators"].pop("0"),
        lambda state: state["generators"]["0"].update(torch=torch.zeros(3)),
        lambda state: state["objective"].clear(),
        lambda state: state.update(best=3),
    ],
)
def test_a_state_that_was_made_up_is_refused(spoil, tmp_path):
    options = {"schedule": partial(StepLR, step_size=2)}
    with stopped(8):
        trained(run=tmp_path, **options)
    for path in (tmp_path / "checkpoints").iterdir():
        state = checkpoints.decode(path.read_bytes())
        spoil(state)
        path.write_bytes(checkpoints.encode(state))
    with pytest.raises(ValueError, match="has a checkpoint of another run"):
        trained(run=tmp_path, resume=True, **options)


def test_a_checkpoint_of_a_later_format_is_not_passed_over(tmp_path):
    with stopped(8):
        trained(run=tmp_path)
    path = max((tmp_path / "checkpoints").iterdir())
    state = checkpoints.decode(path.read_bytes())
    path.write_bytes(checkpoints.encode({**state, "format": 2}))
    with pytest.raises(ValueError, match=r"has format 2 .*; upgrade pyro_vae"):
        trained(run=tmp_path, resume=True)
    assert path.exists()


def test_tensorboard_forgets_what_is_written_again(tmp_path, monkeypatch):
    opened, written = [], []

    class Writer:
        def __init__(self, folder, purge_step=None):
            opened.append(purge_step)

        def add_scalar(self, key, value, epoch):
            written.append((key, epoch))

        def close(self):
            pass

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    interrupted(8, tmp_path)
    assert opened == [None, 2]
    assert [epoch for key, epoch in written if key == "loss"] == [1, 2, 3, 4, 5]


# Steps that are left out


class Faulty(nn.Module):
    """The identity under batch norm, whose output or gradient is no number in some steps."""

    def __init__(self, steps, backward=False):
        super().__init__()
        self.steps, self.backward, self.norm = steps, backward, nn.BatchNorm1d(2)
        self.runs = -2  # each of two sizes of batches is tried once, checks aside

    def forward(self, x):
        training = self.training and torch.is_grad_enabled()
        self.runs += training
        if training and self.runs in self.steps:
            if self.backward:
                x.register_hook(lambda gradient: gradient * math.nan)
            else:
                x = x * math.nan
        return self.norm(x)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 10.0])
def test_steps_that_are_not_finite_are_left_out_and_counted(backward, clip, monkeypatch):
    taken, step = [], SGD.step

    def stepping(self, *arguments):
        taken.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return step(self, *arguments)

    monkeypatch.setattr(SGD, "step", stepping)
    vae = linear_vae(4, 2)
    faulty = Faulty({14, 15, 22}, backward)
    vae = VAE(
        vae.prior, likelihoods.Normal(nn.Sequential(faulty, vae.likelihood.network)), vae.posterior
    )
    options = {"optimizer": partial(SGD, lr=1e-4, momentum=0.9), "clip": clip, "warmup": 0}
    found = fit(vae, rows(), skip_nonfinite=3, **{**WITH, **options})
    assert sum(row["skipped"] for row in found) == 3
    assert len(taken) == 5 * 5 - 3
    assert all(math.isfinite(row["loss"]) for row in found)
    assert all(each.isfinite().all() for each in vae.state_dict().values())
    assert int(faulty.norm.num_batches_tracked) > 0


@pytest.mark.parametrize(("allowed", "words"), [(0, "step 6, first in"), (2, "step 8, after 2")])
def test_no_more_steps_are_left_out_than_allowed(allowed, words):
    vae = with_layer(partial(Faulty, set(range(13, 99))))
    with pytest.raises(FloatingPointError, match=f"NaN or infinite in epoch 2, {words}"):
        fit(vae, rows(), skip_nonfinite=allowed, **WITH)
    assert all(each.isfinite().all() for each in vae.state_dict().values())


def test_the_first_gradient_that_is_nan_is_named_under_clipping():
    vae = with_layer(partial(Faulty, set(range(14, 99)), backward=True))
    names = [name for name, _ in vae.named_parameters()]
    spoiled = names.index("posterior.network.last.weight")
    assert spoiled > 0  # what comes before has a gradient that is a number
    with pytest.raises(FloatingPointError, match=f"first in the gradient of '{names[spoiled]}'"):
        fit(vae, rows(), clip=1.0, **WITH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resume": True}, "there is no run to resume; give its folder as `run`"),
        ({"checkpoint": -1}, "minutes between checkpoints are 0 or more, not -1"),
        ({"checkpoint": math.nan}, "minutes between checkpoints are 0 or more, not nan"),
        ({"skip_nonfinite": -1}, "steps that may be left out are 0 or more, not -1"),
    ],
)
def test_care_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        trained(**options)


class Labelled(nn.Module):
    """A pair with a network for labels, which only batches with a label use."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Linear(4, 4), nn.Linear(2, 4), nn.Linear(2, 1)

    def model(self, x, label):
        declare(self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
            has = label >= 0
            if has.any():
                with pyro.poutine.mask(mask=has):
                    pyro.sample("y", dist.Normal(self.head(z)[:, 0], 1.0), obs=label)

    def guide(self, x, label):
        declare(self)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def test_momentum_of_parameters_that_few_batches_use_goes_on(tmp_path):
    label = torch.full((len(ROWS),), -1.0)
    label[:3] = 1.0
    none = Split(ROWS[:0], (label[:0],))
    given = Data(Split(ROWS, (label,)), none, none)
    ends = []
    for name, parts in (("whole", [3]), ("broken", [1, 2, 3])):
        for epochs in parts:
            pyro.set_rng_seed(0)
            pair = Labelled()
            fit(
                pair, given, **{**WITH, "epochs": epochs, "batch_size": 2}, warmup=0.0,
                optimizer=partial(Adam, lr=1e-2), run=tmp_path / name, resume=epochs > parts[0],
            )  # fmt: skip
        ends.append(list(pair.parameters()))
    assert all(map(torch.equal, *ends))
