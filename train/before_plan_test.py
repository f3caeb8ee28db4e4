import pytest

from train.command_line import given
from train.run_dir import OptionError, read_options


def test_given_options_are_named_as_their_fields():
    args = ["--data", "x", "--roi-size=8", "8", "8", "--no-remat", "--window", "-175", "250"]
    assert given(args) == {"data", "roi_size", "remat", "window"}


@pytest.mark.parametrize(
    "args",
    [
        "--family monai",
        "--roi-size 36 52 36",
        "--roi-size 64 64 64 --family monai",
        "--hidden-size 90",
        "--num-heads 5",
        "--accumulate 3",
        "--accumulate 3 --batch-size 6",
    ],
)
def test_options_that_a_plan_fits_to_the_given_ones_are_not_judged_before(args):
    read_options(["--data", "nowhere", *args.split()])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--family monai --num-layers 8", "--num-layers 8: must be 12 for --family monai"),
        ("--family monai --patch-size 8 8 8", "--patch-size 8 8 8: must be 16 16 16 for"),
        ("--family monai --roi-size 36 52 36", "--roi-size 36 52 36: each must be divisible by"),
        ("--roi-size 36 52 36 --patch-size 8 8 8", "--roi-size 36 52 36: each must be divis"),
        ("--roi-size 33 52 36", "--roi-size 33 52 36: each must be divisible by"),
        ("--hidden-size 90 --num-heads 4", "--num-heads 4: must divide"),
        ("--num-heads 0", "--num-heads 0: must be a positive integer"),
        ("--accumulate 3 --batch-size 4", "--accumulate 3: --batch-size 4 must be divisible"),
        ("--accumulate 1000000000000", "--accumulate 1000000000000: must be finite"),
        ("--num-heads 1000000000000", "--num-heads 1000000000000: must be finite"),
        # Without a plan nothing makes them fit.
        ("--recipe hippocampus --roi-size 33 52 36", "--roi-size 33 52 36: each must be div"),
        ("--recipe hippocampus --accumulate 3", "--accumulate 3: --batch-size"),
    ],
)
def test_given_options_that_do_not_fit_each_other_are_refused_before_the_plan(args, message):
    with pytest.raises(OptionError) as error:
        read_options(["--data", "nowhere", *args.split()])
    assert str(error.value).startswith(message)


def test_the_family_brings_its_sizes_without_a_plan():
    model = read_options(["--family", "monai"]).model
    assert (model.patch_size, model.num_layers) == ((16, 16, 16), 12)
