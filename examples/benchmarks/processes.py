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

from pyro_vae import CompiledSVI, data, fit
from pyro_vae.checkpoints import save_state
from pyro_vae.distributed import Exchange, Ranks, joined
from pyro_vae.parts import Blueprint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
STEPS = 100
FIRST, LAST = "<!-- processes.py writes from here -->", "<!-- to here -->"


def load(options):
    """The data of the options, binarised at one half."""
    return data.load(options.data, directory=options.data_dir, view=data.threshold)


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
    order, losses = torch.Generator().manual_seed(0), []
    for step, batch in enumerate(forever(part, options.batch_size, order), start=1):
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
    parameters = list(vae.parameters())
    optimizer = ADAM(parameters)
    svi = CompiledSVI(
        vae.model,
        vae.guide,
        lambda _: optimizer,
        Trace_ELBO(max_plate_nesting=1),
        mode=options.mode,
    )
    return svi, optimizer, Exchange(ranks, parameters, [])


def forever(part, size, order):
    """Whole batches, in a new order each time through."""
    while True:
        yield from (b for b in part.batches(size, order, shuffle=True) if len(b[0]) == size)


def in_turn(options):
    """The losses of one process that goes through the two shares, and its weights as it goes."""
    splits = load(options)
    vae = made(splits, options)
    drawn = int(torch.randint(2**31, ()))
    states = [torch.get_rng_state()]
    pyro.set_rng_seed(drawn + 1)
    states.append(torch.get_rng_state())
    svi, optimizer, _ = stepping(vae, Ranks(), options)
    streams = [
        forever(Ranks(k, 2).shard(splits).train, options.batch_size, torch.Generator())
        for k in (0, 1)
    ]
    # `forever` draws nothing before its first batch, so that its generator can be seeded here.
    streams = [
        forever(
            Ranks(k, 2).shard(splits).train, options.batch_size, torch.Generator().manual_seed(0)
        )
        for k in (0, 1)
    ]
    parameters = list(vae.parameters())
    for batches in zip(*streams, strict=False):
        total, slopes = 0.0, []
        for k, batch in enumerate(batches):
            torch.set_rng_state(states[k])
            total += float(svi.loss_and_grads(*batch))
            slopes.append([each.grad.clone() for each in parameters])
            states[k] = torch.get_rng_state()
        for parameter, *each in zip(parameters, *slopes, strict=True):
            parameter.grad = torch.stack(each).mean(0)
        optimizer.step()
        yield total, vae.state_dict()
