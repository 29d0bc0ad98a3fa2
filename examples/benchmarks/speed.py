"""How long a step, an epoch and a start take: this package, Pyro, PyTorch, NumPyro, pythae.

    python examples/benchmarks/speed.py --data-dir DATA

Every contender (`contenders/`) trains the same networks by the same bound with Adam at 1e-3, in a
process of its own that stays for all rounds. A round goes through them twice, for a block of
steps each and for an epoch each: A B C, A B C. Each is started twice, with an empty folder for
what it compiles (cold) and with the one that this filled (warm); start-up is the time from the
birth of the process to the end of its first step, imports included. A step is timed in blocks, on
batches that are ready in memory, binarised at one half. An epoch is what the library's users do
with the data, the last, smaller batch included where the library allows it. Reported are medians
over the rounds, and of ratios the medians of those within a round, which a change of the
machine's pace leaves alone.

Contenders whose packages are missing are left out: ``pip install '.[bench]'``. ``--linear`` shows
how this package's costs grow in draws and data.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import contenders
import numpy as np
from contenders import CONTENDERS, SIZES

FOLDER = Path(__file__).parent
OURS, FIRST = "pyro_vae", "784-400-20"
MARKS = {  # on the page, of each device
    "cpu": ("<!-- speed.py writes from here -->", "<!-- to here -->"),
    "cuda": ("<!-- speed.py --device cuda writes from here -->", "<!-- to here, of a GPU -->"),
}
PACKAGES = ["torch", "pyro-ppl", "jax", "numpyro", "pythae", "torchvision", "numpy"]
ROWS = 60_000  # images of an epoch, to which a part is scaled
WARMUP = 200  # steps before anything is timed
DRAWS = [1, 2, 5, 10, 20, 35, 50]
PARTS = [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]

# What is promised on each device: the measure, and the most that it may be.
PROMISES = {
    "cpu": [
        ("step, to the floor", "784-400-20", "step", "floor", 1.4),
        ("step, to `pyro.infer.SVI`", "784-400-20", "step", "Pyro", 0.42),
        ("step, to PyTorch", "784-400-20", "step", "PyTorch", 0.55),
        ("step, to PyTorch, compiled", "784-400-20", "step", "PyTorch, compiled", 0.8),
        ("epoch, to NumPyro", "784-400-20", "epoch", "NumPyro", 0.6),
        ("epoch, to pytorch/examples", "784-400-20", "epoch", "pytorch/examples", 0.3),
        ("epoch, to pythae", "784-400-20", "epoch", "pythae", 0.6),
        ("peak memory, to PyTorch", "784-400-20", "memory", "PyTorch", 1.1),
        ("step with 50 draws, to the floor", "IWAE", "step", "floor", 1.7),
    ],
    "cuda": [("step, to `pyro.infer.SVI`", "784-400-20", "step", "Pyro", 0.1)],
}


class Process:
    """A contender in its own process, which answers one request at a time."""

    def __init__(self, name, size, options, cache):
        self.name, self.size, self.times = name, size, {}
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, name, size, options.data_dir, options.device, options.threads)
        self.process = context.Process(target=contenders.serve, args=arguments, daemon=False)
        with environment(options.threads, cache, pinned=not options.small):
            began = time.perf_counter()
            self.process.start()
        theirs.close()
        for expected in ("imported", "built", "stepped"):
            self.expect(expected)
            self.times[expected] = time.perf_counter() - began

    def expect(self, request):
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"the process of {self.name} died") from None
        if kind == "missing":
            self.process.join()
            raise ModuleNotFoundError(value)
        if kind == "failed":
            raise SystemExit(f"{self.name} failed:\n{value}")
        assert kind == request
        return value

    def __call__(self, request, *arguments):
        self.pipe.send((request, *arguments))
        return self.expect(request)

    def end(self):
        self.pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


@contextlib.contextmanager
def environment(threads, cache, *, pinned):
    """The same cores and threads for every process begun here, and a place for compiled code."""
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    before = dict(os.environ)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(ours)
    if pinned and cores and len(cores) > threads:  # XLA asks for no number, it looks at the cores
        os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if cores:
            os.sched_setaffinity(0, cores)


def start(name, size, options):
    """Start a contender cold, then warm, and return the warm one with its times; or None."""
    shared = options.small or options.linear  # where start-up is not the question
    once = shared or options.once
    cache = options.scratch if shared else tempfile.mkdtemp(dir=options.scratch)
    try:
        cold = warm = Process(name, size, options, cache)
        if not once:
            cold.end()
            warm = Process(name, size, options, cache)
    except ModuleNotFoundError as error:
        say(f"{name} is left out ({error}); pip install '.[bench]'")
        return None
    except SystemExit as error:
        if name == "floor" or name.startswith(OURS):
            raise
        say(f"{name} is left out, since it cannot start: {error}")
        return None
    warm.times = {"cold": cold.times} if once else {"cold": cold.times, "warm": warm.times}
    return warm


def measure(cases, options):
    """One row of figures for each case, a label, a contender's name and a size, in turn."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for label, name, size in cases:
            process = start(name, size, options)
            if process:
                stack.callback(process.end)
                processes[label] = process
        rows = {label: begin(process, options) for label, process in processes.items()}
        for index in range(max(options.rounds, options.epochs)):
            for label, process in processes.items() if index < options.rounds else ():
                count = rows[label]["count"]
                rows[label]["steps"].append(1e3 * process("timed", count) / count)
            for label, process in processes.items() if index < options.epochs else ():
                if process.name == OURS:
                    seconds, to_steps = beside_steps(process, rows[label])
                    rows[label]["to_steps"].append(to_steps)
                else:
                    seconds = process("epoch")
                if seconds is not None:
                    rows[label]["epochs"].append(seconds)
        for label, process in processes.items():
            rows[label]["memory"] = process("memory")
    return rows


def beside_steps(process, row):
    """Seconds of an epoch, and its ratio to as many bare steps, just before and after it.

    It does not begin the warmer for this, since ours is the second of two epochs anyway.
    """
    before = process("timed", row["count"])
    seconds = process("epoch")
    after = process("timed", row["count"])
    bare = (before + after) / 2 / row["count"]
    return seconds, seconds / (math.ceil(row["rows"] / row["batch"]) * bare)


def begin(process, options):
    """The row of a process that has taken its first steps, without figures so far."""
    loss = process("trained", options.warmup)
    once = process("timed", 10) / 10
    if options.epochs:
        process("epoch")  # which meets the smaller last batch, and is not counted
    return {
        "contender": process.name,
        "batch": process.size.batch,
        "particles": process.size.particles,
        "rows": process.size.rows,
        "start": process.times,
        "loss": loss,
        "count": max(round(options.seconds / once), 10),
        "steps": [],
        "epochs": [],
        "to_steps": [],
    }


def value(row, measure):
    """The figure of one row: milliseconds, seconds for the whole data, or MiB."""
    if measure == "step":
        return statistics.median(row["steps"])
    if measure == "epoch":
        return statistics.median(row["epochs"]) * ROWS / row["rows"] if row["epochs"] else None
    peak = row["memory"]["device"] or row["memory"]["host"]
    return peak / 2**20


def ratio(rows, one, other, measure):
    """How many times the figure of `other` that of `one` is, or None; of times, round by round."""
    if one not in rows or other not in rows:
        return None
    if measure == "memory":
        return value(rows[one], measure) / value(rows[other], measure)
    pairs = zip(rows[one][f"{measure}s"], rows[other][f"{measure}s"], strict=False)
    ratios = [first / second for first, second in pairs]
    return statistics.median(ratios) if ratios else None


def shown(number, digits=2):
    return "" if number is None else f"{number:.{digits}f}"


def table(size, rows):
    """Markdown of one size."""
    rounds, epochs = (max(len(row[kind]) for row in rows.values()) for kind in ("steps", "epochs"))
    lines = [
        f"**{size}**: {SIZES[size].about}; medians of {rounds} rounds; epochs: {epochs}.",
        "",
        "| contender | ms per step | images per s | to the floor | ours to it | s per epoch "
        "| ours to it | start-up, cold / warm, s | peak, MiB | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        step, epoch = value(row, "step"), value(row, "epoch")
        cells = [
            shown(step),
            f"{1e3 * row['batch'] / step:,.0f}",
            shown(ratio(rows, name, "floor", "step")),
            shown(ratio(rows, OURS, name, "step")),
            shown(epoch, 1 if epoch and epoch >= 1 else 2),
            shown(ratio(rows, OURS, name, "epoch")),
            " / ".join(f"{times['stepped']:.1f}" for times in row["start"].values()),
            f"{value(row, 'memory'):.0f}",
            shown(row["loss"], 1),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def promises(results):
    """Markdown of what is promised, and whether it is kept."""
    lines = ["| measure | ratio | at most | kept |", "|---|---|---|---|"]

    def add(what, found, most, unit=""):
        if found is not None:
            kept = "yes" if found <= most else "NO"
            lines.append(f"| {what} | {found:.2f}{unit} | {most:g}{unit} | {kept} |")

    sizes = results["sizes"]
    device = results.get("device", "cpu")
    for what, size, kind, other, most in PROMISES[device]:
        add(what, ratio(sizes.get(size, {}), OURS, other, kind), most)
    ours = sizes.get("784-400-20", {}).get(OURS)
    if ours and device == "cpu":
        if ours.get("to_steps"):
            add("epoch, to our own bare steps", statistics.median(ours["to_steps"]), 1.05)
        for how, times in ours["start"].items():
            add(f"start-up, {how}", times["stepped"], {"cold": 15, "warm": 5}[how], " s")
    return "\n".join(lines) if len(lines) > 2 else ""


def line(x, y):
    """Slope, intercept and R^2 of a straight line by least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.subtract(y, slope * np.asarray(x) + intercept)
    return float(slope), float(intercept), float(1 - residual.var() / np.var(y))


def linear(options):
    """Milliseconds per step by draws, and seconds per epoch by images, of each contender."""
    found = {}
    iwae, plain = SIZES["IWAE"], SIZES["784-400-20"]
    for name in options.contenders:
        draws, parts = options.draws, options.parts
        sizes = {k: dataclasses.replace(iwae, particles=k, rows=iwae.batch * 20) for k in draws}
        steps_only = argparse.Namespace(**{**vars(options), "epochs": 0})
        steps = measure([(k, name, size) for k, size in sizes.items()], steps_only)
        sizes = {n: dataclasses.replace(plain, rows=n) for n in parts}
        epochs = measure([(n, name, size) for n, size in sizes.items()], options)
        figures = {
            "draws": {str(k): value(row, "step") for k, row in steps.items()},
            "images": {str(n): statistics.median(row["epochs"]) for n, row in epochs.items()},
        }
        found[name] = {
            key: {"values": pairs, "line": line([int(x) for x in pairs], [*pairs.values()])}
            for key, pairs in figures.items()
            if len(pairs) > 1
        }
    return found


def growth(found):
    """Markdown of the straight lines."""
    lines = ["| contender | cost | by | slope | intercept | R² |", "|---|---|---|---|---|---|"]
    what = {"draws": ("ms per step, batch 20", 1), "images": ("s per epoch", 1000)}
    for name, axes in found.items():
        for key, fit in axes.items():
            (cost, unit), (slope, intercept, r2) = what[key], fit["line"]
            by = key if unit == 1 else f"1,000 {key}"
            cells = [name, cost, by, f"{slope * unit:.3g}", f"{intercept:.3g}", f"{r2:.4f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(options):
    """Where and with what the figures were taken."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [each.split(":")[1].strip() for each in lines if each.startswith("model name")]
        model = names[0] if names else model
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if options.device == "cuda":
        import torch

        model = f"{torch.cuda.get_device_name()}, {model}"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def where(results):
    """The machine and the versions, in a sentence."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; Python "
        f"{machine['python']}, {versions}."
    )


def report(results):
    """Markdown of everything in the results."""
    parts = [
        where(results),
        promises(results),
        *(table(size, rows) for size, rows in results["sizes"].items()),
    ]
    if results.get("linear"):
        parts.append(growth(results["linear"]))
    return "\n\n".join(part for part in parts if part)


def write(text, page, marks):
    """Put a text between the two marks on a page."""
    first, last = marks
    before, rest = page.read_text().split(first)
    after = rest.split(last, 1)[1]  # others on the page may end alike
    page.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}")


def draw(results):
    """Bars of the milliseconds of a step, a panel for each size."""
    from matplotlib.figure import Figure

    panels = results["sizes"]
    counts = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(7.5, 0.6 * len(panels) + 0.26 * sum(counts)), dpi=120)
    figure.set_layout_engine("constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (size, rows) in zip(every, panels.items(), strict=True):
        names, values = list(rows), [value(row, "step") for row in rows.values()]
        ours = [name.startswith(OURS) for name in names]
        bars = axes.barh(names, values, color=["C1" if own else "C0" for own in ours])
        axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{size}: milliseconds per step", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def imitation(folder, rows=600):
    """Write random images in the format of MNIST, for a trial of everything in seconds."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for part, count in (("train", rows), ("t10k", 10)):
        images = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = draws.integers(0, 10, count, dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + values.ndim, *values.shape], ">u4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())


def say(text):
    print(text, file=sys.stderr, flush=True)


def prepare(options):
    """Data where the contenders can read them, and a device that is there."""
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("this machine has no GPU that torch can use; leave out --device")
    if not options.small:
        from pyro_vae import data

        data.load("mnist", directory=options.data_dir)  # fetched and unpacked where need be
        options.data_dir = str(options.data_dir or data.folder())
        return
    options.data_dir = str(Path(options.scratch, "data"))
    imitation(Path(options.data_dir))
    options.rounds, options.epochs, options.seconds, options.warmup = 1, 1, 0.01, 20
    options.threads = 1  # threads that wait for a core on a busy machine would take minutes
    options.draws, options.parts = [1, 2, 3], [200, 400, 600]
    for name, size in SIZES.items():
        SIZES[name] = dataclasses.replace(
            size, hidden=16, batch=20, particles=min(size.particles, 3), rows=600
        )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=None)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=None)
    parser.add_argument("--rounds", type=int, default=7, help="blocks of steps of each contender")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a block")
    parser.add_argument("--epochs", type=int, default=5, help="epochs that are timed; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="threads, alike for all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--once", action="store_true", help="only one start of each, a cold one")
    parser.add_argument("--linear", action="store_true", help="growth in draws and data instead")
    parser.add_argument("--small", action="store_true", help="random images, for a trial")
    parser.add_argument("--report", action="store_true", help="only print what --out holds")
    parser.add_argument("--readme", action="store_true", help="write the report into README.md")
    parser.add_argument("--out", type=Path, help="folder of results (default: results/ here)")
    options = parser.parse_args()
    if options.out is None:  # a trial leaves the results alone
        options.out = Path(tempfile.mkdtemp()) if options.small else FOLDER / "results"
    options.warmup, options.draws, options.parts = WARMUP, DRAWS, PARTS
    if options.sizes is None:
        options.sizes = [k for k, size in SIZES.items() if size.device in ("", options.device)]
    if options.contenders is None:
        options.contenders = [OURS] if options.linear else list(CONTENDERS)
    return options


def collect(options, results, keep):
    """Measure what the options ask for, put it into the results and keep them, size by size."""
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = scratch
        prepare(options)
        here = {"device": options.device, "machine": machine(options)}
        before = {"device": "cpu", **results}
        if results["sizes"] and any(before[key] != value for key, value in here.items()):
            say("the figures of another machine, or of other versions, are dropped")
            results["sizes"] = {}
            results.pop("linear", None)
        results |= here
        if options.linear:
            results["linear"] = linear(options)
            keep(results)
        for name in [] if options.linear else options.sizes:
            say(f"measuring {name}")
            size = SIZES[name]
            cases = [(key, key, size) for key in options.contenders if CONTENDERS[key].has(size)]
            results["sizes"][name] = measure(cases, options)
            keep(results)


def main():
    options = arguments()
    file = options.out / ("speed.json" if options.device == "cpu" else "speed_gpu.json")
    results = json.loads(file.read_text()) if file.exists() else {"sizes": {}}

    def keep(results):
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        if results["sizes"]:
            draw(results).savefig(file.with_suffix(".png"))

    if not options.report:
        collect(options, results, keep)
    if options.readme:
        chart = f"![Milliseconds per step of every contender](results/{file.stem}.png)"
        write(f"{report(results)}\n\n{chart}", FOLDER / "README.md", MARKS[options.device])
        if options.device == "cpu":
            first = table(FIRST, results["sizes"][FIRST])
            write(f"{where(results)}\n\n{first}", FOLDER.parents[1] / "README.md", MARKS["cpu"])
    print(report(results))


if __name__ == "__main__":
    main()
