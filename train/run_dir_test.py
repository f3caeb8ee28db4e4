import dataclasses
import shlex

import pytest

from train.command_line import parse
from train.run_dir import resume_command


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--keep-checkpoints 5 --save-minutes 2.5 --fsdp 4 --depth-shards 2 --workers 2",
        "--keep-freed-memory --cache '/scratch/my cases' --compilation-cache ''",
        "--coordinator-address host:1 --num-processes 2 --process-id 1",
    ],
)
def test_the_command_that_goes_on_has_what_the_run_needs(options):
    command = resume_command(parse(shlex.split(f"--out o --epochs 3 {options}")))
    assert command == f"python -m train --out o --resume {options}".strip()
    parsed = parse(shlex.split(command)[3:]).run
    assert parsed == dataclasses.replace(
        parse(shlex.split(options)).run, out=parsed.out, resume="yes"
    )
