"""The versions of JAX that are sure to load an exported program.

JAX promises that a program of `jax.export` runs with every JAX that was built up to six months
after, or three weeks before, the jaxlib that wrote it
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

import datetime

MONTHS_NEWER = 6
WEEKS_OLDER = 3

# The days on which the wheels of jaxlib were built.
BUILT = {
    "0.10.0": datetime.date(2026, 4, 16),
    "0.10.1": datetime.date(2026, 5, 18),
    "0.11.1": datetime.date(2026, 8, 17),
    "0.11.2": datetime.date(2026, 9, 17),
    "0.12.0": datetime.date(2026, 10, 16),
    "0.12.0.1": datetime.date(2026, 10, 20),
}


def sure_to_load(jaxlib: str, today: datetime.date) -> dict[str, str]:
    """Tells which versions of JAX are sure to load a program that is written today.

    Args:
      jaxlib: version of jaxlib.
      today: the day of writing, from which the time counts if the day on which this jaxlib was
        built is not known.

    Returns:
      "jax_built_from" and "jax_built_until", the first and the last day; and "counted_from", the
      day that they were computed from and what happened on it.
    """
    built = BUILT.get(jaxlib)
    if built is None:
        start, event = today, f"writing; when jaxlib {jaxlib} was built is not known"
    else:
        start, event = built, f"building of jaxlib {jaxlib}"
    return {
        "jax_built_from": str(start - datetime.timedelta(weeks=WEEKS_OLDER)),
        "jax_built_until": str(_months_later(start, MONTHS_NEWER)),
        "counted_from": f"{start}, {event}",
    }


def _months_later(day: datetime.date, months: int) -> datetime.date:
    """Adds months; the day of the month is at most 28, so that it is there in every month."""
    years, month = divmod(day.month - 1 + months, 12)
    return datetime.date(day.year + years, month + 1, min(day.day, 28))
