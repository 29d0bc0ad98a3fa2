"""Kill training at random moments, resume it, and compare the weights byte for byte.

    python examples/benchmarks/kill.py

One run trains to its end. Then as many others of the same configuration as there are kills are
stopped by SIGKILL, each at a moment drawn uniformly from the time that training takes, and every
other one of them at the first moment from there on at which a checkpoint is being written, which
the unfinished file that it leaves behind proves. `pyro-vae train --resume` takes each to its end.
Its weights, the last and the best, must be the very bytes of the run that was never stopped, and
its metrics the same rows, each once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

WEIGHTS = ("last.safetensors", "best.safetensors")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*options):
    return [sys.executable, "-m", "pyro_vae", "train", *map(str, options)]


def start(arguments):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(arguments, env=ENVIRONMENT, **quiet)


def until(condition, process):
    """Wait until training has come to something; whether it did before it ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(1e-4)
    return False


def metrics(folder):
    """The rows of a run, without what they say of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "images_per_second"} for row in rows]


def reached(folder):
    """The last step of which a run has kept a checkpoint."""
    return max(int(path.stem) for path in (folder / "checkpoints").glob("*.safetensors"))


def kill(folder, options, delay, *, writing, steps):
    """Begin a run, kill it, and go on with it to its end; None where it was over before that.

    A run is over once the last of its steps is kept, although its pictures may not be.
    """
    states = folder / "checkpoints"
    process = start(command(*options, "--out", folder))
    begun = until(lambda: (states / "000000001.safetensors").exists(), process)
    time.sleep(delay)
    if writing:
        begun = until(lambda: any(states.glob("*.part")), process)
    process.kill()
    process.wait()
    if not begun or process.returncode != -9 or reached(folder) == steps:
        return None
    row = {
        "after": round(delay, 3),
        "writing": any(states.glob("*.part")),
        "epochs": (folder / "metrics.jsonl").read_text().count("\n"),
        "step": reached(folder),
    }
    done = subprocess.run(
        command("--resume", folder), env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"the run could not be resumed: {done.stderr}")
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--mode", default="captured")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    given = ["--data", options.data, "--epochs", options.epochs, "--mode", options.mode]
    given += ["--threads", 1, "--checkpoint", 0.002]
    if options.data_dir:
        given += ["--data-dir", options.data_dir]
    moments, rows = random.Random(options.seed), []

    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        process = start(command(*given, "--out", whole))
        until(lambda: (whole / "checkpoints" / "000000001.safetensors").exists(), process)
        began = time.perf_counter()
        until(lambda: (whole / "last.safetensors").exists(), process)
        took = time.perf_counter() - began
        if process.wait():
            raise SystemExit("the run that is not stopped failed")
        steps = reached(whole)
        for number in range(options.kills):
            row, tries = None, 0
            while row is None:  # a machine that is faster now than before may be done sooner
                folder, tries = Path(scratch) / f"killed-{number}-{tries}", tries + 1
                if tries > 5:
                    raise SystemExit("training ends before it can be killed; give more epochs")
                delay = moments.uniform(0, 0.9 * took)
                row = kill(folder, given, delay, writing=number % 2 == 1, steps=steps)
                took = took if row else delay
            row["equal"] = metrics(folder) == metrics(whole) and all(
                (folder / name).read_bytes() == (whole / name).read_bytes() for name in WEIGHTS
            )
            rows.append(row)
            print(
                f"killed after {row['after']:.2f} s{' while writing' * row['writing']}, resumed "
                f"from step {row['step']}: {'equal' if row['equal'] else 'DIFFERENT'}",
                flush=True,
            )

    equal, writing = (sum(row[key] for row in rows) for key in ("equal", "writing"))
    print(f"{equal} of {len(rows)} equal, {writing} of them killed while a checkpoint was written")
    results = {
        "data": options.data,
        "mode": options.mode,
        "epochs": options.epochs,
        "steps": steps,
        "seed": options.seed,
        "torch": torch.__version__,
        "equal": equal,
        "kills": rows,
    }
    (options.out / "kill.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
