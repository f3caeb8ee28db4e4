import pytest

from unetr_flax.export.errors import ExportError
from unetr_flax.export.folder import new_folder


def write(path, text="new", **options):
    with new_folder(path, **{"overwrite": False, **options}) as folder:
        assert folder.parent == path.parent
        (folder / "export.json").write_text(text)


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    write(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "export.json").read_text() == "new"
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_or_the_older_export(tmp_path, error):
    def fail(overwrite):
        with new_folder(tmp_path / "out", overwrite=overwrite) as folder:
            (folder / "model.onnx").write_text("half")
            raise error

    with pytest.raises(error):
        fail(overwrite=False)
    assert not names(tmp_path)
    write(tmp_path / "out", "old")
    with pytest.raises(error):
        fail(overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["export.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["after the old one went", "before the new one came"])
def test_the_older_export_stays_if_the_new_one_does_not_get_its_place(
    tmp_path, monkeypatch, error, step
):
    write(tmp_path / "out", "old")
    rename = type(tmp_path).rename

    def fail(self, target):
        if self.suffix == ".tmp" and step == "before the new one came":
            raise error
        moved = rename(self, target)
        if target.suffix == ".old" and step == "after the old one went":
            raise error
        return moved

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(error):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "export.json").read_text() == "old"


def test_an_older_export_is_replaced_whole_but_only_if_asked(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    (out / "model.onnx").write_text("old")
    with pytest.raises(ExportError, match="is there already; --overwrite replaces it"):
        write(out)
    assert names(out) == ["export.json", "model.onnx"]
    write(out, overwrite=True)
    assert names(out) == ["export.json"]
    assert (out / "export.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_files_of_others_are_never_replaced(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds 'thesis.txt', which no export wrote"):
        write(out, overwrite=True)
    assert names(out) == ["export.json", "thesis.txt"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    with pytest.raises(ExportError, match=r"holds 'model.safetensors', which no export wrote"):
        write(model, overwrite=True)
    assert names(model) == ["model.safetensors"]
    with pytest.raises(ExportError, match="is a file, must be a folder"):
        write(out / "thesis.txt", overwrite=True)
    assert names(tmp_path) == ["model", "out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    write(tmp_path / "out", "old")
    link = tmp_path / "link"
    link.symlink_to("out")
    with new_folder(link, overwrite=True) as folder:
        (folder / "export.json").write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "out" / "export.json").read_text() == "new"
