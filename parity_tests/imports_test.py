"""Imports run one way: reference -> torch; library -> jax; training -> library; proofs -> all."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

OURS = {"unetr_flax", "unetr_torch_ref", "parity_tests", "train", "benchmarks"}
FRAMEWORKS = {"torch", "monai", "jax", "flax", "optax", "orbax"}
# The line of the innermost folder counts.
MAY_IMPORT = {
    "unetr_torch_ref": {"unetr_torch_ref", "torch"},
    "unetr_flax": {"unetr_flax", "jax", "flax"},
    "unetr_flax/parity": {"unetr_flax", "unetr_torch_ref", "jax", "flax", "torch", "monai"},
    "train": {"train", "unetr_flax", "jax", "flax", "optax", "orbax"},
}

# Packages that functions may import when called, and only then.
LATE = {
    "unetr_flax/export/onnx.py": "torch",
    "unetr_flax/weights/torch_files.py": "torch",
    "unetr_flax/weights/families/reference.py": "unetr_torch_ref",
    "unetr_flax/weights/families/monai.py": "monai",
    "unetr_flax/weights/families/tamasino52.py": "unetr_torch_ref",
}


def imported_packages(path: Path, *, late: bool = True) -> set[str]:
    """Returns the top-level packages that a file imports, anywhere or only outside functions."""
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
    """Returns the folder whose line in MAY_IMPORT counts for a file."""
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


def library_modules() -> dict[str, Path]:
    """Returns the files of the library's modules and packages by dotted name, without tests."""
    modules = {}
    for path in (ROOT / "unetr_flax").rglob("*.py"):
        if not path.stem.endswith("_test"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if path.stem == "__init__" else parts)] = path
    return modules


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """Returns those of some modules that a file imports by name, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules else node.module)
    return names & modules.keys()


def test_imports_of_the_library_have_no_cycle():
    modules = library_modules()
    graph = {name: imported_modules(path, modules) for name, path in modules.items()}
    assert "unetr_flax.model.config" in graph["unetr_flax.weights.families.registry"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # Each module is imported by the next one.
        pytest.fail(" <- ".join(error.args[1]))


def test_library_imports_without_its_extras():
    extras = (
        "torch",
        "unetr_torch_ref",
        "monai",
        "nibabel",
        "scipy",
        "SimpleITK",
        "optax",
        "orbax",
        "matplotlib",
        "flatbuffers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "train",
    )
    hide = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    code = f"{hide}\nimport unetr_flax.cli, unetr_flax.weights"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
