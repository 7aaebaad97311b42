"""Reading weights: every accepted form arrives to the bit, every bad one is named and leaves the model as it was."""

import functools
import hashlib
import http.server
import re
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fused_resnet import models
from fused_resnet.models import cifar, load_keras_weights, load_weights
from tests.support import real_data


def small_model(seed: int, **kwargs) -> cifar.CifarResNet:
    """A CIFAR ResNet-8 with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = cifar.CifarResNet(1, **kwargs)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.fill_(seed)
    return model


def snapshot(model: nn.Module) -> dict:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(model: nn.Module, state: dict) -> bool:
    ours = model.state_dict()
    return list(ours) == list(state) and all(torch.equal(ours[key], state[key]) for key in state)


@pytest.fixture
def trained():
    return small_model(seed=1)


@pytest.fixture
def model():
    return small_model(seed=2)


@pytest.fixture
def checkpoint(trained, tmp_path):
    file = tmp_path / "small.pth"
    torch.save(trained.state_dict(), file)
    return file


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder, moved into this test's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def cache(tmp_path, monkeypatch, hub):
    """The folder of downloaded weights, moved into this test's, as is torch.hub's."""
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def kept(cache):
    return [file.name for file in cache.iterdir() if file.suffix != ".lock"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """http://127.0.0.1:port over tmp_path/served, with the list of paths that were asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requests = []
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{httpd.server_port}", requests=requests)
        httpd.shutdown()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def refused(model, source, match, error=ValueError, load=load_weights, **kwargs) -> str:
    """Check that loading fails with `match` in its message and that the model is what it was."""
    before, modules = snapshot(model), repr(model)
    with pytest.raises(error, match=match) as raised:
        load(model, source, progress=False, **kwargs)
    assert same(model, before) and repr(model) == modules
    return str(raised.value)


# --- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    (str, Path, Path.as_uri, lambda file: types.SimpleNamespace(url=str(file))),
    ids=("str", "Path", "file_url", "url_attribute"),
)
def test_sources(model, trained, checkpoint, form):
    load_weights(model, form(checkpoint))
    assert same(model, trained.state_dict())


def test_a_file_url_may_contain_blanks(model, trained, tmp_path):
    file = tmp_path / "my weights.pth"
    torch.save(trained.state_dict(), file)
    load_weights(model, file.as_uri())
    assert same(model, trained.state_dict())


@pytest.mark.parametrize(
    "wrap",
    (
        lambda state: {"state_dict": state, "best_prec1": 91.7},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {key.replace("linear.", "fc."): value for key, value in state.items()},
    ),
    ids=("state_dict", "model", "module", "compiled", "alias"),
)
def test_wrappings(model, trained, tmp_path, wrap):
    torch.save(wrap(trained.state_dict()), tmp_path / "wrapped.th")
    load_weights(model, tmp_path / "wrapped.th")
    assert same(model, trained.state_dict())


def test_npz(model, trained, tmp_path):
    np.savez(tmp_path / "small.npz", **{key: tensor.numpy() for key, tensor in trained.state_dict().items()})
    load_weights(model, tmp_path / "small.npz")
    assert same(model, trained.state_dict())


def test_half_precision_checkpoints_are_widened(model, trained, tmp_path):
    state = {key: tensor.half() for key, tensor in trained.state_dict().items() if tensor.is_floating_point()}
    torch.save(state, tmp_path / "w16.pth")
    load_weights(model, tmp_path / "w16.pth")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, trained.conv1.weight.half().float())


def test_counters_of_batches_may_be_missing(model, trained, tmp_path):
    state = {key: value for key, value in trained.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    load_weights(model, tmp_path / "old.pth")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


class FrozenNorm(nn.Module):
    """What detection models put in BatchNorm's place: four buffers and no counter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))


def test_counters_of_batches_are_dropped_where_the_norm_has_none(tmp_path):
    trained = models.ResNet(models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3)
    model = models.ResNet(models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, norm_layer=FrozenNorm)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    load_weights(model, tmp_path / "trained.pth")
    assert torch.equal(model.layer3[0].bn2.running_var, trained.layer3[0].bn2.running_var)


def test_parameters_stay_the_same_objects(model, checkpoint):
    before = dict(model.named_parameters())
    load_weights(model, checkpoint)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_strict_false_loads_what_matches(model, trained, tmp_path):
    state = {key: value for key, value in trained.state_dict().items() if not key.startswith("linear")}
    torch.save({**state, "head.weight": torch.ones(3)}, tmp_path / "backbone.pth")
    before = snapshot(model)
    result = load_weights(model, tmp_path / "backbone.pth", strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["linear.weight", "linear.bias"], ["head.weight"])
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_builders_take_weights(tmp_path):
    torch.manual_seed(0)
    trained = models.resnet18(num_classes=3)
    torch.save(trained.state_dict(), tmp_path / "resnet18.pth")
    model = models.resnet18(weights=tmp_path / "resnet18.pth", num_classes=3)
    assert same(model, trained.state_dict())


# --- digests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", (8, 20, 64))
def test_right_digest(model, trained, checkpoint, digits):
    load_weights(model, checkpoint, sha256=digest(checkpoint)[:digits].upper())
    assert same(model, trained.state_dict())


def test_digest_in_the_file_name(model, trained, checkpoint):
    right = checkpoint.rename(checkpoint.with_name(f"small-{digest(checkpoint)[:8]}.pth"))
    load_weights(model, right)
    assert same(model, trained.state_dict())


def test_wrong_digest(model, checkpoint):
    refused(model, checkpoint, f"has SHA-256 {digest(checkpoint)}, wanted {'0' * 64}", sha256="0" * 64)


def test_wrong_digest_in_the_file_name(model, checkpoint):
    wrong = checkpoint.rename(checkpoint.with_name("small-deadbeef.pth"))
    refused(model, wrong, "small-deadbeef.pth has SHA-256 .*, wanted deadbeef")
    load_weights(model, wrong, sha256=digest(wrong))  # the explicit digest counts


def test_a_date_in_the_file_name_is_no_digest(model, trained, checkpoint):
    load_weights(model, checkpoint.rename(checkpoint.with_name("small-20261120.pth")))
    assert same(model, trained.state_dict())


@pytest.mark.parametrize("sha256", ("", "abc", "z" * 64, "0" * 65))
def test_a_digest_that_is_none(model, checkpoint, sha256):
    refused(model, checkpoint, "sha256 must be 8 to 64 hexadecimal digits", sha256=sha256)


# --- downloads ----------------------------------------------------------------------------------------------------


def test_a_download_is_kept(model, trained, checkpoint, server, cache):
    (server.folder / "small.pth").write_bytes(checkpoint.read_bytes())
    load_weights(model, f"{server.url}/small.pth?download=true", progress=False, sha256=digest(checkpoint))
    assert same(model, trained.state_dict())
    assert [re.sub("url-[0-9a-f]{12}", "url-X", file.name) for file in map(Path, kept(cache))] == ["small.url-X.pth"]
    again = small_model(seed=3)
    load_weights(again, f"{server.url}/small.pth?download=true", progress=False)
    assert same(again, trained.state_dict())
    assert len(server.requests) == 1


def test_a_kept_download_with_another_digest_is_replaced(model, trained, checkpoint, server, cache):
    other = small_model(seed=5).state_dict()
    torch.save(other, server.folder / "small.pth")
    load_weights(model, f"{server.url}/small.pth", progress=False)
    (server.folder / "small.pth").write_bytes(checkpoint.read_bytes())
    load_weights(model, f"{server.url}/small.pth", progress=False)
    assert same(model, other) and len(server.requests) == 1
    load_weights(model, f"{server.url}/small.pth", progress=False, sha256=digest(checkpoint)[:8])
    assert same(model, trained.state_dict()) and len(server.requests) == 2
    assert len(kept(cache)) == 1


def test_downloads_of_one_file_name_are_told_apart(model, server, cache):
    states = {}
    for seed, folder in ((1, "first"), (2, "second")):
        (server.folder / folder).mkdir()
        states[f"{server.url}/{folder}/model.pth"] = state = small_model(seed=seed).state_dict()
        torch.save(state, server.folder / folder / "model.pth")
    for _ in range(2):
        for url, state in states.items():
            load_weights(model, url, progress=False)
            assert same(model, state)
    assert len(server.requests) == len(kept(cache)) == 2


def test_a_download_of_torch_hub_with_a_digest_in_its_name_is_found(model, trained, checkpoint, server, cache, hub):
    name = f"small-{digest(checkpoint)[:8]}.pth"
    hub.mkdir(parents=True)
    (hub / name).write_bytes(checkpoint.read_bytes())
    load_weights(model, f"{server.url}/elsewhere/{name}", progress=False)
    assert same(model, trained.state_dict()) and server.requests == []


@pytest.mark.parametrize("name, match", (("small-deadbeef.pth", "wanted deadbeef"), ("small.pth", "not a readable")))
def test_a_bad_download_is_not_kept(model, checkpoint, server, cache, name, match):
    (server.folder / name).write_bytes(checkpoint.read_bytes()[:-100])
    refused(model, f"{server.url}/{name}", f"{re.escape(server.url)}/{name}.*{match}")
    assert kept(cache) == []


def test_a_damaged_kept_download_is_replaced(model, trained, checkpoint, server, cache, caplog):
    """Reported, and not a failure that stays: the digest is not known, so only reading it shows the damage."""
    (server.folder / "small.pth").write_bytes(checkpoint.read_bytes())
    load_weights(model, f"{server.url}/small.pth", progress=False)
    (name,) = kept(cache)
    (cache / name).write_bytes(checkpoint.read_bytes()[:-100])
    load_weights(model, f"{server.url}/small.pth", progress=False)
    assert same(model, trained.state_dict()) and len(server.requests) == 2
    assert [f"{name} is ignored and downloaded again" in text for text in caplog.messages] == [True]
    assert (cache / name).read_bytes() == checkpoint.read_bytes()


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(model, trained, checkpoint, server, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    (server.folder / "small.pth").write_bytes(checkpoint.read_bytes())
    for _ in range(2):
        load_weights(model, f"{server.url}/small.pth", progress=False)
        assert same(model, trained.state_dict())
    assert ["weights are not kept" in text for text in caplog.messages] == [True]  # once
    assert len(server.requests) == 2


def test_processes_that_want_one_file_download_it_once(checkpoint, server, cache):
    """The second waits for the first one's lock, and then finds the file."""
    (server.folder / "small.pth").write_bytes(checkpoint.read_bytes())
    models = [small_model(seed=seed) for seed in range(4)]

    def load(model):
        load_weights(model, f"{server.url}/small.pth", progress=False)

    threads = [threading.Thread(target=load, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(model, models[0].state_dict()) for model in models)
    assert len(server.requests) == 1 and len(kept(cache)) == 1


def test_a_missing_url(model, server, cache):
    refused(model, f"{server.url}/none.pth", f"cannot download {server.url}/none.pth: .*404", error=OSError)
    assert kept(cache) == []


def test_a_url_without_a_file_name(model, server):
    refused(model, f"{server.url}/", "names no file")


# --- what is refused ----------------------------------------------------------------------------------------------


def test_no_such_file(model, tmp_path):
    refused(model, tmp_path / "none.pth", "there is no file .*none.pth", error=FileNotFoundError)
    refused(model, "DEFAULT", "knows no weights by name", error=FileNotFoundError)
    refused(model, 18, "must be a path or a URL, got int", error=TypeError)


@pytest.mark.parametrize("name", ("bad.pth", "bad.npz"))
@pytest.mark.parametrize("damage", ("truncated", "text", "empty"))
def test_corrupt_files(model, trained, tmp_path, name, damage):
    file = tmp_path / name
    if name.endswith(".npz"):
        np.savez(file, **{key: tensor.numpy() for key, tensor in trained.state_dict().items()})
    else:
        torch.save(trained.state_dict(), file)
    content = {"truncated": file.read_bytes()[:-2000], "text": b"<html>404</html>", "empty": b""}[damage]
    file.write_bytes(content)
    refused(model, file, f"{name} is not a readable checkpoint")


def test_pickled_code_is_not_run(model, tmp_path):
    torch.save(model, tmp_path / "whole_model.pth")
    refused(model, tmp_path / "whole_model.pth", "whole_model.pth is not a readable checkpoint .*torch.save of tensors")


@pytest.mark.parametrize(
    "content, match",
    (
        ([torch.ones(3)], "holds no state_dict but a list"),
        ({}, "holds no state_dict"),
        ({"epoch": 3, "weights": {}}, "holds a int under 'epoch'"),
        ({0: torch.ones(3)}, "holds a Tensor under 0"),
    ),
    ids=("list", "empty", "number", "unnamed"),
)
def test_files_that_hold_something_else(model, tmp_path, content, match):
    torch.save(content, tmp_path / "other.pth")
    refused(model, tmp_path / "other.pth", match)


def test_missing_and_unexpected_keys(model, trained, tmp_path):
    state = trained.state_dict()
    del state["linear.bias"], state["bn1.running_var"]
    torch.save({**state, "extra.weight": torch.ones(2, 3)}, tmp_path / "keys.pth")
    message = refused(model, tmp_path / "keys.pth", "keys.pth does not fit CifarResNet")
    assert "2 missing: bn1.running_var (16,), linear.bias (10,); 1 unexpected: extra.weight (2, 3)." in message
    assert message.endswith("or pass strict=False to load the keys that match.")


@pytest.mark.parametrize("strict", (True, False))
def test_wrong_shapes(model, tmp_path, strict):
    torch.save(small_model(seed=1, num_classes=100).state_dict(), tmp_path / "cifar100.pth")
    message = refused(model, tmp_path / "cifar100.pth", "does not fit", strict=strict)
    assert "2 different: linear.weight is (10, 64) float32 in the model and (100, 64) float32 in the file" in message
    assert "num_classes" in message and "strict=False" not in message


def test_integers_for_floats(model, trained, tmp_path):
    state = trained.state_dict() | {"conv1.weight": torch.ones(16, 3, 3, 3, dtype=torch.int8)}
    torch.save(state, tmp_path / "quantized.pth")
    refused(model, tmp_path / "quantized.pth", r"conv1.weight is \(16, 3, 3, 3\) float32 .* \(16, 3, 3, 3\) int8")


def test_a_long_list_is_cut(model, tmp_path):
    torch.save({"conv1.weight": model.conv1.weight}, tmp_path / "one.pth")
    message = refused(model, tmp_path / "one.pth", r"36 missing: bn1.weight \(16,\), .*, and 32 more")
    assert len(message) < 600


def test_strict_false_needs_one_match(model, tmp_path):
    torch.save({"features.0.weight": torch.ones(3)}, tmp_path / "vgg.pth")
    refused(model, tmp_path / "vgg.pth", "unexpected: features.0.weight", strict=False)


# --- Keras --------------------------------------------------------------------------------------------------------


def keras_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Random arrays under Keras's names and in its layouts for `model`, a bottleneck ResNet. Written out by hand."""
    random = np.random.default_rng(0)
    arrays = {}

    def conv_bn(conv, bn, conv_module):
        k, c, r, s = conv_module.weight.shape
        arrays[f"{conv}.kernel"] = random.random((r, s, c, k), dtype=np.float32).astype(np.float16)
        arrays[f"{conv}.bias"] = random.random(k, dtype=np.float32)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            arrays[f"{bn}.{name}"] = random.random(k, dtype=np.float32)

    conv_bn("conv1", "bn_conv1", model.conv1)
    for stage, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), 2):
        for letter, block in zip("abcdef", layer):
            conv_bn(f"res{stage}{letter}_branch2a", f"bn{stage}{letter}_branch2a", block.conv1)
            conv_bn(f"res{stage}{letter}_branch2b", f"bn{stage}{letter}_branch2b", block.conv2)
            conv_bn(f"res{stage}{letter}_branch2c", f"bn{stage}{letter}_branch2c", block.conv3)
            if letter == "a":
                conv_bn(f"res{stage}a_branch1", f"bn{stage}a_branch1", block.downsample[0])
    arrays["fc1000.kernel"] = random.random((2048, model.fc.out_features), dtype=np.float32)
    arrays["fc1000.bias"] = random.random(model.fc.out_features, dtype=np.float32)
    return arrays


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory):
    model = models.ResNet(models.resnet.Bottleneck, (2, 1, 1, 1), num_classes=5, stride_in_1x1=True)
    arrays = keras_arrays(model)
    file = tmp_path_factory.mktemp("keras") / "keras.npz"
    np.savez(file, **arrays)
    return file, arrays


@pytest.fixture
def bottlenecks():
    torch.manual_seed(0)
    return models.ResNet(models.resnet.Bottleneck, (2, 1, 1, 1), num_classes=5, stride_in_1x1=True)


def test_keras_arrays_arrive_in_their_places(bottlenecks, keras_file):
    file, arrays = keras_file
    assert load_keras_weights(bottlenecks, file) is bottlenecks
    block = bottlenecks.layer3[0]
    assert block.conv2.weight[5, 7, 0, 2].item() == arrays["res4a_branch2b.kernel"][0, 2, 7, 5]
    assert block.downsample[0].bias[3].item() == arrays["res4a_branch1.bias"][3]
    assert bottlenecks.layer1[1].bn3.running_var[9].item() == arrays["bn2b_branch2c.moving_variance"][9]
    assert bottlenecks.fc.weight[4, 100].item() == arrays["fc1000.kernel"][100, 4]
    convs = [module for module in bottlenecks.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in bottlenecks.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(conv.bias, nn.Parameter) and conv.bias.abs().sum() > 0 for conv in convs)
    assert {norm.eps for norm in norms} == {1e-3}
    load_keras_weights(bottlenecks, file, eps=1e-5)  # biases are there already
    assert {norm.eps for norm in norms} == {1e-5}


def test_keras_needs_the_stride_in_the_1x1(keras_file):
    torch.manual_seed(0)
    v15 = models.ResNet(models.resnet.Bottleneck, (2, 1, 1, 1), num_classes=5)
    refused(v15, keras_file[0], r"resnet50\(stride_in_1x1=True\)", load=load_keras_weights)
    refused(models.resnet18(num_classes=5), keras_file[0], "are bottlenecks", load=load_keras_weights)


@pytest.mark.parametrize("change", ("missing", "unexpected", "shape", "layout"))
def test_keras_files_that_do_not_fit(bottlenecks, keras_file, tmp_path, change):
    arrays = dict(keras_file[1])
    match = {
        "missing": r"1 missing: layer1.0.conv1.bias \(64,\)",
        "unexpected": r"1 unexpected: dense.kernel",
        "shape": r"1 different: fc.bias is \(5,\) float32 in the model and \(7,\)",
        "layout": "conv1.kernel has shape .*, not HWIO",
    }[change]
    if change == "missing":
        del arrays["res2a_branch2a.bias"]
    elif change == "unexpected":
        arrays["dense.kernel"] = np.ones((2, 3), np.float32)
    elif change == "shape":
        arrays["fc1000.bias"] = np.ones(7, np.float32)
    else:
        arrays["conv1.kernel"] = np.ones((7, 7, 3), np.float32)
    np.savez(tmp_path / "changed.npz", **arrays)
    refused(bottlenecks, tmp_path / "changed.npz", match, load=load_keras_weights)


# --- files that others published ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("resnet20", "resnet32", "resnet56"))
def test_published_cifar_checkpoints_fill_every_tensor(name):
    model = real_data.akamaster(name)
    again = {key: tensor for key, tensor in models.create(name).state_dict().items() if tensor.dim()}
    assert not [key for key, tensor in again.items() if torch.equal(model.state_dict()[key], tensor)]


def test_a_published_checkpoint_of_another_depth_is_refused():
    file = real_data.path("cifar10/resnet32-d509ac18.th")
    refused(cifar.resnet20(), file, "unexpected: layer1.3.conv1.weight")
    refused(cifar.resnet56(), file, "missing: layer1.5.conv1.weight")


def test_a_pruned_checkpoint_needs_its_widths():
    file = real_data.path("cifar10/distiller_resnet20_channel_pruned.npz")
    refused(cifar.resnet20(option="B"), file, r"layer1.0.conv1.weight is \(16, 16, 3, 3\) .* \(11, 16, 3, 3\)")
    refused(cifar.resnet20(inner_widths=real_data.PRUNED_WIDTHS), file, "unexpected: layer2.0.downsample.0.weight")
