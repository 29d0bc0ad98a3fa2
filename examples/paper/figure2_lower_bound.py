"""Figure 2 of Auto-Encoding Variational Bayes: the bound against training samples seen.

    python examples/paper/figure2_lower_bound.py --data-dir DATA

MNIST with 500 hidden units and 3, 5, 10, 20 and 200 latents, Frey Face with 200 and 2, 5, 10 and
20; the same networks by AEVB and by wake-sleep. The bound is that of all test images and of 10,000
training images drawn at random, with one draw of z each. A finished curve is in
`results/figure2.json` and is not run again. `protocol.py` has what the paper says of the set-up.
"""

from functools import partial

import protocol
import reporting
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyro_vae.checkpoints import save

HIDDEN = {"MNIST": 500, "FreyFace": 200}
LATENTS = {"MNIST": [3, 5, 10, 20, 200], "FreyFace": [2, 5, 10, 20]}
PRIMARY = {"MNIST": "static", "FreyFace": "none, random split"}
# Beside the primary protocol, at some sizes: how much hangs on what the paper does not say.
BESIDE = [
    ("MNIST", 3, "dynamic"),
    ("MNIST", 3, "greyscale"),
    ("MNIST", 20, "dynamic"),
    ("MNIST", 20, "greyscale"),
    ("FreyFace", 10, "none, final block"),
]
PANELS = {f"{n} Nz={k}": (f"{n} Nz={k}", PRIMARY[n]) for n in LATENTS for k in LATENTS[n]}
PANELS |= {f"{n} Nz={k}: {kind}": (f"{n} Nz={k}", kind) for n, k, kind in BESIDE}
AT = [1_000_000, 6_000_000, 10_000_000, 18_000_000, 100_000_000]


def wanted(options):
    """Every curve: data set, number of latents, binarisation, method."""
    cases = [(n, k, PRIMARY[n]) for n in options.data for k in LATENTS[n]]
    cases += [case for case in BESIDE if case[0] in options.data]
    if options.latents:
        cases = [case for case in cases if case[1] in options.latents]
    if options.binarisation:
        cases = [case for case in cases if case[2] in options.binarisation]
    return [(*case, method) for case in cases for method in options.methods]


def report(results, options):
    """The pictures, the table of ours beside the published values, and the order of methods."""
    chosen = reporting.chosen(results.rows, options)
    if not chosen:
        reporting.write("figure2", "", options)
        return
    for name in HIDDEN:
        if rows := [row for row in chosen if row["panel"].startswith(name)]:
            picture = reporting.draw(rows, PANELS, figure="2")
            file = reporting.file_of(f"figure2_{name}", options)
            FigureCanvasAgg(picture).print_png(str(file))
    parts = [
        reporting.table(results.rows, figure="2", at=AT),
        reporting.ordered(chosen, figure="2", primary=PRIMARY.values()),
    ]
    reporting.write("figure2", "\n\n".join(part for part in parts if part), options)


def main():
    parser = protocol.arguments(__doc__, 1e7)
    parser.add_argument("--data", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--latents", nargs="+", type=int, help="these sizes only")
    parser.add_argument("--binarisation", nargs="+", choices=protocol.DATA, help="these only")
    methods = list(protocol.OBJECTIVES)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    options = protocol.ready(parser)
    results = protocol.Results(options.out / "figure2.json")
    cases = wanted(options)
    if not cases:
        parser.error("the figure has no such panel; leave out --data, --latents or --binarisation")
    for name, latent, binarisation, method in [] if options.report else cases:
        panel = f"{name} Nz={latent}"
        about = {"figure": "2", "panel": panel, "binarisation": binarisation}
        asked = {**about, "method": method, **protocol.asked(options)}
        if results.has(**asked, budget=options.samples):
            continue
        data = protocol.load(binarisation, options)
        hidden = 32 if options.small else HIDDEN[name]
        make = partial(
            protocol.build, binarisation, data.shape, latent, hidden, options.initial_scale
        )
        splits = {"train": data.train, "test": data.test}
        file = protocol.weights(options, panel, method, binarisation)

        def keep(rows, pair, file=file):
            save(pair, file)
            results.add(rows)

        protocol.curve(make, method, splits, options, about=about, keep=keep)
    report(results, options)


if __name__ == "__main__":
    main()
