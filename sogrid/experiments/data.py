"""MNIST and CIFAR-10 as tensors that say where they come from (Thesis §4.1).

Three sources: a *folder* (argument ``root`` or the environment variable ``SOGRID_DATA``), a verified and
cached *download*, and the *embedded* digits, a small balanced part of MNIST that ships with the package.
Whatever the source, the raw arrays are compared with pinned SHA-256 digests (of the official CIFAR-10
it is the archive file that is pinned), and the data set carries the name of the variant it is. Nothing
is ever unpickled or extracted to disk.

Index letters: n example, d pixel.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataError", "Dataset", "load", "load_whole", "write_subset"]

SHAPES = {"mnist": (28, 28), "cifar10": (3, 32, 32)}
SOURCES = ("auto", "folder", "download", "embedded")
ARRAYS = ("train images", "train labels", "test images", "test labels")

EMBEDDED = Path(__file__).parent / "digits"
"""The digits that ship with the package (LeCun, Cortes and Burges, CC BY-SA 3.0), by :func:`write_subset`."""

EMBEDDED_PER_CLASS = (1000, 200)
"""Digits of each class in the embedded train and test set."""

PARQUET_FILES = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
OFFICIAL_FILES = {
    "mnist": (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ),
    "cifar10": ("cifar-10-binary.tar.gz",),
}
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
FILE_DIGESTS = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}
"""SHA-256 of the official files as downloaded."""

ARRAY_DIGESTS = {
    "MNIST, full": (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    ),
    "MNIST, embedded subset": (
        "f83ddfb6346264b52ed4a5c96f7891bb59b5b151c2cb216648d82f22e3c85195",
        "81018dafcfe18151c97046f4634773cc19464ce01f34c11a89a445656fa5599c",
        "e4b06aa7d06a546c5a606533ecb3e3f39cb8dfb1e76da47a92a3ca261a79302e",
        "6ef716f0c2574b8aefde1819960be0672f42dd393741e1b8182410ad15658864",
    ),
    "CIFAR-10 (JPEG copy)": (
        "16d2ec364c8fbd10250c3c4ba981db8f85ecede9c5a779dd0c1e685658acff48",
        "475881ffd59d1bd39a59b82e41df95e41cf49548518acb3dcfd4411ab6930ebb",
        "1577b1923f0a1046afc9230f6d1d61ab5e8ced2ff124ef1ce89e0cf38957ccde",
        "7d82cf75c735acbe7b289b1d091591988e2ebd886f58a73b0c0c766c419843b6",
    ),
}
"""SHA-256 of the raw uint8 arrays, in the order of :data:`ARRAYS`, channels first.

The JPEG copy of CIFAR-10 has other pixels and another order of the images than the original.
"""

REMEDIES = {
    "mnist": "load('mnist', source='download') fetches MNIST, source='embedded' needs no network; or put "
    "the four official *-ubyte.gz files into a folder and point SOGRID_DATA at it.",
    "cifar10": "load('cifar10', source='download') fetches CIFAR-10; or put the official "
    "cifar-10-binary.tar.gz into a folder and point SOGRID_DATA at it.",
}


class DataError(ValueError):
    """A data set is missing, damaged or not what its name says; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: ``"mnist"`` or ``"cifar10"``.
        variant: What exactly it is, e.g. ``"MNIST, embedded subset"``; belongs on every figure.
        train: Images in [0, 1], ``[n, d]``, and int64 labels ``[n]``. d is 28·28, or 3·32·32 with the
            channels first.
        test: The same for the test set.
        checksum: SHA-256 over the raw uint8 bytes of train images, train labels, test images and test
            labels, one after the other.
    """

    name: str
    variant: str
    train: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)
    checksum: str

    @property
    def caption(self) -> str:
        """Variant, sizes and first digits of the checksum, for the foot of a figure."""
        n_train, n_test = len(self.train[1]), len(self.test[1])
        return f"{self.variant}: {n_train:,} train / {n_test:,} test, sha256 {self.checksum[:8]}"


def load_whole(name: str, **options: Any) -> Dataset:
    """:func:`load` for what is about the full data set.

    Args:
        name: ``"mnist"`` or ``"cifar10"``.
        **options: Those of :func:`load`.

    Raises:
        DataError: Also if only a part of it is there.
        ValueError: See :func:`load`.
    """
    found = load(name, **options)
    if "subset" in found.variant:
        raise DataError(
            f"this needs the full data set, not the {found.variant}: set SOGRID_DATA or run "
            f"sogrid.experiments.data.load({name!r}, source='download') once"
        )
    return found


def load(
    name: str,
    *,
    source: str = "auto",
    root: str | os.PathLike | None = None,
    subset: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load MNIST or CIFAR-10, verified.

    With ``source="auto"`` a folder, where one is given by ``root`` or ``SOGRID_DATA``, has to hold the
    data set: there is no falling back. Without a folder, the cache of an earlier download is used if
    it is there, and else the embedded digits. Only ``source="download"`` touches the network.

    Args:
        name: ``"mnist"`` or ``"cifar10"``.
        source: ``"auto"``, ``"folder"``, ``"download"`` or ``"embedded"`` (MNIST only).
        root: Folder with the Hub's parquet files in ``mnist/`` and ``cifar10/``, or with the official
            files there or directly in it; default ``SOGRID_DATA``.
        subset: Keep only the first so many examples of each set.
        device: Where to put the tensors.
        dtype: Floating-point type of the images.

    Raises:
        DataError: If the data set is missing, damaged or unknown content under a known name.
        ValueError: For an unknown name or source, a ``root`` that would be ignored, a ``subset`` out of
            range, or a dtype that is not floating point.

    Example:
        >>> digits = load("mnist", source="embedded")
        >>> digits.variant, digits.train[0].shape
        ('MNIST, embedded subset', torch.Size([10000, 784]))
    """
    if name not in SHAPES:
        raise ValueError(f"name must be one of {tuple(SHAPES)}, got {name!r}")
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    if root is not None and source not in ("auto", "folder"):
        raise ValueError(f"root is a folder to read from and would be ignored with source={source!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    variant, arrays = _acquire(name, source, root)
    if subset is not None:
        if not 0 < subset <= len(arrays[0]):
            raise ValueError(f"subset must be between 1 and {len(arrays[0])}, got {subset}")
        variant, arrays = f"{variant}, first {subset:,}", [array[:subset] for array in arrays]

    def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        # Divided on the CPU: a GPU multiplies by 1/255 instead, which is not the same last bit.
        pixels = torch.tensor(images).flatten(1).to(dtype).div_(255)
        return pixels.to(device), torch.tensor(labels).long().to(device)

    return Dataset(name, variant, tensors(*arrays[:2]), tensors(*arrays[2:]), _sha256(*arrays))


def write_subset(folder: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
    """Write the embedded digits: the first 1,000 (test: 200) of each class, in the order of the file.

    Args:
        folder: Where the four files in the official idx.gz format go.
        root: Folder that holds the full MNIST; default ``SOGRID_DATA``.

    Raises:
        DataError: If the full MNIST is not there.
    """
    _, arrays = _acquire("mnist", "folder", root)
    for split, per_class in enumerate(EMBEDDED_PER_CLASS):
        images, labels = arrays[2 * split : 2 * split + 2]
        kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        for array, file in zip((images, labels), OFFICIAL_FILES["mnist"][2 * split :], strict=False):
            (Path(folder) / file).write_bytes(gzip.compress(_idx(array[kept]), 9, mtime=0))


class _Layout(NamedTuple):
    """Files that together hold a variant's four arrays in order, and the reader of one such file."""

    variant: str
    files: tuple[Path, ...]
    read: Callable[[Path], list[np.ndarray]]


def _official(name: str, folder: Path) -> _Layout:
    """The official files, in ``folder``."""
    variant, read = {"mnist": ("MNIST, full", _read_idx), "cifar10": ("CIFAR-10, full", _read_archive)}[name]
    return _Layout(variant, tuple(folder / file for file in OFFICIAL_FILES[name]), read)


def _hub(name: str, folder: Path) -> _Layout:
    """The Hub's parquet files, in ``folder``."""
    variant, column = {"mnist": ("MNIST, full", "image"), "cifar10": ("CIFAR-10 (JPEG copy)", "img")}[name]
    read = partial(_read_parquet, column=column, shape=SHAPES[name])
    return _Layout(variant, tuple(folder / file for file in PARQUET_FILES), read)


def _acquire(name: str, source: str, root: str | os.PathLike | None) -> tuple[str, list[np.ndarray]]:
    """Variant and verified arrays from the source asked for."""
    folder = os.environ.get("SOGRID_DATA") if root is None else root
    if source == "folder" or (source == "auto" and (folder or root is not None)):
        return _from_folder(name, folder)
    if source == "download":
        return _verified(name, _download(name))
    cached = _official(name, _cache_folder(name))
    if source == "auto" and all(file.is_file() for file in cached.files):
        try:
            return _verified(name, cached)
        except DataError as error:
            warnings.warn(f"ignoring the cached download: {error}", stacklevel=3)
    if name != "mnist":
        raise DataError(f"{name} does not ship with sogrid. {REMEDIES[name]}")
    return _verified(name, _official(name, EMBEDDED)._replace(variant="MNIST, embedded subset"))


def _from_folder(name: str, folder: str | os.PathLike | None) -> tuple[str, list[np.ndarray]]:
    """Read the first complete layout in ``folder``."""
    if not folder:
        raise DataError(f"source='folder' needs root= or the variable SOGRID_DATA. {REMEDIES[name]}")
    named = "" if folder != os.environ.get("SOGRID_DATA") else ", where SOGRID_DATA points (or unset it)"
    folder = Path(folder).expanduser()
    layouts = [_official(name, folder / name), _official(name, folder), _hub(name, folder / name)]
    for layout in layouts:
        if all(file.is_file() for file in layout.files):
            return _verified(name, layout)
    looked_for = "\n".join(f"  {', '.join(map(_presence, layout.files))}" for layout in layouts)
    raise DataError(
        f"no {name} in {_presence(folder)}{named}; looked for one of\n{looked_for}\n{REMEDIES[name]}"
    )


def _presence(path: Path) -> str:
    return f"{path}" if path.exists() else f"{path} (missing)"


def _verified(name: str, layout: _Layout) -> tuple[str, list[np.ndarray]]:
    """Read a layout and compare every array's shape and digest with what is pinned."""
    arrays = [array for file in layout.files for array in layout.read(file)]
    digests = ARRAY_DIGESTS.get(layout.variant, [""] * len(ARRAYS))  # no digest: checked as a file
    for i, (array, digest) in enumerate(zip(arrays, digests, strict=True)):
        found, shape = _sha256(array), () if i % 2 else SHAPES[name]
        if array.shape[1:] != shape or found != (digest or found):
            raise _damaged(
                layout.files[i * len(layout.files) // len(ARRAYS)],
                f"the {ARRAYS[i]} have shape {array.shape} and sha256 {found[:12]}…, those of "
                f"{layout.variant!r} have shape {('n', *shape)} and sha256 {digest[:12]}…",
            )
    return layout.variant, arrays


def _damaged(file: Path, finding: object) -> DataError:
    return DataError(
        f"{file}: {finding}. The file is damaged or not the one its name says; it was left as it is. "
        "Replace it by the original, or move it away and use load(…, source='download')."
    )


def _sha256(*arrays: np.ndarray) -> str:
    """Digest of the arrays' bytes, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _read_idx(file: Path) -> list[np.ndarray]:
    """The uint8 array of an idx.gz file: zero, zero, type 8, rank, sizes (big-endian int32), values."""
    try:
        raw = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(file, error) from error
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * rank:
        raise _damaged(file, f"begins with {raw[:4].hex(' ')}, which is no idx file of unsigned bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    if len(raw) != 4 + 4 * rank + prod(shape):
        raise _damaged(file, f"{len(raw):,} bytes do not hold the array of shape {shape} it announces")
    return [np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)]


def _idx(array: np.ndarray) -> bytes:
    """The idx format of a uint8 array; inverse of :func:`_read_idx` before compression."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _read_archive(file: Path) -> list[np.ndarray]:
    """The arrays of the official binary CIFAR-10: records of one label and 3·32·32 pixels."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != FILE_DIGESTS[file.name]:
        raise _damaged(file, f"sha256 {found[:12]}…, where the original has {FILE_DIGESTS[file.name][:12]}…")
    parts = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    blobs = {}
    with tarfile.open(file, "r|gz") as archive:
        for member in archive:
            if member.isfile():
                blobs[member.name] = archive.extractfile(member).read()
    arrays = []
    for names in (parts[:5], parts[5:]):
        raw = b"".join(blobs[f"cifar-10-batches-bin/{part}"] for part in names)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        arrays += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]]
    return arrays


def _read_parquet(file: Path, column: str, shape: Sequence[int]) -> list[np.ndarray]:
    """Images ``[n, *shape]`` (decoded from PNG or JPEG, channels first) and labels ``[n]``."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read([f"{column}.bytes", "label"], use_threads=False)
        encoded = table.column(column).combine_chunks().field("bytes")
        labels = table.column("label").cast(pa.uint8())
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(file, error) from error
    if labels.null_count:
        raise _damaged(file, "a label is missing")
    images = np.empty((len(encoded), *shape), np.uint8)
    for i, blob in enumerate(encoded):
        try:
            pixels = np.asarray(Image.open(io.BytesIO(blob.as_py()), formats=("PNG", "JPEG")))
            images[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        except Exception as error:  # Pillow has a different type for every kind of damage
            raise _damaged(file, f"image {i} cannot be decoded to shape {shape} ({error})") from error
    return [images, labels.to_numpy()]


def _cache_folder(name: str) -> Path:
    """Where downloads are kept: the operating system's cache folder."""
    import pooch

    return Path(pooch.os_cache("sogrid")) / name


def _download(name: str) -> _Layout:
    """Fetch the official files that are not yet cached; a file appears only once it is verified."""
    import pooch

    folder = _cache_folder(name)
    for file in OFFICIAL_FILES[name]:
        failures = []
        for mirror in MIRRORS[name]:
            try:
                pooch.retrieve(mirror + file, f"sha256:{FILE_DIGESTS[file]}", file, folder, progressbar=True)
                break
            except (OSError, ValueError) as error:
                failures.append(f"  {mirror}{file}: {error}")
        else:
            raise DataError(
                f"could not download {file}:\n" + "\n".join(failures) + "\nTry again later (what is already "
                f"in {folder} is kept), or get the files by hand. {REMEDIES[name]}"
            )
    return _official(name, folder)
