"""The cases of a benchmark, each a model and an input shape, and the sides that compute them."""

import dataclasses
import os

from unetr_flax import UNETRConfig

# The sides of a race, and a description of each.
SIDES = {
    "ours": "this project",
    "ours-remat": "this project, activations of each block computed again in the backward pass",
    "naive": "the same model by plain definitions, in XLA's own convolutions and deconvolutions",
    "torch": "PyTorch, eager",
    "torch-channels-last": "PyTorch, eager, channels_last_3d",
    "torch-compile": "PyTorch, torch.compile, channels_last_3d",
}
FAMILIES = ("reference", "monai")

# The default shapes for a GPU: edge and batch.
GPU_SHAPES = ((96, 1), (96, 2), (96, 8), (128, 1), (224, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and an input shape.

    Attributes:
      family: "reference" (light_r=4) or "monai" (its defaults).
      edge: voxels per axis.
      batch: volumes.
      dtype: "float32" or "bfloat16"; parameters, norms and loss stay float32.
    """

    family: str
    edge: int
    batch: int
    dtype: str

    @property
    def cfg(self) -> UNETRConfig:
        """The model's configuration: 12 layers, width 768, one channel to four."""
        make = {"reference": UNETRConfig.reference, "monai": UNETRConfig.monai}[self.family]
        return make((self.edge,) * 3, 1, 4)

    def __str__(self) -> str:
        return f"{self.family}, {self.edge}^3, batch {self.batch}, {self.dtype}"


def environment(side: str) -> dict[str, str]:
    """Makes the environment of a worker: JAX takes GPU memory as needed, or none beside PyTorch."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if side.startswith("torch"):
        own["JAX_PLATFORMS"] = "cpu"
    return {**os.environ, **own}
