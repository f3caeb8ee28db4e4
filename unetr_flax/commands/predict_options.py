"""The options of `unetr predict`."""

import dataclasses
from typing import Literal

# The usual share of neighboring windows, and that of --fast.
OVERLAP, FAST_OVERLAP = 0.5, 0.25


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How scans are read."""

    preprocessing: str | None = None
    """btcv, spleen, hippocampus or a JSON file: what is done to a scan before the model. A model
    folder tells this itself; PyTorch files do not."""

    allow_nan: bool = False
    """Take voxels that are NaN for the lowest intensity, instead of refusing the scan."""

    part: str | None = None
    """I/N: do only the I-th of N parts of the cases, for N processes on any number of machines.
    Taken from SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX where these are set and there are several
    cases."""


@dataclasses.dataclass(frozen=True)
class Computation:
    """How the model is applied."""

    regions: tuple[str, ...] | None = None
    """Name of each output, if outputs are sigmoids of regions and not classes: TC WT ET for 4D
    masks, or with the class ids that each has, TC=1,3 WT=1,2,3 ET=3. A folder of a model that was
    trained on regions tells this itself; PyTorch files do not."""

    overlap: float = OVERLAP
    """Fraction of a window that neighbors share, in [0, 1)."""

    flips: tuple[int, ...] = ()
    """Axes (0, 1, 2: right, anterior, superior) along which windows are flipped, all combinations
    averaged. Only those along which training flipped help; others are refused where the model's
    folder tells."""

    fast: bool = False
    """Larger steps of the window (overlap 0.25), and no averaging: neither flips nor more than the
    first model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation."""

    device: str | None = None
    """cpu, gpu or tpu, or one of them such as gpu:0; all accelerators if not given."""

    ray: str | None = None
    """local, or the address of a Ray cluster: a worker per GPU, or per node without GPUs, shares
    the cases; those of a worker that is lost are done again. Needs the extra ray."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written beside each label map, and how it is changed before."""

    probabilities: bool = False
    """CASE.probabilities.nii.gz: the probability of each class, 4D."""

    statistics: bool = False
    """CASE.statistics.json: volume, intensities and place of each label; a single case is also
    printed as a table."""

    preview: bool = False
    """CASE.png: three planes through the largest cross-section, with labels and legend."""

    html: bool = False
    """CASE.html: a page to scroll through scan and labels, which needs no network."""

    keep_largest: tuple[str, ...] | None = None
    """Keep only the largest connected part of each of these labels (names or ids), or of all labels
    if none is named."""

    fill_holes: bool = False
    """Give a label the background that it encloses."""

    roi_subset: tuple[str, ...] | None = None
    """Labels (names or ids) to write; all others become background."""

    overwrite: bool = False
    """Replace label maps that are there; without this they are skipped."""

    quiet: bool = False
    """Print nothing but errors."""

    json: bool = False
    """Print one JSON object with the outcome of all cases, instead of text."""
