"""Reports on finished runs: the commands evaluate and compare."""

from __future__ import annotations

__all__ = ["compare", "evaluate"]

import csv
import hashlib
import io
import itertools
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import scipy
import torch
from torch.distributions import constraints
from tqdm import tqdm

from pyro_vae import checkpoints, plots
from pyro_vae.diagnostics import calibration, decompose
from pyro_vae.distributed import Ranks
from pyro_vae.evaluation import Estimate, bound, log_likelihood
from pyro_vae.parts import KINDS, Part
from pyro_vae.runs import (
    Run,
    SplitName,
    bounds,
    dataset_batches,
    in_threads,
    print_paths,
    score,
    support,
)
from pyro_vae.scoring import Batch
from pyro_vae.splits import Split, dequantised
from pyro_vae.vae import VAE

Array = npt.NDArray[Any]

# What reading a damaged file raises.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
# Settings that say where and how a run is computed, and not what it is.
_WHERE = ("allow", "data_dir", "mode", "device", "threads", "checkpoint", "out", "resume")
_BLOCK = 250  # data whose estimates are written at a time
_ESCAPES = str.maketrans({each: f"\\{each}" for each in "_%&#${}"})  # of LaTeX
_ARRAYS = ("log_likelihood", "monte_carlo_error", "effective_sample_size", "pareto_k")


def evaluate(
    run: Run,
    *,
    split: SplitName = "test",
    particles: int = 10,
    samples: int = 5000,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Print what a run is worth: the bound and its parts, L_K with its errors, calibration.

    Arrays of each datum and pictures go to the run's folder. An estimate that was stopped
    goes on where it was, and one of other weights or data, by another seed or by more samples
    is set aside under a name of its own. Processes started by torchrun share L_K, which is the
    same for any number of them, and the first one does the rest.

    Args:
        run: The run.
        split: Split to evaluate.
        particles: Draws of z for each datum, whose bounds are averaged (without importance
            weights).
        samples: Draws K for each datum in the importance-sampling estimate L_K of log p(x); 0
            to leave it out, and without --json all but a line on the bound.
        threads: Threads of the processor (default: as many as torch takes).
        json: Print JSON in place of the table; its "reliable" is false where L_K is not to be
            trusted for some data, and null where there are too few samples to tell.
    """
    if samples < 0:
        raise ValueError(f"L_K takes 1 sample or more, or 0 to leave it out, not {samples}")
    with in_threads(torch.get_num_threads() if threads is None else threads):
        _evaluate(run, split, particles, samples, json)


def _evaluate(run: Run, split: SplitName, particles: int, samples: int, json: bool) -> None:
    vae, part, first = run.vae(), run.split(split), Ranks.here().first
    if not samples and not json:
        if first:
            print(score(vae, part, split, particles=particles))
        return
    if len(part) < 2:
        raise ValueError(
            f"'{run.run}' has a single {split} datum, which has no spread: take another --split, "
            f"or other data by --data"
        )
    part = part.read()
    batches = list(dataset_batches(part))
    batch = tuple(torch.cat(columns) for columns in zip(*batches, strict=True))
    halves = bound(vae, batches, particles=particles) if first else None
    estimate = _estimated(run, vae, batch, split, samples, part.level) if samples else None
    if halves is None:
        return
    found: dict[str, Any] = {
        "run": run.run,
        "split": split,
        "data": len(part),
        "unit": getattr(vae.likelihood, "unit", "nats"),
        **halves.summary(),
    }
    arrays = {key: getattr(halves, key).numpy(force=True) for key in ("reconstruction", "kl")}
    arrays |= {"unit": np.array(found["unit"]), "weights": np.array(run.weights)}
    pictures = {}
    if estimate:
        found |= {f"L_{samples}_{key}": value for key, value in estimate.summary().items()}
        found[f"L_{samples}"] = found.pop(f"L_{samples}_L_{samples}")
        share = found[f"L_{samples}_unreliable"]
        # Of too few draws there is no k-hat to tell by.
        found["reliable"] = None if estimate.pareto_k.isnan().any() else not share
        found["bits_per_dimension"] = estimate.bits_per_dimension
        found["bits"] = _bits(vae, part, batch, found["bits_per_dimension"])
        arrays |= _kept(estimate)
        pictures["k_hat"] = plots.k_hat(arrays["pareto_k"], estimate.threshold)
    pyro.set_rng_seed(run.seed)
    parts = decompose(vae, batch)
    found |= {"decomposition": parts.summary(), "verdict": parts.verdict}
    found["saturated"] = parts.saturated
    if parts.marginal_dimension_kl is not None:
        arrays["marginal_dimension_kl"] = parts.marginal_dimension_kl.numpy(force=True)
    if parts.dimension_kl is not None:
        arrays["dimension_kl"] = parts.dimension_kl.numpy(force=True)
        pictures["kl"] = plots.dimensions(arrays["dimension_kl"])
    try:
        ranks = calibration(vae, batch)
    except ValueError as error:
        found["calibration"] = str(error)
    else:
        found["calibration"] = {"p_value": _family(ranks.p_values), "passed": ranks.passed}
        arrays["ranks"] = ranks.ranks.numpy(force=True)
        pictures["calibration"] = plots.ranks(arrays["ranks"], ranks.draws)
    with torch.no_grad():
        arrays["z"] = torch.cat([vae.encode(*each).sample() for each in batches]).numpy(force=True)
    labels = None if part.labels is None else part.labels.numpy(force=True)
    pictures["latents"] = plots.scatter(arrays["z"], labels)
    path, key = Path(run.run) / f"evaluation-{split}.npz", _key(run, split, samples, batch)
    aside = _set_aside(path, key)
    _write(path, arrays, key)
    if estimate:  # not before, since what comes after an estimate may fail
        _part(run, split).unlink(missing_ok=True)
    paths = aside + [
        plots.save(figure, Path(run.run) / f"evaluation-{split}-{name}.png")
        for name, figure in pictures.items()
    ]
    if json:
        print(dumps(_plain(found), indent=2))
        return
    print(_table(found, samples, split))
    print_paths(paths)


def compare(
    runs: Sequence[str],
    *,
    by: str = "prior",
    pair: str = "seed",
    split: SplitName = "test",
    out: str | None = None,
) -> None:
    """Print differences between runs that differ in one setting, paired by another.

    Each run must have been evaluated. Differences are to the runs that have the setting of
    the first one, with 95 % t-intervals over the pairs. Where a run has no partner, runs differ
    in other settings too, or L_K is not to be trusted for a part of the data, that is said.

    Args:
        runs: The folders of the runs.
        by: The setting, of config.yaml, that is compared.
        pair: The setting that tells which runs belong together.
        split: Split that they were evaluated on.
        out: Folder to write comparison.csv and comparison.tex to (default: they are not written).
    """
    if out is not None and not Path(out).is_dir():
        raise FileNotFoundError(f"there is no folder '{out}' to write to; make it")
    table: dict[str, dict[str, dict[str, float]]] = {}
    places: dict[tuple[str, str], str] = {}
    variants: dict[str, Any] = {}
    seen: dict[str, tuple[str, tuple[str, ...]]] = {}
    others: dict[tuple[str, str], set[str]] = {}
    doubtful: dict[str, float] = {}
    for run in runs:
        with Run(run).settings() as settings:
            for key in (by, pair):
                if key not in settings:
                    raise ValueError(f"'{run}' has no setting '{key}' in its config.yaml")
            variant, partner = (_named(settings[key], key) for key in (by, pair))
            variants[variant] = settings[by]
            if by != "epochs" and settings.get("patience") is None:
                settings["epochs done"] = _lines(Path(run) / "metrics.jsonl")
            settings["processes"] = _processes(Path(run) / "config.yaml")
            for key in settings.keys() - {by, pair, *_WHERE}:
                value = dumps(settings[key], sort_keys=True, default=str)
                others.setdefault((key, partner), set()).add(value)
        values, kind, share = _values(run, split)
        doubtful[variant] = max(share, doubtful.get(variant, 0.0))
        _check_alike(seen.setdefault("", (run, kind[:3])), (run, kind[:3]))
        _check_alike(seen.setdefault(partner, (run, kind)), (run, kind))
        if partner in table.setdefault(variant, {}):
            raise ValueError(
                f"these runs cannot be paired: two have {by} {variant} and {pair} {partner}; give "
                f"one of them, or another --pair"
            )
        table[variant][partner] = values
        places[variant, partner] = run
    if len(table) < 2:
        raise ValueError(f"these runs cannot be compared by {by}: all have {next(iter(table))}")
    names = _short(variants, by) if by in KINDS else {each: each for each in variants}
    rows = _differences({names[each]: values for each, values in table.items()}, by, pair)
    print(_text(rows))
    paired = _partners(table)
    if lone := [run for (each, partner), run in places.items() if partner not in paired[each]]:
        print(f"without a partner of the same {pair}, and left out: {', '.join(lone)}")
    if any(doubtful.values()):
        shares = ", ".join(f"{names[each]} {share:.1%}" for each, share in doubtful.items())
        print(
            f"k-hat is high for data of {shares} (of a run, at most): their L_K may be far below "
            f"log p(x), so that a difference may be one of the posteriors and not of the models"
        )
    if also := sorted({key for (key, _), values in others.items() if len(values) > 1}):
        print(f"runs of a pair differ in {', '.join(also)} too, so that it may not be {by} alone")
    if alone := [str(row[by]) for row in rows[1:] if row["pairs"] == 1]:
        print(
            f"no interval for {', '.join(alone)}, with one pair each: it takes two at least, so "
            f"train and evaluate with another {pair} too"
        )
    if out is None:
        return
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [Path(out) / "comparison.csv", Path(out) / "comparison.tex"]
    for path, text in zip(paths, (content.getvalue(), _latex(rows)), strict=True):
        checkpoints.write(path, text.encode())
    print(f"{paths[0]}, {paths[1]}")


def _estimated(
    run: Run, vae: VAE, batch: Batch, split: str, samples: int, level: float | None
) -> Estimate:
    """L_K of all data, block by block, going on with the blocks that are there."""
    path, ranks = _part(run, split), Ranks.here()
    key, size = _key(run, split, samples, batch), len(batch[0])
    before = [path, path.with_name(f"evaluation-{split}.npz")]
    before += sorted(path.parent.glob(f"evaluation-{split}-L_{samples}*.npz"))
    kept = next(filter(None, (_read(each, key) for each in before)), None)
    done = [_restored(kept, samples)] if kept else []
    if ranks.first:
        _set_aside(path, key)
    start = len(done[0].log_likelihood) if done else 0
    shown = f"L_{samples}" if ranks.first else ""
    with tqdm(
        total=size, initial=start, unit="datum", desc=shown, leave=False, disable=not shown
    ) as bar:
        while start < size:
            mine = min(start + ranks.rank * _BLOCK, size)
            pyro.set_rng_seed(run.seed + mine)  # so that it is the same however it is shared out
            rows = tuple(tensor[mine : mine + _BLOCK] for tensor in batch)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the importance weights")
                done.append(_gathered(vae, rows, samples, level, ranks))
            start += len(done[-1].log_likelihood)
            bar.update(len(done[-1].log_likelihood))
            if ranks.first:
                _write(path, _kept(Estimate.joined(done)), key)
    return Estimate.joined(done)


def _part(run: Run, split: str) -> Path:
    """Where an estimate is kept until its evaluation is done."""
    return Path(run.run) / f"evaluation-{split}.part.npz"


def _gathered(vae: VAE, rows: Batch, samples: int, level: float | None, ranks: Ranks) -> Estimate:
    """The estimates of a block of data from each process, of which the last may have none."""
    found = None
    if len(rows[0]):
        found = log_likelihood(vae, rows, samples=samples, level=level)
    if ranks.size == 1 and found:
        return found
    own = torch.stack([getattr(found, name) for name in _ARRAYS], -1) if found else None
    together = ranks.gather(rows[0].new_zeros(0, 4, dtype=torch.float64) if own is None else own)
    values: dict[str, Any] = dict(zip(_ARRAYS, together.unbind(-1), strict=True))
    return replace(found, **values) if found else Estimate(**values, samples=samples)


def _kept(estimate: Estimate) -> dict[str, Array]:
    """An estimate as arrays of a file."""
    arrays = {name: getattr(estimate, name).numpy(force=True) for name in _ARRAYS}
    return {
        **arrays,
        "dimensions": np.array(estimate.dimensions or 0),
        "level": np.array(estimate.level),
    }


def _restored(arrays: Mapping[str, Array], samples: int) -> Estimate:
    """The estimate that a file holds."""
    values: Any = {name: torch.as_tensor(arrays[name]) for name in _ARRAYS}
    dimensions = int(arrays["dimensions"]) or None
    return Estimate(**values, samples=samples, dimensions=dimensions, level=float(arrays["level"]))


def _set_aside(path: Path, key: str) -> list[Path]:
    """Keep another estimate under a name of its own, but for one by fewer samples of the same."""
    before = _key_of(path)
    *what, samples = before.split() or ["0"]
    *now, count = key.split()
    if before == key or int(samples) <= (int(count) if what == now else 0):
        return []
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    stem = path.stem.removesuffix(".part")
    names = (path.with_name(f"{stem}-L_{samples}{end}.npz") for end in ends)
    return [path.replace(next(each for each in names if _key_of(each) in (before, "")))]


def _key_of(path: Path) -> str:
    """What the estimate in a file depends on, as `_key` has it; nothing where there is none."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            return str(file["key"]) if "log_likelihood" in file.files else ""
    except _DAMAGE:
        return ""


def _key(run: Run, split: str, samples: int, batch: Batch) -> str:
    """What an estimate depends on, in words, of which `_values` reads the last ones."""
    digest = _weights(Path(run.run) / f"{run.weights}.safetensors")
    return f"{digest} {split} seed {run.seed} data {_digest(batch)} samples {samples}"


def _weights(path: Path) -> str:
    """What tells one file of weights from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _processes(config: Path) -> str:
    """How many processes trained a run, which the header of its configuration says."""
    return (re.findall(r"^# By (\d+) processes", config.read_text(), re.M) or ["1"])[0]


def _digest(batch: Batch) -> str:
    """What tells one set of data, with its context, from another."""
    digest = hashlib.sha256()
    for tensor in batch:
        array = np.ascontiguousarray(tensor.numpy(force=True))
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, key: str) -> dict[str, Array] | None:
    """Arrays that were written under this key."""
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            same = str(file["key"]) == key
            there = same and {*_ARRAYS, "dimensions", "level"} <= set(file.files)
            return {name: file[name] for name in file.files if name != "key"} if there else None
    except _DAMAGE:
        return None


def _write(path: Path, arrays: Mapping[str, Array], key: str) -> None:
    content = io.BytesIO()
    values: dict[str, Any] = {**arrays, "key": np.array(key)}
    np.savez(content, **values)
    checkpoints.write(path, content.getvalue())


def _bits(vae: VAE, part: Split, batch: Batch, value: float | None) -> str | None:
    """What an integer of the data stands for, or why dequantised ones have no bits."""
    if part.view is dequantised and part.level is None:
        return "x is not stored as whole numbers up to 255"
    if value is None:
        return None
    if part.level:
        return "upper bound, 8 bit"
    element = support(vae, *batch[1:])
    top = 1.0 if element is constraints.boolean else bounds(element)[1]
    return {1.0: "1 bit", 255.0: "8 bit"}.get(top, "whole numbers")


def _family(p_values: torch.Tensor) -> float:
    return min(1.0, float(p_values.min()) * len(p_values))


def _plain(value: Any) -> Any:
    """Numbers that JSON knows; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(found: Mapping[str, Any], samples: int, split: str) -> str:
    """Rows of a name, a value and what is to be said of it."""
    parts = found["decomposition"]
    rows: list[tuple[str, str | float, str]] = []
    saturated = ", no verdict: needs more data" if found["saturated"] else ""
    if samples:
        name = f"L_{samples}"
        share, median = found[f"{name}_unreliable"], found[f"{name}_pareto_k"]
        rows.append((name, found[name], f"± {found[f'{name}_standard_error']:.2f} over data"))
        said = "unreliable where k-hat is high" if share else "by the draws of z"
        if found["reliable"] is None:
            said += ", too few for a k-hat"
        rows.append(("  Monte Carlo error", f"{found[f'{name}_monte_carlo_error']:.4f}", said))
        if math.isnan(median):
            rows.append(("  k-hat, median", "none", "too few draws"))
        else:
            rows.append(("  k-hat, median", median, f"too high for {share:.1%} of the data"))
        size = f"{found[f'{name}_effective_sample_size']:.0f}"
        rows.append(("  effective sample size", size, f"of {samples:,}, median"))
        if found["bits"]:
            bits = found["bits_per_dimension"]
            shown = "none" if bits is None else f"{bits:.2f}"
            rows.append(("  bits per dimension", shown, found["bits"]))
    rows += [
        ("ELBO", found["elbo"], f"± {found['standard_error']:.2f} over data"),
        ("  reconstruction", found["reconstruction"], "minus the distortion"),
        ("  KL", found["kl"], "the rate"),
        (
            "    mutual information",
            parts["mutual_information"],
            f"of at most log N = {parts['log_count']:.2f}; "
            f"{parts['mutual_information_without_itself']:.2f} without itself",
        ),
        ("    marginal KL", parts["marginal_kl"], f"of the aggregated posterior{saturated}"),
        ("  active units", f"{parts['active_units']:.0f}", f"of {parts['units']:.0f}"),
    ]
    if "total_correlation" in parts:
        rows.insert(
            -1, ("      total correlation", parts["total_correlation"], f"of q(z){saturated}")
        )
    if isinstance(found["calibration"], str):
        calibrated = f"calibration: {found['calibration']}"
    else:
        passed = "passes" if found["calibration"]["passed"] else "fails"
        p = found["calibration"]["p_value"]
        calibrated = (
            f"calibration of q on simulated data {passed} at 1 % (p = {p:.2g} over all ranks); a "
            f"pass is necessary, not sufficient"
        )
    lines = [f"{split}: {found['unit']}, per datum, means over {found['data']:,} data"]
    for name, value, said in rows:
        shown = value if isinstance(value, str) else f"{value:.2f}"
        lines.append(f"{name:26}{shown:>9}  {said}")
    return "\n".join([*lines, found["verdict"], calibrated])


def _named(setting: Any, key: str) -> str:
    """A setting in a word, the class of a part with its options."""
    if key in KINDS and setting is not None:
        part = setting if isinstance(setting, Part) else Part.of(setting)
        options = ", ".join(f"{name}={value}" for name, value in part.options.items())
        name = str(part.name).rpartition(".")[2]
        return f"{name}({options})" if options else name
    return str(setting)


def _short(variants: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Names of parts with those options only in which parts of one class differ."""
    parts = {
        full: Part.of(setting or {"class_path": "None"}) for full, setting in variants.items()
    }
    short = dict[str, str]()
    for full, part in parts.items():
        alike = [each.options for each in parts.values() if each.name == part.name]
        own = {
            name: value
            for name, value in part.options.items()
            if any(options.get(name) != value for options in alike)
        }
        short[full] = _named(Part(part.name, own), kind)
    return short if len({*short.values()}) == len(short) else {full: full for full in variants}


def _values(run: str, split: str) -> tuple[dict[str, float], tuple[str, ...], float]:
    """Means of an evaluated run, what others must have in common with it, and its bad L_K."""
    path = Path(run) / f"evaluation-{split}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{run}' has not been evaluated: run `pyro-vae evaluate "
            f"{run}{checkpoints.allowing(run)} --split {split}` first"
        )
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            elbo = file["reconstruction"] - file["kl"]
            words = str(file["key"]).split()
            weights, samples, digest = words[0], words[-1], words[-3]
            usual = {"unit": "nats", "weights": "best"}  # of a file of an earlier version
            kind = [str(file[name] if name in file.files else usual[name]) for name in usual]
            values, share = {"ELBO": float(elbo.mean())}, 0.0
            if "log_likelihood" in file.files:
                estimate = _restored(file, int(samples))
                values[f"L_{samples}"] = estimate.mean
                share = float(estimate.unreliable.double().mean())
    except (*_DAMAGE, IndexError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from error
    now = path.with_name(f"{kind[1]}.safetensors")
    if not now.is_file() or _weights(now) != weights:
        raise ValueError(
            f"'{run}' has other weights than when it was evaluated: run `pyro-vae evaluate "
            f"{run}{checkpoints.allowing(run)} --split {split}` again"
        )
    return values, (samples, *kind, digest, str(len(elbo))), share


def _check_alike(first: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]) -> None:
    """Two runs were evaluated alike, as `_values` says, and where they are partners on one set."""
    if first[1] == other[1]:
        return
    weights = f"weights that are {first[1][2]} and {other[1][2]}"
    kinds = ("another number of samples", "another unit", weights)
    differ = [one != another for one, another in zip(first[1], other[1], strict=True)]
    what = next(
        (kind for kind, apart in zip(kinds, differ, strict=False) if apart), "different data"
    )
    raise ValueError(
        f"these runs cannot be paired: '{first[0]}' and '{other[0]}' were evaluated with {what}; "
        f"evaluate them alike"
    )


def _partners(table: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """By what the runs of each variant are paired, of the first one, which is last, with any."""
    (name, base), *rest = table.items()
    paired = {variant: sorted(runs.keys() & base.keys()) for variant, runs in rest}
    return {**paired, name: sorted({*itertools.chain(*paired.values())})}


def _differences(
    table: Mapping[str, Mapping[str, Mapping[str, float]]], by: str, pair: str
) -> list[dict[str, Any]]:
    """For each variant its means, and its paired differences to the first one."""
    base_name, base = next(iter(table.items()))
    paired = _partners(table)
    for variant, partners in paired.items():
        if not partners:
            raise ValueError(
                f"these runs cannot be paired: {by} {variant} and {base_name} have no {pair} in "
                f"common"
            )
    rows = []
    for variant, runs in table.items():
        partners = paired[variant]
        row: dict[str, Any] = {by: variant, "pairs": len(partners)}
        for key in next(iter(base.values())):
            gains = np.array([runs[each][key] - base[each][key] for each in partners])
            row[key] = float(np.mean([runs[each][key] for each in partners]))
            row[f"{key} difference"] = float(gains.mean())
            half = math.nan
            if len(gains) > 1:
                half = float(scipy.stats.t.ppf(0.975, len(gains) - 1) * scipy.stats.sem(gains))
            row[f"{key} low"], row[f"{key} high"] = (
                row[f"{key} difference"] - half,
                row[f"{key} difference"] + half,
            )
        rows.append(row)
    return rows


def _cells(row: Mapping[str, Any], first: bool) -> list[str]:
    """A row in words: values, and differences with their intervals."""
    cells = []
    for key, value in row.items():
        if key.endswith((" low", " high")):
            continue
        if not key.endswith(" difference"):
            cells.append(f"{value:.2f}" if isinstance(value, float) else str(value))
        elif first:
            cells.append("")
        else:
            name = key.removesuffix(" difference")
            low, high = row[f"{name} low"], row[f"{name} high"]
            interval = "" if math.isnan(low) else f" ({low:+.2f} to {high:+.2f})"
            cells.append(f"{value:+.2f}{interval}")
    return cells


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [key for key in rows[0] if not key.endswith((" low", " high"))]
    lines = [heads, *(_cells(row, index == 0) for index, row in enumerate(rows))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _latex(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [key for key in rows[0] if not key.endswith((" low", " high"))]
    lines = [heads, *(_cells(row, index == 0) for index, row in enumerate(rows))]
    escaped = [[cell.translate(_ESCAPES) for cell in line] for line in lines]
    # In braces, since a bracket at the beginning of a row is an option of the end of the last.
    head, *body = [" & ".join([f"{{{first}}}", *rest]) + r" \\" for first, *rest in escaped]
    columns = "l" + "r" * (len(heads) - 1)
    begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\hline", head, r"\hline", *body, r"\hline", end, ""])
