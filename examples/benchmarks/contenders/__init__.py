"""The contenders of `speed.py`, a file for each library, and the process that runs one.

This file imports no library that is measured, so that each process holds only its own.
"""

import dataclasses
import gc
import importlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Size:
    """What is trained: networks, batch, number of draws.

    Attributes:
        about: One line for the reader.
        kind: ``dense``, ``conv`` or ``layers``, the networks.
        hidden: Width of the one hidden layer of encoder and decoder.
        latent: Number of latents, of the layer next to x.
        batch: Images in a step.
        activation: ``relu`` or ``tanh``.
        particles: Draws of z in the bound, that of IWAE where there are several.
        channels: Of the convolutions of stride 2, from x on.
        above: Number of latents of a second layer, over the first.
        rows: Images in an epoch that is timed; others are scaled to the whole.
        device: Where it is measured, unless it is asked for by name: ``cuda``, or anywhere.
    """

    about: str
    kind: str = "dense"
    hidden: int = 400
    latent: int = 20
    batch: int = 128
    activation: str = "relu"
    particles: int = 1
    channels: tuple[int, ...] = ()
    above: int = 0
    rows: int = 60_000
    device: str = ""


SIZES = {
    "784-400-20": Size("ReLU, batch 128, one draw"),
    "784-500-20": Size(
        "tanh, batch 100, one draw, as Kingma & Welling (2013)",
        hidden=500, batch=100, activation="tanh",
    ),
    "convolutions": Size(
        "convolutions of 32 and 64 channels, 256 hidden units, 20 latents, batch 128",
        kind="conv", hidden=256, channels=(32, 64), rows=6_000,
    ),
    "IWAE": Size(
        "784-400-20, ReLU, batch 20, 50 draws",
        batch=20, particles=50, rows=2_000,
    ),
    "two layers": Size(
        "784-400-50, 100 tanh units to 20 more latents above, inferred from below, batch 128",
        kind="layers", latent=50, activation="tanh", above=20,
    ),
    "wide": Size(
        "784-4096-64, ReLU, batch 1024, one draw",
        hidden=4096, latent=64, batch=1024, device="cuda",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A contender: where it is written, and what it is.

    Attributes:
        module: File in this folder.
        family: Its class there.
        about: One line for the reader.
        options: What its class is given besides the size.
        fits: From a size to whether the contender has it.
    """

    module: str
    family: str
    about: str
    options: dict = dataclasses.field(default_factory=dict)
    fits: object = None

    def has(self, size):
        return self.fits is None or self.fits(size)


def _one_draw(size):
    return size.kind != "layers" and size.particles == 1


CONTENDERS = {
    "floor": Entry("floor", "Floor", "only the large products of forward and backward pass"),
    "floor, oneDNN": Entry(
        "floor",
        "Floor",
        "the same products by oneDNN",
        {"onednn": True},
        fits=lambda size: size.device != "cuda" and size.kind != "conv",
    ),
    "pyro_vae": Entry(
        "with_pyro", "Compiled", "`CompiledSVI`, and `fit` for an epoch", {"mode": "compiled"}
    ),
    "pyro_vae, not compiled": Entry(
        "with_pyro", "Compiled", "the captured graph, run as it is", {"mode": "captured"}
    ),
    "pyro_vae, bfloat16": Entry(
        "with_pyro",
        "Compiled",
        "its networks in bfloat16",
        {"mode": "compiled", "bfloat16": True},
        fits=lambda size: size.device == "cuda",
    ),
    "Pyro": Entry("with_pyro", "Eager", "`pyro.infer.SVI` on the same program"),
    "Pyro, JIT": Entry(
        "with_pyro", "Jit", "`JitTrace_ELBO` on the same distributions", fits=_one_draw
    ),
    "PyTorch": Entry("with_torch", "Handwritten", "written by hand"),
    "PyTorch, compiled": Entry(
        "with_torch", "Handwritten", "the same loss under `torch.compile`", {"compiled": True}
    ),
    "PyTorch, compiled, fused Adam": Entry(
        "with_torch",
        "Handwritten",
        "the same with `Adam(fused=True)`",
        {"compiled": True, "fused": True},
    ),
    "pytorch/examples": Entry(
        "with_torch",
        "DataLoaded",
        "written like its `vae/main.py`, `DataLoader` and `ToTensor` included",
        fits=lambda size: size.kind == "dense" and size.particles == 1,
    ),
    "NumPyro": Entry(
        "with_numpyro",
        "NumPyro",
        "`SVI`, a whole epoch in one jitted loop",
        fits=lambda size: size.kind != "conv",
    ),
    "pythae": Entry(
        "with_pythae", "Pythae", "its models and its trainer", fits=lambda size: size.above == 0
    ),
}


class Contender:
    """One way to train one size: a subclass takes a step, or many, and a pass over the data.

    Args:
        size: What is trained.
        directory: Folder of the data sets.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, size, directory, device):
        self.size, self.directory, self.device = size, Path(directory), device

    def steps(self, count):
        """Take `count` steps on batches that are ready, and return their mean loss per datum."""
        raise NotImplementedError

    def one_pass(self):
        """Train on every image once, data handling included, as the library's users do."""
        raise NotImplementedError

    def epoch(self):
        """Seconds of one pass, None where there is none to take."""
        began = time.perf_counter()
        self.one_pass()
        self.wait()
        return time.perf_counter() - began

    def wait(self):
        """Wait for work that was handed to a device."""

    def device_memory(self):
        """Peak of the device's memory in bytes, None on a CPU."""
        return None

    # What the process is asked for.

    def timed(self, count):
        self.wait()
        began = time.perf_counter()
        self.steps(count)
        self.wait()
        return time.perf_counter() - began

    def trained(self, count):
        """Mean loss per datum over the last tenth of `count` steps."""
        self.steps(count - count // 10)
        return self.steps(max(count // 10, 1))

    def memory(self):
        return {"host": peak_memory(), "device": self.device_memory()}


def mnist(directory):
    """The training images, bytes ``(60000, 28, 28)``, from their unpacked file."""
    path = Path(directory, "MNIST", "raw", "train-images-idx3-ubyte")
    return np.fromfile(path, np.uint8, offset=16).reshape(-1, 28, 28)


def peak_memory():
    """Largest resident memory of this process in bytes.

    ``ru_maxrss`` would begin at that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [each for each in status.read_text().splitlines() if each.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def serve(pipe, name, size, directory, device, threads):
    """Run one contender: three messages up to its first step, then what the pipe asks for."""
    entry = CONTENDERS[name]
    try:
        module = importlib.import_module(f"contenders.{entry.module}")
        module.threads(threads)
        pipe.send(("imported", None))
        contender = getattr(module, entry.family)(size, directory, device, **entry.options)
        pipe.send(("built", None))
        contender.timed(1)
        pipe.send(("stepped", None))
        while True:
            request, *arguments = pipe.recv()
            gc.collect()  # what runs before have left, which a user's process would not have
            pipe.send((request, getattr(contender, request)(*arguments)))
    except EOFError:
        pass  # nobody asks any more
    except ImportError as error:
        pipe.send(("missing", str(error)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
