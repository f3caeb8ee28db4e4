import pytest

from train.budget import BudgetError, Times, seconds, steps_that_fit, time_steps


def test_a_budget_is_a_number_with_a_unit():
    assert [seconds(text) for text in ("90s", "15m", "1.5h")] == [90, 900, 5400]
    for text in ("", "15", "m", "-1m", "0s", "15 m", "2d", "1e3s"):
        with pytest.raises(ValueError, match="must be a time such as 90s"):
            seconds(text)


@pytest.mark.parametrize(
    ("budget", "times"),
    [
        ("15m", Times(spent=60, step=0.5, validation=10, results=20)),
        ("2h", Times(spent=60, step=0.5, validation=1, results=2)),
        ("5m", Times(spent=10, step=2, validation=100, results=20)),
        ("1m", Times(spent=1, step=20, validation=1, results=1)),
    ],
)
def test_the_whole_run_fits_into_its_budget_and_nearly_fills_it(budget, times):
    steps, pause = steps_that_fit(budget, times)
    validations = -(-steps // pause)
    total = times.spent + steps * times.step + validations * times.validation + times.results
    assert total <= seconds(budget)
    assert total > 0.95 * seconds(budget) - times.step
    assert validations <= 10
    # Validation takes little of it, unless a single one is more.
    assert validations * times.validation <= max(0.05 * seconds(budget), times.validation)


def test_a_budget_without_time_for_training_is_refused():
    with pytest.raises(BudgetError, match=r"^--budget 1m: no training fits into it; 50 s pass"):
        steps_that_fit("1m", Times(spent=50, step=1, validation=6, results=5))


def test_a_share_of_the_budget_is_spent_on_measuring(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("train.budget.time.monotonic", lambda: clock[0])
    taken = []

    def step(duration):
        taken.append(duration)
        clock[0] += duration if len(taken) > 1 else 100 * duration

    assert time_steps(lambda: step(2.0), "100s") == 2
    assert len(taken) == 4
    taken.clear()
    assert time_steps(lambda: step(0.25), "100s") == 0.25
    assert len(taken) == 9


def test_all_processes_time_as_many_steps_as_the_main_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("train.budget.time.monotonic", lambda: clock[0])
    taken = []

    def step():
        taken.append(None)
        clock[0] += 0.5

    # The main process, whose clock is faster, has room for seven more steps, and this one for one.
    monkeypatch.setattr("train.budget.is_main", lambda: False)
    monkeypatch.setattr("train.budget.process_sum", lambda own: own + 7)
    assert time_steps(step, "100s") == 0.5
    assert len(taken) == 1 + 3 + 7
