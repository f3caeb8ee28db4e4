"""The report as one HTML page, to be read or printed without anything else."""

import html
from collections.abc import Sequence
from string import Template

from parity_tests.report import (
    RATIO_HEADER,
    SUMMARY_HEADER,
    Lines,
    Report,
    as_svg,
    details,
    metric,
    plot,
    ratio_lines,
    settings,
    summary,
)

# Columns of words; all others are figures.
WORDS = ("what", "dtype", "where", "shape", "holds")

STYLE = """
:root { --ink: #1c2330; --soft: #5c6675; --line: #dde2e9; --good: #0b6b3a; --bad: #a81c1c; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
       max-width: 1060px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 48rem; }
.verdict { border-left: 6px solid; padding: .7rem 1rem; font-size: 1.15rem; font-weight: 600; }
.good { border-color: var(--good); color: var(--good); background: #eef8f2; }
.bad { border-color: var(--bad); color: var(--bad); background: #fdf0f0; }
.soft { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: .25rem .6rem .25rem 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
.figure { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.name, code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em;
              overflow-wrap: anywhere; }
tr.bad td { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .88rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; }
svg { width: 100%; height: auto; }
@media print {
  body { font-size: 10.5px; padding: 0; max-width: none; }
  tr, svg, .verdict, dl { break-inside: avoid; }
  thead { display: table-header-group; }
  .verdict { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parity of the Flax UNETR with PyTorch</title>
<style>$style</style>
</head>
<body>
<h1>Parity of the Flax UNETR with PyTorch</h1>
<div class="verdict $kind">$verdict</div>
<p class="soft">$versions</p>
$sections
</body>
</html>
""")


def page(report: Report) -> str:
    """Writes the page; the same report gives the same text."""
    sections = [_lines("Differences", _failures(report)), _lines("Why it differs", report.why)]
    sections.append(_lines("Left out", report.left_out))
    sections.append(
        _section(
            "Numbers",
            _paragraph(
                f"{metric(report.rows)} In float64 it must be rounding, in float32 the products "
                "have the highest precision."
            )
            + _table(SUMMARY_HEADER, summary(report.rows)),
        )
        if report.rows
        else ""
    )
    if report.ratios:
        text = (
            "Errors against float64, ||a - exact|| / ||exact||, of the Flax model and of PyTorch "
            "with autocast, both with parameters in float32: means over several images, and for "
            "gradients over the parameters of a part."
        )
        table = _table(RATIO_HEADER, ratio_lines(report.ratios))
        sections.append(_section("Half precision", _paragraph(text) + table))
    if (figure := plot(report.rows)) is not None:
        sections.append(_section("Error by depth", as_svg(figure)))
    sections.append(_section("Models and inputs", _models(report)))
    if report.rows:
        tables = "".join(
            f"<details><summary>{html.escape(rung)} ({len(lines)})</summary>"
            f"{_table(header, lines)}</details>\n"
            for rung, (header, lines) in details(report.rows).items()
        )
        sections.append(_section("Every comparison", tables))
    return PAGE.substitute(
        style=STYLE,
        kind="bad" if report.status else "good",
        verdict=html.escape(report.verdict),
        versions=html.escape(report.versions),
        sections="\n".join(filter(None, sections)),
    )


def _failures(report: Report, most: int = 20) -> list[str]:
    lines = [f"{row.rung}: {row.name}, {row.dtype}" for row in report.failed]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return lines[:most] + more


def _models(report: Report) -> str:
    blocks = []
    for model in report.models:
        facts = {
            "model": model.name,
            "weights": model.weights,
            "configuration": settings(model.cfg),
            "SHA-256 of weights": model.weights_sha256,
            "SHA-256 of image": model.image_sha256,
        }
        items = "".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
            for key, value in facts.items()
        )
        blocks.append(f"<dl>{items}</dl>")
    return "".join(blocks)


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}"


def _lines(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return _section(title, f"<ul>{items}</ul>")


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n"


def _table(header: tuple[str, ...], lines: Lines) -> str:
    classes = ["" if name in WORDS else ' class="figure"' for name in header]
    if "where" in header:
        classes[header.index("where")] = ' class="name"'
    heads = "".join(
        f"<th{kind if 'figure' in kind else ''}>{html.escape(name)}</th>"
        for name, kind in zip(header, classes, strict=True)
    )
    body = []
    for line in lines:
        cells = "".join(
            f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(line, classes, strict=True)
        )
        body.append(f"<tr{' class=bad' if line[-1] == 'NO' else ''}>{cells}</tr>")
    return (
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>" + "\n".join(body) + "</tbody></table>\n"
    )
