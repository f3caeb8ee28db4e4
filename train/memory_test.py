import jax
import jax.numpy as jnp
import pytest

import train.memory
from train.command_line import parse
from train.data.headers import Need
from train.memory import check_roi, check_size, check_step, device_memory
from train.run_dir import OptionError
from train.sharding import AXES


@pytest.fixture(autouse=True)
def ten_gigabytes(monkeypatch):
    monkeypatch.setattr(train.memory, "available_memory", lambda: 10**10)


def mesh(data=1, fsdp=1, depth=1):
    """Makes a mesh of devices that need not be there."""
    return jax.sharding.AbstractMesh((data, fsdp, depth), AXES)


def judge(args, devices):
    check_size(parse(args.split()), devices)


def test_defaults_fit():
    judge("", mesh())
    judge("--roi-size 96 96 96 --hidden-size 768 --num-layers 12 --num-heads 12", mesh())


@pytest.mark.parametrize(
    ("args", "too_few", "enough", "message"),
    [
        ("--hidden-size 8000", mesh(data=8, depth=4), mesh(fsdp=8), "the parameters alone on each"),
        ("--roi-size 512 512 512 --batch-size 4", mesh(data=2), mesh(data=4, depth=4), "on each"),
        ("--roi-size 512 512 512 --batch-size 4", mesh(), mesh(fsdp=2, depth=8), "there are 10 GB"),
        ("--hidden-size 4800", mesh(), mesh(fsdp=2), "alone, there are 10 GB"),
    ],
)
def test_the_share_of_one_device_is_judged(args, too_few, enough, message):
    with pytest.raises(OptionError, match=message):
        judge(args, too_few)
    judge(args, enough)


def test_parts_of_an_accumulated_batch_are_judged():
    args = "--roi-size 512 512 512 --batch-size 8"
    with pytest.raises(OptionError, match="a step takes over"):
        judge(args, mesh(depth=4))
    judge(f"{args} --accumulate 8", mesh(depth=4))


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert device_memory() == 10**10 // 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--roi-size 1024 1024 1024",
            "--roi-size 1024 1024 1024 --batch-size 2: a step takes",
        ),
        ("--batch-size 1000000000", "--roi-size 8 8 8 --batch-size 1000000000: a step takes over"),
        (
            "--hidden-size 100000",
            "--hidden-size 100000 --num-layers 4 --light-r 4.0: training",
        ),
        ("--num-layers 1000000", "--hidden-size 96 --num-layers 1000000 --light-r 4.0: training t"),
        ("--light-r 0.001", "--hidden-size 96 --num-layers 4 --light-r 0.001: training takes over"),
    ],
)
def test_sizes_far_beyond_the_memory_are_refused(args, message):
    with pytest.raises(OptionError) as error:
        judge(args, mesh())
    assert str(error.value).startswith(message)
    assert "there are 10 GB" in str(error.value)


def test_crops_that_are_padding_are_refused():
    need = Need(0, 0, 0, (40, 20, 10))
    check_roi(parse([]), need)
    check_roi(parse(["--roi-size", "96", "96", "16"]), need)
    with pytest.raises(OptionError, match=r"^--roi-size 512 96 96: the volumes have at most 40 x"):
        check_roi(parse(["--roi-size", "512", "96", "96"]), need)


def test_the_memory_of_a_step_is_that_of_the_compiler():
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(250_000, jnp.float32)).compile()
    line = check_step(compiled, 10**10)
    assert line.startswith("a step takes 2 MB of 10 GB of memory on each device")
    with pytest.raises(OptionError, match="a step takes 2 MB of memory on each device, there are"):
        check_step(compiled, 10**6)
