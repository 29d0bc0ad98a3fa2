"""Parts by name: what a constructor gets, what it refuses, and blueprints as plain values."""

import dataclasses
import json
import sys

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae import MLP, ConvDecoder, ConvEncoder, likelihoods, objectives, posteriors, priors
from pyro_vae.networks import fill
from pyro_vae.parts import KINDS, Blueprint, Part, find, make, named
from pyro_vae.splits import Split, dynamic, levels

SMALL = {"shape": (1, 8, 8), "latent": 2, "hidden": (16, 12)}


class Asking(priors.Prior):
    """Keeps what it gets by name."""

    def __init__(self, latent, shape, encoder, decoder, posterior, data, *, width=1.0):
        super().__init__()
        self.got = (latent, shape, encoder, decoder, posterior, data, width)

    def forward(self, *context):
        return dist.Normal(torch.zeros(self.got[0]), self.got[-1]).to_event(1)


class Needing(priors.Prior):
    """Needs an option, and takes any other."""

    def __init__(self, latent, size, **others):
        super().__init__()
        self.got = (latent, size, others)

    def forward(self, *context):
        return dist.Normal(torch.zeros(self.got[0]), 1.0).to_event(1)


class Wide(posteriors.Posterior):
    """Takes more parameters than a location and a scale."""

    @classmethod
    def outputs(cls, latent, *, rank=1):
        return (2 + rank, latent)

    def __init__(self, encoder, *, rank=1):
        super().__init__(encoder)

    def forward(self, x, *context):
        loc, log_scale, *_ = self.network(x, *context).unbind(-2)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class Halved(likelihoods.Normal):
    """An encoder should see half of the data, a decoder one context feature less."""

    @classmethod
    def features(cls, context, *, less=1):
        return context - less

    @staticmethod
    def encoded(x):
        return x / 2

    def __init__(self, decoder, *, less=1):
        super().__init__(decoder, scale=1.0)


def own(cls, **options):
    return Part(f"{__name__}.{cls.__name__}", options)


def test_a_constructor_gets_by_name_what_it_asks_for():
    x = torch.rand(7, 1, 8, 8)
    vae = Blueprint(**SMALL, prior=own(Asking, width=3.0)).build(Split(x))
    latent, shape, encoder, decoder, posterior, data, width = vae.prior.got
    assert (latent, shape, width) == (2, (1, 8, 8), 3.0)
    assert posterior is vae.posterior
    assert encoder is vae.posterior.network
    assert decoder is vae.likelihood.network
    assert torch.equal(data, x)


def test_a_constructor_gets_data_as_they_are_scored_and_no_draws_of_them():
    part = Split(torch.rand(7, 1, 8, 8))
    for view, expected in ((levels, (255 * part.x).round()), (dynamic, part.x)):
        viewed = dataclasses.replace(part, view=view)
        vae = Blueprint(**SMALL, prior=own(Asking)).build(viewed)
        assert torch.equal(vae.prior.got[5], expected)


def test_without_data_a_constructor_gets_zeros_of_the_same_shape():
    data = Blueprint(**SMALL, rows=7, prior=own(Asking)).build().prior.got[5]
    assert torch.equal(data, torch.zeros(7, 1, 8, 8))


def test_options_go_to_a_constructor_that_takes_any():
    part = own(Needing, size=3, width=4)
    assert Blueprint(**SMALL, prior=part).build().prior.got == (2, 3, {"width": 4})


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [
        ("prior", "Norml", "Normal"),
        ("likelihood", "bernouli", "Bernoulli"),
        ("posterior", "pyro_vae.posteriors.Norml", "Normal"),
        ("objective", "TraceMeanfield", "TraceMeanField_ELBO"),
        ("optimizer", "Adm", "Adam"),
        ("schedule", "CosineAnealingLR", "CosineAnnealingLR"),
    ],
)
def test_an_unknown_class_is_met_with_the_nearest_name(kind, name, nearest):
    with pytest.raises(ValueError, match=rf"unknown {kind} .*did you mean '{nearest}'\?"):
        find(name, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interface_is_no_class_to_choose(kind):
    with pytest.raises(ValueError, match=f"unknown {kind}"):
        find(KINDS[kind][0].__name__, kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("os.system", "prior"),
        ("torch.nn.Linear", "prior"),
        ("pyro_vae.posteriors.Normal", "prior"),
        ("pyro_vae.priors.Normal", "likelihood"),
        ("torch.optim.lr_scheduler.StepLR", "optimizer"),
    ],
)
def test_a_class_of_another_kind_is_refused(name, kind):
    with pytest.raises(TypeError, match=f"'{name}' is no {kind}: it must be a subclass of"):
        find(name, kind)


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        (Part("Normal", {"wdth": 3}), ValueError, "no option 'wdth'; it takes learned"),
        (Part("Normal", {"latent": 3}), ValueError, "no option 'latent'; it takes learned"),
        (own(Needing), TypeError, "Needing needs size: give it as an option"),
        (own(Needing, size=1, data=2), ValueError, "no option 'data'; it takes size"),
        (own(Asking, depth=2), ValueError, "no option 'depth'; it takes width"),
    ],
)
def test_options_that_do_not_fit_a_constructor_are_refused(part, error, words):
    with pytest.raises(error, match=words):
        Blueprint(**SMALL, prior=part).build()


def test_a_value_of_the_wrong_type_is_refused_in_a_sentence():
    with pytest.raises(TypeError, match="Normal cannot be set up: "):
        Blueprint(**SMALL, likelihood=Part("Normal", {"scale": "wide"})).build()


def test_a_module_is_imported_only_where_it_is_allowed(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (tmp_path / "intruder.py").write_text(code + "from pyro_vae.priors import Normal\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "intruder", raising=False)
    blueprint = Blueprint(**SMALL, prior=Part("intruder.Normal"))
    with pytest.raises(PermissionError, match="allow its module by `--allow intruder`"):
        blueprint.build(allow=["another"])
    assert not marker.exists()
    assert isinstance(blueprint.build(allow=["intruder"]).prior, priors.Normal)
    assert marker.exists()
    del sys.modules["intruder"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_file.Mine", "No module named 'no_such_file'"),
        ("broken.Mine", "unpaired"),
        ("json.Mine", "has no attribute 'Mine'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(name, words, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise LookupError('unpaired')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"prior '{name}' cannot be imported: .*{words}"):
        find(name, "prior")


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        ({}, ((2, 2), (1, 8, 8))),
        ({"likelihood": Part("Normal", {"per_element": True})}, ((2, 2), (2, 1, 8, 8))),
        ({"posterior": own(Wide)}, ((3, 2), (1, 8, 8))),
        ({"posterior": own(Wide, rank=4)}, ((6, 2), (1, 8, 8))),
    ],
)
@pytest.mark.parametrize("channels", [(), (3, 5)])
def test_a_part_sets_the_width_of_its_network(options, outputs, channels):
    vae = Blueprint(**SMALL, channels=channels, **options).build()
    x, z = torch.zeros(4, 1, 8, 8), torch.zeros(4, 2)
    assert vae.posterior.network(x).shape == (4, *outputs[0])
    assert vae.likelihood.network(z).shape == (4, *outputs[1])
    assert vae.decode(vae.encode(x).sample()).mean.shape == x.shape


def test_the_decoder_has_the_widths_of_the_encoder_reversed():
    vae = Blueprint(**SMALL, activation="Tanh", context=3).build()
    networks = (vae.posterior.network, vae.likelihood.network)
    assert all(isinstance(network, MLP) for network in networks)
    widths = [[m.in_features for m in n.modules() if isinstance(m, nn.Linear)] for n in networks]
    assert widths == [[64 + 3, 16, 12], [2 + 3, 12, 16]]
    assert all(any(isinstance(m, nn.Tanh) for m in network.modules()) for network in networks)


def test_channels_make_a_convolutional_pair():
    vae = Blueprint(shape=(3, 7, 5), latent=2, hidden=(16,), channels=(4, 6)).build()
    networks = (vae.posterior.network, vae.likelihood.network)
    assert [type(network) for network in networks] == [ConvEncoder, ConvDecoder]
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    layers = [[m for m in network.modules() if isinstance(m, kinds)] for network in networks]
    assert [[m.in_channels for m in each] for each in layers] == [[3, 4], [6, 4]]
    assert vae.sample(2).shape == (2, 3, 7, 5)


def networks(blueprint):
    """Encoder and decoder of a VAE that is built with a fixed seed."""
    torch.manual_seed(0)
    vae = blueprint.build()
    return vae.posterior.network, vae.likelihood.network


@pytest.mark.parametrize("channels", [(), (3, 5)])
def test_an_encoder_sees_data_as_their_likelihood_says(channels):
    x = torch.rand(4, 1, 8, 8)
    encoder, plain = (
        networks(Blueprint(**SMALL, channels=channels, likelihood=likelihood))[0]
        for likelihood in (own(Halved, less=0), Part("Normal"))
    )
    assert torch.equal(encoder(x), plain(x / 2))
    assert plain.transform is None


def test_an_encoder_takes_all_context_and_a_decoder_what_its_likelihood_says():
    for options, width in (({}, 2), ({"less": 3}, 0)):
        blueprint = Blueprint(**SMALL, context=3, likelihood=own(Halved, **options))
        assert [network.context for network in networks(blueprint)] == [3, width]


def test_a_size_factor_reaches_the_counts_and_not_the_decoder():
    part = Part("Poisson", {"size_factor": True})
    vae = Blueprint((5,), latent=2, context=4, likelihood=part).build()
    assert (vae.posterior.network.context, vae.likelihood.network.context) == (4, 3)
    z, c, size = torch.randn(6, 2), torch.randn(6, 3), torch.rand(6, 1) + 0.5
    expected = size * vae.likelihood.network(z, c).exp()
    assert torch.allclose(vae.decode(z, c, size).mean, expected)


@pytest.mark.parametrize("channels", [(), (3, 5)])
@pytest.mark.parametrize("part", [Part("Bernoulli"), own(Halved, less=0)])
def test_what_is_missing_is_not_scored_and_known_to_the_encoder(channels, part):
    vae = Blueprint(**SMALL, channels=channels, missing=True, likelihood=part).build()
    x = torch.rand(6, 1, 8, 8).round()
    x[torch.rand(x.shape) < 0.3] = torch.nan
    encoder = vae.posterior.network
    encoder_input = fill(x / 2 if part.name.endswith("Halved") else x, dims=3)
    expected, encoder.transform = encoder(x), None
    assert torch.equal(encoder(encoder_input), expected)
    z = torch.randn(6, 2)
    complete = vae.likelihood.likelihood(z).base_dist
    scores = complete.log_prob(x.nan_to_num(0.0))
    expected = torch.where(x.isnan(), 0.0, scores).flatten(1).sum(1)
    assert torch.allclose(vae.decode(z).log_prob(x), expected, atol=1e-5)


def test_missing_is_no_likelihood_to_name():
    with pytest.raises(ValueError, match="name that one and give --missing"):
        find("Missing", "likelihood")
    assert "Missing" not in named("likelihood")


def test_what_cannot_train_by_plain_options_is_not_named():
    schedules, optimizers = named("schedule"), named("optimizer")
    assert {"StepLR", "MultiStepLR"} <= set(schedules)
    assert {"Adam", "RMSprop"} <= set(optimizers)
    assert not {"ChainedScheduler", "SequentialLR", "LambdaLR", "MultiplicativeLR"} & {*schedules}
    assert not {"Muon", "SparseAdam", "LBFGS"} & {*optimizers}
    assert find("LambdaLR", "schedule") is torch.optim.lr_scheduler.LambdaLR


def test_layers_are_gated_and_blocks_added_in_both_networks():
    blueprint = Blueprint(**SMALL, gated=True, activation="Identity")
    for network in networks(blueprint):
        assert [type(layer.activation) for layer in network.hidden] == [nn.Identity] * 2
    for network in networks(Blueprint(**SMALL, channels=(3, 5), blocks=2)):
        convolutions = [
            m for m in network.modules() if isinstance(m, nn.Conv2d) and m.stride == (1, 1)
        ]
        assert sorted(m.in_channels for m in convolutions) == [3] * 4 + [5] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gated": True, "channels": (3,)}, "gated layers are those of MLPs"),
        ({"blocks": 1}, "residual blocks are those of a convolutional pair: give its channels"),
        ({"blocks": -1, "channels": (3,)}, "0 residual blocks or more, not -1"),
        ({"latent": 0}, "at least 1 dimension"),
        ({"hidden": (16, 0)}, "at least 1 wide"),
        ({"channels": (0,)}, "at least 1 wide"),
        ({"activation": "system"}, "unknown activation 'system': there are ELU"),
    ],
)
def test_sizes_and_activations_that_make_no_network_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Blueprint(**{**SMALL, **options}).build()


@pytest.mark.parametrize(
    "blueprint",
    [
        Blueprint(**SMALL),
        Blueprint(shape=(1, 8, 8), channels=(4,), activation="SiLU", context=10, rows=9),
        Blueprint(**SMALL, likelihood=Part("Normal", {"per_element": True, "floor": 0.1})),
        Blueprint(**SMALL, prior=own(Asking, width=2.0), posterior=own(Wide, rank=3)),
        Blueprint(**SMALL, gated=True, activation="Identity", missing=True),
        Blueprint(**SMALL, channels=(3,), blocks=2, bfloat16=True),
        Blueprint(**SMALL, context=2, likelihood=Part("Poisson", {"size_factor": True})),
    ],
)
def test_a_blueprint_survives_json(blueprint):
    read = Blueprint.of(json.loads(json.dumps(blueprint.plain())))
    assert json.dumps(read.plain()) == json.dumps(blueprint.plain())
    before, after = blueprint.build().state_dict(), read.build().state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"latent": "2"},
        {"latent": 2.0},
        {"latent": None},
        {"shape": 8},
        {"shape": [1, -8, 8]},
        {"hidden": 16},
        {"rows": -1},
        {"blocks": 1.5},
        {"gated": 1},
        {"bfloat16": "yes"},
        {"missing": "no"},
        {"depth": 3},
        {"prior": "Normal"},
        {"prior": {"name": 3}},
        {"prior": {"name": "Normal", "options": [3]}},
        {"prior": {"name": "Normal", "widths": 3}},
    ],
)
def test_values_of_no_blueprint_are_refused(changes):
    with pytest.raises(ValueError, match="this is no description of a VAE"):
        Blueprint.of({**Blueprint(**SMALL).plain(), **changes})


def test_a_blueprint_from_before_its_later_fields_is_read():
    values = Blueprint(**SMALL).plain()
    for key in ("gated", "blocks", "bfloat16", "missing"):
        del values[key]
    assert Blueprint.of(values) == Blueprint.of(Blueprint(**SMALL).plain())


def test_an_incomplete_blueprint_is_refused():
    with pytest.raises(ValueError, match="this is no description of a VAE: 'prior'"):
        Blueprint.of({"shape": [1, 8, 8]})


def test_a_part_survives_a_configuration():
    part = Part("my_file.MyPrior", {"width": 3})
    assert part.plain() == {"class_path": "my_file.MyPrior", "init_args": {"width": 3}}
    assert Part.of(part.plain()) == part
    assert Part.of({"class_path": "Normal"}) == Part("Normal")
    with pytest.raises(ValueError, match="and no 'width'"):
        Part.of({"class_path": "Normal", "width": 3})


def test_make_gives_an_optimiser_and_its_schedule():
    given = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5}
    optimizer = make(Part("SGD", {"momentum": 0.9}), "optimizer", **given)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["momentum"] == 0.9
    part = Part("torch.optim.lr_scheduler.StepLR", {"step_size": 3, "gamma": 0.1})
    schedule = make(part, "schedule", optimizer=optimizer)
    assert (schedule.step_size, schedule.gamma) == (3, 0.1)
    assert schedule.optimizer is optimizer


def test_make_gives_an_objective_within_an_objective():
    inner = {"class_path": "TraceMeanField_ELBO", "init_args": {"num_particles": 3}}
    objective = make(Part("BetaELBO", {"weight": 4.0, "elbo": inner}), "objective")
    assert isinstance(objective, objectives.BetaELBO)
    assert isinstance(objective.elbo, objectives.TraceMeanField_ELBO)
    assert (float(objective.weight), objective.elbo.num_particles) == (4.0, 3)


def test_make_asks_leave_for_an_objective_within_an_objective():
    part = Part("BetaELBO", {"elbo": {"class_path": "intruder.Objective"}})
    with pytest.raises(PermissionError, match="allow its module by `--allow intruder`"):
        make(part, "objective", allow=())


@pytest.mark.parametrize(
    ("name", "kind", "needs"),
    [("LBFGS", "optimizer", "closure"), ("ReduceLROnPlateau", "schedule", "metrics")],
)
def test_a_step_that_needs_more_than_training_knows_is_refused(name, kind, needs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    given = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1, "optimizer": optimizer}
    with pytest.raises(ValueError, match=f"{name} cannot train here, since its step .*{needs}"):
        make(Part(name), kind, **given)


@pytest.mark.parametrize("name", ["pyro.infer.RenyiELBO", "pyro.infer.JitTrace_ELBO"])
def test_an_objective_that_goes_wrong_in_minibatches_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is not for a VAE in minibatches; there are"):
        find(name, "objective")
