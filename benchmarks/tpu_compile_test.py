import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import tpu_compile
from benchmarks.tpu_compile import CHIPS, PROMISES, Figures, Options, Program, chosen, main
from unetr_flax import UNETRConfig

STEP = Program("v5e:2x2", "reference", 4.0, 96, 1, "step")
GIB = 2**30


@pytest.fixture
def compiler(monkeypatch):
    """Fakes the compiler: a kind of program needs the bytes that a test sets; 96^3 has 2 GiB."""
    totals = {}

    def compile_program(topology, cfg, batch, kind, *mesh):
        total = totals.get(kind, 0)
        if isinstance(total, str):
            raise jax.errors.JaxRuntimeError(total)
        return Figures(total, total // 2, flops=2e12, traffic=3 * GIB, seconds=4)

    monkeypatch.setattr(tpu_compile, "compile_program", compile_program)
    monkeypatch.setattr(tpu_compile, "PROMISES", {STEP: 2})
    return totals


def test_promises_are_within_the_chips():
    assert PROMISES
    for program, promised in PROMISES.items():
        assert promised <= CHIPS[program.topology]


@pytest.mark.parametrize(("more", "status"), [(0, 0), (1, 1)])
def test_what_exceeds_its_promise_fails(compiler, tmp_path, capsys, more, status):
    compiler["step"] = 2 * GIB + more
    assert main(["--promised", "--out", str(tmp_path / "figures.json")]) == status
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == (
        "| v5e:2x2 | reference light_r 4, 96^3, batch 1 | step | 2.00 of 2 GiB | 1.00 GiB "
        "| 2.00 T | 3.0 GiB | 4 s |"
    )
    message = (
        "tpu_compile: v5e:2x2 | reference light_r 4, 96^3, batch 1 | step: 2.00 GiB, "
        "must fit 2 GiB\n"
    )
    assert printed.err == (message if status else "")


def test_a_promise_holds_however_its_program_is_chosen(compiler, tmp_path):
    compiler["step"] = 2 * GIB + 1
    out = ["--out", str(tmp_path / "figures.json")]
    assert main(["--edges", "96", "--kinds", "step", *out]) == 1


def test_what_is_not_promised_must_fit_the_chip(compiler, tmp_path):
    options = ["--light-r", "2", "--kinds", "step", "--out", str(tmp_path / "figures.json")]
    compiler["step"] = int(CHIPS["v5e:2x2"] * GIB)
    assert main(options) == 0
    compiler["step"] += 1
    assert main(options) == 1


def test_what_the_compiler_refuses_fails_and_the_rest_is_compiled(compiler, tmp_path, capsys):
    out = tmp_path / "figures.json"
    compiler["step"] = "RESOURCE_EXHAUSTED: Used 17G of 15.75G hbm.\nand so on"
    assert main(["--kinds", "step", "forward", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    refused, compiled = printed.out.splitlines()[-2:]
    assert refused.endswith("| step | RESOURCE_EXHAUSTED: Used 17G of 15.75G hbm. |")
    assert "| forward | 0.00 of 16 GiB |" in compiled
    assert "step: more than the chip has" in printed.err
    assert [row["program"]["kind"] for row in json.loads(out.read_text())] == ["forward"]

    compiler["step"] = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["--kinds", "step", "--out", str(out)])


def test_gathered_feature_maps_fail(monkeypatch, compiler, tmp_path, capsys):
    figures = Figures(0, 0, flops=0, traffic=0, seconds=0, gathered=2)
    monkeypatch.setattr(tpu_compile, "compile_program", lambda *args: figures)
    assert main(["--kinds", "step", "--out", str(tmp_path / "figures.json")]) == 1
    assert "| step: gathers 2 feature maps" in capsys.readouterr().err


def test_figures_replace_those_of_the_same_program(compiler, tmp_path):
    out = tmp_path / "new" / "figures.json"
    for total, kinds in ((1, ["forward", "step"]), (2, ["step"])):
        compiler["step"] = total
        assert main(["--kinds", *kinds, "--out", str(out)]) == 0
    kept = {row["program"]["kind"]: row["total"] for row in json.loads(out.read_text())}
    assert kept == {"forward": 0, "step": 2}


def test_options_choose():
    assert chosen(Options(promised=True)) == list(PROMISES)
    assert chosen(Options(batch=(1, 2))) == [
        Program("v5e:2x2", "reference", 4.0, 96, batch, kind)
        for batch in (1, 2)
        for kind in ("forward", "step")
    ]
    assert chosen(Options(batch=(4,), chips=4, kinds=("step",))) == [
        Program("v5e:2x2", "reference", 4.0, 96, 4, "step", chips=4)
    ]
    options = Options(chips=4, fsdp=2, depth_shards=2, batch=(2,), kinds=("step",))
    assert str(*chosen(options)).endswith("batch 2 on 4 chips, fsdp 2, depth 2 | step")
    options = Options(topologies=("v6e:2x2",), edges=(32, 64), family="monai", kinds=("step",))
    assert chosen(options) == [Program("v6e:2x2", "monai", 1, edge, 1, "step") for edge in (32, 64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topologies", "v4"], "topology 'v4': must be one of v5e:2x2, v5p:2x2x1, v6e:2x2"),
        (["--family", "swin"], "family 'swin': must be one of reference, monai"),
        (["--kinds", "train"], "kind 'train': must be one of forward, step, step-remat"),
        (["--batch", "0"], "batch 0: must be at least 1"),
        (["--chips", "3"], "chips 3: must be 1, 2 or 4, and divisible by fsdp 1 times"),
        (["--chips", "4", "--depth-shards", "3"], "chips 4: must be 1, 2 or 4, and divisible"),
        (["--chips", "4", "--batch", "6"], "batch 6: must be divisible by 4 shares of it"),
        (["--chips", "2", "--depth-shards", "2"], "kind 'forward': must be without fsdp"),
        (["--edges", "90"], "img_size=(90, 90, 90)"),
        (["--light-r", "0"], "light_r=0.0"),
        (["--family", "monai", "--light-r", "4"], "light_r 4: must be 1 for monai"),
    ],
)
def test_bad_options_are_named(compiler, capsys, options, message):
    assert main(options) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tpu_compile: ")
    assert message in printed.err
    assert not printed.out


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is TPU's compiler")
def test_the_compiler_compiles():
    # Runs in another process, as the compiler changes which devices JAX looks for.
    result = subprocess.run(
        [sys.executable, "-c", "import benchmarks.tpu_compile_test as t; t.print_figures()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found, shared, *split = json.loads(result.stdout.splitlines()[-1])
    # The image, the logits, and some parameters.
    assert found["total"] > 32**3 * (4 + 2 * 2)
    assert min(found["flops"], found["traffic"], found["seconds"]) > 0
    # Four chips with a volume each need what one with one volume needs.
    assert shared["total"] == pytest.approx(found["total"], rel=0.05)
    # Chips that share the depth of their volumes gather no feature map and exchange single slices.
    assert len(split) == 4
    for figures in split:
        assert figures["gathered"] == 0
        assert figures["exchanged"]
        assert all(len(shape) == 5 and shape[1] == 1 for shape in figures["exchanged"])


def print_figures():
    """Prints the figures of a small model.

    They are those of its forward pass on one chip and on four, and of training steps of one volume
    and two on two chips that share them.
    """
    cfg = UNETRConfig.reference((32, 32, 32), 1, 2, 8, hidden_size=32, num_layers=4, num_heads=2)
    found = [
        tpu_compile.compile_program("v5e:2x2", cfg, chips, "forward", chips) for chips in (1, 4)
    ]
    found += [
        tpu_compile.compile_program(topology, cfg, batch, "step", 2, depth_shards=2)
        for topology in ("v5e:2x2", "v5p:2x2x1")
        for batch in (1, 2)
    ]
    print(json.dumps([dataclasses.asdict(figures) for figures in found]))
