"""Writes and reads checkpoints with the version of MONAI that is importable.

Run by `parity_tests.monai_versions` with that version's folder on the path, so it imports nothing
of this project.

  monai_writer.py write FOLDER CASES.json   for each case CASE.pt: weights, image and logits
  monai_writer.py read FOLDER CASES.json    loads CASE.back.pt, strictly, and compares its logits

Both print a JSON object: the error of each case that failed, by name.
"""

import inspect
import json
import sys
import warnings
from pathlib import Path


def make_unetr(values):
    """Builds MONAI's UNETR in float64; raises TypeError for options that this version lacks."""
    from monai.networks.nets import UNETR

    parameters = inspect.signature(UNETR.__init__).parameters
    values = dict(values)
    # MONAI 1.3 gave the option its new name.
    if "proj_type" in values and "proj_type" not in parameters:
        values["pos_embed"] = values.pop("proj_type")
    if values.get("spatial_dims") == 3 and "spatial_dims" not in parameters:
        del values["spatial_dims"]
    unknown = values.keys() - parameters.keys()
    if unknown:
        raise TypeError(f"no {', '.join(sorted(unknown))}")
    return UNETR(**values).double().eval()


def write(values, path, seed):
    """Writes a randomized model's weights, an image [2, C, ...], and its logits."""
    import torch

    torch.manual_seed(seed)
    model = make_unetr(values)
    state_dict = model.state_dict()
    with torch.no_grad():
        for key, value in state_dict.items():
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape))
            if key.endswith("running_var"):
                value.abs_()
        image = torch.randn((2, values["in_channels"], *values["img_size"])).double()
        logits = model(image)
    torch.save({"state_dict": state_dict, "epoch": 3}, path.with_suffix(".pt"))
    torch.save({"image": image, "logits": logits}, path.with_suffix(".outputs.pt"))


def read(values, path, seed):
    """Loads what was converted back, with every key, and compares the logits."""
    import torch

    torch.manual_seed(seed + 1)
    model = make_unetr(values)
    outputs = torch.load(path.with_suffix(".outputs.pt"), weights_only=True)
    model.load_state_dict(torch.load(path.with_suffix(".back.pt"), weights_only=True))
    with torch.no_grad():
        logits = model.double()(outputs["image"])
    error = (logits - outputs["logits"]).abs().max() / outputs["logits"].abs().max()
    if not error <= 1e-12:
        raise ValueError(f"logits after the way back differ by {error:.1e}")


def main():
    """Runs one action for all cases."""
    warnings.simplefilter("ignore")
    action = {"write": write, "read": read}[sys.argv[1]]
    folder = Path(sys.argv[2])
    failed = {}
    for seed, (name, values) in enumerate(json.loads(Path(sys.argv[3]).read_text()).items()):
        try:
            action(values, folder / name, seed)
        except Exception as error:  # whatever a version raises is the result
            failed[name] = str(error).splitlines()[0] or type(error).__name__
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
