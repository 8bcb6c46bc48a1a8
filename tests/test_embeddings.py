"""Features of images are computed once, whatever interrupts it, and kept beside the scores."""

import numpy as np
import pytest
import torch
from PIL import Image

from xdpo.images.reading import Picture, with_checksums
from xdpo.scores import embeddings


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of which each is of one grey."""
    found = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.new("L", (8, 8), 10 * number).save(path)
        found.append(Picture("set", "", "", path.name, 0, path, "model"))
    return with_checksums(found)[0]


@pytest.fixture
def embed(pictures, tmp_path, monkeypatch):
    """Features of the pictures in batches of two: embed(dies_after=None, version="a") → checksum → vector."""
    calls = []

    def call(*, dies_after=None, version="a", embedder="clip", each=0.0):
        calls.clear()

        def vectors_of(images):
            if len(calls) == dies_after:
                raise KeyboardInterrupt
            calls.append(len(images))
            return torch.tensor([[float(np.asarray(image).mean()), 1.0] for image in images])

        monkeypatch.setattr(embeddings, "SAVE_SECONDS", each)
        monkeypatch.setattr(embeddings, "load_embedder", lambda *_: (lambda image: image, vectors_of))
        monkeypatch.setattr(embeddings, "embedder_version", lambda *_: version)
        device, folder = torch.device("cpu"), tmp_path / "output"
        return embeddings.image_features(pictures, folder, embedder=embedder, device=device, batch_size=2)

    call.calls, call.folder = calls, tmp_path / "output"
    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("each", [-1.0, 1000.0])
def test_a_killed_embedding_goes_on_from_its_parts(embed, pictures, each):
    """Parts are written every few seconds, here after each batch, and the rest where the run ends."""
    with pytest.raises(KeyboardInterrupt):
        embed(dies_after=2, each=each)
    assert names(embed.folder) == ["features.parts"]
    assert len(list((embed.folder / "features.parts").iterdir())) == (2 if each < 0 else 1)
    resumed = embed(each=each)
    assert embed.calls == [2, 1] and names(embed.folder) == ["features.npz"]
    assert [resumed[str(picture.sha256)].tolist() for picture in pictures] == [[10.0 * n, 1.0] for n in range(7)]

    content = (embed.folder / "features.npz").read_bytes()
    (embed.folder / "features.npz").unlink()
    embed(each=each)
    assert embed.calls == [2, 2, 2, 1] and (embed.folder / "features.npz").read_bytes() == content
    embed(each=each)
    assert embed.calls == []


def test_features_of_another_version_are_computed_anew_and_its_parts_removed(embed):
    with pytest.raises(KeyboardInterrupt):
        embed(dies_after=2)
    embed(version="b")
    assert embed.calls == [2, 2, 2, 1] and names(embed.folder) == ["features.npz"]


def test_the_parts_of_a_run_that_was_killed_while_merging_are_merged(embed):
    with pytest.raises(KeyboardInterrupt):
        embed(dies_after=3)
    parts = embed.folder / "features.parts"
    kept = {path.name: path.read_bytes() for path in parts.iterdir()}
    embed()
    parts.mkdir()
    for name, content in kept.items():
        (parts / name).write_bytes(content)
    embed()
    assert embed.calls == [] and names(embed.folder) == ["features.npz"]


def test_each_network_has_a_file(embed):
    embed()
    embed(embedder="dinov2")
    assert embed.calls == [2, 2, 2, 1] and names(embed.folder) == ["features.npz", "features_dinov2.npz"]


def test_damaged_features_are_named(embed):
    with pytest.raises(KeyboardInterrupt):
        embed(dies_after=1)
    (part,) = (embed.folder / "features.parts").iterdir()
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{part.name} can't be read .*its features are then computed anew"):
        embed()
