import numpy as np
import pytest

from unetr_flax.imaging.intensity import (
    Percentiles,
    Window,
    ZScore,
    background,
    rule_from_dict,
    rule_of_modality,
    rule_to_dict,
)


def test_window():
    hu = np.array([-1000.0, -175.0, 37.5, 250.0, 3000.0], np.float32)
    np.testing.assert_allclose(Window().normalize(hu), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(Window(0, 500).normalize(hu), [0, 0, 0.075, 0.5, 1])
    assert Window().normalize(hu).dtype == np.float32


def test_percentiles_normalize_the_body_whatever_its_unit():
    rng = np.random.default_rng(0)
    image = rng.gamma(4.0, 100.0, (10, 12, 8))
    image[:5] = 0
    image[7, 0, 0] = 1e9
    normalized = Percentiles().normalize(image)
    assert normalized.dtype == np.float32
    body = normalized[5:]
    np.testing.assert_allclose(body.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(body.std(), 1, rtol=1e-5)
    np.testing.assert_allclose(Percentiles().normalize(image * 1000), normalized, atol=1e-4)


@pytest.mark.parametrize(("rule", "clipped"), [(Percentiles(), 5), (Percentiles(2, 98), 20)])
def test_percentiles_are_those_of_the_nonzero_voxels(rule, clipped):
    # The percentile n / 10 of 1001 sorted numbers is the number with index n.
    values = np.arange(1001.0, 0, -1) ** 2
    ordered = np.clip(values, *np.sort(values)[[clipped, -1 - clipped]])
    expected = (ordered - ordered.mean()) / ordered.std()
    normalized = rule.normalize(np.concatenate([values, np.zeros(500)]))
    np.testing.assert_allclose(normalized[:1001], expected, atol=1e-5)


def test_z_score_is_over_all_voxels():
    image = np.random.default_rng(0).normal(1e4, 3, (9, 8, 7)).astype(np.float32)
    image[:4] = 0
    normalized = ZScore().normalize(image)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized.mean(dtype=float), 0, atol=1e-6)
    np.testing.assert_allclose(normalized.std(dtype=float), 1, rtol=1e-6)


@pytest.mark.parametrize("rule", [Percentiles(), ZScore()])
@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_channel_becomes_zero(rule, value):
    np.testing.assert_array_equal(rule.normalize(np.full((3, 4, 5), value, np.float32)), 0)


def test_background_is_the_lowest_intensity_of_each_channel():
    image = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    np.testing.assert_array_equal(background(image), [image[..., 0].min(), image[..., 1].min()])


@pytest.mark.parametrize("name", ["CT", "ct", " Ct "])
def test_ct_is_windowed_and_all_else_is_normalized_as_mri(name):
    assert rule_of_modality(name) == Window(-175, 250)
    assert rule_of_modality("T1") == rule_of_modality("PET-CT") == Percentiles(0.5, 99.5)


@pytest.mark.parametrize("rule", [Window(-1000, 400), Percentiles(1, 99), ZScore()])
def test_dict_and_back(rule):
    assert rule_from_dict(rule_to_dict(rule)) == rule


def test_dict_has_the_name_of_the_rule_and_its_numbers():
    assert rule_to_dict(Window(-5, 3)) == {"rule": "window", "low": -5.0, "high": 3.0}
    assert rule_to_dict(ZScore()) == {"rule": "zscore"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"^\[\]: must be an object"),
        ({"low": 1, "high": 2}, "^rule=None: must be one of 'window', 'percentiles', 'zscore'$"),
        ({"rule": ["window"]}, r"^rule=\['window'\]: must be one of"),
        ({"rule": "window"}, r"^fields \['rule'\]: must be \['rule', 'low', 'high'\] for rule"),
        ({"rule": "zscore", "low": 1}, r"^fields \['rule', 'low'\]: must be \['rule'\]"),
        ({"rule": "window", "low": "1", "high": 2}, "^low='1': low and high must be finite num"),
        ({"rule": "window", "low": True, "high": 2}, "^low=True: low and high must be finite"),
        ({"rule": "window", "low": 0, "high": float("inf")}, "^high=inf: low and high must be f"),
        ({"rule": "window", "low": 0, "high": 10**400}, "^high=10+: low and high must be finite"),
        ({"rule": "window", "low": 2, "high": 2}, r"^low=2\.0: must be below high=2\.0$"),
        ({"rule": "percentiles", "low": -1, "high": 2}, "^low=-1: low and high must be .* 0 to"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message) as error:
        rule_from_dict(values)
    assert "\n" not in str(error.value)
