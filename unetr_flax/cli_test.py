import os
import signal
import sys

import jax
import pytest

from unetr_flax import cli
from unetr_flax.commands import summary


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["unetr", *args])
    return cli.main()


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_help_names_every_verb_without_importing_it(monkeypatch, capsys, args):
    monkeypatch.setattr("importlib.import_module", None)
    assert run(monkeypatch, *args) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_help_and_begins_it_as_the_list_does(monkeypatch, capsys, verb):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, verb, "--help")
    assert left.value.code == 0
    assert " ".join(cli.VERBS[verb].split()) in " ".join(capsys.readouterr().out.split())


def test_an_unknown_verb_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "segment", "a") == 2
    assert capsys.readouterr().err.startswith("unetr: segment: must be one of predict, evaluate, ")


def test_summary_has_every_module_and_the_article_s_count(monkeypatch, capsys):
    assert run(monkeypatch, "summary") == 0
    table = capsys.readouterr().out
    for path in ("encoder/embedding/projection", "encoder/block_11/attention/qkv", "decoder/head"):
        assert path in table
    assert "92,459,028" in table


def test_summary_takes_other_sizes(monkeypatch, capsys):
    args = ("--img-size", "32", "16", "8", "--patch-size", "16", "16", "4", "--hidden-size", "32")
    assert run(monkeypatch, "summary", *args, "--depth", "1") == 0
    assert "float32[1,32,16,8,4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--norm", "instance"), "--norm: only with a PyTorch file"),
        (("--norm-groups", "0"), "--norm-groups: only with a PyTorch file"),
        (("--ignore", "loss.*"), "--ignore: only with a PyTorch file"),
        (("--dropout-rate", "2"), "dropout_rate"),
    ],
)
def test_summary_takes_no_option_that_it_does_not_use(monkeypatch, capsys, args, message):
    assert run(monkeypatch, "summary", *args) == 2
    assert message in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_ends_the_command_silently(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    # Closing it would fail as well.
    output = os.fdopen(writing, "w", buffering=1, closefd=False)
    monkeypatch.setattr(sys, "stdout", output)
    assert run(monkeypatch, "summary", "--depth", "1") == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
    os.close(writing)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n  xx"),
        MemoryError("Unable to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_one_line_and_status_2(monkeypatch, capsys, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(summary, "summary", fail)
    assert run(monkeypatch, "summary") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"unetr: memory ran out: {str(error).splitlines()[0]}")
    assert printed.count("\n") == 1


def test_an_error_of_the_program_shows_where_it_is(monkeypatch):
    def fail() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(summary, "summary", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run(monkeypatch, "summary")


@pytest.mark.parametrize("args", [("--img-size", "10"), ("--num-heads", "7"), ("--light-r", "3")])
def test_a_model_that_cannot_be_is_one_line_and_status_2(monkeypatch, capsys, args):
    assert run(monkeypatch, "summary", *args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("unetr: ")
    assert printed.err.count("\n") == 1
