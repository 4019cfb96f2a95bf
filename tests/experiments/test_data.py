import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sogrid.experiments import data
from sogrid.experiments.data import DataError, load, write_subset

REAL = os.environ.get("SOGRID_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="SOGRID_DATA is not set: no full data sets here")
MNIST_FILES = data.OFFICIAL_FILES["mnist"]
ARCHIVE = data.OFFICIAL_FILES["cifar10"][0]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """No real folder, no real cache."""
    monkeypatch.delenv("SOGRID_DATA", raising=False)
    monkeypatch.setattr(data, "_cache_folder", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache"


def fake_arrays(shape, n_train, n_test):
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, high, size, dtype=np.uint8)
        for n in (n_train, n_test)
        for high, size in ((256, (n, *shape)), (10, n))
    ]


@pytest.fixture
def mnist(monkeypatch):
    """Twelve random "digits" whose digests pass for MNIST's."""
    arrays = fake_arrays((28, 28), 12, 5)
    monkeypatch.setitem(data.ARRAY_DIGESTS, "MNIST, full", tuple(data._sha256(a) for a in arrays))
    return arrays


@pytest.fixture
def cifar(monkeypatch):
    """Twenty random pictures, the same for the archive and for the parquet files."""
    arrays = fake_arrays((3, 32, 32), 20, 4)
    monkeypatch.setitem(data.ARRAY_DIGESTS, "CIFAR-10 (JPEG copy)", tuple(data._sha256(a) for a in arrays))
    return arrays


def write_idx(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in zip(MNIST_FILES, arrays, strict=True):
        (folder / file).write_bytes(gzip.compress(data._idx(array)))
    return folder


def write_hub(folder, arrays, column):
    folder.mkdir(parents=True, exist_ok=True)
    for file, images, labels in zip(data.PARQUET_FILES, arrays[::2], arrays[1::2], strict=True):
        pictures = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(images)]
        pq.write_table(pa.table({column: pictures, "label": labels.astype(np.int64)}), folder / file)
    return folder


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_archive(folder, arrays, monkeypatch):
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (
        np.concatenate([labels[:, None], images.reshape(len(images), -1)], 1)
        for images, labels in (arrays[:2], arrays[2:])
    )
    parts = {f"data_batch_{i + 1}.bin": part for i, part in enumerate(np.split(train, 5))}
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, content in [
            ("../escaped.bin", b"outside"),
            ("cifar-10-batches-bin/batches.meta.txt", b"airplane"),
            *(
                (f"cifar-10-batches-bin/{n}", p.tobytes())
                for n, p in {**parts, "test_batch.bin": test}.items()
            ),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setitem(data.FILE_DIGESTS, ARCHIVE, digest)
    return folder


def assert_holds(dataset, arrays):
    for (images, labels), raw_images, raw_labels in zip(
        (dataset.train, dataset.test), arrays[::2], arrays[1::2], strict=True
    ):
        expected = raw_images.reshape(len(raw_images), -1).astype(np.float32) / np.float32(255)
        assert np.array_equal(images.numpy(), expected)
        assert np.array_equal(labels.numpy(), raw_labels)


# The digits in the package


def test_embedded_digits():
    digits = load("mnist", source="embedded")
    assert digits.variant == "MNIST, embedded subset"
    assert digits.checksum.startswith("c6f81ee3")
    assert digits.caption == "MNIST, embedded subset: 10,000 train / 2,000 test, sha256 c6f81ee3"
    for (images, labels), per_class in ((digits.train, 1000), (digits.test, 200)):
        assert images.shape == (10 * per_class, 784)
        assert images.dtype == torch.float32
        assert (images.min(), images.max()) == (0, 1)
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [per_class] * 10
    assert digits.train[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "the order of MNIST"


def test_embedded_digits_are_small_and_need_no_folder():
    assert sum((data.EMBEDDED / file).stat().st_size for file in MNIST_FILES) < 3_000_000
    assert load("mnist").variant == "MNIST, embedded subset"


def test_a_set_is_described_without_its_tensors():
    assert "tensor" not in repr(load("mnist", subset=3))


def test_subset_keeps_the_first_of_each_set(tmp_path, mnist):
    part = load("mnist", root=write_idx(tmp_path, mnist), subset=7)
    assert part.variant == "MNIST, full, first 7"
    assert_holds(part, [mnist[0][:7], mnist[1][:7], *mnist[2:]])
    assert part.checksum == data._sha256(*(a[:7] for a in mnist))


def test_write_subset(tmp_path, mnist, monkeypatch):
    monkeypatch.setattr(data, "EMBEDDED_PER_CLASS", (2, 1))
    write_subset(tmp_path, root=write_idx(tmp_path / "full", mnist))
    images, labels = (data._read_idx(tmp_path / file)[0] for file in MNIST_FILES[:2])
    kept = [i for i, label in enumerate(mnist[1]) if list(mnist[1][:i]).count(label) < 2]
    assert np.array_equal(images, mnist[0][kept])
    assert np.array_equal(labels, mnist[1][kept])
    once = [(tmp_path / file).read_bytes() for file in MNIST_FILES]
    assert {raw[4:8] for raw in once} == {bytes(4)}, "no time stamp"
    write_subset(tmp_path, root=tmp_path / "full")
    assert once == [(tmp_path / file).read_bytes() for file in MNIST_FILES]


# Folders


@pytest.mark.parametrize("place", [".", "mnist"])
def test_idx_files(tmp_path, mnist, place):
    write_idx(tmp_path / place, mnist)
    found = load("mnist", root=tmp_path)
    assert found.variant == "MNIST, full"
    assert found.checksum == hashlib.sha256(b"".join(a.tobytes() for a in mnist)).hexdigest()
    assert_holds(found, mnist)


def test_parquet_and_idx_give_the_same(tmp_path, mnist):
    write_hub(tmp_path / "hub" / "mnist", mnist, "image")
    hub, idx = load("mnist", root=tmp_path / "hub"), load("mnist", root=write_idx(tmp_path, mnist))
    assert (hub.variant, hub.checksum) == (idx.variant, idx.checksum)
    assert_holds(hub, mnist)


def test_cifar_archive_and_parquet_agree_in_layout(tmp_path, cifar, monkeypatch):
    write_hub(tmp_path / "hub" / "cifar10", cifar, "img")
    write_archive(tmp_path / "official", cifar, monkeypatch)
    hub, official = load("cifar10", root=tmp_path / "hub"), load("cifar10", root=tmp_path / "official")
    assert (hub.variant, official.variant) == ("CIFAR-10 (JPEG copy)", "CIFAR-10, full")
    assert hub.checksum == official.checksum
    assert official.train[0].shape == (20, 3072)
    assert_holds(hub, cifar)
    assert_holds(official, cifar)


def test_nothing_is_extracted(tmp_path, cifar, monkeypatch):
    write_archive(tmp_path / "deep" / "folder", cifar, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    load("cifar10", root=tmp_path / "deep" / "folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_unpickled(tmp_path, mnist, cifar, monkeypatch):
    write_idx(tmp_path / "idx", mnist)
    write_hub(tmp_path / "hub" / "mnist", mnist, "image")
    write_archive(tmp_path / "official", cifar, monkeypatch)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *args, **kwargs: pytest.fail("unpickled"))
    for name, root in (("mnist", "idx"), ("mnist", "hub"), ("cifar10", "official")):
        load(name, root=tmp_path / root)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"pickles")
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz \(missing\)"):
        load("cifar10", root=tmp_path)


def test_environment_variable_is_used(tmp_path, mnist, monkeypatch):
    monkeypatch.setenv("SOGRID_DATA", str(write_idx(tmp_path, mnist)))
    assert_holds(load("mnist"), mnist)
    assert_holds(load("mnist", source="folder"), mnist)
    assert load("mnist", source="embedded").variant == "MNIST, embedded subset"


def test_an_empty_variable_is_unset_but_an_empty_root_is_an_error(monkeypatch):
    monkeypatch.setenv("SOGRID_DATA", "")
    assert load("mnist").variant == "MNIST, embedded subset"
    with pytest.raises(DataError, match="needs root="):
        load("mnist", root="")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_empty_folder_is_an_error_not_a_fallback(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SOGRID_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no {name} in ") as error:
        load(name)
    for file in (*data.OFFICIAL_FILES[name], *data.PARQUET_FILES):
        assert f"{file} (missing)" in str(error.value)
    assert "source='download'" in str(error.value)
    assert "where SOGRID_DATA points (or unset it)" in str(error.value)
    with pytest.raises(DataError, match=f"no {name} in ") as error:
        load(name, root=tmp_path)
    assert "unset" not in str(error.value)


def test_a_missing_file_is_named(tmp_path, mnist):
    (write_idx(tmp_path, mnist) / MNIST_FILES[3]).unlink()
    with pytest.raises(DataError) as error:
        load("mnist", root=tmp_path)
    assert f"{tmp_path / MNIST_FILES[3]} (missing)" in str(error.value)
    assert f"{tmp_path / MNIST_FILES[2]} (missing)" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no mnist in .*nowhere \(missing\)"):
        load("mnist", root=tmp_path / "nowhere")


# Damage

IMAGES = data._idx(np.zeros((12, 28, 28), np.uint8))


def gzipped(raw):
    """Of today and tomorrow the same."""
    return gzip.compress(raw, mtime=0)


def flipped(raw, at):
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (gzipped(IMAGES)[:-20], "ended before"),
        (b"", "ended before|do not hold|no idx"),
        (b"<html>404</html>", "Not a gzipped file"),
        (flipped(gzipped(IMAGES), -5), "CRC check failed"),
        (gzipped(b"\0\0\x0d\x03" + IMAGES[4:]), "begins with 00 00 0d 03"),
        (gzipped(b"\0\0\x08"), "no idx file"),
        (gzipped(IMAGES[:9]), "no idx file"),
        (gzipped(IMAGES[:-1]), "do not hold the array"),
        (gzipped(IMAGES + b"\0"), "do not hold the array"),
        (gzipped(IMAGES), "train images have shape .* and sha256"),
        (gzipped(data._idx(np.zeros(12, np.uint8))), r"shape \(12,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_damaged_idx_files(tmp_path, mnist, content, finding):
    file = write_idx(tmp_path, mnist) / MNIST_FILES[0]
    file.write_bytes(content)
    with pytest.raises(DataError, match=finding) as error:
        load("mnist", root=tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "download" in str(error.value)
    assert file.read_bytes() == content, "left as it was"


@pytest.mark.parametrize("which", range(4))
def test_one_changed_value_is_found_and_its_file_named(tmp_path, mnist, which):
    changed = [array.copy() for array in mnist]
    changed[which].flat[-1] ^= 1
    with pytest.raises(DataError, match=f"{MNIST_FILES[which]}: the {data.ARRAYS[which]} have"):
        load("mnist", root=write_idx(tmp_path, changed))
    parquet = data.PARQUET_FILES[which // 2]
    write_hub(tmp_path / "hub" / "mnist", changed, "image")
    with pytest.raises(DataError, match=f"{parquet}: the {data.ARRAYS[which]} have"):
        load("mnist", root=tmp_path / "hub")


def test_right_bytes_in_another_shape_are_refused(tmp_path, mnist):
    mnist[0] = mnist[0].reshape(12, 14, 56)
    with pytest.raises(DataError, match=r"shape \(12, 14, 56\)"):
        load("mnist", root=write_idx(tmp_path, mnist))


def test_test_set_under_the_train_sets_name(tmp_path, mnist):
    write_idx(tmp_path, mnist)
    (tmp_path / MNIST_FILES[0]).write_bytes((tmp_path / MNIST_FILES[2]).read_bytes())
    with pytest.raises(DataError, match=r"have shape \(5, 28, 28\)"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"not parquet",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw.replace(b"IDAT", b"IDOT"),
        lambda raw: raw.replace(b"PNG", b"GNP"),
    ],
)
def test_damaged_parquet_files(tmp_path, mnist, damage):
    file = write_hub(tmp_path / "mnist", mnist, "image") / data.PARQUET_FILES[1]
    # Uncompressed, so that the damage reaches the pictures.
    pq.write_table(pq.read_table(file), file, compression="none", use_dictionary=False)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError) as error:
        load("mnist", root=tmp_path)
    assert str(error.value).startswith(f"{file}: ")


@pytest.mark.parametrize("label", [None, "seven", -1, 300, 2.5])
def test_labels_that_are_no_classes(tmp_path, mnist, label):
    file = write_hub(tmp_path / "mnist", mnist, "image") / data.PARQUET_FILES[1]
    whole = pq.read_table(file)
    labels = [label, *whole.column("label").to_pylist()[1:]]
    kind = pa.string() if isinstance(label, str) else pa.float64() if label == 2.5 else pa.int64()
    column = pa.array([str(v) if isinstance(label, str) else v for v in labels], kind)
    pq.write_table(whole.set_column(whole.schema.get_field_index("label"), "label", column), file)
    with pytest.raises(DataError, match=re.escape(str(file))):
        load("mnist", root=tmp_path)


def test_another_data_sets_parquet_files_are_refused(tmp_path, mnist):
    write_hub(tmp_path / "mnist", mnist, "img")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: .*image"):
        load("mnist", root=tmp_path)


def test_pictures_of_another_size_are_refused(tmp_path, cifar):
    write_hub(tmp_path / "cifar10", [cifar[0][:, :, :16], *cifar[1:]], "img")
    with pytest.raises(DataError, match="image 0 cannot be decoded"):
        load("cifar10", root=tmp_path)


def test_damaged_archive_is_refused_unread(tmp_path, cifar, monkeypatch):
    file = write_archive(tmp_path, cifar, monkeypatch) / ARCHIVE
    damaged = flipped(file.read_bytes(), 100)
    file.write_bytes(damaged)
    monkeypatch.setattr(tarfile, "open", lambda *args: pytest.fail("opened"))
    with pytest.raises(DataError, match=rf"{ARCHIVE}: sha256"):
        load("cifar10", root=tmp_path)
    assert file.read_bytes() == damaged


# Downloads, from a server on this machine


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content = self.server.content.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"") + self.server.withheld))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.content, server.withheld = [], {}, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(data.MIRRORS, "mnist", (f"{address}/first/", f"{address}/second/"))
    monkeypatch.setitem(data.MIRRORS, "cifar10", (f"{address}/first/",))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def official_files(folder, monkeypatch):
    """Contents by name, and their digests made the official ones."""
    contents = {file.name: file.read_bytes() for file in folder.glob("*.gz")}
    for name, content in contents.items():
        monkeypatch.setitem(data.FILE_DIGESTS, name, hashlib.sha256(content).hexdigest())
    return contents


def test_download_tries_the_mirrors_and_is_cached(tmp_path, mnist, server, monkeypatch, cache):
    contents = official_files(write_idx(tmp_path / "official", mnist), monkeypatch)
    server.content = {f"/second/{name}": content for name, content in contents.items()}
    found = load("mnist", source="download")
    assert found.variant == "MNIST, full"
    assert_holds(found, mnist)
    assert {file.name: file.read_bytes() for file in (cache / "mnist").iterdir()} == contents
    assert len(server.requests) == 8
    assert_holds(load("mnist", source="download"), mnist)
    assert_holds(load("mnist"), mnist)
    assert len(server.requests) == 8, "nothing is fetched twice"


def test_download_of_cifar(tmp_path, cifar, server, monkeypatch):
    write_archive(tmp_path / "official", cifar, monkeypatch)
    server.content = {f"/first/{ARCHIVE}": (tmp_path / "official" / ARCHIVE).read_bytes()}
    assert load("cifar10", source="download").variant == "CIFAR-10, full"
    assert_holds(load("cifar10"), cifar)


@pytest.mark.parametrize("fault", ["absent", "garbage", "cut off", "no server"])
def test_failed_download_leaves_what_was_there(tmp_path, mnist, server, monkeypatch, cache, fault):
    contents = official_files(write_idx(tmp_path / "official", mnist), monkeypatch)
    (cache / "mnist").mkdir(parents=True)
    kept = {MNIST_FILES[0]: contents[MNIST_FILES[0]], MNIST_FILES[1]: b"damaged long ago"}
    for name, content in kept.items():
        (cache / "mnist" / name).write_bytes(content)
    if fault == "garbage":
        server.content = {f"/{mirror}/{name}": b"?" for mirror in ("first", "second") for name in contents}
    elif fault == "cut off":
        server.content = {f"/first/{name}": content[:-9] for name, content in contents.items()}
        server.withheld = 9
    elif fault == "no server":
        monkeypatch.setitem(data.MIRRORS, "mnist", ("http://127.0.0.1:9/",))
    with pytest.raises(DataError, match=f"could not download {MNIST_FILES[1]}") as error:
        load("mnist", source="download")
    for mirror in data.MIRRORS["mnist"]:
        assert f"{mirror}{MNIST_FILES[1]}: " in str(error.value)
    assert "SOGRID_DATA" in str(error.value)
    assert {file.name: file.read_bytes() for file in (cache / "mnist").iterdir()} == kept


def test_damaged_cache_warns_and_is_left_alone(mnist, cache):
    file = write_idx(cache / "mnist", mnist) / MNIST_FILES[2]
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=rf"ignoring the cached download: .*{MNIST_FILES[2]}"):
        assert load("mnist").variant == "MNIST, embedded subset"
    assert file.read_bytes() == b"damaged"


def test_only_download_touches_the_network(server):
    load("mnist")
    with pytest.raises(DataError, match=r"cifar10 does not ship with sogrid.*source='download'"):
        load("cifar10")
    with pytest.raises(DataError, match="does not ship"):
        load("cifar10", source="embedded")
    assert server.requests == []


# Arguments


def test_every_grey_level_is_exact(tmp_path, mnist, monkeypatch):
    mnist[0].flat[:256] = np.arange(256)
    monkeypatch.setitem(data.ARRAY_DIGESTS, "MNIST, full", tuple(data._sha256(a) for a in mnist))
    found = load("mnist", root=write_idx(tmp_path, mnist), dtype=torch.float64)
    assert found.train[0].dtype == torch.float64
    assert np.array_equal(found.train[0].numpy().ravel()[:256], np.arange(256) / 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "MNIST"}, r"name must be one of \('mnist', 'cifar10'\), got 'MNIST'"),
        ({"source": "web"}, "source must be one of .*got 'web'"),
        ({"source": "download", "root": "."}, "root .*ignored"),
        ({"source": "folder"}, "SOGRID_DATA"),
        ({"dtype": torch.int64}, r"dtype must be a floating-point type, got torch\.int64"),
        ({"subset": 0}, "subset must be between 1 and 10000, got 0"),
        ({"subset": 10_001}, "subset must be between 1 and 10000, got 10001"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "mnist", **arguments})


# The real things


@needs_real
def test_real_mnist_holds_the_embedded_digits(tmp_path):
    full = load("mnist", root=REAL)
    assert full.caption == "MNIST, full: 60,000 train / 10,000 test, sha256 06b0d1f1"
    write_subset(tmp_path, root=REAL)
    for file in MNIST_FILES:
        assert np.array_equal(data._read_idx(tmp_path / file)[0], data._read_idx(data.EMBEDDED / file)[0])


@needs_real
@pytest.mark.skipif(not (Path(REAL or "") / "cifar10").is_dir(), reason="no CIFAR-10 in SOGRID_DATA")
def test_real_cifar():
    dataset = load("cifar10", root=REAL, subset=100)
    assert dataset.variant in ("CIFAR-10 (JPEG copy), first 100", "CIFAR-10, full, first 100")
    assert dataset.train[0].shape == (100, 3072)
