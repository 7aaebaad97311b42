"""Reading trained weights: from a file or a URL into a model, checked as a whole before anything is copied."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union, cast

import torch
from torch import Tensor, nn

from fused_resnet.machine import files
from fused_resnet.machine.errors import one_line

# a path, an http(s) or file URL, or anything with a `url` such as torchvision's ResNet50_Weights.DEFAULT
Source = Union[str, "os.PathLike[str]", object]

# torch.hub's convention: name-<first digits of the SHA-256>.ext. Eight digits that read as a date are a date.
_NAME_HASH = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.[^.]+$")
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 4
_DOWNLOAD_S = 1800.0  # that another process may take to download the same file


def load_weights(
    model: nn.Module, source: Source, *, progress: bool = True, sha256: Optional[str] = None, strict: bool = True
):
    """Copy trained weights into `model`, in place. Returns what nn.Module.load_state_dict returns.

    source: a path or URL of a file written by torch.save (tensors only: read with weights_only=True) or of an .npz.
    A state_dict may be wrapped in {"state_dict": ...} or {"model": ...}, and its keys prefixed "module." or
    "_orig_mod.". Downloads are kept in the folder `weights` of `files.cache_dir`; those that torch.hub has are found.
    sha256: the expected digest or its first eight or more digits; without it the one in the file name is checked, as in
    resnet18-f37072fd.pth. strict=False loads the keys that match and needs at least one; shapes must agree all the
    same.

    Raises FileNotFoundError, OSError for a failed download, and TypeError for another kind of source. ValueError for a
    wrong digest, an unreadable file, and keys or shapes that do not fit. The model has not been changed by then.
    """
    path, found = _fetch(source, progress, sha256)
    aliases = getattr(model, "key_aliases", {})
    expected = model.state_dict()
    state = {".".join(aliases.get(part, part) for part in key.split(".")): t for key, t in found.items()}
    # frozen norms count no batches; checkpoints from before PyTorch 0.4.1 have no counts, and load without them
    state = {key: t for key, t in state.items() if key in expected or not key.endswith("num_batches_tracked")}
    _check_fit(path, type(model).__name__, expected, state, strict)
    return model.load_state_dict(state, strict=strict)


def load_keras_weights(
    model: nn.Module, source: Source, *, progress: bool = True, sha256: Optional[str] = None, eps: float = 1e-3
) -> nn.Module:
    """Fill a ResNet of Bottlenecks from Keras's ResNet-50 arrays, in place, and return it.

    model: `resnet50(stride_in_1x1=True)` or deeper. source: as in `load_weights`, an .npz with the layer names of
    Keras and Caffe: conv1.kernel, bn_conv1.gamma, res2a_branch2a.kernel, bn2a_branch1.moving_mean, fc1000.bias.
    Kernels are turned from HWIO into KCRS; Keras's convolution biases become `bias` parameters of the convolutions;
    every BatchNorm2d gets Keras's `eps`. Such weights expect BGR images minus (103.939, 116.779, 123.68).

    Raises as `load_weights` does, and ValueError for a model without stride_in_1x1; the model is unchanged by then.
    """
    convs = _keras_layers(model)
    path, arrays = _fetch(source, progress, sha256)
    state = _from_keras(path, arrays, convs)
    expected = dict(model.state_dict())
    for name, _, _, _ in convs:
        weight = cast(Tensor, model.get_submodule(name).weight)
        expected.setdefault(f"{name}.bias", weight.detach().new_zeros(weight.shape[0]))
    _check_fit(path, type(model).__name__, expected, state, strict=True)
    for name, bn_name, _, _ in convs:
        conv = cast(nn.Conv2d, model.get_submodule(name))
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.detach().new_zeros(conv.out_channels))
        cast(nn.BatchNorm2d, model.get_submodule(bn_name)).eps = eps
    model.load_state_dict(state)
    return model


def _fetch(source: Source, progress: bool, sha256: Optional[str]) -> tuple[Path, dict[str, Tensor]]:
    """(where it is, its tensors) of what is behind `source`, downloaded where necessary, its digest verified."""
    source = getattr(source, "url", source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load_weights: source must be a path or a URL, got {type(source).__name__}.")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"load_weights: sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}.")
    url = urllib.parse.urlsplit(os.fspath(source))
    if url.scheme in ("http", "https"):
        return _fetch_url(os.fspath(source), os.path.basename(url.path), progress, sha256)
    path = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"load_weights: there is no file {path}. Pass a path or URL of a checkpoint, for instance "
            f"torchvision.models.ResNet50_Weights.DEFAULT.url; fused_resnet knows no weights by name."
        )
    _verify(path, _digest_wanted(path.name, sha256))
    return path, _read(path)


def _fetch_url(url: str, name: str, progress: bool, sha256: Optional[str]) -> tuple[Path, dict[str, Tensor]]:
    """As `_fetch`. One process downloads, others wait; where the folder cannot be written, nothing is kept."""
    if not name:
        raise ValueError(f"load_weights: the URL {url} names no file.")
    path, wanted = files.cache_dir() / "weights" / _name_kept(url, name), _digest_wanted(name, sha256)
    places = [path]
    if _NAME_HASH.search(name):  # then torch.hub, and so torchvision, may have the very file
        places.append(Path(torch.hub.get_dir(), "checkpoints", name))
    for place in places:
        if (state := _kept(place, wanted)) is not None:
            return place, state
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, timeout_s=_DOWNLOAD_S))
        except OSError as error:
            files.report_once(f"{path.parent} cannot be written, so weights are not kept ({one_line(error)}).")
            folder = None
        else:
            folder = path.parent
            if (state := _kept(path, wanted)) is not None:
                return path, state
        arrived = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)), name)
        try:
            torch.hub.download_url_to_file(url, str(arrived), progress=progress)
        except OSError as error:
            raise OSError(f"load_weights: cannot download {url}: {error}. Download it and pass its path.") from error
        _verify(arrived, wanted, shown=url)
        state = _read(arrived, shown=url)  # a download cut short must not stay in the cache
        if folder is not None:
            os.replace(arrived, path)
    return path, state


def _kept(path: Path, wanted: Optional[str]) -> Optional[dict[str, Tensor]]:
    """The tensors of a file that was downloaded earlier; None without one, and for one that is damaged or another."""
    try:
        if not path.is_file():
            return None
        _verify(path, wanted)
        return _read(path)
    except (OSError, ValueError) as error:
        files.report_once(f"{path} is ignored and downloaded again ({one_line(error)})")
        return None


def _name_kept(url: str, name: str) -> str:
    """The file name in the URL if it tells contents apart, else that with a digest of the URL: many are model.pth."""
    if _NAME_HASH.search(name):
        return name
    # a dot before the digest, since `_NAME_HASH` reads digits after a dash as the file's own digest
    stem, extension = os.path.splitext(name)
    return f"{stem}.url-{hashlib.sha256(url.encode()).hexdigest()[:12]}{extension}"


def _digest_wanted(name: str, sha256: Optional[str]) -> Optional[str]:
    in_name = _NAME_HASH.search(name)
    return sha256.lower() if sha256 is not None else in_name and in_name.group(1)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(path: Path, wanted: Optional[str], shown: Optional[str] = None) -> None:
    if wanted is None:
        return
    digest = _digest(path)
    if not digest.startswith(wanted):
        raise ValueError(
            f"load_weights: {shown or path} has SHA-256 {digest}, wanted {wanted}. Get the file again, or pass the "
            f"sha256 of the file you mean."
        )


def _read(path: Path, shown: Optional[str] = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by key, unwrapped and without prefixes."""
    try:
        content = _read_npz(path) if path.suffix == ".npz" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zip, pickle and numpy each raise their own kinds
        raise ValueError(
            f"load_weights: {shown or path} is not a readable checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}). It must be a torch.save of tensors only "
            f"or an .npz; get the file again if it may be damaged."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"load_weights: {shown or path} holds no state_dict but a {type(content).__name__}.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"load_weights: {shown or path} holds a {type(value).__name__} under {key!r} where a state_dict has a "
                f"tensor under a name. Save model.state_dict() alone or as {{'state_dict': ...}}."
            )
    state = dict(content)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _check_fit(path: Path, model_name: str, expected: Mapping, state: Mapping, strict: bool) -> None:
    """Raise ValueError unless load_state_dict will succeed, key by key and shape by shape."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    differ = [
        f"{key} is {_described(expected[key])} in the model and {_described(state[key])} in the file"
        for key in expected
        if key in state and _kind(expected[key]) != _kind(state[key])
    ]
    problems = []
    if missing and (strict or len(unexpected) == len(state)):
        problems.append(_listed("missing", [f"{key} {tuple(expected[key].shape)}" for key in missing]))
    if unexpected and (strict or len(unexpected) == len(state)):
        problems.append(_listed("unexpected", [f"{key} {tuple(state[key].shape)}" for key in unexpected]))
    if differ:
        problems.append(_listed("different", differ))
    if problems:
        advice = "Build the model that was trained (depth, num_classes, groups, option, inner_widths)"
        if not differ and len(unexpected) < len(state):
            advice += ", or pass strict=False to load the keys that match"
        raise ValueError(f"load_weights: {path} does not fit {model_name}: {'; '.join(problems)}. {advice}.")


def _kind(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.is_floating_point()


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(what: str, entries: list[str]) -> str:
    more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{len(entries)} {what}: {', '.join(entries[:_SHOWN])}{more}"


def _keras_layers(model: nn.Module) -> list[tuple[str, str, str, str]]:
    """(conv, bn, Keras's conv, Keras's bn) for every convolution of a bottleneck ResNet with its stride in the 1x1."""
    layers = [("conv1", "bn1", "conv1", "bn_conv1")]
    for stage in range(1, 5):
        for index, block in enumerate(getattr(model, f"layer{stage}", ())):
            if not hasattr(block, "conv3") or block.conv2.stride != (1, 1):
                raise ValueError(
                    "load_keras_weights: Keras's ResNets are bottlenecks with the stride in the first 1x1 convolution. "
                    "Build the model with resnet50(stride_in_1x1=True)."
                )
            ours, keras = f"layer{stage}.{index}", f"{stage + 1}{chr(ord('a') + index)}_branch"
            for n, letter in enumerate("abc", 1):
                layers.append((f"{ours}.conv{n}", f"{ours}.bn{n}", f"res{keras}2{letter}", f"bn{keras}2{letter}"))
            if block.downsample is not None:
                layers.append((f"{ours}.downsample.0", f"{ours}.downsample.1", f"res{keras}1", f"bn{keras}1"))
    if len(layers) == 1:
        raise ValueError(f"load_keras_weights: {type(model).__name__} has no stages layer1 to layer4.")
    return layers


def _from_keras(path: Path, arrays: Mapping[str, Tensor], layers: list[tuple[str, str, str, str]]) -> dict[str, Tensor]:
    """Keras's arrays under our keys and in our layouts; names that are none of Keras's stay as they are."""
    names = {"fc1000.kernel": "fc.weight", "fc1000.bias": "fc.bias"}
    for conv, bn, keras_conv, keras_bn in layers:
        names |= {f"{keras_conv}.kernel": f"{conv}.weight", f"{keras_conv}.bias": f"{conv}.bias"}
        bn_names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        names |= {f"{keras_bn}.{theirs}": f"{bn}.{ours}" for theirs, ours in bn_names.items()}
    state = {}
    for name, array in arrays.items():
        if name.endswith(".kernel"):
            if array.dim() not in (2, 4):
                raise ValueError(f"load_keras_weights: {path}: {name} has shape {tuple(array.shape)}, not HWIO.")
            array = array.permute(3, 2, 0, 1) if array.dim() == 4 else array.t()
        state[names.get(name, name)] = array
    return state
