"""Pyro's own `SVI`, eager and jitted, and this package's `CompiledSVI`."""

import time
from functools import partial

import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO
from torch.optim.lr_scheduler import LambdaLR

from contenders.programs import OnTorch, images, objective, pair, pool, threads
from pyro_vae import fit
from pyro_vae.vae import as_pyro

__all__ = ["Compiled", "Eager", "Jit", "threads"]


class Eager(OnTorch):
    """`pyro.infer.SVI` and `pyro.optim.Adam`; data are bytes, binarised batch by batch.

    Pyro's validation is on, as it is unless a user switches it off. A loss is a float here: Pyro
    waits for it in every step.
    """

    def __init__(self, size, directory, device):
        super().__init__(size, directory, device)
        pyro.set_rng_seed(0)
        self.data = images(size, directory).map(lambda part: part.to(device))
        self.pool = pool(self.data.train, size)
        self.pair = self.programs()
        self.svi = self.inference()

    def programs(self):
        return pair(self.size).to(self.device)

    def inference(self):
        optimizer = pyro.optim.Adam({"lr": 1e-3})
        return SVI(self.pair.model, self.pair.guide, optimizer, loss=objective(self.size))

    def step(self, x):
        return self.svi.step(x)

    def one_pass(self):
        for batch in self.data.train.batches(self.size.batch, shuffle=True):
            self.svi.step(*batch)


class Jit(Eager):
    """`JitTrace_ELBO`, which needs parameters in the param store: `pyro.module` in the programs.

    What was traced holds the number of data, so that an epoch leaves out a smaller last batch.
    """

    def inference(self):
        vae = self.pair

        def model(x):
            pyro.module("likelihood", vae.likelihood)
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", as_pyro(vae.prior()))
                pyro.sample("x", as_pyro(vae.likelihood(z)), obs=x)

        def guide(x):
            pyro.module("posterior", vae.posterior)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", as_pyro(vae.posterior(x)))

        loss = JitTrace_ELBO(max_plate_nesting=1, ignore_jit_warnings=True)
        return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)

    def one_pass(self):
        for batch in self.data.train.batches(self.size.batch, shuffle=True):
            if len(batch[0]) == self.size.batch:
                self.svi.step(*batch)


class Compiled(Eager):
    """`CompiledSVI` for steps; `fit` for an epoch, the last of two, so that start-up is not in it.

    Args:
        mode: How the programs run.
        bfloat16: Whether their networks are trained in bfloat16.
    """

    def __init__(self, size, directory, device, *, mode, bfloat16=False):
        self.mode, self.bfloat16 = mode, bfloat16
        super().__init__(size, directory, device)

    def programs(self):
        return pair(self.size, bfloat16=self.bfloat16).to(self.device)

    def inference(self):
        from pyro_vae import CompiledSVI

        return CompiledSVI(
            self.pair.model,
            self.pair.guide,
            partial(torch.optim.Adam, lr=1e-3),
            objective(self.size),
            mode=self.mode,
        )

    def epoch(self):
        if self.mode != "compiled":
            return None
        ends = []

        def end(epoch):  # called before the first epoch and after each
            self.wait()
            ends.append(time.perf_counter())
            return 1.0

        fit(
            self.programs(),
            self.data,
            objective=objective(self.size),
            schedule=partial(LambdaLR, lr_lambda=end),
            epochs=2,
            batch_size=self.size.batch,
            warmup=0,
            mode=self.mode,
            progress=False,
        )
        return ends[-1] - ends[-2]
