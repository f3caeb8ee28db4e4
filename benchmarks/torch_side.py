"""The PyTorch sides of a race."""

from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from parity_tests.torch_loss import dice_cross_entropy
from unetr_flax.parity.torch_models import torch_model_of
from unetr_flax.parity.twins import channels_first_tensor


class TorchSide:
    """Runs forward passes and training steps of one model.

    Args:
      case: the model and its input.
      state_dict: the weights.
      image: image [B, *img_size, C].
      labels: class of each voxel, [B, *img_size].
      learning_rate: learning rate of AdamW.
      channels_last: whether weights and images lie channels last in memory.
      compile: whether torch.compile compiles the model.
    """

    def __init__(
        self,
        case: Case,
        state_dict: dict[str, Any],
        image: np.ndarray,
        labels: np.ndarray,
        learning_rate: float,
        *,
        channels_last: bool = False,
        compile: bool = False,
    ):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = "gpu" if self._device == "cuda" else "cpu"
        if self._device == "cuda":
            # XLA does the same: it picks convolutions by trying, and may use TF32 for float32.
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        model = torch_model_of(case.cfg)
        model.load_state_dict(state_dict)
        self._module = model.to(self._device, memory_format=layout)
        self._model = torch.compile(self._module) if compile else self._module
        self._image = channels_first_tensor(image).to(self._device, memory_format=layout)
        self._labels = torch.from_numpy(labels).long().to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._module.parameters(), lr=learning_rate, weight_decay=1e-4
        )
        self._autocast = case.dtype == "bfloat16"

    def forward(self) -> torch.Tensor:
        """Computes logits [B, K, *img_size] in evaluation mode; they stay on the device."""
        self._module.eval()
        with torch.no_grad():
            logits = self._run()
        self._wait()
        return logits

    def step(self) -> float:
        """Takes a training step and returns its loss."""
        self._module.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = dice_cross_entropy(self._run().float(), self._labels)
        loss.backward()
        self._optimizer.step()
        # The loss is known before the parameters are updated, so the step must be waited for.
        self._wait()
        return float(loss.detach())

    def to_host(self, logits: torch.Tensor) -> np.ndarray:
        """Copies logits of `forward` to the host, channels last, as float32."""
        return np.moveaxis(logits.float().cpu().numpy(), 1, -1)

    def cost(self, what: str) -> None:
        """Returns None: PyTorch has no figures."""

    def peak_of_step(self) -> int | None:
        """Takes a step and returns the accelerator's peak of bytes in use; None on CPU."""
        if self._device == "cpu":
            self.step()
            return None
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _run(self) -> torch.Tensor:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            return self._model(self._image)
