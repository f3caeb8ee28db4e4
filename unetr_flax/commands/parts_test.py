import itertools

import pytest

from unetr_flax.commands.parts import find_part, take_part


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_parts_are_all_items_once(count):
    items = list(range(count))
    parts = [take_part(items, part, 3) for part in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_option_goes_before_variables():
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert find_part("3/8", variables) == (3, 8, "--part")
    assert find_part(None, {}) is None
    for given in ("0/2", "3/2", "1/0", "1", "a/b", "-1/2", "1/2/3", "", "1/2\n"):
        with pytest.raises(ValueError, match="must be I/N, with I from 1 to N"):
            find_part(given, {})


@pytest.mark.parametrize(
    ("task", "first", "step", "count", "part"),
    [
        ("0", "0", "1", "4", 1),
        ("3", "0", "1", "4", 4),
        ("7", "1", "2", "4", 4),
        ("5", "5", "1", "1", 1),
    ],
)
def test_a_task_of_a_slurm_array_is_a_part(task, first, step, count, part):
    variables = {
        "SLURM_ARRAY_TASK_ID": task,
        "SLURM_ARRAY_TASK_MIN": first,
        "SLURM_ARRAY_TASK_STEP": step,
        "SLURM_ARRAY_TASK_COUNT": count,
    }
    assert find_part(None, variables) == (part, int(count), "SLURM_ARRAY_TASK_ID")


def test_a_pod_of_an_indexed_job_is_a_part():
    variables = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}
    assert find_part(None, variables) == (1, 2, "JOB_COMPLETION_INDEX")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT=None: must be an integer"),
        (
            {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"},
            "SLURM_ARRAY_TASK_ID='x': must be an integer; --part I/N says which part this is",
        ),
        # An array such as 1,2,9 is not evenly spaced.
        (
            {
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "SLURM_ARRAY_TASK_ID: is part 9 of 3",
        ),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS=None: must be an integer"),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "2"}, "is part 3 of 2; --part I/N says"),
    ],
)
def test_variables_that_are_no_part_are_refused(variables, message):
    with pytest.raises(ValueError, match=message):
        find_part(None, variables)
