import gc

from unetr_flax.runtime.garbage import collector_paused


def test_the_collector_is_off_within_and_as_before_afterwards():
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with collector_paused(), collector_paused():
        pass
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
