import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file

from unetr_flax import UNETR, Preprocessing, UNETRConfig, cli
from unetr_flax.export import stablehlo
from unetr_flax.export.errors import ExportError
from unetr_flax.export.stablehlo import write_stablehlo
from unetr_flax.export.testing import PREPROCESSING, Case, relative_error

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "export.md"

# Runs a script once for each of the triples of arguments, in a process without these packages.
CLEAN = """
import sys
sys.modules.update(dict.fromkeys(("flax", "unetr_flax", "torch", "einops")))
script, *arguments = sys.argv[1:]
for i in range(0, len(arguments), 3):
    sys.argv = [script, *arguments[i:i + 3]]
    exec(compile(open(script).read(), script, "exec"))
"""


class Exported(Case):
    """A model and what the command wrote of it."""

    def __init__(self, family, lowering, path):
        super().__init__(family, path)
        self.out, self.lowering = path / "exported", lowering
        command = ["unetr", "export", str(self.folder), str(self.out), "--lowering", lowering]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            assert cli.main() == 0
        self.about = json.loads((self.out / "export.json").read_text())

    def program(self):
        return export.deserialize(bytearray((self.out / "model.stablehlo").read_bytes()))


# The tuned lowering of MONAI's twelve blocks takes long to compile.
CASES = ["reference-auto", "monai-xla", pytest.param("monai-auto", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return Exported(*request.param.split("-"), tmp_path_factory.mktemp("export"))


of_reference = pytest.mark.parametrize("case", CASES[:1], indirect=True)


def test_the_documented_script_computes_the_models_logits_without_flax(case, tmp_path):
    script = tmp_path / "load.py"
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    script.write_text(next(block for block in blocks if "export.deserialize" in block))
    arguments = []
    for batch in (1, 2, 3):
        np.save(tmp_path / f"image{batch}.npy", case.image[:batch])
        arguments += [case.out, tmp_path / f"image{batch}.npy", tmp_path / f"logits{batch}.npy"]
    command = [sys.executable, "-c", CLEAN, script, *arguments]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    for batch in (1, 2, 3):
        logits = np.load(tmp_path / f"logits{batch}.npy")
        assert relative_error(logits, case.logits[:batch]) < 1e-5


def test_export_json_says_what_users_need(case):
    about, cfg = case.about, case.cfg
    assert about["format"] == "unetr_flax_export"
    assert UNETRConfig.from_dict(about["config"]) == cfg
    if PREPROCESSING[case.family] is None:
        assert about["preprocessing"] is None
    else:
        assert Preprocessing.from_dict(about["preprocessing"]) == PREPROCESSING[case.family]
    assert about["provenance"] == {"source": case.family}
    weights, image = about["inputs"]
    assert weights == {"name": "weights", "dtype": "float32", "file": "model.safetensors"}
    assert image["shape"] == ["b", *cfg.img_size, cfg.in_channels]
    assert about["outputs"][0]["shape"] == ["b", *cfg.img_size, cfg.out_channels]
    assert about["written_by"]["jax"] == jax.__version__
    assert about["sure_to_load"].keys() == {"jax_built_from", "jax_built_until", "counted_from"}
    given = f"{case.folder} {case.out} --lowering {case.lowering}"
    assert about["write_anew"] == f"unetr export {given} --overwrite"


def test_the_program_names_no_source_files(case):
    assert b".py" not in (case.out / "model.stablehlo").read_bytes()


def test_the_program_is_for_all_platforms(case):
    program = case.program()
    assert program.platforms == ("cpu", "cuda", "tpu") == tuple(case.about["platforms"])
    assert program.calling_convention_version == case.about["calling_convention_version"]
    assert "_platform_index" in program.mlir_module()


@of_reference
def test_a_program_for_one_platform_has_the_forms_of_that_platform(case, tmp_path):
    programs = {}
    for platform in ("cuda", "tpu"):
        write_stablehlo(tmp_path, case.cfg, case.variables, platforms=[platform])
        program = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
        assert program.platforms == (platform,)
        programs[platform] = program.mlir_module()
        assert "_platform_index" not in programs[platform]
        weights = load_file(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"for platforms '\\('{platform}',\\)'"):
            jax.jit(program.call).lower(weights, case.image)
    assert programs["cuda"] != programs["tpu"]


@of_reference
def test_weights_can_be_in_the_program(case, tmp_path):
    about = write_stablehlo(
        tmp_path, case.cfg, case.variables, platforms=["cpu"], lowering="xla", with_weights=True
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.stablehlo"]
    assert about["weights"] is None
    assert [array["name"] for array in about["inputs"]] == ["image"]
    program = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    logits = jax.jit(program.call)(case.image)
    assert relative_error(logits, case.logits) < 1e-5


# Flax's LayerNorm itself relies on promotion for mixed precision.
@of_reference
@jax.numpy_dtype_promotion("standard")
def test_bfloat16_is_that_of_the_model(case, tmp_path):
    options = {"platforms": ["cpu"], "lowering": "xla", "with_weights": True}
    about = write_stablehlo(tmp_path, case.cfg, case.variables, dtype="bfloat16", **options)
    assert about["outputs"][0]["dtype"] == "bfloat16"
    program = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    logits = jax.jit(program.call)(case.image)
    assert logits.dtype == jnp.bfloat16
    model = UNETR(case.cfg, lowering="xla", dtype=jnp.bfloat16)
    expected = jax.jit(model.apply)(case.variables, case.image)
    assert relative_error(logits, expected) < 1e-2


@of_reference
def test_what_cannot_be_exported_is_one_line(case, tmp_path, monkeypatch):
    def fails(match, **options):
        with pytest.raises(ExportError, match=match) as error:
            write_stablehlo(tmp_path, case.cfg, case.variables, **options)
        assert "\n" not in str(error.value)
        assert not any(tmp_path.iterdir())

    fails(r"platforms \[\]: must be one or more", platforms=[])
    fails(r"platforms \['cpu', 'cpu'\]: must be", platforms=["cpu", "cpu"])
    monkeypatch.setattr(stablehlo, "MAX_BYTES_WITHIN", 1000)
    fails("GB of weights: a program holds at most", with_weights=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(r"needs flatbuffers: pip install 'unetr-flax\[export\]'")
