"""Networks: their maps against torch's own, under any leading dimensions."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyro_vae.networks import MLP, BFloat16, ConvDecoder, ConvEncoder, fill

IMAGES = [(1, 28, 28), (1, 28, 20), (3, 8, 8), (2, 7, 5)]


def test_mlp_is_the_composition_of_its_layers():
    network = MLP((2, 3), [5], (2, 4), context=2, activation=nn.Tanh)
    x, c = torch.randn(7, 2, 3), torch.randn(7, 2)
    (first, _), last = network.hidden, network.last
    hidden = torch.tanh(torch.cat([x.reshape(7, 6), c], 1) @ first.weight.T + first.bias)
    assert torch.allclose(network(x, c), (hidden @ last.weight.T + last.bias).reshape(7, 2, 4))


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
def test_a_gated_layer_is_the_product_of_its_two_halves(activation):
    network = MLP(3, [5, 4], 2, gated=True, activation=activation)
    x = torch.randn(7, 3)
    h = x
    for layer in network.hidden:
        value, gate = (h @ each.weight.T + each.bias for each in (layer.value, layer.gate))
        h = activation()(value) * torch.sigmoid(gate)
    assert torch.allclose(network(x), h @ network.last.weight.T + network.last.bias, atol=1e-6)


@pytest.mark.parametrize("kind", [MLP, ConvEncoder])
def test_a_transform_is_applied_before_anything_else(kind):
    torch.manual_seed(0)
    network = kind((1, 4, 4), [3], 2, transform=torch.log1p)
    torch.manual_seed(0)
    plain = kind((1, 4, 4), [3], 2)
    x = torch.randint(0, 1000, (6, 1, 4, 4)).float()
    assert torch.equal(network(x), plain((1 + x).log()))


@pytest.mark.parametrize("kind", [MLP, ConvEncoder])
def test_the_input_of_a_network_has_its_shape_after_the_transform(kind):
    network = kind((2, 4, 4), [3], 2, transform=partial(fill, dims=3))
    assert network(torch.full((5, 7, 1, 4, 4), torch.nan)).isfinite().all()
    with pytest.raises(ValueError, match=r"of shape \(..., 2, 4, 4\) and got \(5, 4, 4, 4\)"):
        network(torch.zeros(5, 2, 4, 4))


@pytest.mark.parametrize(("shape", "dims"), [((5,), 1), ((3, 4, 2), 3), ((1, 4, 2), 3)])
@pytest.mark.parametrize("lead", [(), (6,), (2, 6)])
def test_fill_gives_zeros_for_what_is_missing_and_the_mask(shape, dims, lead):
    x = torch.randn(*lead, *shape)
    x[torch.rand(x.shape) < 0.3] = torch.nan
    array = x.numpy()
    expected = np.concatenate([np.nan_to_num(array), ~np.isnan(array)], axis=-dims)
    assert fill(x, dims=dims).shape == (*lead, 2 * shape[0], *shape[1:])
    np.testing.assert_array_equal(fill(x, dims=dims).numpy(), expected)


def residual(block, x):
    first, second = block.change[1], block.change[3]
    inner = functional.conv2d(x.relu(), first.weight, first.bias, padding=1)
    return x + functional.conv2d(inner.relu(), second.weight, second.bias, padding=1)


def test_residual_blocks_of_an_encoder_follow_each_convolution():
    network = ConvEncoder((1, 9, 6), [3, 4], (2, 4), hidden=5, blocks=2)
    h = x = torch.randn(2, 1, 9, 6)
    layers = list(network.convolutions)
    for convolution, first, second in (layers[0:3], layers[4:7]):
        h = functional.conv2d(h, convolution.weight, convolution.bias, stride=2, padding=1)
        h = residual(second, residual(first, h)).relu()
    assert torch.allclose(network(x), network.dense(h.flatten(1)), atol=1e-6)


def test_residual_blocks_of_a_decoder_come_before_each_transposed_convolution():
    network = ConvDecoder(2, [4, 3], (1, 8, 8), hidden=5, blocks=1)
    z = torch.randn(6, 2)
    layers = list(network.convolutions)
    h = network.dense(z)
    for block, grow in ((layers[0], layers[2]), (layers[3], layers[5])):
        h = residual(block, h).relu()
        h = functional.conv_transpose2d(
            h, grow.weight, grow.bias, stride=2, padding=1, output_padding=1
        )
    assert torch.allclose(network(z), h, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("kind", "shapes", "input"),
    [
        (ConvEncoder, ((1, 7, 5), [4, 6], (2, 3)), (1, 7, 5)),
        (ConvDecoder, (3, [6, 4], (1, 7, 5)), (3,)),
    ],
)
def test_a_block_whose_last_convolution_is_zero_is_the_identity(kind, shapes, input, lead):
    network, plain = kind(*shapes, blocks=2), kind(*shapes)
    for block in network.modules():
        if hasattr(block, "change"):
            nn.init.zeros_(block.change[-1].weight)
            nn.init.zeros_(block.change[-1].bias)
    state = [each for name, each in network.state_dict().items() if ".change." not in name]
    plain.load_state_dict(dict(zip(plain.state_dict(), state, strict=True)))
    x = torch.randn(*lead, *input)
    assert torch.equal(network(x), plain(x))


def test_convolutional_encoder_is_the_composition_of_its_layers():
    network = ConvEncoder((1, 9, 6), [3], (2, 4), hidden=5)
    x = torch.randn(2, 1, 9, 6)
    convolution = network.convolutions[0]
    features = functional.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
    assert features.shape == (2, 3, 5, 3)
    assert torch.allclose(network(x), network.dense(features.relu().flatten(1)))


@pytest.mark.parametrize("shape", IMAGES)
def test_convolutional_decoder_restores_every_size(shape):
    network = ConvDecoder(3, [6, 5], (2, *shape))
    assert network(torch.randn(4, 3)).shape == (4, 2, *shape)


NETWORKS = [
    (MLP((1, 8, 8), [16], (2, 3), context=2), (1, 8, 8)),
    (ConvEncoder((1, 8, 8), [4, 5], (2, 3), context=2), (1, 8, 8)),
    (ConvDecoder(3, [5, 4], (1, 8, 8), context=2), (3,)),
    (MLP((1, 8, 8), [16, 5], (2, 3), context=2, gated=True), (1, 8, 8)),
    (ConvEncoder((1, 8, 8), [4, 5], (2, 3), context=2, blocks=2), (1, 8, 8)),
    (ConvDecoder(3, [5, 4], (1, 8, 8), context=2, blocks=2), (3,)),
]


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
@pytest.mark.parametrize("lead", [(), (5,), (4, 5), (2, 1, 5)])
def test_leading_dimensions_are_a_loop(network, shape, lead):
    x, context = torch.randn(*lead, *shape), torch.randn(*lead, 2)
    flat = x.reshape(-1, *shape), context.reshape(-1, 2)
    one_by_one = torch.stack([network(row, c) for row, c in zip(*flat, strict=True)])
    together = network(x, context)
    assert torch.allclose(together.reshape(one_by_one.shape), one_by_one, atol=1e-6)
    assert together.shape[: len(lead)] == lead


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_context_is_broadcast_over_particles(network, shape):
    x, context = torch.randn(4, 5, *shape), torch.randn(5, 2)
    assert torch.equal(network(x, context), network(x, context.expand(4, 5, 2)))


@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_wrong_shapes_are_named(network, shape):
    with pytest.raises(ValueError, match=r"takes inputs of shape .* and got"):
        network(torch.randn(5, 9), torch.randn(5, 2))
    with pytest.raises(ValueError, match="context=2 was given 0 context features"):
        network(torch.randn(5, *shape))


@pytest.mark.parametrize(("network", "shape"), [NETWORKS[0], NETWORKS[2], NETWORKS[5]])
def test_output_bias_is_the_output_at_zero_weights(network, shape):
    value = torch.full(network.output, 0.25)
    network.set_bias(value)
    last = network.last if isinstance(network, MLP) else network.convolutions[-1]
    nn.init.zeros_(last.weight)
    assert torch.equal(
        network(torch.randn(3, *shape), torch.randn(3, 2)), value.expand(3, *value.shape)
    )


def test_a_convolution_of_vectors_is_refused():
    with pytest.raises(ValueError, match="use an MLP"):
        ConvEncoder((64,), [4], (2, 3))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: MLP((1, 8, 8), [30], (2, 3), context=2), (7, 1, 8, 8)),
        (lambda: ConvEncoder((1, 8, 8), [4], (2, 3), context=2), (7, 1, 8, 8)),
        (lambda: ConvDecoder(5, [4], (1, 8, 8), context=2), (7, 5)),
    ],
)
def test_a_network_is_trained_in_bfloat16_and_evaluated_in_float32(make, shape):
    torch.manual_seed(0)
    network = make()
    both = BFloat16(network)
    inputs = torch.rand(shape), torch.randn(shape[0], 2)
    weights = list(network.parameters())
    exact, rough = network(*inputs), both(*inputs)
    slopes, rougher = (
        torch.autograd.grad(each.square().sum(), weights) for each in (exact, rough)
    )
    assert rough.dtype == exact.dtype == torch.float32
    # Each of at most three layers rounds inputs, weights and outputs to 8 binary digits, of
    # values below 1 in size; that all of these errors are as large as can be is not met.
    for one, other in zip([rough, *rougher], [exact, *slopes], strict=True):
        assert other.dtype == torch.float32
        error = (one - other).norm() / other.norm()
        assert 0 < error < 9 * 2**-8
    assert torch.equal(both.eval()(*inputs), exact)


def test_a_bias_is_set_through_the_precision():
    network = MLP(2, [], (1, 2))
    BFloat16(network).set_bias(torch.tensor([[1.0, 2.0]]))
    assert network.last.bias.tolist() == [1, 2]
    with pytest.raises(TypeError, match="a Linear decoder has no method set_bias"):
        BFloat16(nn.Linear(2, 2)).set_bias(torch.zeros(2))
