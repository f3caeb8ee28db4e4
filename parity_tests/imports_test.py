"""Imports run one way: reference -> torch; library -> jax; training -> library; proofs -> all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OURS = {"unetr_flax", "unetr_torch_ref", "parity_tests", "train", "benchmarks"}
FRAMEWORKS = {"torch", "jax", "flax", "optax", "orbax"}
MAY_IMPORT = {
    "unetr_torch_ref": {"unetr_torch_ref", "torch"},
    "unetr_flax": {"unetr_flax", "jax", "flax"},
    "train": {"train", "unetr_flax", "jax", "flax", "optax", "orbax"},
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    files = [f for f in (ROOT / package).rglob("*.py") if not f.stem.endswith("_test")]
    assert files
    for path in files:
        forbidden = (imported_packages(path) & (OURS | FRAMEWORKS)) - MAY_IMPORT[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_library_imports_without_its_extras():
    extras = ("torch", "nibabel", "scipy", "optax", "orbax", "matplotlib", "train")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras}))\nimport unetr_flax.weights"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
