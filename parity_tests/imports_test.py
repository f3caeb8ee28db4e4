"""Imports run one way: reference -> torch; library -> jax; training -> library; proofs -> all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OURS = {"unetr_flax", "unetr_torch_ref", "parity_tests", "train", "benchmarks"}
FRAMEWORKS = {"torch", "monai", "jax", "flax", "optax", "orbax"}
# A folder's own line counts, not that of the folder around it.
MAY_IMPORT = {
    "unetr_torch_ref": {"unetr_torch_ref", "torch"},
    "unetr_flax": {"unetr_flax", "jax", "flax"},
    "unetr_flax/parity": {"unetr_flax", "unetr_torch_ref", "jax", "flax", "torch", "monai"},
    "train": {"train", "unetr_flax", "jax", "flax", "optax", "orbax"},
}

# Where functions may import a package when called, and only then.
LATE = {
    "unetr_flax/weights/torch_files.py": "torch",
    "unetr_flax/parity/torch_models.py": "monai",
}


def imported_packages(path: Path, *, late: bool = True) -> set[str]:
    """Top-level packages that a file imports, wherever in the file or only outside functions."""
    names = set()
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


def folder(path: Path) -> str:
    """The folder whose line in MAY_IMPORT counts for a file."""
    name = path.relative_to(ROOT).as_posix()
    return max((f for f in MAY_IMPORT if name.startswith(f + "/")), key=len)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    files = [f for f in (ROOT / package).rglob("*.py") if not f.stem.endswith("_test")]
    files = [f for f in files if folder(f) == package]
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        allowed, late = MAY_IMPORT[package], {LATE.get(name)}
        forbidden = (imported_packages(path) & (OURS | FRAMEWORKS)) - allowed - late
        forbidden |= imported_packages(path, late=False) & late
        assert not forbidden, f"{name} imports {sorted(forbidden)}"


def test_library_imports_without_its_extras():
    extras = ("torch", "nibabel", "scipy", "optax", "orbax", "matplotlib", "train")
    hide = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    code = f"{hide}\nimport unetr_flax.cli, unetr_flax.weights"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
