"""CIFAR-10 and micrographs from files that the tests write: whole, damaged, wrong, missing."""

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svlib.experiments import data

RECORDS = 20  # in each of the six files; the official ones have 10,000


def records(number: int) -> np.ndarray:
    """One file's records: labels and pixels, bytes."""
    generator = np.random.default_rng(number)
    labels = generator.integers(0, 10, (RECORDS, 1), dtype=np.uint8)
    return np.hstack([labels, generator.integers(0, 256, (RECORDS, 3072), dtype=np.uint8)])


def archive(contents: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as members:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    return out.getvalue()


CONTENTS = {name: records(number).tobytes() for number, name in enumerate(data._CIFAR10_FILES)}
ARCHIVE = archive(CONTENTS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CIFAR10_RECORDS", RECORDS)
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(ARCHIVE).hexdigest())
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)


def unpack(folder: Path, contents: dict[str, bytes]) -> Path:
    place = folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    for name, content in contents.items():
        (place / name).write_bytes(content)
    return folder


def test_files_of_the_official_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six files of 10,000 records pass, all of them black; one with a record more does not."""
    monkeypatch.undo()
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in CONTENTS:
        (folder / name).touch()
        os.truncate(folder / name, 30_730_000)
    with pytest.raises(ValueError, match="images must differ in some pixel"):
        data.cifar10(tmp_path)
    os.truncate(folder / "test_batch.bin", 30_733_073)
    message = "test_batch.bin must have 30,730,000 bytes, got 30,733,073: it is truncated or no"
    with pytest.raises(ValueError, match=message):
        data.cifar10(tmp_path)
    assert data.CIFAR10_URL.endswith("/cifar-10-binary.tar.gz")


def test_cifar10_is_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = data.cifar10(unpack(tmp_path / "unpacked", CONTENTS))
    assert split.images.shape == (5 * RECORDS, 3, 32, 32)
    assert split.held_out_images.shape == (RECORDS, 3, 32, 32)
    assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
    second = records(1)
    assert split.labels[RECORDS : 2 * RECORDS].tolist() == second[:, 0].tolist()
    assert split.held_out_labels.tolist() == records(5)[:, 0].tolist()
    training = np.concatenate([records(number)[:, 1:] for number in range(5)]).astype(float)
    green = second[3, 1 + 1024 + 2 * 32 + 7]  # record 3, second channel, row 2, column 7
    by_hand = (green - training.mean()) / training.std()
    assert float(split.images[RECORDS + 3, 1, 2, 7]) == pytest.approx(by_hand, rel=1e-6)
    assert float(split.images.double().std(correction=0)) == pytest.approx(1, abs=1e-6)

    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "cifar-10-binary.tar.gz").write_bytes(ARCHIVE)
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "packed"))
    packed = data.cifar10()
    assert torch.equal(packed.images, split.images)
    assert packed.source == "CIFAR-10, official archive"
    assert packed.sha256 == data.CIFAR10_SHA256
    assert split.source == "CIFAR-10, binary layout, unverified copy"
    assert split.sha256 == hashlib.sha256(b"".join(CONTENTS.values())).hexdigest()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "another"])
def test_archive_with_another_checksum_is_refused(damage: str, tmp_path: Path) -> None:
    flipped = bytearray(ARCHIVE)
    flipped[len(flipped) // 2] ^= 1
    content = {
        "flipped": bytes(flipped),
        "truncated": ARCHIVE[:-1000],
        "empty": b"",
        "another": archive({}),
    }[damage]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    message = rf"cifar-10-binary.tar.gz must have SHA-256 {data.CIFAR10_SHA256}, got {digest} .*"
    rest = rf"\({len(content):,} bytes\): it is damaged or truncated; .* get it again"
    with pytest.raises(ValueError, match=message + rest):
        data.cifar10(tmp_path)


def test_archive_without_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive({name: part for name, part in CONTENTS.items() if name != "test_batch.bin"})
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(content).hexdigest())
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"must hold cifar-10-batches-bin/test_batch.bin, got an archive without"
    ):
        data.cifar10(tmp_path)


def test_unpacked_files_are_checked(tmp_path: Path) -> None:
    folder = unpack(tmp_path, CONTENTS)
    victim = folder / "cifar-10-batches-bin" / "data_batch_3.bin"
    victim.write_bytes(CONTENTS["data_batch_3.bin"][:-5])
    with pytest.raises(
        ValueError, match=r"data_batch_3.bin must have 61,460 bytes, got 61,455: it is truncated"
    ):
        data.cifar10(folder)
    wrong = records(2)
    wrong[[4, 9], 0] = 10, 255
    victim.write_bytes(wrong.tobytes())
    with pytest.raises(
        ValueError, match=r"data_batch_3.bin must have labels 0 to 9, got 10 in record 4 \(2 such\)"
    ):
        data.cifar10(folder)
    victim.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"folder must hold .*https://www.cs.toronto.edu.* with data_batch_3.bin, got",
    ):
        data.cifar10(folder)


def test_missing_folder_says_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"\(--data, or the environment variable SVLIB_DATA\) .*toronto.* got none",
    ):
        data.cifar10()
    with pytest.raises(
        FileNotFoundError,
        match=r"cifar-10-binary.tar.gz or cifar-10-batches-bin .* got .*/nowhere, which is none",
    ):
        data.cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"train-volume.tif .*isbi-2012.* got .*/nowhere"):
        data.micrographs(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"folder must hold image and label .*isbi-2012.* got"
    ):
        data.micrographs(tmp_path)


class Server(BaseHTTPRequestHandler):
    """Sends ``content``, after a header that promises ``promised`` bytes."""

    content, promised = ARCHIVE, len(ARCHIVE)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.promised))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    handler = type("Handler", (Server,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=partial(running.serve_forever, poll_interval=0.01)).start()
        monkeypatch.setattr(
            data, "CIFAR10_URL", f"http://127.0.0.1:{running.server_port}/cifar-10-binary.tar.gz"
        )
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield handler
        running.shutdown()


def test_download(server: type[Server], tmp_path: Path) -> None:
    server.content = ARCHIVE[:-7] + b"another"
    with pytest.raises(ValueError, match="does not match the known hash"):
        data.fetch_cifar10(tmp_path)
    server.content = ARCHIVE[:3000]  # the connection ends early
    with pytest.raises((OSError, ValueError)):
        data.fetch_cifar10(tmp_path)
    assert not list(tmp_path.iterdir())
    server.content = ARCHIVE
    path = data.fetch_cifar10(tmp_path)
    assert path.read_bytes() == ARCHIVE
    server.content = b""  # what is there whole is not fetched again
    assert data.fetch_cifar10(tmp_path) == path
    assert len(data.cifar10(tmp_path).images) == 5 * RECORDS


def test_damaged_archive_is_fetched_again(server: type[Server], tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(ARCHIVE[:1000])
    data.fetch_cifar10(tmp_path)
    assert (tmp_path / "cifar-10-binary.tar.gz").read_bytes() == ARCHIVE


def sections(count: int, size: int = 16) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pictures whose grey tells their number, dark where the label says membrane."""
    generator = np.random.default_rng(0)
    labels = [(generator.random((size, size)) > 0.3).astype(np.uint8) * 255 for _ in range(count)]
    return [10 * number + label // 255 for number, label in enumerate(labels)], labels


def write_pairs(folder: Path, images: list[np.ndarray], labels: list[np.ndarray]) -> Path:
    for kind, pictures in (("image", images), ("label", labels)):
        (folder / kind).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / kind / f"{number}.png")
    return folder


def write_tiff(path: Path, pictures: list[np.ndarray]) -> None:
    pages = [Image.fromarray(picture) for picture in pictures]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def test_micrographs_from_pairs_and_from_tiff(tmp_path: Path) -> None:
    images, labels = sections(12)  # more than ten: section 2 comes before section 10
    split = data.micrographs(write_pairs(tmp_path / "pairs", images, labels), held_out=3)
    assert split.images.shape == split.labels.shape == (9, 1, 16, 16)
    assert torch.equal(
        split.held_out_labels[:, 0], torch.from_numpy(np.stack(labels[9:]) == 0).float()
    )
    training = np.stack(images[:9]).astype(float)
    by_hand = (np.stack(images[9:]) - training.mean()) / training.std()
    np.testing.assert_allclose(split.held_out_images[:, 0], by_hand, rtol=1e-5)

    write_tiff(tmp_path / "train-volume.tif", images)
    write_tiff(tmp_path / "train-labels.tif", labels)
    pages = data.micrographs(tmp_path, held_out=3)
    assert torch.equal(pages.images, split.images)
    assert torch.equal(pages.labels, split.labels)
    assert pages.source == split.source == "12 micrographs"
    pixels = np.stack(images).tobytes() + np.stack(labels).tobytes()
    assert pages.sha256 == split.sha256 == hashlib.sha256(pixels).hexdigest()
    ones = write_pairs(tmp_path / "ones", images, [label // 255 for label in labels])
    assert torch.equal(data.micrographs(ones, held_out=3).labels, split.labels)


def test_bad_micrographs(tmp_path: Path) -> None:
    images, labels = sections(4)
    folder = write_pairs(tmp_path / "pairs", images, labels)
    with pytest.raises(ValueError, match="held_out must be below the number of sections, 4, got 4"):
        data.micrographs(folder, held_out=4)
    with pytest.raises(TypeError, match="held_out must be an integer"):
        data.micrographs(folder, held_out=1.5)  # type: ignore[arg-type]
    victim = folder / "label" / "2.png"
    Image.fromarray(labels[2] // 2).save(victim)
    with pytest.raises(
        ValueError, match=r"labels must be 0 on membranes and 1 or 255 in cells, got \[127\] in"
    ):
        data.micrographs(folder, held_out=1)
    Image.fromarray(labels[2][:8]).save(victim)
    with pytest.raises(
        ValueError,
        match=r"must be as many and of one size, got 4 and 4 of \[\(8, 16\), \(16, 16\)\]",
    ):
        data.micrographs(folder, held_out=1)
    Image.fromarray(np.stack([labels[2]] * 3, -1)).save(victim)
    with pytest.raises(
        ValueError, match=r"2.png must be 8-bit grey or black and white, got mode 'RGB'"
    ):
        data.micrographs(folder, held_out=1)
    inverted = Image.fromarray(1 - labels[2] // 255)  # a palette may give any grey to any number
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    inverted.save(victim)
    with pytest.raises(
        ValueError, match=r"2.png must be 8-bit grey or black and white, got mode 'P'"
    ):
        data.micrographs(folder, held_out=1)
    Image.fromarray(labels[2]).save(victim)
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"2.png must be a picture, it cannot be read"):
        data.micrographs(folder, held_out=1)
    victim.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2.png must be there, got none: every image has a label"
    ):
        data.micrographs(folder, held_out=1)
    constant = write_pairs(tmp_path / "constant", [labels[0] * 0] * 4, labels)
    with pytest.raises(ValueError, match="images must differ in some pixel"):
        data.micrographs(constant, held_out=1)
