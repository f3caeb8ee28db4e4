import dataclasses
import multiprocessing
import signal
import time

import jax
import pytest
import torch

from parity_tests import climb as climbing
from parity_tests.__main__ import main, write
from parity_tests.climb import Step, climb, climb_steps, plan, torch_threads
from parity_tests.devices import use_platform
from parity_tests.ladder import RUNGS
from parity_tests.options import Options
from unetr_flax.parity.torch_models import torch_model_of

TINY = Options(
    img_size=(16, 32, 16),
    light_r=16,
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    rungs=("volume to score",),
)


def test_plan_of_a_cpu_compares_a_model_in_one_dtype_after_the_other():
    steps, left_out = plan(Options(), "reference", ("float64", "float32"))
    assert not left_out
    assert [step.dtype for step in steps if step.model == "model"] == ["float64"] * 4 + [
        "float32"
    ] * 2
    assert [step.name for step in steps[-3:]] == ["trajectory", "volume to score", "half precision"]


def test_plan_tells_what_a_platform_or_family_does_not_have():
    steps, left_out = plan(Options(platform="tpu"), "monai", ("float32",))
    assert steps == [
        Step(name, "float32") for name in ("activations", "volume to score", "half precision")
    ]
    assert left_out == [
        "masked activations: family 'monai' has no such option",
        *(f"{name}: needs float64, which tpu does not have" for name in list(RUNGS)[2:5]),
    ]


def test_plan_leaves_out_what_needs_classes_for_a_model_with_one_output():
    steps, left_out = plan(Options(out_channels=1), "reference", ("float64", "float32"))
    assert {step.name for step in steps} == {"activations", "masked activations", "half precision"}
    assert left_out == [
        f"{name}: needs 2 classes, --out-channels is 1"
        for name in ("gradients", "training", "trajectory", "volume to score")
    ]


def test_a_rung_without_its_package_is_left_out_visibly(monkeypatch, tmp_path):
    def compare(twins):
        raise ModuleNotFoundError(name="monai.data")

    rung = dataclasses.replace(RUNGS["volume to score"], compare=compare)
    monkeypatch.setitem(RUNGS, "volume to score", rung)
    monkeypatch.setattr(climbing, "explain_rows", lambda rows, twins: [])
    report = climb(TINY, TINY.config())
    assert report.left_out == ["volume to score: monai is not installed"]
    assert report.verdict == "NOTHING COMPARED: 0 of 0 comparisons within tolerance; 1 left out"
    write(report, tmp_path)
    assert "monai is not installed" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "error_by_depth.png").exists()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_platform_that_is_absent_is_one_line(platform, monkeypatch):
    def devices(backend):
        raise RuntimeError(f"Unknown backend {backend}\nand more")

    # The machine may have one.
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=rf"--platform {platform}: jax \S+ finds no such device"):
        use_platform(platform)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": ("leap",)}, "--rungs leap: must be among activations"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"family": "monai", "num_layers": 6}, "--num-layers: MONAI"),
        ({"family": "monai", "patch_size": (8,)}, "--patch-size: MONAI"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options).config()


def test_a_model_has_the_same_weights_in_every_dtype_and_smaller_ones_have_their_own(monkeypatch):
    seen = []

    def compare(twins):
        seen.append(twins)
        return []

    for name in ("activations", "volume to score"):
        monkeypatch.setitem(RUNGS, name, dataclasses.replace(RUNGS[name], compare=compare))
    steps = [Step("activations", "float64"), Step("activations", "float32")]
    climb_steps(TINY, TINY.config(), [*steps, Step("volume to score", "float64")])
    wide, narrow, reduced = seen
    assert [twins.dtype for twins in seen] == ["float64", "float32", "float64"]
    for exact, cast in zip(
        wide.torch_model.parameters(), narrow.torch_model.parameters(), strict=True
    ):
        assert cast.dtype == torch.float32
        assert torch.equal(exact.float(), cast)
    assert reduced.cfg == RUNGS["volume to score"].reduce(TINY.config())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"out_channels": 3},
            "state dict: 2 keys do not fit the model: shape: decoder0_header.2.block.",
        ),
        (
            {"family": "monai", "num_layers": 12},
            "state dict: is of family 'reference', the model of 'monai'",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_one_line_that_names_it(
    monkeypatch, capsys, tmp_path, other, message
):
    file = tmp_path / "a.pt"
    torch.save(torch_model_of(TINY.config()).state_dict(), file)
    options = dataclasses.replace(TINY, checkpoint=file, **other)
    monkeypatch.setattr("parity_tests.__main__.tyro.cli", lambda *args, **kwargs: options)
    monkeypatch.setattr("parity_tests.__main__.use_platform", lambda platform: None)
    assert main() == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"python -m parity_tests: {file}: {message}")
    assert printed.count("\n") == 1


def test_an_unusable_folder_is_told_before_the_long_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    options = dataclasses.replace(TINY, out=tmp_path / "file")
    monkeypatch.setattr("parity_tests.__main__.tyro.cli", lambda *args, **kwargs: options)
    monkeypatch.setattr("parity_tests.__main__.use_platform", lambda platform: None)
    assert main() == 2
    message = f"python -m parity_tests: --out {options.out}: File exists\n"
    assert capsys.readouterr() == ("", message)


def _finish_later(options, cfg, steps):
    """Stands in for the work of the second process."""
    time.sleep(1)
    options.out.touch()


def test_an_interrupt_ends_the_second_process(monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(climbing, "_climb_alone", _finish_later)
    monkeypatch.setattr(climbing, "climb_steps", interrupted)
    options = dataclasses.replace(
        TINY, rungs=("activations", "volume to score"), out=tmp_path / "done"
    )
    # Commands in the background of a shell begin with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            climb(options, options.config(), parallel=True)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
    assert not options.out.exists()


def test_threads_are_limited_for_a_while():
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_compiled_programs_are_kept_for_later_runs(monkeypatch):
    kept = []
    # On a machine with an accelerator the tests go on there.
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr("parity_tests.devices.keep_compiled_programs", lambda: kept.append(True))
    use_platform("cpu")
    assert kept
