import importlib.util
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from unetr_flax import Preprocessing, UNETRConfig, cli
from unetr_flax.export import onnx
from unetr_flax.export.errors import ExportError
from unetr_flax.export.onnx import write_onnx
from unetr_flax.export.testing import CONFIGS, PREPROCESSING, Case, relative_error

onnxruntime = pytest.importorskip("onnxruntime")
for package in onnx.PACKAGES:
    pytest.importorskip(package)


class Exported(Case):
    """A model and what the command wrote of it; MONAI's with its weights in a file apart."""

    def __init__(self, family, path):
        super().__init__(family, path)
        self.out = path / "exported"
        command = ["unetr", "export", str(self.folder), str(self.out), "--format", "onnx"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            if family == "monai":
                patch.setattr(onnx, "MAX_BYTES_WITHIN", 1000)
            assert cli.main() == 0
        self.about = json.loads((self.out / "export.json").read_text())


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    return Exported(request.param, tmp_path_factory.mktemp("export"))


def test_onnx_runtime_computes_the_models_logits(case):
    session = onnxruntime.InferenceSession(
        case.out / "model.onnx", providers=["CPUExecutionProvider"]
    )
    expected = np.moveaxis(case.logits, -1, 1)
    image = np.moveaxis(case.image, -1, 1)
    for batch in (1, 2, 3):
        (logits,) = session.run(None, {"image": image[:batch]})
        assert relative_error(logits, expected[:batch]) < onnx.TOLERANCE


def test_the_graph_names_no_source_files(case):
    assert b".py" not in (case.out / "model.onnx").read_bytes()


def test_export_json_says_what_users_need(case):
    about, cfg = case.about, case.cfg
    (image,), (logits,) = about["inputs"], about["outputs"]
    assert image["shape"] == ["batch", cfg.in_channels, *cfg.img_size]
    assert logits["shape"] == ["batch", cfg.out_channels, *cfg.img_size]
    session = onnxruntime.InferenceSession(
        case.out / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for array, theirs in ((image, session.get_inputs()[0]), (logits, session.get_outputs()[0])):
        assert (array["name"], array["shape"]) == (theirs.name, theirs.shape)
        assert theirs.type == "tensor(float)"
    assert UNETRConfig.from_dict(about["config"]) == cfg
    if PREPROCESSING[case.family] is None:
        assert about["preprocessing"] is None
    else:
        assert Preprocessing.from_dict(about["preprocessing"]) == PREPROCESSING[case.family]
    assert about["onnxruntime_relative_error"] <= onnx.TOLERANCE
    files = {file.name for file in case.out.iterdir()} - {"export.json", "model.onnx"}
    assert files == ({"model.onnx.data"} if case.family == "monai" else set())
    assert about["weights"] == (files.pop() if files else None)


@pytest.mark.parametrize("case", ["reference"], indirect=True)
def test_other_logits_than_the_models_are_an_error(case, tmp_path, monkeypatch):
    def another(path, cfg, variables, *, external_data):
        shutil.copy(case.out / "model.onnx", path)

    monkeypatch.setattr(onnx, "_write", another)
    variables = jax.tree.map(np.copy, case.variables)
    variables["params"]["decoder"]["head"]["bias"][0] += 1.0
    with pytest.raises(ExportError, match="ONNX Runtime's logits differ by"):
        write_onnx(tmp_path, case.cfg, variables)


@pytest.mark.parametrize("package", onnx.PACKAGES)
def test_missing_packages_are_one_line(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(ExportError, match=rf"^ONNX needs {package}: pip install 'unetr-flax\[onnx"):
        write_onnx(tmp_path, CONFIGS["reference"], {})
