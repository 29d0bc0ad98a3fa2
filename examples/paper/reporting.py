"""Pictures and tables of the experiments, from their rows and the published values."""

import csv
import itertools
import math

import numpy as np
import protocol
from matplotlib.figure import Figure
from scipy import stats

METHODS = ("AEVB", "wake-sleep", "MCEM")  # each with a colour of its own


def published():
    """The digitised curves of the paper's Figures 2 and 3 (Kingma & Welling, 2013)."""
    with (protocol.FOLDER / "published.csv").open() as file:
        return [
            {
                **row,
                "training_samples": int(row["training_samples"]),
                "value_nats": float(row["value_nats"]),
            }
            for row in csv.DictReader(file)
        ]


def file_of(name, options):
    """The file of a picture, which has another name where the options are not the page's."""
    asked = protocol.asked(options).items()
    named = [f"{key}-{value}" for key, value in asked if value != options.usual[key]]
    return options.out / f"{'-'.join([name, *named])}.png"


def other(options):
    """Whether results other than the page's were asked for."""
    return protocol.asked(options) != options.usual


def chosen(rows, options):
    """The rows of one protocol, for pictures and comparisons."""
    keys = protocol.asked(options).items()
    return [row for row in rows if all(row.get(key) == value for key, value in keys)]


def line(rows, **columns):
    """The points of one curve, by number of samples."""
    points = [row for row in rows if all(row[key] == value for key, value in columns.items())]
    return {row["training_samples"]: row["value_nats"] for row in points}


def draw(rows, panels, *, figure, columns=5):
    """Our curves, and in the same axes the published ones, dashed.

    Args:
        rows: Those of `curve`.
        panels: By the title of each, its panel and binarisation; those without rows are left out.
        figure: Of the paper.
        columns: How many panels stand side by side.
    """
    have = {(row["panel"], row["binarisation"]) for row in rows}
    panels = {title: which for title, which in panels.items() if which in have}
    tall = math.ceil(len(panels) / columns)
    size = (3.1 * min(columns, len(panels)), 2.9 * tall)
    picture = Figure(figsize=size, dpi=120, layout="constrained")
    every = picture.subplots(tall, min(columns, len(panels)), squeeze=False).flatten()
    theirs = published()
    for axes in every:
        axes.set_axis_off()
    for (title, (panel, kind)), axes in zip(panels.items(), every, strict=False):
        axes.set_axis_on()
        values = []
        for color, method in enumerate(METHODS):
            for width, split in ((0.9, "train"), (1.8, "test")):
                which = {"panel": panel, "method": method, "split": split}
                ours = line(rows, binarisation=kind, **which)
                paper = line(theirs, figure=figure, **which)
                style = {"color": f"C{color}", "linewidth": width}
                label = f"{method}, {split}" if ours or paper else None
                axes.plot(list(ours), list(ours.values()), **style, label=label)
                axes.plot(list(paper), list(paper.values()), "--", **style)
                for each in (ours, paper):
                    values += [v for n, v in each.items() if n >= 3e5] or each.values()
        low, high = min(values), max(values)
        axes.set_ylim(low - 0.02 * (high - low) - 1, high + 0.05 * (high - low) + 1)
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    every[0].legend(fontsize=6)
    every[0].set_ylabel("nats per image", fontsize=8)
    return picture


def table(rows, *, figure, at, split="test"):
    """Markdown of values ours / published at equal numbers of samples, a line for each curve."""
    theirs = published()
    reached = {row["training_samples"] for row in rows}
    at = [n for n in at if n in reached] or [max(reached)]
    head = " | ".join(f"{n:.2g}".replace("e+0", "e") for n in at)
    lines = [
        f"| panel | method | binarisation | initial scale | seed | step | hours | {head} |",
        "|---" * (7 + len(at)) + "|",
    ]
    for key in dict.fromkeys(protocol.identity(row) for row in rows):
        own = [row for row in rows if protocol.identity(row) == key]
        _, panel, method, binarisation, seed, scale, given, _ = key
        ours = line(own, split=split)
        paper = line(theirs, figure=figure, panel=panel, method=method, split=split)
        cells = [
            f"{number(ours.get(n))} / {number(paper.get(n))}" if n in ours else "" for n in at
        ]
        hours = f"{max(row['seconds'] for row in own) / 3600:.2f}"
        hours += " (GPU)" if own[0].get("device") == "cuda" else ""
        step = f"{own[0]['step_size']}{' (given)' if given else ''}"
        lines.append(
            f"| {panel} | {method} | {binarisation} | {scale} | {seed} | {step} "
            f"| {hours} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def order(rows, *, figure, primary, since=1_000_000, clear=1.0):
    """How often two methods come in the published order, where that is clear.

    Args:
        rows: Those of `curve`.
        figure: Of the paper.
        primary: The binarisations that are compared.
        since: Numbers of samples from here on.
        clear: Smallest published distance, in nats, that is compared.

    Returns:
        Of each panel, split and pair of methods, with the one ahead in more points first: how
        many ``points`` were compared, in how many we ``agree``, and our least ``lead`` in those.
    """
    rows = [row for row in rows if row["binarisation"] in primary]
    theirs, found = published(), []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    places = dict.fromkeys((row["panel"], row["split"]) for row in rows)
    for (panel, split), pair in itertools.product(places, itertools.combinations(methods, 2)):
        where = {"panel": panel, "split": split}
        ours = [line(rows, **where, method=method) for method in pair]
        paper = [line(theirs, **where, figure=figure, method=method) for method in pair]
        leads = {}
        for n in set.intersection(*map(set, (*ours, *paper))):
            lead = paper[0][n] - paper[1][n]
            if n >= since and abs(lead) > clear:
                leads[n] = math.copysign(1, lead) * (ours[0][n] - ours[1][n])
        if leads:
            first = sum(paper[0][n] - paper[1][n] for n in leads) > 0
            found.append(
                {
                    **where,
                    "order": pair if first else pair[::-1],
                    "points": len(leads),
                    "agree": sum(lead > 0 for lead in leads.values()),
                    "lead": min(leads.values()),
                }
            )
    return found


def ordered(rows, **how):
    """Markdown of what `order` finds."""
    lines = [
        "| panel | split | published order | points | in that order | smallest lead of ours |"
    ]
    lines.append("|---" * 6 + "|")
    for each in order(rows, **how):
        cells = [each["panel"], each["split"], " above ".join(each["order"])]
        cells += [str(each["points"]), str(each["agree"]), number(each["lead"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def gain(rows, others):
    """Mean difference of two lists of rows, paired by seed, with a 95 % t-interval."""
    before = {row["seed"]: row["value_nats"] for row in others}
    apart = [row["value_nats"] - before[row["seed"]] for row in rows if row["seed"] in before]
    if len(apart) < 2:
        return "".join(f"{each:+.2f}" for each in apart)
    mean, half = np.mean(apart), stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}), {len(apart)} pairs"


def bounds(rows):
    """The name of what the rows of a table have estimated, by its number of draws."""
    return " or ".join(f"L_{draws}" for draws in sorted({row["draws"] for row in rows}))


def number(value, digits=1):
    """A value to a tenth of a nat, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def write(section, text, options):
    """Put a text between the marks of a section of the page, if of its results and protocol."""
    print(text or f"there are no such results in {options.out}")
    page = protocol.FOLDER / "README.md"
    if not text or other(options) or options.out.resolve() != protocol.FOLDER / "results":
        return
    first, last = f"<!-- {section} writes from here -->", "<!-- to here -->"
    before, rest = page.read_text().split(first)
    after = rest.split(last, 1)[1]
    page.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}")
