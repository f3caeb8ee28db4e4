import threading
import time
import types

from benchmarks.stages import Stages


def test_an_inner_stage_does_not_count_for_the_outer_one():
    stages = Stages()
    with stages.stage("outer"), stages.stage("inner"):
        time.sleep(0.05)
    assert stages.seconds["inner"] >= 0.05
    assert stages.seconds["outer"] < 0.05
    assert stages.calls["inner"] <= stages.calls["outer"]


def test_stages_of_other_threads_are_not_inner_ones():
    stages = Stages()

    def other():
        with stages.stage("other"):
            time.sleep(0.05)

    thread = threading.Thread(target=other)
    with stages.stage("main"):
        thread.start()
        thread.join()
    assert min(stages.seconds["main"], stages.seconds["other"]) >= 0.05


def test_calls_of_a_function_are_measured_and_finished():
    stages, owner = Stages(), types.SimpleNamespace(double=lambda x: 2 * x)
    finished = []
    stages.measure(owner, "double", "arithmetic", lambda result: finished.append(result) or result)
    assert [owner.double(x) for x in (1, 2)] == finished == [2, 4]
    assert len(stages.calls["arithmetic"]) == 2
