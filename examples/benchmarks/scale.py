"""What an image costs in time and memory where there are 10^4 to 10^7 of them, on disk.

    python examples/benchmarks/scale.py --readme

Random bytes, 28x28, are written to `.npy` files, in shards of a million. A process for each number
of images trains a 784-400-20 VAE on as many of them, of all epochs together, through memory maps
(`data.load(path, mapped=True)`), and another one from memory where they fit. Rounds go through all
of these in turn. Before each, the files are dropped from the system's cache, so that they come
from the disk. Compilation comes first and is not counted; then the data are loaded (which looks
for what no file may hold), and training begins.

``--largest 10_000_000`` needs 9 GB of disk. Peaks of memory are those of Linux, and left out
elsewhere.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import speed

FOLDER = Path(__file__).parent
MARKS = "<!-- scale.py writes from here -->", "<!-- scale.py writes to here -->"
LIMIT = "<!-- the limit, written from here -->", "<!-- the limit, written to here -->"
SHARD = 1_000_000  # images in a file
IN_MEMORY = 2_000_000  # images that are also trained on from memory, at most
BATCH = 125  # divides every number of images, so that every batch is alike
STATUS = Path("/proc/self/status")


def paths(folder, images):
    """The files of a data set."""
    return [folder / f"{number:03}.npy" for number in range(math.ceil(images / SHARD))]


def synthesise(folder, images, chunk=50_000):
    """Write random bytes, a part at a time."""
    folder.mkdir()
    draws = np.random.default_rng(images)
    for number, path in enumerate(paths(folder, images)):
        rows = min(images - number * SHARD, SHARD)
        file = np.lib.format.open_memmap(path, "w+", np.uint8, (rows, 28, 28))
        for start in range(0, rows, chunk):
            some = file[start : start + chunk]
            some[:] = draws.integers(0, 256, some.shape, dtype=np.uint8)
        file.flush()


def forget(folder):
    """Drop what the system has of the files in its cache."""
    for path in folder.iterdir():
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory():
    """What /proc says of this process, in bytes: resident without files, and its peak with."""
    if not STATUS.exists():
        return {}
    lines = (line.split() for line in STATUS.read_text().splitlines())
    fields = {key.rstrip(":"): value for key, *value in lines}
    return {key: 1024 * int(fields[key][0]) for key in ("RssAnon", "VmHWM") if key in fields}


class Peak(threading.Thread):
    """The peaks of this process's memory from here on."""

    def __init__(self):
        super().__init__(daemon=True)
        self.done, self.anonymous = threading.Event(), 0
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # which begins the peak anew
        self.start()

    def run(self):
        while not self.done.wait(0.02):
            self.anonymous = max(self.anonymous, memory().get("RssAnon", 0))

    def end(self):
        self.done.set()
        self.join()
        return {"anonymous": self.anonymous, "resident": memory().get("VmHWM", 0)}


def measure(options):
    """Train in this process, and print what it took."""
    import pyro
    import torch

    from pyro_vae import MLP, VAE, CompiledSVI, data, likelihoods, posteriors, priors

    torch.set_num_threads(options.threads)
    pyro.set_rng_seed(0)
    vae = VAE(
        prior=priors.Normal(20),
        likelihood=likelihoods.Bernoulli(MLP(20, [400], (1, 28, 28))),
        posterior=posteriors.Normal(MLP((1, 28, 28), [400], (2, 20))),
    )
    adam = pyro.optim.Adam({"lr": 1e-3})
    svi = CompiledSVI(vae.model, vae.guide, adam, loss=pyro.infer.Trace_ELBO(), mode=options.mode)
    for _ in range(5):
        svi.step(torch.rand(BATCH, 1, 28, 28).round())

    peak, began = Peak(), time.perf_counter()
    mapped = options.measure == "on disk"
    loaded = data.load(options.path, mapped=mapped, view=data.dynamic, validation=0, test=0)
    seconds = {"load": time.perf_counter() - began}
    began, done = time.perf_counter(), 0
    epochs = (loaded.train.batches(BATCH, shuffle=True) for _ in itertools.count())
    for batch in itertools.chain.from_iterable(epochs):
        loss = svi.step(*batch)
        done += BATCH
        if done >= options.images:
            break
    seconds["train"] = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "images": done, **peak.end(), "loss": float(loss)}))


def read(options):
    """Read in this process as training would, with nothing else to do, and print the seconds."""
    from pyro_vae import data

    rows = data.load(options.path, mapped=True, validation=0, test=0).train
    began, done = time.perf_counter(), 0
    for batch in rows.stored(BATCH, shuffle=True):
        done += len(batch[0])
        if done >= options.images:
            break
    print(json.dumps({"seconds": time.perf_counter() - began, "images": done}))


def child(options, scratch, what, size):
    """What a process prints that measures one thing at so many images, which it reads anew."""
    folder = scratch / str(size)
    forget(folder)
    given = ["--measure", what, "--path", folder, "--images", options.images]
    given += ["--threads", options.threads, "--mode", options.mode]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, given)],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what}: the process for {size:,} images failed")
    return json.loads(done.stdout)


def cases(options):
    """Numbers of images, and where they are."""
    for size in options.sizes:
        for where in ("on disk", "in memory"):
            if where == "on disk" or size <= IN_MEMORY:
                yield size, where


def collect(options, scratch):
    """The rows of all cases, each with a process in every round, and readings of the largest."""
    needed = sum(options.sizes) * 784
    if (free := shutil.disk_usage(scratch).free) < 1.05 * needed:
        raise SystemExit(
            f"{needed / 2**30:.1f} GiB of images do not fit into {scratch}, which has "
            f"{free / 2**30:.1f} GiB left; give another folder by --scratch, or --largest"
        )
    for size in options.sizes:
        speed.say(f"writing {size:,} images")
        synthesise(scratch / str(size), size)
    rows = {case: {"images": case[0], "where": case[1], "rounds": []} for case in cases(options)}
    for number, case in itertools.product(range(options.rounds), rows):
        speed.say(f"round {number + 1}: {case[0]:,} images {case[1]}")
        rows[case]["rounds"].append(child(options, scratch, case[1], case[0]))
    largest = max(options.sizes)
    readings = [child(options, scratch, "reading", largest) for _ in range(options.rounds)]
    return list(rows.values()), {"of": largest, "rounds": readings}


def microseconds(row):
    """What an image costs, as the median over the rounds."""
    return statistics.median(1e6 * r["seconds"]["train"] / r["images"] for r in row["rounds"])


def mebibytes(row, key):
    """The greatest peak of the rounds."""
    return max(each[key] for each in row["rounds"]) / 2**20


def table(rows):
    """Markdown of all cases."""
    lines = [
        "| images | GB | where | µs per image | to the fewest | s to load "
        "| peak without files, MiB | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = {}
    for row in rows:
        cost, where = microseconds(row), row["where"]
        first.setdefault(where, cost)
        load = statistics.median(each["seconds"]["load"] for each in row["rounds"])
        cells = [
            f"{row['images']:,}",
            f"{row['images'] * 784 / 1e9:.2g}",
            where,
            f"{cost:.1f}",
            f"{cost / first[where]:.2f}",
            f"{load:.2f}",
            f"{mebibytes(row, 'anonymous'):,.0f}",
            f"{mebibytes(row, 'resident'):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(results):
    """Markdown of everything in the results."""
    trained, rounds = results["rows"][0]["rounds"][0]["images"], len(results["rows"][0]["rounds"])
    about = (
        f"{trained:,} images of all epochs together, in batches of {BATCH}, `mode="
        f'"{results["mode"]}"`; times are medians of {rounds} rounds, peaks the greatest.'
    )
    reading = (
        f"With nothing else to do, batches of {results['reading']['of']:,} images come from the "
        f"disk at {disk(results) / 1e9:.2f} GB/s."
    )
    return "\n\n".join([speed.where(results), about, table(results["rows"]), reading])


def disk(results):
    """Bytes a second that are read, shuffled, of files that are not in the system's cache."""
    rates = [784 * each["images"] / each["seconds"] for each in results["reading"]["rounds"]]
    return statistics.median(rates)


def limit(results, processes):
    """Markdown on 10^9 images and 64 processes: a model of a step, and what it says.

    A step of b images takes max(b t, b s / D) + e: computing at t an image, with the reading of
    the next window beside it, s bytes an image at D bytes a second, and then the exchange,
    e = 2 (1 - 1/N) G / B + 2 log2(N) L, of N processes that send each other G bytes of gradients
    over links of B bytes a second and latency L.
    """
    images, count, latency, size = 10**9, 64, 1e-5, processes["batch_size"]
    one = statistics.median(processes["images_per_second"]["one"])
    lines = [
        "| a process computes | images/s | and reads | link 1.25 GB/s | 12.5 GB/s | 50 GB/s |",
        "|---|---|---|---|---|---|",
    ]
    for factor in (1, 10, 100, 1000):
        compute, read = size / (one * factor), size * 784 / disk(results)
        cells = []
        for link in (1.25e9, 12.5e9, 50e9):
            wire = 2 * (1 - 1 / count) * processes["exchange"]["bytes"] / link
            wire += 2 * math.log2(count) * latency
            step = max(compute, read) + wire
            minutes = images / (count * size) * step / 60
            part = max((compute, "computing"), (read, "disk"), (wire, "exchange"))[1]
            cells.append(f"{minutes:.1f} min, {compute / step:.0%}, {part}")
        name = "as measured here" if factor == 1 else f"{factor} times as fast"
        speed_of_one = f"{one * factor:,.0f} | {one * factor * 784 / 1e6:,.0f} MB/s"
        lines.append(f"| {name} | {speed_of_one} | {' | '.join(cells)} |")
    gradients = processes["exchange"]["bytes"] / 1e6
    about = (
        f"Measured: {one:,.0f} images a second of one process on one thread, {gradients:.1f} MB "
        f"of gradients, {disk(results) / 1e9:.2f} GB/s from this disk. Assumed: links "
        f"and devices as named, a latency of 10 µs, batches of {size} for each process. Cells: "
        f"minutes for one pass, share of the time in which a process computes, and what takes "
        f"longest."
    )
    return f"{about}\n\n" + "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="numbers of images")
    parser.add_argument("--largest", type=int, help="one more, such as 10_000_000")
    parser.add_argument("--images", type=int, default=500_000, help="images that are trained on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", default="compiled", help="of CompiledSVI")
    parser.add_argument("--scratch", type=Path, help="folder for the images, for the time being")
    parser.add_argument("--report", action="store_true", help="only print what --out holds")
    parser.add_argument("--readme", action="store_true", help="write the report into README.md")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cpu"
    options.sizes += [options.largest] if options.largest else []
    if any(size < 1 or size % BATCH for size in options.sizes):
        parser.error(f"numbers of images are multiples of {BATCH}, the size of a batch")
    return options


def main():
    options = arguments()
    if options.measure:
        (read if options.measure == "reading" else measure)(options)
        return
    file = options.out / "scale.json"
    if not options.report:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            rows, reading = collect(options, Path(scratch))
        results = {"machine": speed.machine(options), "mode": options.mode}
        results |= {"rows": rows, "reading": reading}
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
    text = report(json.loads(file.read_text()))
    print(text)
    if options.readme:
        speed.write(text, FOLDER / "README.md", MARKS)
    if options.readme and (processes := options.out / "processes.json").exists():
        both = json.loads(file.read_text()), json.loads(processes.read_text())
        speed.write(limit(*both), FOLDER / "README.md", LIMIT)


if __name__ == "__main__":
    main()
