import datetime

from unetr_flax.export.compatibility import BUILT, sure_to_load

TODAY = datetime.date(2030, 8, 31)


def test_known_versions_count_from_the_day_on_which_they_were_built():
    assert sure_to_load("0.10.1", TODAY) == {
        "jax_built_from": "2026-04-27",
        "jax_built_until": "2026-11-18",
        "counted_from": "2026-05-18, building of jaxlib 0.10.1",
    }


def test_other_versions_count_from_the_day_of_writing():
    sure = sure_to_load("99.0", TODAY)
    # There is no February 31.
    assert (sure["jax_built_from"], sure["jax_built_until"]) == ("2030-08-10", "2031-02-28")
    assert sure["counted_from"].startswith("2030-08-31, writing; when jaxlib 99.0 was built is not")


def test_the_excluded_versions_are_not_listed():
    assert not {"0.10.2", "0.11.0"} & BUILT.keys()
