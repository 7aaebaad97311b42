"""Images: every form in which CIFAR-10 comes gives the same ones, and damaged files are refused by name."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fused_resnet.recipes import data, images


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8), np.arange(12) % 10


def write_binary(folder, pixels, labels):
    """Two images a file, as cifar-10-binary.tar.gz has 10,000."""
    for number, name in enumerate([*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"]):
        rows = slice(2 * number, 2 * number + 2)
        records = np.concatenate([labels[rows, None].astype(np.uint8), pixels[rows].reshape(2, -1)], axis=1)
        (folder / name).write_bytes(records.tobytes())


def write_python(folder, pixels, labels):
    for number, name in enumerate([*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]):
        rows = slice(2 * number, 2 * number + 2)
        batch = {b"data": pixels[rows].reshape(2, -1), b"labels": labels[rows].tolist(), b"batch_label": b"one"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.mark.parametrize("write", (write_binary, write_python))
def test_folders_of_cifar10(write, sample, tmp_path):
    pixels, labels = sample
    write(tmp_path, pixels, labels)
    for split, rows in (("train", slice(0, 10)), ("test", slice(10, 12))):
        found = images.load(tmp_path, 32, split)
        assert found.pixels.numpy().tolist() == pixels[rows].tolist() and found.labels.tolist() == labels[rows].tolist()
    opened = data.cifar10(tmp_path)
    assert (len(opened.train), len(opened.test), opened.train.classes) == (10, 2, 10)
    assert len(data.cifar10(tmp_path, tested=1).test) == 1
    name = "data_batch_3.bin" if write is write_binary else "data_batch_3"
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"{name} (has 6141 bytes|is no batch of CIFAR-10)"):
        data.cifar10(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        data.cifar10(tmp_path)


def test_a_pickle_may_hold_arrays_alone(sample, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    write_python(tmp_path, *sample)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [0]}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_2 is no batch of CIFAR-10 .*mkdir, which is no array"):
        data.cifar10(tmp_path)
    assert not (tmp_path / "made").exists()
    for odd in ({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]},
                {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
                {b"data": np.zeros((1, 3072)), b"labels": [1]}):  # fmt: skip
        (tmp_path / "data_batch_2").write_bytes(pickle.dumps(odd, protocol=2))
        with pytest.raises(ValueError, match="data_batch_2 (must have rows|has labels 10|must hold uint8)"):
            data.cifar10(tmp_path)


def test_what_cannot_be_trained_on(sample, tmp_path):
    pixels, labels = sample
    for name, arrays, match in (
        ("keys", {"x": pixels, "y": labels}, "got no array `images` but x, y"),
        ("labels", {"images": pixels}, "training needs labels"),
        ("classes", {"images": pixels, "labels": labels + 3}, "labels are 3 to 12, but there are 10 classes"),
        ("size", {"images": pixels[:, :, :16], "labels": labels}, r"has \(3, 16, 32\)"),
        ("floats", {"images": pixels / 255.0, "labels": labels}, "in float64"),
        ("short", {"images": pixels, "labels": labels[:5]}, "must have 12 integer `labels`"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=match):
            data.cifar10(tmp_path / f"{name}.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "keys.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.npz is no .npz file"):
        data.cifar10(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match="no file or folder .*absent. docs/train.md says"):
        data.cifar10(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has neither data_batch_1.bin nor data_batch_1"):
        data.cifar10(tmp_path)


def test_a_batch_is_the_papers_augmentation_of_its_images(sample):
    """Each image is one of the 81 windows of its padded self, mirrored or not, and all processes see one draw."""
    pixels, labels = (torch.from_numpy(one) for one in sample)
    source = data.InMemory(images.Images(pixels, labels), 10, "none")
    chosen = torch.tensor([5, 2, 9, 0])

    def batch(seed, share=slice(None)):
        return next(iter(source.batches([data.Wanted(chosen, seed, share)])))

    plain, found = batch(None)
    assert torch.equal(plain, pixels[chosen].float() / 255) and found.tolist() == labels[chosen].tolist()
    drawn, found = batch(7)
    assert found.tolist() == labels[chosen].tolist()
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    for image, whole in zip(drawn, padded):
        windows = [whole[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(image, one) or torch.equal(image, one.flip(2)) for one in windows)
    halves = [batch(7, slice(0, 2))[0], batch(7, slice(2, 4))[0]]
    assert torch.equal(torch.cat(halves), drawn) and not torch.equal(batch(8)[0], drawn)
    order = data.order_of(12, 0, 1)
    assert sorted(order.tolist()) == list(range(12)) and not torch.equal(order, data.order_of(12, 0, 2))


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                picture = Image.fromarray(rng.integers(0, 256, (40, 30 + 9 * number, 3), dtype=np.uint8))
                picture.save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def test_folders_of_image_files(folders):
    found = data.folders(folders, 16)
    wanted = [data.Wanted(torch.tensor([4, 0]), seed, slice(None)) for seed in (3, 3, 4, None)]
    before = torch.get_rng_state()
    batches = [x for x, labels in found.train.batches(wanted) if labels.tolist() == [1, 0]]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is the model's"
    assert [tuple(x.shape) for x in batches] == [(2, 3, 16, 16)] * 4
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])
    alone = next(iter(found.train.batches([data.Wanted(torch.tensor([0]), 3, slice(None))])))[0]
    assert torch.equal(alone[0], batches[0][1]), "an image's part does not depend on its batch"
    whole = images.normalized(images.load(folders / "train", 16).pixels, "imagenet")
    assert torch.equal(batches[3], whole[[4, 0]])


def test_folders_that_are_refused(folders):
    with pytest.raises(FileNotFoundError, match="no folder .*absent"):
        data.folders(folders / "absent", 16)
    with pytest.raises(FileNotFoundError, match="no folder .*train"):
        data.folders(folders / "train", 16)
    path = folders / "val" / "bee" / "1.png"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"no picture", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="1.png cannot be read"):
            data.folders(folders, 16)
    path.write_bytes(content)
    (folders / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match="classes without images: cow"):
        data.folders(folders, 16)
    (folders / "val" / "cow" / "1.png").write_bytes(content)
    with pytest.raises(ValueError, match="train and val differ in their classes: cow"):
        data.folders(folders, 16)


def test_headers_alone_are_read_of_many_files(folders, monkeypatch):
    monkeypatch.setattr(data, "_CHECKED_WHOLE", 2)
    path = folders / "train" / "ant" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found = data.folders(folders, 16)  # it has a header
    with pytest.raises(ValueError, match="0.png cannot be read"):
        list(found.train.batches([data.Wanted(torch.tensor([0]), None, slice(None))]))
    path.write_bytes(io.BytesIO().getvalue())
    with pytest.raises(ValueError, match="0.png cannot be read"):
        data.folders(folders, 16)
