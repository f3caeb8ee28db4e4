import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unetr_flax import UNETR, Preprocessing, UNETRConfig, cli
from unetr_flax.imaging.padding import centered_start, crop_or_pad
from unetr_flax.weights import save_pretrained

pytest.importorskip("torch")
nib = pytest.importorskip("nibabel")

CFG = UNETRConfig.reference(
    (16, 8, 24), 2, 2, 32, patch_size=8, hidden_size=12, num_layers=4, num_heads=3, mlp_dim=7
)


@pytest.fixture(scope="module")
def variables():
    x = jnp.zeros((1, *CFG.img_size, CFG.in_channels))
    return jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(UNETR(CFG).init, jax.random.key(0), x),
    )


@pytest.fixture
def scan(tmp_path):
    """Writes a scan that is larger than the window on the first axis and smaller on the second."""
    array = np.random.default_rng(0).gamma(4.0, 100.0, (21, 5, 24, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz", array


@pytest.fixture
def verify(monkeypatch, capsys, tmp_path, variables):
    """Runs the command on a folder without comparing, and gives the volume and what was said."""

    def run(path, preprocessing):
        save_pretrained(tmp_path / "model", CFG, variables, preprocessing=preprocessing)
        seen = []
        monkeypatch.setattr(
            "unetr_flax.parity.verify.verify",
            lambda cfg, weights, inputs: seen.append(inputs.volume) or [],
        )
        monkeypatch.setattr("unetr_flax.parity.table.print_table", lambda rows: None)
        command = ["unetr", "verify", str(tmp_path / "model"), "--volume", str(path)]
        monkeypatch.setattr("sys.argv", command)
        status = cli.main()
        printed = capsys.readouterr()
        return status, seen, printed.out + printed.err

    return run


def test_volume_is_preprocessed_as_the_folder_says(verify, scan):
    path, array = scan
    preprocessing = Preprocessing.from_modalities(["CT", "T1"])
    status, (window,), said = verify(path, preprocessing)
    assert status == 0
    assert f"{path}: preprocessed as the model's folder says" in said
    image = np.stack(
        [rule.normalize(array[..., i]) for i, rule in enumerate(preprocessing.intensity)], -1
    )
    lowest = image.min((0, 1, 2))
    expected = crop_or_pad(image, centered_start((21, 5, 24), CFG.img_size), CFG.img_size, lowest)
    np.testing.assert_array_equal(window, expected[None])
    assert window.shape == (1, 16, 8, 24, 2)
    np.testing.assert_array_equal(window[0, 0, 0, 0], lowest)


def test_volume_is_resampled_as_the_folder_says(verify, scan):
    preprocessing = Preprocessing.from_modalities(["CT", "T1"], spacing=(2.0, 1.0, 3.0))
    _, (window,), _ = verify(scan[0], preprocessing)
    # 10 of 16 voxels are the scan's along the first axis, 8 of 10 along the second.
    inside = (window[0] != window.min((0, 1, 2, 3))).any((1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(inside), np.arange(3, 13))


def test_without_preprocessing_each_channel_has_mean_0_and_deviation_1(verify, scan):
    path, array = scan
    status, (window,), said = verify(path, None)
    assert status == 0
    assert f"{path}: mean 0 and deviation 1, as the model's own preprocessing is not known" in said
    normalized = (array - array.mean((0, 1, 2))) / array.std((0, 1, 2))
    np.testing.assert_allclose(window[0, :, 1:6], normalized[2:18], atol=1e-4)


def test_volume_must_have_the_channels_of_the_model(verify, tmp_path):
    path = tmp_path / "one.nii"
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)), path)
    status, seen, said = verify(path, None)
    assert status == 2
    assert not seen
    assert f"--volume {path}: 3 axes and 1 channels, the model takes 3 and 2" in said
