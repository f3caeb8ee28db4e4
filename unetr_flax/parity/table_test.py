import dataclasses
import io
import math

import numpy as np
from rich.console import Console

from unetr_flax.parity.rows import compare_arrays
from unetr_flax.parity.table import lines, print_table


def row(rung, name, relative, dtype="float64"):
    found = compare_arrays(rung, name, np.ones((2, 3), dtype), np.ones((2, 3), dtype))
    return dataclasses.replace(found, relative=relative, ulps=relative / 2e-16)


ROWS = [
    row("activations", "vit.patch_embedding", 1e-15),
    row("activations", "vit.blocks.0.norm1", 2e-15),
    row("activations", "vit.blocks.0.attn", 4e-15),
    row("activations", "vit.blocks.0.attn", 3e-6, "float32"),
    row("activations", "vit.blocks.11.attn", 1e-9),
    row("activations", "encoder2.blocks.0.0.conv", math.nan),
    row("activations", "encoder2.blocks.0.1", 1e-15),
    row("activations, volume", "vit.blocks.0.attn", 1e-15),
    row("skip features", "z4", 1e-15),
    row("skip features", "z7", 2e-15),
    row("logits", "logits", 1e-15),
]


def test_one_line_per_block_with_its_worst():
    assert lines(ROWS) == [
        ("vit.patch_embedding", "1", "1.0e-15", "5", "", "", "yes"),
        ("vit.blocks.0", "3", "4.0e-15", "20", "3.0e-06", "15000000000", "yes"),
        ("vit.blocks.11", "1", "1.0e-09", "5000000", "", "", "NO"),
        ("encoder2", "2", "nan", "nan", "", "", "NO"),
        ("vit.blocks.0, volume", "1", "1.0e-15", "5", "", "", "yes"),
        ("skip features", "2", "2.0e-15", "10", "", "", "yes"),
        ("logits", "1", "1.0e-15", "5", "", "", "yes"),
    ]


def test_last_line_counts_what_is_within_tolerance():
    out = io.StringIO()
    print_table(ROWS, Console(file=out, width=100))
    text = out.getvalue().rstrip().splitlines()
    assert text[-1] == "9 of 11 comparisons within tolerance"
    assert any("float64" in line and "float32" in line for line in text)
    assert any("<= 1e-10" in line and "<= 1e-05" in line for line in text)
    assert sum("NO" in line for line in text) == 2
