"""The process of one side of the race of whole predictions: a scan's file to a label map's file.

It runs once, from the start of Python to the written file, and prints one line of JSON at the end.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.stages import Stages

# Stages in the order of the reports.
READ, PREPROCESS, NETWORK = "read", "preprocess", "network"
SUMS, RESTORE, WRITE = "add up windows", "labels on the scan's grid", "write"
LOAD, COMPILER = "load the model", "wait for the compiler"
STAGES = (LOAD, READ, PREPROCESS, COMPILER, NETWORK, SUMS, RESTORE, WRITE)

ROI = (96, 96, 96)


def main() -> int:
    """Segments the scans and prints seconds by stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "sliding", "monai"))
    parser.add_argument("model", type=Path)
    parser.add_argument("scan", type=Path, help="a file, for ours also a folder of files")
    parser.add_argument("out", type=Path, help="folder for label maps")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time, monai's only")
    options = parser.parse_args()
    # As the command does, which imports JAX later.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stages = Stages()
    if options.side == "ours":
        status, more = run_ours(stages, options.model, options.scan, options.out)
    elif options.side == "sliding":
        status, more = run_sliding_window(stages, options.model)
    else:
        status, more = run_monai(stages, options.model, options.scan, options.out, options.batch)
    windows = stages.calls[NETWORK]
    answer = {
        "seconds": dict(stages.seconds),
        "first_window": windows[0],
        "windows": len(windows),
        "written": stages.calls[WRITE],
        **more,
    }
    print(json.dumps(answer))
    return status


def run_ours(stages: Stages, model: Path, scan: Path, out: Path) -> tuple[int, dict[str, Any]]:
    """Runs `unetr predict`, whose own functions are measured.

    Returns:
      The exit status; and at which times programs were compiled, since the last case must need
      none.
    """
    with stages.stage(LOAD):
        import jax

        from unetr_flax import cli
        from unetr_flax.commands import models
        from unetr_flax.imaging.file_grid import FileGrid
        from unetr_flax.imaging.preprocessing import Preprocessing
        from unetr_flax.imaging.restore import Restorer
        from unetr_flax.inference import pipeline
        from unetr_flax.inference.accumulators import HostAccumulator
        from unetr_flax.inference.predictor import Predictor
        from unetr_flax.runtime import aot

    compiled = threading.Event()
    programs: list[float] = []

    def is_compiled(program: Any) -> Any:
        compiled.set()
        return program

    def count(event: str, duration: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(time.perf_counter())

    jax.monitoring.register_event_duration_secs_listener(count)
    predict = Predictor.__call__

    def predict_when_compiled(self: Predictor, windows: Any) -> Any:
        if not compiled.is_set():
            with stages.stage(COMPILER):
                compiled.wait()
        return predict(self, windows)

    Predictor.__call__ = predict_when_compiled
    stages.measure(models, "load_model", LOAD)
    stages.measure(aot, "aot_compile", "compile", is_compiled)
    stages.measure(pipeline, "read_scan", READ)
    stages.measure(Preprocessing, "apply", PREPROCESS)
    stages.measure(Predictor, "__call__", NETWORK, jax.block_until_ready)
    for name in ("add", "means", "advance"):
        stages.measure(HostAccumulator, name, SUMS)
    stages.measure(Restorer, "add", RESTORE)
    stages.measure(FileGrid, "write_labels", WRITE)
    sys.argv = ["unetr", "predict", str(model), str(scan), str(out), "--quiet", "--overwrite"]
    return cli.main(), {"programs": programs}


def run_sliding_window(stages: Stages, model: Path) -> tuple[int, dict[str, Any]]:
    """Runs `sliding_window_inference` by itself; all but the network counts as adding up."""
    import jax
    import numpy as np

    from unetr_flax import sliding_window_inference
    from unetr_flax.inference.predictor import Predictor, Weights
    from unetr_flax.weights import load_pretrained

    predictor = Predictor([Weights(*load_pretrained(model))])
    volume = np.random.default_rng(0).random((1, 144, 144, 144, 1), np.float32)
    jax.block_until_ready(predictor(volume[:, :96, :96, :96]))
    stages.measure(Predictor, "__call__", NETWORK, jax.block_until_ready)
    with stages.stage(SUMS):
        sliding_window_inference(
            volume, ROI, predictor, overlap=0.5, mode="gaussian", batch_size=predictor.batch_size
        )
    return 0, {}


def run_monai(
    stages: Stages, model: Path, scan: Path, out: Path, batch: int
) -> tuple[int, dict[str, Any]]:
    """Does the same as MONAI's tutorials do, with the transforms of the preprocessing "spleen"."""
    with stages.stage(LOAD):
        import torch
        from monai import transforms as T
        from monai.data.utils import decollate_batch, list_data_collate
        from monai.inferers import SlidingWindowInferer
        from monai.networks.nets.unetr import UNETR

        net: Any = UNETR(in_channels=1, out_channels=2, img_size=ROI).eval()
        net.load_state_dict(torch.load(model, weights_only=True))
    prepare = T.Compose(
        [
            T.EnsureChannelFirstd("image"),
            T.Orientationd("image", axcodes="RAS", labels=None),
            T.Spacingd("image", pixdim=(1.5, 1.5, 2.0), mode="bilinear"),
            T.ScaleIntensityRanged("image", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
            T.CropForegroundd("image", source_key="image", allow_smaller=True),
        ]
    )
    restore = T.Compose(
        [
            T.Invertd("labels", prepare, orig_keys="image", nearest_interp=False, to_tensor=True),
            T.AsDiscreted("labels", argmax=True),
        ]
    )
    write = T.SaveImaged(
        "labels",
        output_dir=out,
        output_postfix="",
        output_dtype="uint8",
        separate_folder=False,
        resample=False,
        print_log=False,
    )
    inferer = SlidingWindowInferer(ROI, sw_batch_size=batch, overlap=0.5, mode="gaussian")

    def network(windows: Any) -> Any:
        with stages.stage(NETWORK):
            return net(windows)

    with torch.no_grad():
        with stages.stage(READ):
            data: Any = T.LoadImaged("image")({"image": str(scan)})
        with stages.stage(PREPROCESS):
            # A batch of one, as a data loader makes it.
            data = list_data_collate([prepare(data)])
        with stages.stage(SUMS):
            data["labels"] = inferer(data["image"], network)
        with stages.stage(RESTORE):
            (data,) = [restore(item) for item in decollate_batch(data)]
        with stages.stage(WRITE):
            write(data)
    return 0, {}


if __name__ == "__main__":
    sys.exit(main())
