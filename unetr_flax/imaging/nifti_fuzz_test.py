"""Mutated NIfTI files: each is read as nibabel reads it, or refused in one line.

`python -m unetr_flax.imaging.nifti_fuzz_test FOLDER NUMBER` writes the files to a folder, one after
the other, reads them with little memory, and prints how many were read and what was said of others.
"""

import collections
import gzip
import itertools
import random
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from unetr_flax.imaging import VolumeError, read_labels, read_scan, write_labels

COUNT = 700
# Bytes of address space beyond what the imports take.
MEMORY = 300 << 20
SHAPE = (4, 3, 5)
EXTREMES = {
    "i": (-(2**63), -(2**31), -32768, -1, 0, 1, 2, 7, 8, 255, 256, 16384, 32767, 2**31 - 1, 2**62),
    "f": (np.nan, np.inf, -np.inf, 0, -1, 1, 1e-40, 1e38, -1e38, 1e300, 0.5, 351, 352, 353, 1e9),
}


def originals(nib):
    """Yields pairs of a header's class and the bytes of a good file."""
    rng = np.random.default_rng(0)
    for kind, dtype, endianness in itertools.product(
        (nib.Nifti1Image, nib.Nifti2Image), (np.uint8, np.int16, np.float32), "<>"
    ):
        header = kind.header_class(endianness=endianness)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(endianness))
        affine = np.diag([-1.0, 2, 3, 1])[[1, 0, 2, 3]]
        image = kind(rng.integers(0, 9, SHAPE).astype(dtype), affine, header)
        image.set_qform(affine, 1)
        yield kind.header_class, image.to_bytes()


def mutated(rng, kind, data):
    """Changes the bytes of a file in one of several ways, or in several of them."""
    data = bytearray(data)
    compress = rng.random() < 0.5
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        way = rng.randrange(5)
        if way == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif way == 1:
            at = rng.randrange(kind.sizeof_hdr)
            data[at : at + 4] = rng.randbytes(4)
        elif way == 2:
            del data[rng.randrange(len(data)) :]
            data += b"\0"
        elif way == 3 and len(data) > kind.sizeof_hdr:
            data[: kind.sizeof_hdr] = with_extreme_field(rng, kind, data)
        elif way == 4:
            data += rng.randbytes(rng.choice((1, 100)))
    if compress:
        data = bytearray(gzip.compress(data))
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
    return bytes(data)


def with_extreme_field(rng, kind, data):
    endianness = "<" if data[0] in (0x5C, 0x1C) else ">"
    header = kind(bytes(data[: kind.sizeof_hdr]), endianness, check=False)
    fields = [name for name in header if header[name].dtype.kind in "if"]
    name = rng.choice([*fields, *["dim", "pixdim", "vox_offset", "datatype"] * 5])
    field = header[name]
    value = rng.choice(EXTREMES[field.dtype.kind])
    if field.dtype.kind == "i":
        limits = np.iinfo(field.dtype)
        value = min(max(value, limits.min), limits.max)
    with np.errstate(over="ignore"):
        if field.ndim:
            header[name][rng.randrange(len(field))] = value
        else:
            header[name] = value
    return header.binaryblock


def refusal(path, read):
    """Returns what a reader says of a file, None if nothing."""
    try:
        read(path)
    except VolumeError as error:
        message = str(error)
    else:
        return None
    assert message.startswith(f"{path}: "), message
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def check(nib, path, out):
    """Reads a file in all ways, compares with nibabel, and returns what is said of it.

    Labels on its grid are written to `out`, unless this is None.
    """
    said = refusal(path, lambda path: read_scan(path, allow_nan=True))
    if said is not None:
        assert refusal(path, read_labels)
        return said
    scan = read_scan(path, allow_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = nib.Nifti1Image if scan.grid.header.sizeof_hdr == 348 else nib.Nifti2Image
        data = path.read_bytes()
        data = bytearray(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        # nibabel refuses damaged extensions, which are of no use here.
        end = scan.grid.header.sizeof_hdr
        data[end : end + 4] = bytes(4)
        image = nib.as_closest_canonical(kind.from_bytes(bytes(data)))
        expected = np.asarray(image.dataobj).astype(np.float32)
        expected = expected.reshape(scan.volume.array.shape)
        finite = np.isfinite(expected)
    assert scan.nan_voxels == (~finite).sum()
    np.testing.assert_array_equal(scan.volume.array[finite], expected[finite])
    np.testing.assert_array_equal(scan.volume.affine, image.affine)
    if out is not None:
        labels = (scan.volume.array[..., 0] > 3).astype(np.uint8)
        write_labels(out, labels, like=path)
        np.testing.assert_array_equal(read_labels(out)[0], labels)
        np.testing.assert_array_equal(nib.load(out).affine, scan.grid.affine)
    if refusal(path, read_labels) is None:
        np.testing.assert_allclose(read_labels(path)[0], scan.volume.array[..., 0], atol=0.5)
    return "read"


def main(folder, count):
    import nibabel as nib

    warnings.simplefilter("error")
    nib.imageglobals.logger.disabled = True
    files = list(originals(nib))
    for _, data in files:
        (folder / "scan.nii").write_bytes(data)
        assert check(nib, folder / "scan.nii", folder / "out.nii") == "read"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng = random.Random(0)
    said = collections.Counter()
    for number in range(count):
        path = folder / f"scan.nii{rng.choice(('', '.gz'))}"
        path.write_bytes(mutated(rng, *files[number % len(files)]))
        try:
            # Each write waits for the disk.
            out = None if number % 10 else folder / "out.nii"
            said[check(nib, path, out)] += 1
        except BaseException:
            print(f"file {number} is {path}")
            raise
    for text, times in said.most_common():
        print(f"{times:4} {ascii(text)[1:-1]}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_mutated_files_are_read_or_refused_in_little_memory(tmp_path):
    pytest.importorskip("nibabel")
    result = subprocess.run(
        [sys.executable, "-m", __name__, tmp_path, str(COUNT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr
    said = {line[5:]: int(line[:4]) for line in result.stdout.splitlines()}
    assert sum(said.values()) == COUNT
    # Mutations must be neither all harmless nor all fatal at the first check.
    assert COUNT * 0.1 < said["read"] < COUNT * 0.9
    assert len(said) > 30


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
