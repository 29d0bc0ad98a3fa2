"""The same models in NumPyro, a whole pass in one jitted loop."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from contenders import Contender, mnist

__all__ = ["NumPyro", "threads"]

jax.config.update("jax_default_matmul_precision", "float32")  # torch's, and not a GPU's TF32


def threads(count):
    """XLA takes the cores that the process may use."""


def layer(key, input, output):
    """Weights and bias, uniform as in torch."""
    width = input**-0.5
    keys = random.split(key)
    weight = random.uniform(keys[0], (input, output), minval=-width, maxval=width)
    return weight, random.uniform(keys[1], (output,), minval=-width, maxval=width)


def dense(name, key, sizes, activation):
    """A fully connected network with one hidden layer, its parameters NumPyro's."""
    keys = dict(zip(("first", "last"), random.split(key), strict=True))
    first = numpyro.param(f"{name}.first", lambda _: layer(keys["first"], *sizes[:2]))
    last = numpyro.param(f"{name}.last", lambda _: layer(keys["last"], *sizes[1:]))
    return lambda x: activation(x @ first[0] + first[1]) @ last[0] + last[1]


def normal(output):
    loc, log_scale = jnp.split(output, 2, -1)
    return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)


def programs(size):
    """Model and guide of a size."""
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[size.activation]
    keys = random.split(random.key(0), 4)

    def model(x):
        decoder = dense("decoder", keys[0], (size.latent, size.hidden, 784), activation)
        if size.above:
            down = dense("down", keys[1], (size.above, 100, 2 * size.latent), activation)
        with numpyro.plate("data", len(x)):
            prior = dist.Normal(jnp.zeros(size.latent), 1).to_event(1)
            if size.above:
                top = dist.Normal(jnp.zeros(size.above), 1).to_event(1)
                prior = normal(down(numpyro.sample("z1", top)))
            z = numpyro.sample("z", prior)
            numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        encoder = dense("encoder", keys[2], (784, size.hidden, 2 * size.latent), activation)
        if size.above:
            up = dense("up", keys[3], (size.latent, 100, 2 * size.above), activation)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", normal(encoder(x)))
            if size.above:
                numpyro.sample("z1", normal(up(z)))

    return model, guide


class NumPyro(Contender):
    """`numpyro.infer.SVI`; the order and the binarisation of an epoch are inside the jitted loop.

    An epoch leaves out a smaller last batch, whose shape the loop could not have.
    """

    def __init__(self, size, directory, device):
        super().__init__(size, directory, device)
        if jax.default_backend() != {"cpu": "cpu", "cuda": "gpu"}[device]:
            raise ImportError(f"this jax runs on {jax.default_backend()}, not on {device}")
        self.bytes = jnp.asarray(mnist(directory)[: size.rows].reshape(-1, 784))
        loss = RenyiELBO(0, size.particles) if size.particles > 1 else Trace_ELBO()
        self.svi = SVI(*programs(size), numpyro.optim.Adam(1e-3), loss)
        count = max(min(20, len(self.bytes) // size.batch), 1)
        ready = self.bytes[: count * size.batch] > 127
        self.pool = ready.astype(jnp.float32).reshape(count, size.batch, 784)
        self.order = random.key(2)
        self.state = self.svi.init(random.key(1), self.pool[0])
        self.loop = jax.jit(self._loop, donate_argnums=0)
        self.whole = jax.jit(self._whole, donate_argnums=0)

    def _loop(self, state, pool, count):
        def body(index, carry):
            state, total = carry
            state, loss = self.svi.update(state, pool[index % len(pool)])
            return state, total + loss

        return lax.fori_loop(0, count, body, (state, 0.0))

    def _whole(self, state, key, values):
        batch = self.size.batch
        order = random.permutation(key, len(values))
        batches = order[: len(order) // batch * batch].reshape(-1, batch)

        def body(carry, rows):
            state, total = carry
            state, loss = self.svi.update(state, (values[rows] > 127).astype(jnp.float32))
            return (state, total + loss), None

        return lax.scan(body, (state, 0.0), batches)[0]

    def steps(self, count):
        self.state, total = self.loop(self.state, self.pool, count)
        return float(total) / (count * self.size.batch)

    def one_pass(self):
        self.order, key = random.split(self.order)
        self.state, total = self.whole(self.state, key, self.bytes)
        return float(total)

    def wait(self):
        jax.block_until_ready(self.state)

    def device_memory(self):
        if self.device == "cpu":
            return None
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
