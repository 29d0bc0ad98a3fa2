"""Two processes against one: the same numbers, how much more is done, and how they end together.

    python examples/benchmarks/processes.py --data-dir DATA

Each job is one of torchrun, of a 784-400-20 VAE with batches of 512 for each process, of one
thread. *Numbers*: after each of some steps the loss and the weights of two processes beside those
of one process that goes through the two shares in turn, under the random states that the two have.
*Throughput*: images per second of `fit`, in rounds that alternate between one process, two that
train together, and two at the same time that know nothing of each other, which is what the
machine can do at most. *The end*: seconds from the SIGKILL of one process of a command-line run to
the end of its job.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pyro
import torch
from pyro.infer import Trace_ELBO
from safetensors.torch import load_file

from pyro_vae import CompiledSVI, data, fit
from pyro_vae.checkpoints import save_state
from pyro_vae.distributed import Exchange, Ranks, joined
from pyro_vae.parts import Blueprint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
FIRST, LAST = "<!-- processes.py writes from here -->", "<!-- to here -->"


def load(options):
    """The data of the options, binarised at one half."""
    how = {"view": data.threshold, "validation": 0}
    return data.load(options.data, directory=options.data_dir, **how)


def made(splits, options):
    """The VAE, from one random state, and then another one to train in."""
    pyro.set_rng_seed(0)
    vae = Blueprint(splits.shape, latent=20, hidden=[options.hidden]).build()
    pyro.set_rng_seed(1)
    return vae


def steps(ranks, options):
    """Losses and weights after each step, of this process together with the others."""
    splits = load(options)
    vae = made(splits, options)
    ranks.align(vae)
    part = ranks.shard(splits).train
    svi, optimizer, exchange = stepping(vae, ranks, options)
    losses = []
    for step, batch in enumerate(batches(part, options.batch_size), start=1):
        loss, _ = exchange(svi.loss_and_grads(*batch), False)
        optimizer.step()
        losses.append(float(loss))
        if ranks.first:
            save_state(vae.state_dict(), options.into / f"{step}.safetensors")
        if step == options.steps:
            break
    if ranks.first:
        (options.into / "losses.json").write_text(json.dumps(losses))


def stepping(vae, ranks, options):
    """What takes steps, its optimiser, and what averages its gradients."""
    optimizer = ADAM(vae.parameters())
    elbo = Trace_ELBO(max_plate_nesting=1)
    svi = CompiledSVI(vae.model, vae.guide, lambda _: optimizer, elbo, mode=options.mode)
    return svi, optimizer, Exchange(ranks, list(vae.parameters()), [])


def batches(part, size):
    """Whole batches without end, in a new order each time through."""
    order = torch.Generator().manual_seed(0)
    while True:
        yield from (b for b in part.batches(size, order, shuffle=True) if len(b[0]) == size)


def in_turn(options):
    """The losses and the weights of one process that goes through the two shares."""
    splits = load(options)
    vae = made(splits, options)
    drawn = int(torch.randint(2**31, ()))  # by which the second process is seeded
    states = [torch.get_rng_state()]
    pyro.set_rng_seed(drawn + 1)
    states.append(torch.get_rng_state())
    svi, optimizer, _ = stepping(vae, Ranks(), options)
    parameters = list(vae.parameters())
    streams = [batches(Ranks(k, 2).shard(splits).train, options.batch_size) for k in (0, 1)]
    for pair in zip(*streams, strict=False):
        total, slopes = 0.0, []
        for k, batch in enumerate(pair):
            torch.set_rng_state(states[k])
            total += float(svi.loss_and_grads(*batch))
            slopes.append([each.grad.clone() for each in parameters])
            states[k] = torch.get_rng_state()
        for parameter, *both in zip(parameters, *slopes, strict=True):
            parameter.grad = torch.stack(both).mean(0)
        optimizer.step()
        yield total, vae.state_dict()


def throughput(ranks, options):
    """Images per second in each epoch of `fit` but the first, and what an exchange takes."""
    splits = load(options)
    vae = made(splits, options)
    how = {"epochs": options.epochs + 1, "batch_size": options.batch_size, "mode": options.mode}
    rows = fit(vae, splits, optimizer=ADAM, warmup=0, progress=False, **how)
    parameters = list(vae.parameters())
    exchange, loss = Exchange(ranks, parameters, []), torch.zeros(())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    times = []
    for _ in range(options.steps):
        began = time.perf_counter()
        exchange(loss, False)
        times.append(time.perf_counter() - began)
    found = {"speeds": [row["images_per_second"] for row in rows[1:]]}
    found["exchange"] = statistics.median(times)
    found["bytes"] = sum(each.numel() * each.element_size() for each in parameters)
    (options.into / f"{options.name}-{ranks.rank}.json").write_text(json.dumps(found))


def start(count, command):
    """Start a command as so many processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", port]
    words = [sys.executable, *launch, *command]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, words)), env=ENVIRONMENT, **quiet)


def job(count, name, options, *, into, title=""):
    """Start a function of this file as so many processes."""
    given = ["--data", options.data, "--hidden", options.hidden, "--batch-size"]
    given += [options.batch_size, "--epochs", options.epochs, "--mode", options.mode]
    given += ["--steps", options.steps, "--job", name, "--into", into, "--name", title]
    if options.data_dir:
        given += ["--data-dir", options.data_dir]
    return start(count, [__file__, *given])


def ended(process):
    """Wait for a job, which must end well."""
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"a job failed: {said}")


def numbers(options, scratch):
    """The greatest differences of losses and weights between two processes and one."""
    ended(job(2, "steps", options, into=scratch))
    losses = json.loads((scratch / "losses.json").read_text())
    rows = []
    for step, (loss, weights) in enumerate(in_turn(options), start=1):
        found = load_file(scratch / f"{step}.safetensors")
        apart = max(float((found[key] - value).abs().max()) for key, value in weights.items())
        rows.append({"step": step, "loss": abs(losses[step - 1] / loss - 1), "weights": apart})
        if step == options.steps:
            return rows


def speeds(options, scratch):
    """Images per second, by what runs, in a list over the rounds."""
    cases = {"one": (1, 1), "two together": (2, 1), "two apart": (1, 2)}
    found = {name: [] for name in cases}
    for turn in range(options.rounds):
        for name, (count, jobs) in cases.items():
            titles = [f"{name}-{turn}-{k}" for k in range(jobs)]
            started = [
                job(count, "throughput", options, into=scratch, title=title) for title in titles
            ]
            for each in started:
                ended(each)
            texts = [json.loads((scratch / f"{title}-0.json").read_text()) for title in titles]
            found[name].append(sum(statistics.median(text["speeds"]) for text in texts))
            print(
                f"round {turn + 1}, {name}: {found[name][-1]:,.0f} images per second", flush=True
            )
            if name == "two together":
                exchange = {key: texts[0][key] for key in ("exchange", "bytes")}
    return found, exchange


def deaths(options, scratch):
    """Seconds from the SIGKILL of the second process to the end of the job, and the last words."""
    found = []
    for number in range(options.kills):
        folder = scratch / f"run-{number}"
        train = ["-m", "pyro_vae", "train", "--data", options.data, "--out", folder]
        train += ["--epochs", 1000, "--mode", "captured", "--hidden", options.hidden]
        if options.data_dir:
            train += ["--data-dir", options.data_dir]
        process = start(2, train)
        while not (folder / "checkpoints" / "000000001.safetensors").exists():
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself: {process.communicate()[1]}")
            time.sleep(0.1)
        time.sleep(random.Random(number).uniform(0, 5))
        os.kill(second(process.pid), signal.SIGKILL)
        began = time.perf_counter()
        said = process.communicate()[1]
        found.append(time.perf_counter() - began)
        if "another process of this job has ended" not in said:
            raise SystemExit(f"the job ended without saying why: {said}")
    return found


def second(parent):
    """The identity of a job's second process."""
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, check=True)
    for child in map(int, children.stdout.split()):
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise SystemExit("the job has no second process")


def table(results):
    """Markdown of what was found."""
    speed = {key: statistics.median(each) for key, each in results["images_per_second"].items()}
    pairs = results["images_per_second"]
    ratio, most = (
        statistics.median(b / a for a, b in zip(pairs["one"], pairs[name], strict=True))
        for name in ("two together", "two apart")
    )
    last = results["numbers"][-1]
    first = results["numbers"][0]
    exchange = results["exchange"]
    return "\n".join(
        [
            f"{results['machine']}; torch {results['torch']}; {results['data']}, "
            f"{results['hidden']} hidden units, batches of {results['batch_size']} for each "
            f"process, one thread each, {results['mode']}; medians of {len(pairs['one'])} rounds.",
            "",
            "| | images per second | to one process |",
            "|---|---|---|",
            f"| one process | {speed['one']:,.0f} | 1.00 |",
            f"| two that train together | {speed['two together']:,.0f} | {ratio:.2f} |",
            f"| two that train apart | {speed['two apart']:,.0f} | {most:.2f} |",
            "",
            f"An exchange of {exchange['bytes'] / 1e6:.1f} MB of gradients takes "
            f"{1e3 * exchange['exchange']:.1f} ms. After the first step losses differ by "
            f"{first['loss']:.1g} of their size and weights by {first['weights']:.1g}, after "
            f"{last['step']} steps by {last['loss']:.1g} and {last['weights']:.1g}. A job ends "
            f"{statistics.median(results['deaths']):.1f} s after one of its processes is killed, "
            f"and {max(results['deaths']):.1f} s at the most of {len(results['deaths'])} kills.",
        ]
    )


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each measurement")
    parser.add_argument("--mode", default="compiled")
    parser.add_argument("--steps", type=int, default=100, help="steps that are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--readme", action="store_true", help="write the section of README.md")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    for name in ("--job", "--into", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parsed()
    torch.set_num_threads(1)
    if options.job:
        options.into = Path(options.into)
        with joined() as ranks:
            {"steps": steps, "throughput": throughput}[options.job](ranks, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found, exchange = speeds(options, Path(scratch))
        results = {
            "machine": f"{os.cpu_count()} cores",
            "torch": torch.__version__.partition("+")[0],
            **{key: getattr(options, key) for key in ("data", "hidden", "batch_size", "mode")},
            "images_per_second": found,
            "exchange": exchange,
            "numbers": numbers(options, Path(scratch)),
            "deaths": deaths(options, Path(scratch)),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "processes.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if options.readme:
        page = Path(__file__).parent / "README.md"
        before, rest = page.read_text().split(FIRST)
        page.write_text(f"{before}{FIRST}\n\n{table(results)}\n\n{LAST}{rest.split(LAST, 1)[1]}")


if __name__ == "__main__":
    main()
