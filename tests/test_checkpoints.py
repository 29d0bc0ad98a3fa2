"""Run folders: what is saved comes back, what is damaged or foreign is refused."""

import hashlib
import json
import os
import pickle
import re
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch

import pyro_vae
from pyro_vae import checkpoints, fit, load, restore
from pyro_vae.parts import Blueprint, Part

SMALL = {"shape": (1, 8, 8), "latent": 2, "hidden": (16,)}


def write_run(folder, blueprint):
    """A run whose weights and buffers are all drawn at random, and its VAE."""
    vae = blueprint.build().eval()
    for tensor in vae.state_dict().values():
        tensor.normal_()
    checkpoints.describe(checkpoints.create(folder), blueprint)
    checkpoints.save(vae, folder / "best.safetensors")
    return vae


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", Blueprint(**SMALL))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": (3, 5), "context": 10, "activation": "SiLU"},
        {"prior": Part("Normal", {"learned": True})},
        {"likelihood": Part("Normal")},
        {"gated": True, "activation": "Identity", "missing": True},
        {"channels": (1,), "blocks": 1},
        {"bfloat16": True},
        {"context": 10, "likelihood": Part("Poisson")},
        {"likelihood": Part("Normal", {"per_element": True, "bounded": True, "floor": 0.1})},
    ],
    ids=[
        "buffers",
        "convolutions",
        "learned prior",
        "learned scale",
        "gated",
        "blocks",
        "bfloat16",
        "counts",
        "scale of each element",
    ],
)
def test_a_run_opens_bit_for_bit_as_it_was_saved(options, tmp_path):
    blueprint = Blueprint(**{**SMALL, **options})
    saved, opened = write_run(tmp_path / "run", blueprint), load(tmp_path / "run")
    x, context = torch.rand(5, 1, 8, 8), [torch.rand(5, 10)] * bool(blueprint.context)
    z = saved.encode(x, *context).mean
    for before, after in (
        (saved.encode(x, *context), opened.encode(x, *context)),
        (saved.decode(z, *context), opened.decode(z, *context)),
        (saved.prior(*context), opened.prior(*context)),
    ):
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.variance, after.variance)
    assert not any(module.training for module in opened.modules())


def test_a_run_from_before_its_later_fields_opens(run):
    description = json.loads((run / "model.json").read_text())
    for key in ("gated", "blocks", "bfloat16", "missing"):
        del description[key]
    before = load(run).state_dict()
    (run / "model.json").write_text(json.dumps(description))
    after = load(run).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_buffers_are_saved_beside_the_parameters(run):
    opened = load(run)
    assert set(dict(opened.prior.named_buffers())) == {"loc", "log_scale"}
    assert opened.prior.loc.abs().min() > 0


def test_the_last_weights_open_by_name(run):
    last = Blueprint(**SMALL).build()
    checkpoints.save(last, run / "last.safetensors")
    opened = load(run, weights="last").state_dict()
    assert all(torch.equal(opened[key], value) for key, value in last.state_dict().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:200],
        lambda content: content[:-4],
        lambda content: content + b"more",
        lambda content: b"hello, these are no weights",
        lambda content: struct.pack("<Q", 2**62) + content[8:],
        lambda content: struct.pack("<Q", 10**8) + content[8:],
        lambda content: content[:8] + b"?" + content[9:],
    ],
)
def test_damaged_weights_are_refused(damage, run):
    path = run / "best.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"best\.safetensors' is damaged: "):
        load(run)


class Marker:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_is_opened(run, tmp_path):
    raw = pickle.dumps(Marker(tmp_path / "mark"))
    (run / "best.safetensors").write_bytes(raw)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "000000001.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"best\.safetensors' is damaged"):
        load(run)
    with pytest.raises(ValueError, match=r"1\.safetensors' is damaged: .* no other checkpoint"):
        checkpoints.newest(run / "checkpoints")
    assert not (tmp_path / "mark").exists()
    pickle.loads(raw)  # as a reader who trusts the file would have it
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("size", [2**63, 2**40, 10**9, 10**6])
def test_a_header_of_absurd_size_takes_no_memory(size, run):
    whole = checkpoints.encode({"format": 1, "weights": torch.ones(3)})
    checkpoints.write(run / "checkpoint", struct.pack("<Q", size) + whole[8:])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="checksum differs"):
            checkpoints.decode((run / "checkpoint").read_bytes())
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def sealed(content, tensors=()):
    """A file with any JSON as content, and a checksum that is right."""
    raw = bytearray(
        safetensors.torch.save(
            dict(tensors), {"content": content, "format": f"1, sha256 {'0' * 64}"}
        )
    )
    start = raw.index(b"sha256 000") + len("sha256 ")
    raw[start : start + 64] = hashlib.sha256(raw).hexdigest().encode()
    return bytes(raw)


ONES = {"x": torch.ones(2, 3)}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"format": "1"}',
        '{"format": true}',
        '{"format": 1, "x": {"$tensor": "y", "$strides": null}}',
        '{"format": 1, "x": {"$tensor": "x"}}',
        '{"format": 1, "x": {"$tensor": "x", "$strides": [100000000, 1]}}',
        '{"format": 1, "x": {"$tensor": "x", "$strides": [-3, 1]}}',
        '{"format": 1, "x": {"$tensor": "x", "$strides": [0, 0]}}',
        '{"format": 1, "x": {"$tensor": "x", "$strides": [1]}}',
        '{"format": 1, "x": {"$dict": [1]}}',
        '{"format": 1, "x": {"$dict": [[{}, 1]]}}',
        '{"format": 1, "x": {"$tuple": 1}}',
        '{"format": 1, "x": ' + "[" * 10**5,
    ],
)
def test_a_checkpoint_that_was_made_to_mislead_is_refused(content):
    with pytest.raises(ValueError, match=r"holds no state of a run|has format"):
        checkpoints.decode(sealed(content, ONES))


@pytest.mark.parametrize("place", [20, 300, -1, -500])
def test_a_changed_byte_of_weights_is_noticed(place, run):
    path = run / "best.safetensors"
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"best\.safetensors' is damaged: its checksum differs"):
        load(run)


def test_weights_of_a_later_format_say_to_upgrade(run):
    weights = load(run).state_dict()
    raw = safetensors.torch.save(weights, {"format": "2"})
    (run / "best.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"best\.safetensors' has format 2 .* upgrade pyro_vae"):
        load(run)
    for metadata in ({"format": "pt"}, None):  # as other tools write them
        (run / "best.safetensors").write_bytes(safetensors.torch.save(weights, metadata))
        opened = load(run).state_dict()
        assert all(torch.equal(opened[key], value) for key, value in weights.items())


@pytest.mark.parametrize("weights", ["../run/best", "/tmp/best", "a/b", ""])
def test_weights_are_those_of_the_runs_folder(weights, run):
    with pytest.raises(ValueError, match="weights are a name in the run's folder"):
        load(run, weights=weights)


def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (3, 20, 100):
        checkpoints.keep(tmp_path, step, {"step": step})
        assert checkpoints.newest(tmp_path)["step"] == step
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("other", [{"latent": 3}, {"hidden": (16, 16)}, {"channels": (4,)}])
def test_weights_of_another_model_are_refused(other, run):
    checkpoints.save(Blueprint(**{**SMALL, **other}).build(), run / "best.safetensors")
    with pytest.raises(ValueError, match=r"best\.safetensors' holds the weights of another model"):
        load(run)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    saved = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    checkpoints.save(saved, tmp_path / "other.safetensors")
    before = [each.clone() for each in module.state_dict().values()]
    with pytest.raises(ValueError, match="holds the weights of another model"):
        restore(module, tmp_path / "other.safetensors")
    assert all(map(torch.equal, before, module.state_dict().values()))


def test_weights_that_two_parts_share_are_saved(tmp_path):
    saved, fresh = (
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Identity()) for _ in range(2)
    )
    for each in (saved, fresh):
        each[1] = each[0]
    checkpoints.save(saved, tmp_path / "tied.safetensors")
    restore(fresh, tmp_path / "tied.safetensors")
    assert torch.equal(fresh[1].weight, saved[0].weight)


def test_two_writers_of_one_file_leave_it_whole(tmp_path, monkeypatch):
    path, sync, calls = tmp_path / "x.bin", os.fsync, []

    def interrupted(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            checkpoints.write(path, b"B" * 10)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    checkpoints.write(path, b"A" * 9)
    assert path.read_bytes() == b"A" * 9
    assert [each.name for each in tmp_path.iterdir()] == ["x.bin"]


def test_weights_go_into_a_module_of_ones_own(tmp_path):
    saved, fresh = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    checkpoints.save(saved, tmp_path / "linear.safetensors")
    restore(fresh, tmp_path / "linear.safetensors")
    assert torch.equal(fresh.weight, saved.weight)
    assert torch.equal(fresh.bias, saved.bias)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"shape": [1, 8, 8]}',
        b'{"format": 1}',
        b'{"format": 1, "shape": [1, 8, 8], "prior": 3}',
    ],
)
def test_a_damaged_description_is_refused(content, run):
    (run / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json' is damaged: "):
        load(run)


def test_a_description_of_a_later_format_is_refused(run):
    (run / "model.json").write_text(json.dumps({"format": 2, "parts": ["of", "the", "future"]}))
    with pytest.raises(
        ValueError, match="has format 2 and this version reads formats up to 1; upgrade"
    ):
        load(run)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("os.system", {"command": "touch {marker}"}),
        ("subprocess.Popen", {"args": ["touch", "{marker}"]}),
        ("pathlib.Path.touch", {"self": "{marker}"}),
    ],
)
@pytest.mark.parametrize("kind", ["prior", "likelihood", "posterior"])
def test_a_description_runs_no_program(kind, name, options, run, tmp_path):
    marker, path = tmp_path / "marker", run / "model.json"
    part = json.dumps({"name": name, "options": options}).replace("{marker}", str(marker))
    path.write_text(json.dumps({**json.loads(path.read_text()), kind: json.loads(part)}))
    module = name.rpartition(".")[0]
    with pytest.raises(PermissionError, match=f"'{name}' lies outside this package"):
        load(run)
    with pytest.raises((TypeError, ValueError), match=f"'{name}' (is no|cannot be imported)"):
        load(run, allow=[module])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model.json", "run' is no run: there is no file 'model.json' in it"),
        ("best.safetensors", r"there are no weights at '.*best\.safetensors'"),
    ],
)
def test_a_missing_file_is_named(missing, words, run):
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        load(run)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is no run"):
        load(tmp_path / "nowhere")


def test_a_run_of_python_says_how_to_get_its_weights_back(vae, digits, tmp_path):
    run = tmp_path / "own"
    fit(vae, digits, epochs=1, run=run, progress=False)
    with pytest.raises(FileNotFoundError, match="own' was trained from Python, and has") as said:
        load(run)
    made = re.search(r"pyro_vae\.(restore)\(vae, '(.*)'\)$", str(said.value))
    trained = {key: value.clone() for key, value in vae.state_dict().items()}
    for each in vae.parameters():
        torch.nn.init.zeros_(each)
    getattr(pyro_vae, made[1])(vae, made[2])
    assert all(torch.equal(vae.state_dict()[key], value) for key, value in trained.items())


def test_create_makes_new_folders_and_takes_empty_ones(tmp_path):
    folder = tmp_path / "runs" / "first"
    assert checkpoints.create(folder) == folder
    assert folder.is_dir()
    assert checkpoints.create(str(folder)) == folder


@pytest.mark.parametrize("place", ["full", "full/file"])
def test_create_refuses_what_is_there_and_leaves_it(place, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    with pytest.raises(FileExistsError, match=f"{place}' exists and is no empty folder"):
        checkpoints.create(tmp_path / place)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    assert (tmp_path / "full" / "file").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, b"the old file"])
def test_write_fails_without_a_trace(error, before, tmp_path, monkeypatch):
    def fail(descriptor):
        raise error

    path = tmp_path / "file"
    if before:
        checkpoints.write(path, before)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        checkpoints.write(path, b"the new file")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before] * bool(before)


def test_write_replaces_the_old_file(tmp_path):
    for content in (b"the old file", b"new"):
        checkpoints.write(tmp_path / "file", content)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"new"]
