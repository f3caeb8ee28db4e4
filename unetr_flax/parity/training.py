"""Diagnosis of training: which part of a step differs, and why."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unetr_flax.parity.diagnose import SIDES, Finding, explain_sites
from unetr_flax.parity.sites import Site

Named = Mapping[str, np.ndarray]


def explain_loss(
    logits: np.ndarray,
    labels: np.ndarray,
    ours: tuple[np.ndarray, np.ndarray],
    theirs: tuple[np.ndarray, np.ndarray],
    *,
    right: Mapping[str, Any] | None = None,
    sides: tuple[str, str] = SIDES,
) -> list[Finding]:
    """Explains the difference of two losses of Dice and cross-entropy on the same logits.

    Args:
      logits: [B, K, *spatial].
      labels: [B, *spatial], integers.
      ours: a loss, and its gradient by the logits.
      theirs: the other one.
      right: settings of `causes.training.loss` that both should have.
      sides: names of the two.
    """
    own, other = (np.concatenate([np.reshape(v, 1), np.ravel(g)]) for v, g in (ours, theirs))
    arrays = {"logits": logits, "labels": labels}
    site = Site("loss", "with its gradient", "loss", arrays, right or {}, own, other)
    return explain_sites([site], other.dtype.name, sides)


def explain_gradients(
    ours: Named,
    theirs: Named,
    *,
    negligible: float = 0.0,
    sides: tuple[str, str] = SIDES,
) -> list[Finding]:
    """Explains the difference of two gradients of the same loss.

    A gradient that differs by a factor, is zero or lies in another order is told as such; the
    names are those of parameters, the last ones first, as a backward pass reaches them.

    Args:
      ours: gradients by name.
      theirs: the others.
      negligible: gradients of this size or smaller are rounding and left out.
      sides: names of the two.
    """
    sites = [
        Site(name, "gradient", "gradient", {"x": theirs[name]}, {}, ours[name], theirs[name])
        for name in reversed(list(theirs))
        # Negated, as nan is not negligible.
        if not max(np.abs(g[name]).max() for g in (ours, theirs)) <= negligible
    ]
    return explain_sites(sites, next(iter(theirs.values())).dtype.name, sides)


def explain_step(
    optimizer: str,
    before: Named,
    gradients: Named,
    ours: Named,
    theirs: Named,
    *,
    right: Mapping[str, Any],
    moments: tuple[Mapping[str, Named], Mapping[str, Named]] = ({}, {}),
    norm: float | None = None,
    sides: tuple[str, str] = SIDES,
) -> list[Finding]:
    """Explains the difference of two optimizer steps from the same parameters and gradients.

    They are judged in float64: in float32 a step is lost in the rounding of the parameter.

    Args:
      optimizer: "adam" or "sgd".
      before: parameters before the step, by name.
      gradients: their gradients.
      ours: parameters after one's step.
      theirs: parameters after the other's.
      right: settings of `causes.training.adam_step` or `sgd_step` that both should have;
        "learning_rates" are those of the schedule, and "count" is the number of steps before, 0 if
        it is not given.
      moments: one's and the other's averages before the step, by their names ("first" and "second"
        of adam, "velocity" of sgd) and by those of parameters; needed if there were steps before.
      norm: global norm by which gradients are clipped; that of `gradients` if None.
      sides: names of the two.

    Raises:
      ValueError: if a parameter is not float64.
    """
    for name, value in ((n, v) for side in (before, ours, theirs) for n, v in side.items()):
        if value.dtype != np.float64:
            raise ValueError(f"{name}: {value.dtype}, must be float64")
    if norm is None:
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    sites = [
        Site(
            name,
            "optimizer step",
            f"{optimizer}_step",
            {
                "parameter": before[name],
                "gradient": gradient,
                "norm": np.asarray(norm),
                **{kind: of[name] for kind, of in moments[1].items()},
            },
            right,
            ours[name] - before[name],
            theirs[name] - before[name],
            own={kind: of[name] for kind, of in moments[0].items()},
        )
        for name, gradient in gradients.items()
    ]
    return explain_sites(sites, "float64", sides)


def explain_average(
    before: Named,
    parameters: Named,
    ours: Named,
    theirs: Named,
    *,
    right: Mapping[str, Any],
    sides: tuple[str, str] = SIDES,
) -> list[Finding]:
    """Explains the difference of two moving averages of weights after the same step.

    Args:
      before: the averages before the step, by name.
      parameters: the parameters after it.
      ours: one's averages after it.
      theirs: the other's.
      right: settings of `causes.training.average_step` that both should have.
      sides: names of the two.
    """
    sites = [
        Site(
            name,
            "moving average",
            "average_step",
            {"average": average, "parameter": parameters[name]},
            right,
            ours[name] - average,
            theirs[name] - average,
        )
        for name, average in before.items()
    ]
    return explain_sites(sites, "float64", sides)
