"""The confusion table of causes: errors planted in either model, against the causes named."""

import copy
import dataclasses
from collections.abc import Iterator

import jax

from parity_tests import configs
from parity_tests.gradients import backward_findings
from parity_tests.ladder import random_mask
from parity_tests.planted_errors import PLANTED_ERRORS, PlantedError
from parity_tests.torch_errors import TORCH_ERRORS, TorchError
from parity_tests.trajectory import TRAININGS, Training, name_of_rung, trajectory_findings
from parity_tests.volume_to_score import loss_findings
from unetr_flax import UNETRConfig
from unetr_flax.parity.diagnose import Finding, diagnose, told
from unetr_flax.parity.rows import Row
from unetr_flax.parity.twins import Twins, make_twins, precise
from unetr_flax.parity.verify import summed_up

# Words of the cause that is to be named for each error planted in the Flax model.
NAMED = {
    "deconvolution kernel not flipped": "kernel flipped",
    "convolution kernel with two spatial axes exchanged": "spatial axes in the order (1, 0, 2)",
    "qkv split as (qkv h d)": "q, k and v split as (qkv h d) instead of (h d qkv)",
    "qkv split as (d h qkv)": "q, k and v split as (d h qkv) instead of (h d qkv)",
    "heads joined as (d h)": "heads joined as (d h)",
    "attention scaled by the head's size": "attention scaled by the head's width instead of",
    "attention scaled after the softmax": "attention scaled after the softmax",
    "GELU by tanh": "GELU by tanh instead of the exact GELU",
    "LayerNorm epsilon 1e-6": "epsilon 1e-06 instead of 1e-05",
    "BatchNorm epsilon 1e-6": "epsilon 1e-06 instead of 1e-05",
    "ReLU leaks": "LeakyReLU of slope 0.01 instead of ReLU",
    "patches in another order": "tokens and positions in the order of the grid's axes (1, 0, 2)",
    "skip features in reverse order": "the feature after block 1 instead of 3",
    "last skip feature one block early": "the feature after block 4 instead of 5",
    "norm after the last block": "a norm without parameters",
    "concatenated in the other order": "up-sampled features before the skip",
    "mask ignored": "mask ignored",
    "mask inverted": "mask inverted",
    "running variance biased": "the biased variance in the running one",
    "BatchNorm momentum 0.01": "momentum 0.01 instead of 0.1",
    "running statistics used in training": "the running statistics (evaluation mode) instead of",
    "weight decay through Adam's moments": "weight decay added to the gradient (not decoupled)",
}

# Rungs of one forward pass, and of one step in training mode.
FORWARD = {"activations", "skip features", "attention maps", "decoder stages", "logits"}
TRAINING = {"gradients, training mode", "running statistics"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
      side: the model that has the error, "Flax" or "PyTorch".
      planted: the error in words.
      named: the causes that were named, or what was said in their place, with their modules.
      right: whether that is the planted one, in all its places and with nothing else.
    """

    side: str
    planted: str
    named: str
    right: bool


def flax_findings(error: PlantedError) -> list[Finding]:
    """Plants an error in the Flax model and returns what the diagnosis finds."""
    # Programs traced before do not have the error.
    jax.clear_caches()
    try:
        with precise(), error.plant():
            twins = make_twins(configs.SMALL, "float64")
            if error.rung == "trajectory":
                return training_findings(twins, TRAININGS[0])
            mask = random_mask(twins) if error.rung == "masked activations" else None
            return diagnose(twins, mask, train=error.rung == "training")
    finally:
        jax.clear_caches()


def torch_findings(error: TorchError, twins: Twins | None = None) -> list[Finding]:
    """Plants an error in a copy of the PyTorch model and returns what the diagnosis finds.

    Args:
      error: the error.
      twins: twins of its configuration, to share; made anew if None.
    """
    with precise():
        twins = twins or make_twins(error.cfg, "float64")
        twins = dataclasses.replace(twins, torch_model=copy.deepcopy(twins.torch_model))
        error.plant(twins.torch_model)
        return diagnose(twins, random_mask(twins) if error.masked else None)


def training_findings(twins: Twins, training: Training | None = None) -> list[Finding]:
    """Explains a difference in training mode: forward, then backward, then of optimizer steps.

    Args:
      twins: both models.
      training: how steps are taken; None if the difference is one of gradients or statistics.
    """
    findings = diagnose(twins, train=True) or backward_findings(twins, train=True)
    return findings or ([] if training is None else trajectory_findings(twins, training))


def explain_rows(rows: list[Row], twins: dict[str, Twins]) -> list[str]:
    """Finds out why comparisons of the ladder do not hold, and puts that into lines.

    Args:
      rows: all comparisons.
      twins: both models by dtype, and under "tiny" those that trained.
    """
    failed = [row for row in rows if not row.ok]
    if not failed:
        return []
    # Float64 shows causes that float32's rounding would hide.
    dtype = "float64" if any(row.dtype == "float64" for row in failed) else "float32"
    rungs = {row.rung for row in failed if row.dtype == dtype}
    parted = [training for training in TRAININGS if name_of_rung(training) in rungs]
    with precise():
        if rungs & FORWARD:
            findings = diagnose(twins[dtype])
        elif any(rung.endswith(", masked") for rung in rungs):
            findings = diagnose(twins[dtype], random_mask(twins[dtype]))
        elif rungs & TRAINING:
            findings = training_findings(twins[dtype])
        elif "gradients" in rungs:
            findings = diagnose(twins[dtype]) or backward_findings(twins[dtype], train=False)
        elif "loss" in rungs:
            findings = loss_findings(twins["small"])
        elif parted:
            findings = training_findings(twins["tiny"], parted[0])
        else:
            return [f"{', '.join(sorted(rungs))}: causes are not looked for in this comparison"]
    return told(findings) or [summed_up(rows)]


def flax_case(error: PlantedError) -> Case:
    """Makes the line of an error in the Flax model."""
    findings = flax_findings(error)
    first = str(findings[0]) if findings else ""
    right = NAMED[error.name] in first and " in Flax" in first
    return Case("Flax", error.name, _named(findings), right)


def torch_case(error: TorchError, twins: Twins | None = None) -> Case:
    """Makes the line of an error in the PyTorch model."""
    findings = torch_findings(error, twins)
    return Case("PyTorch", error.name, _named(findings), error.is_named(findings))


def healthy_case(name: str, cfg: UNETRConfig) -> Case:
    """Makes the line of two models that agree."""
    with precise():
        findings = diagnose(make_twins(cfg, "float64"))
    return Case("neither", f"nothing ({name})", _named(findings), not findings)


def cases() -> Iterator[Case]:
    """Yields the lines of all planted errors."""
    for error in PLANTED_ERRORS:
        yield flax_case(error)
    with precise():
        twins = {error.cfg: make_twins(error.cfg, "float64") for error in TORCH_ERRORS}
    for error in TORCH_ERRORS:
        yield torch_case(error, twins[error.cfg])


def healthy_configs() -> dict[str, UNETRConfig]:
    """Returns 30 configurations or more of all families, on which nothing may be accused."""
    from parity_tests import monai_configs

    monai = {name: UNETRConfig.monai(**values) for name, values in monai_configs.ALL.items()}
    return {**configs.ALL, "tamasino52": configs.TAMASINO52, **monai}


def print_table(healthy: bool) -> int:
    """Prints the table in Markdown, line by line; returns 1 if a cause is named wrongly.

    Args:
      healthy: whether models that agree are diagnosed, too.
    """
    print("| side | planted | named | right |\n| --- | --- | --- | --- |")
    counts = [0, 0]

    def add(case: Case) -> None:
        counts[0] += case.right
        counts[1] += 1
        right = "yes" if case.right else "NO"
        print(f"| {case.side} | {case.planted} | {case.named} | {right} |", flush=True)

    for case in cases():
        add(case)
    if healthy:
        for name, cfg in healthy_configs().items():
            add(healthy_case(name, cfg))
    print(f"\n{counts[0]} of {counts[1]} right")
    return 0 if counts[0] == counts[1] else 1


def _named(findings: list[Finding]) -> str:
    """Puts each cause that was named, with the first module that has it, into the table's form."""
    modules: dict[str, list[str]] = {}
    for finding in findings:
        cause = finding.cause or f"no known cause ({finding.numbers.partition(';')[0]})"
        modules.setdefault(cause, []).append(finding.name)
    lines = [
        f"`{names[0]}`{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {cause}"
        for cause, names in modules.items()
    ]
    return "; ".join(lines) or "nothing"
