import monai
import pytest

from parity_tests import monai_versions
from parity_tests.monai_versions import CASES, Result, check_version, markdown


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder in which the MONAI of this environment is installed as its own version."""
    version = monai.__version__
    package = tmp_path / version / "package"
    package.mkdir(parents=True)
    (package / "monai").symlink_to(monai.__path__[0])
    monkeypatch.setattr(
        monai_versions, "CASES", {"flat": CASES["flat"], "none": {"no_such_option": 1}}
    )
    return version, tmp_path


@pytest.mark.slow
def test_the_installed_version_holds_there_and_back(installed):
    held, lacking = check_version(*installed)
    assert held.problem is None
    assert held.error <= 1e-10
    assert held.unused == 24
    assert lacking.lacking == "no_such_option"


@pytest.mark.slow
def test_a_checkpoint_that_is_read_wrongly_is_noticed(installed, monkeypatch):
    convert = monai_versions.from_torch

    def without_positions(state_dict, cfg):
        variables = convert(state_dict, cfg)
        variables["params"]["encoder"]["embedding"]["position_embedding"] *= 0
        return variables

    monkeypatch.setattr(monai_versions, "from_torch", without_positions)
    result, _ = check_version(*installed)
    assert result.problem.startswith("logits differ by")
    assert result.error > 1e-3


def test_the_table_has_a_row_for_each_version():
    names = list(CASES)
    results = [
        Result("1.0.0", names[0], 170, 3, 1e-15),
        Result("1.0.0", names[1], lacking="qkv_bias"),
        Result("1.1.0", names[0], problem="2 keys do not fit"),
    ]
    assert markdown(results).splitlines()[2:] == [
        "| 1.0.0 | 1.0e-15, 3 of 170 keys unused | has no qkv_bias |",
        "| 1.1.0 | 2 keys do not fit |",
    ]


def test_an_index_without_versions_is_no_success(monkeypatch, capsys, tmp_path):
    options = monai_versions.Options(out=tmp_path)
    monkeypatch.setattr(monai_versions.tyro, "cli", lambda *args, **kwargs: options)
    monkeypatch.setattr(monai_versions, "_run", lambda command: "ERROR: no matching distribution")
    assert monai_versions.main() == 2
    assert "pip lists no version" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
