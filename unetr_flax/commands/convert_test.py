import dataclasses
import json

import jax
import numpy as np
import pytest

from unetr_flax import UNETR, Preprocessing, UNETRConfig, cli
from unetr_flax.model.abstract import abstract_variables
from unetr_flax.weights import (
    load_pretrained,
    read_metadata,
    read_state_dict,
    save_pretrained,
    to_torch,
)
from unetr_flax.weights.unused_keys import unused_keys

torch = pytest.importorskip("torch")

SIZE = {"img_size": (32, 16, 32), "in_channels": 2, "out_channels": 3}
MONAI = UNETRConfig.monai(**SIZE, feature_size=4, hidden_size=8, mlp_dim=12, num_heads=2)
BRATS = ("TC=1,3", "WT=1,2,3", "ET=3")
TOLD = ("--num-heads", "2", "--img-size", "32", "16", "32")


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["unetr", *map(str, args)])
    return cli.main()


@pytest.fixture
def says(monkeypatch, capsys):
    """Runs a command that must fail and gives its one line."""

    def fails(*args):
        assert run(monkeypatch, *args) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("unetr: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return fails


def random_variables(cfg):
    shapes = abstract_variables(UNETR(cfg))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


@pytest.fixture
def file(tmp_path):
    """Writes a checkpoint like those of a DDP run of MONAI 1.5."""
    state_dict = {**to_torch(random_variables(MONAI), MONAI), **unused_keys(MONAI, "1.5")}
    tensors = {f"module.{key}": torch.tensor(value) for key, value in state_dict.items()}
    path = tmp_path / "best.pt"
    torch.save({"epoch": 7, "state_dict": tensors, "optimizer": {"lr": 0.1}}, path)
    return path


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_checkpoint_becomes_a_folder_and_goes_back(monkeypatch, capsys, tmp_path, file):
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", file, folder, *TOLD) == 0
    shown = capsys.readouterr().out
    assert "family 'monai'" in shown
    assert "read from a state_dict of a checkpoint, prefix 'module.' removed\n" in shown
    assert "84 keys that the model never applies dropped" in shown
    assert "window 32 x 16 x 32, patches" in shown
    cfg, variables = load_pretrained(folder)
    assert cfg == MONAI
    assert_equal(variables, random_variables(MONAI))
    provenance = read_metadata(folder)["provenance"]
    assert provenance == {
        "source": "best.pt",
        "held": "state_dict of a checkpoint, prefix 'module.' removed",
        "unused_keys": 84,
    }

    back = tmp_path / "back.pt"
    assert run(monkeypatch, "convert", folder, back, "--to", "torch", "--monai", "1.5") == 0
    original = torch.load(file, weights_only=True)["state_dict"]
    again = torch.load(back, weights_only=True)
    assert {f"module.{key}" for key in again} == original.keys()
    assert all(torch.equal(again[key], original[f"module.{key}"]) for key in again)


def test_named_keys_beside_the_models_are_ignored(monkeypatch, capsys, says, tmp_path, file):
    checkpoint = torch.load(file, weights_only=True)
    beside = {"loss.weight": torch.ones(2), "loss.n": torch.tensor(3), "module.best": torch.ones(1)}
    torch.save({**checkpoint, "state_dict": {**checkpoint["state_dict"], **beside}}, file)
    out = tmp_path / "model"
    line = says("convert", file, out, *TOLD)
    assert "keys module.* there are loss.weight, loss.n; ignore them" in line
    assert "(--ignore 'loss.*')" in line
    assert "unexpected: best (1,)" in says("convert", file, out, *TOLD, "--ignore", "loss.*")
    ignore = ("--ignore", "loss.*", "--ignore", "best")
    line = says("convert", file, out, *TOLD, *ignore, "--ignore", "metric.*")
    assert f"{file}: --ignore: 'metric.*' matches no key" in line
    line = says("convert", file, out, *TOLD, *ignore, "--ignore", "decoder5.*")
    assert "keys do not fit the model: missing: decoder5" in line
    assert not out.exists()

    assert run(monkeypatch, "convert", file, out, *TOLD, *ignore) == 0
    assert "prefix 'module.' removed, 3 keys ignored\n" in capsys.readouterr().out
    assert_equal(load_pretrained(out)[1], random_variables(MONAI))
    line = says("convert", out, tmp_path / "a.pt", "--to", "torch", "--ignore", "loss.*")
    assert "a folder tells all of its model" in line
    assert "--ignore: only with a PyTorch file" in says("summary", "--ignore", "loss.*")


def test_safetensors_say_themselves_which_model_they_are_of(monkeypatch, tmp_path, file):
    folder, again, there = tmp_path / "model", tmp_path / "again", tmp_path / "a.safetensors"
    assert run(monkeypatch, "convert", file, folder, *TOLD) == 0
    assert run(monkeypatch, "convert", folder, there, "--to", "torch") == 0
    assert unused_keys(MONAI).keys() <= read_state_dict(there).state_dict.keys()
    assert run(monkeypatch, "convert", there, again, "--ignore", "*cross_attn.*") == 0
    assert_equal(load_pretrained(again), load_pretrained(folder))


def test_position_embeddings_are_resized_only_if_asked(monkeypatch, tmp_path, file):
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", file, folder, *TOLD, "--resize-to", "48", "32", "32") == 0
    cfg, variables = load_pretrained(folder)
    assert cfg.img_size == (48, 32, 32)
    assert variables["params"]["encoder"]["embedding"]["position_embedding"].shape == (1, 12, 8)


def test_what_is_there_is_not_replaced_unless_asked(monkeypatch, says, tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert "is there already" in says("convert", file, folder, *TOLD)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert run(monkeypatch, "convert", file, folder, *TOLD, "--overwrite") == 0
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert load_pretrained(folder)[0] == MONAI


def test_what_shapes_do_not_tell_is_asked_for_by_option(says, tmp_path, file):
    out = tmp_path / "model"
    assert "--num-heads: shapes do not tell it" in says("convert", file, out)
    assert "--img-size: 4 position embeddings" in says("convert", file, out, "--num-heads", "2")
    assert "num_heads=3: must divide" in says("convert", file, out, "--num-heads", "3", *TOLD[2:])
    assert "--norm group and --norm-groups" in says("convert", file, out, *TOLD, "--norm", "group")
    assert "--monai: only with --to torch" in says("convert", file, out, *TOLD, "--monai", "1.4")
    assert not out.exists()


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(says, tmp_path, file):
    out = tmp_path / "model"
    whole = torch.load(file, weights_only=True)
    keys = list(whole["state_dict"])
    for key in keys[5:8]:
        del whole["state_dict"][key]
    torch.save(whole, file)
    line = says("convert", file, out, *TOLD)
    assert "3 keys do not fit the model: missing: " in line
    assert "and 2 more" in line
    file.write_bytes(file.read_bytes()[:3000])
    assert str(file) in says("convert", file, out, *TOLD)
    assert "no such file" in says("convert", tmp_path / "none.pt", out, *TOLD)
    assert not out.exists()


def test_a_folder_needs_nothing_told(says, monkeypatch, tmp_path, file):
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", file, folder, *TOLD) == 0
    line = says("convert", folder, tmp_path / "a.pt", "--to", "torch", "--num-heads", "2")
    assert "a folder tells all of its model" in line
    line = says("convert", folder, tmp_path / "a.onnx", "--to", "torch")
    assert "must end in .safetensors" in line
    header = folder / "config.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "version": 9}))
    assert "version 9, must be 1" in says("summary", folder)


def test_a_window_that_is_taken_for_a_cube_is_said_to_be(monkeypatch, capsys, tmp_path):
    cfg = UNETRConfig.monai(16, 2, 3, feature_size=4, hidden_size=8, mlp_dim=12, num_heads=2)
    file, folder = tmp_path / "a.pt", tmp_path / "model"
    state_dict = to_torch(random_variables(cfg), cfg)
    torch.save({key: torch.tensor(value) for key, value in state_dict.items()}, file)
    assert run(monkeypatch, "convert", file, folder, "--num-heads", "2") == 0
    assert "window 16 x 16 x 16 (taken for a cube" in capsys.readouterr().out
    assert load_pretrained(folder)[0] == cfg


def test_blocks_that_feed_the_decoder_are_asked_for_or_said(monkeypatch, capsys, says, tmp_path):
    file, folder = tmp_path / "a.pt", tmp_path / "model"

    def save(num_layers, skip_layers):
        cfg = UNETRConfig.reference(
            (8, 8, 8),
            1,
            2,
            32,
            patch_size=4,
            hidden_size=4,
            num_layers=num_layers,
            num_heads=2,
            skip_layers=skip_layers,
        )
        state_dict = to_torch(random_variables(cfg), cfg)
        torch.save({key: torch.tensor(value) for key, value in state_dict.items()}, file)
        return cfg

    cfg = save(5, (1, 2, 3, 5))
    assert "--skip-layers: shapes do not tell" in says("convert", file, folder, *TOLD[:2])
    told = (*TOLD[:2], "--skip-layers", "1", "2", "3", "5")
    assert run(monkeypatch, "convert", file, folder, *told) == 0
    assert load_pretrained(folder)[0] == cfg
    assert "feed nothing" not in capsys.readouterr().out
    cfg = save(14, (3, 6, 9, 12))
    assert run(monkeypatch, "convert", file, folder, *TOLD[:2], "--overwrite") == 0
    assert load_pretrained(folder)[0] == cfg
    said = "features after blocks 3, 6, 9, 12 (the last 2 feed nothing, --skip-layers if they do)"
    assert said in capsys.readouterr().out


def test_a_folder_keeps_its_preprocessing(monkeypatch, tmp_path):
    preprocessing = Preprocessing.from_modalities(["CT", "T1"], spacing=(1.0, 1.0, 2.0))
    variables = random_variables(MONAI)
    save_pretrained(tmp_path / "a", MONAI, variables, preprocessing=preprocessing)
    assert run(monkeypatch, "convert", tmp_path / "a", tmp_path / "b") == 0
    assert read_metadata(tmp_path / "b")["preprocessing"] == preprocessing


def test_preprocessing_is_stored_in_the_folder(monkeypatch, says, tmp_path, file):
    given = Preprocessing.from_modalities(["CT", "T1"], labels=["background", "a", "b"])
    told = tmp_path / "told.json"
    told.write_text(json.dumps(given.to_dict()))
    folder = tmp_path / "model"
    assert run(monkeypatch, "convert", file, *TOLD, "--preprocessing", told, folder) == 0
    assert read_metadata(folder)["preprocessing"] == given
    other = Preprocessing.from_modalities(["T2", "T1"])
    told.write_text(json.dumps(other.to_dict()))
    assert run(monkeypatch, "convert", folder, tmp_path / "b", "--preprocessing", told) == 0
    assert read_metadata(tmp_path / "b")["preprocessing"] == other

    out = tmp_path / "none"
    line = says("convert", file, out, *TOLD, "--preprocessing", "spleen")
    assert "modalities=('CT',): must be 2, one per input channel of the model" in line
    assert "preprocessing: must be one of btcv, spleen, hippocampus" in says(
        "convert", file, out, *TOLD, "--preprocessing", "preprocessing"
    )
    told.write_text(json.dumps({**other.to_dict(), "spacing": 0}))
    line = says("convert", file, out, *TOLD, "--preprocessing", told)
    assert f"--preprocessing {told}: preprocessing: spacing=0: must be" in line
    line = says("convert", folder, tmp_path / "a.pt", "--to", "torch", "--preprocessing", told)
    assert "--preprocessing: only for a model folder, not with --to torch" in line
    assert not out.exists()


def test_one_output_without_a_name_is_told(monkeypatch, capsys, tmp_path):
    cfg = dataclasses.replace(MONAI, out_channels=1)
    folders = [tmp_path / name for name in ("plain", "converted", "named", "again")]
    save_pretrained(folders[0], cfg, random_variables(cfg))
    for source, target, options, expected in (
        (folders[0], folders[1], (), True),
        (folders[0], folders[2], ("--regions", "tumor=1"), False),
        (folders[2], folders[3], (), False),
        (folders[0], tmp_path / "a.pt", ("--to", "torch"), False),
    ):
        assert run(monkeypatch, "convert", source, target, *options) == 0
        line = "one output, a region that unetr predict needs a name of: --regions NAME\n"
        assert (line in capsys.readouterr().out) == expected


def test_regions_are_stored_in_the_folder_as_training_does(
    monkeypatch, capsys, says, tmp_path, file
):
    told = tmp_path / "told.json"
    labels = ["background", "edema", "enhancing"]
    told.write_text(
        json.dumps(Preprocessing.from_modalities(["T1", "T2"], labels=labels).to_dict())
    )
    options = (*TOLD, "--preprocessing", told, "--regions")
    folder, masks, out = tmp_path / "model", tmp_path / "masks", tmp_path / "none"
    assert run(monkeypatch, "convert", file, folder, *options, *BRATS) == 0
    assert "label maps of 1 TC without ET, 2 WT without TC, 3 ET" in capsys.readouterr().out
    metadata = read_metadata(folder)
    assert metadata["provenance"]["source"] == "best.pt"
    regions = {key: metadata["provenance"][key] for key in ("regions", "region_ids")}
    assert regions == {"regions": ["TC", "WT", "ET"], "region_ids": [[1, 3], [1, 2, 3], [3]]}
    assert metadata["preprocessing"].labels == ()
    assert run(monkeypatch, "convert", file, masks, *options, "TC", "WT", "ET") == 0
    assert "regions TC, WT, ET: written as 4D masks" in capsys.readouterr().out
    assert read_metadata(masks)["provenance"]["regions"] == ["TC", "WT", "ET"]

    line = says("convert", folder, out, "--regions", "TC", "WT", "ET")
    assert f"--regions: {folder} tells itself that it predicts TC, WT, ET" in line
    for values, message in (
        (["TC", "WT"], "regions TC, WT: must be 3, one for each output of the model"),
        (["TC", "WT", "TC"], "regions: TC, WT, TC: must be different names"),
        ([], "--regions : must be a name for each output"),
        (["TC=1,3", "WT", "ET=3"], "--regions WT: must be NAME=ID,ID,"),
        (["TC=0", "WT=1", "ET=3"], "--regions TC=0: ids must be 1 to 65535"),
    ):
        assert message in says("convert", file, out, *options, *values)
    line = says("convert", file, tmp_path / "a.pt", "--to", "torch", "--regions", "TC")
    assert "--regions: only for a model folder, not with --to torch" in line
    assert not out.exists()


def test_a_pretrained_encoder_becomes_that_of_a_model(monkeypatch, capsys, says, tmp_path):
    variables = random_variables(MONAI)
    weights = to_torch(variables, MONAI)
    encoder = tmp_path / "encoder.pt"
    torch.save(
        {
            "state_dict": {
                f"module.{key.removeprefix('vit.')}": torch.tensor(value)
                for key, value in weights.items()
                if key.startswith("vit.")
            }
        },
        encoder,
    )
    config, folder = tmp_path / "config.json", tmp_path / "model"
    config.write_text(json.dumps(MONAI.to_dict()))
    assert run(monkeypatch, "convert", encoder, folder, "--encoder-for", config) == 0
    assert "137 keys loaded, 0 skipped, 0 resized" in capsys.readouterr().out
    cfg, loaded = load_pretrained(folder)
    assert cfg == MONAI
    assert_equal(loaded["params"]["encoder"], variables["params"]["encoder"])
    assert read_metadata(folder)["provenance"] == {"encoder": "encoder.pt", "model": "config.json"}

    again = tmp_path / "again"  # a folder gives its other weights, too, and what is known of them
    known = {"regions": ["TC", "WT", "ET"], "flips": [0, 1], "model": "older"}
    save_pretrained(folder, MONAI, loaded, provenance=known)
    assert run(monkeypatch, "convert", encoder, again, "--encoder-for", folder) == 0
    assert_equal(load_pretrained(again)[1], loaded)
    merged = known | {"encoder": "encoder.pt", "model": "model"}
    assert read_metadata(again)["provenance"] == merged
    save_pretrained(folder, MONAI, loaded, provenance="a thesis")
    options = ("--encoder-for", folder, "--regions", *BRATS, "--overwrite")
    assert run(monkeypatch, "convert", encoder, again, *options) == 0
    merged = {"source": "a thesis", "encoder": "encoder.pt", "model": "model"}
    assert read_metadata(again)["provenance"].items() >= merged.items()
    out = tmp_path / "out"
    assert "--ignore goes" in says("convert", encoder, out, "--encoder-for", folder, *TOLD)
    assert "cannot be read" in says("convert", encoder, out, "--encoder-for", tmp_path / "none")
    assert "must be a model folder or" in says("convert", encoder, out, "--encoder-for", encoder)
    assert "only with --encoder-for" in says("convert", encoder, out, "--encoder-img-size", "32")
    assert not out.exists()
