"""The viewer of the pages: NiiVue's published bundle, which travels with the package.

NiiVue (https://github.com/niivue/niivue) draws volumes with WebGL 2. `assets/LICENSES.txt` says
where the bundle comes from and what its licenses are.
"""

import gzip
import hashlib
import zlib
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
VERSION = "0.69.0"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"


def read_niivue() -> str:
    """Reads NiiVue's JavaScript, which defines the global object `niivue`.

    Raises:
      ValueError: if the file is not the published one.
      OSError: if the file cannot be read.
    """
    path = ASSETS / f"niivue-{VERSION}.umd.js.gz"
    try:
        script = gzip.decompress(path.read_bytes())
    # The three errors of damaged gzip files.
    except (gzip.BadGzipFile, EOFError, zlib.error):
        script = b""
    if hashlib.sha256(script).hexdigest() != SHA256:
        raise ValueError(f"{path}: damaged or replaced, must be NiiVue {VERSION} as published")
    return script.decode("utf-8")
