import pytest

from unetr_flax import cli
from unetr_flax.export.testing import Case
from unetr_flax.weights import to_torch, write_state_dict


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Case("reference", tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command and gives its status and what it said."""

    def export(*args):
        monkeypatch.setattr("sys.argv", ["unetr", "export", *map(str, args)])
        status = cli.main()
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return export


SMALL = ("--platforms", "cpu", "--lowering", "xla")


def test_a_pytorch_file_is_exported_and_an_export_replaced_only_if_asked(run, model, tmp_path):
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    write_state_dict(file, to_torch(model.variables, model.cfg), {})
    told = ("--num-heads", 2, "--img-size", 16, 8, 24)
    status, said = run(file, out, *SMALL, *told)
    assert status == 0
    assert "sure to load in a JAX that was built from 20" in said
    assert f"{out}: written, export.json" in said
    weights = (out / "model.safetensors").read_bytes()

    status, said = run(model.folder, out, *SMALL)
    assert (status, said) == (2, f"unetr: {out}: is there already; --overwrite replaces it\n")
    status, _ = run(model.folder, out, *SMALL, "--overwrite")
    assert status == 0
    assert (out / "model.safetensors").read_bytes() == weights


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(run, model, tmp_path):
    def fails(line, *args):
        status, said = run(*args)
        assert status == 2
        assert line in said.splitlines()[-1]
        assert not list(tmp_path.iterdir())

    out = tmp_path / "out"
    fails("none: no such file", tmp_path / "none", out)
    for option in (("--dtype", "bfloat16"), ("--with-weights",), SMALL[:2], SMALL[2:]):
        onnx = ("--format", "onnx", *option)
        fails(f"unetr: {option[0]}: only with --format stablehlo", model.folder, out, *onnx)
    fails("platforms ['cpu', 'cpu']: must be one or more", model.folder, out, *SMALL[:2], "cpu")
