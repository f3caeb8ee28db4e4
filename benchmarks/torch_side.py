"""The sides of a race that are PyTorch's."""

from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from parity_tests.torch_loss import dice_cross_entropy
from unetr_flax.parity.originals import pytorch_original
from unetr_flax.parity.twins import to_tensor


class TorchSide:
    """Forward passes and training steps of one model.

    Args:
      case: which model and input.
      state_dict: the weights.
      image: [B, *img_size, C].
      labels: [B, *img_size].
      learning_rate: of AdamW.
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
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        model = pytorch_original(case.cfg)
        model.load_state_dict(state_dict)
        self._module = model.to(self._device, memory_format=layout)
        self._model = torch.compile(self._module) if compile else self._module
        self._image = to_tensor(image).to(self._device, memory_format=layout)
        self._labels = torch.from_numpy(labels).long().to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._module.parameters(), lr=learning_rate, weight_decay=1e-4
        )
        self._autocast = case.dtype == "bfloat16"

    def forward(self) -> np.ndarray:
        """Logits [B, *img_size, K] in evaluation mode."""
        self._module.eval()
        with torch.no_grad():
            logits = self._run().float()
        return np.moveaxis(logits.cpu().numpy(), 1, -1)

    def step(self) -> float:
        """Takes a training step; its loss."""
        self._module.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = dice_cross_entropy(self._run().float(), self._labels)
        loss.backward()
        self._optimizer.step()
        # Reading the loss waits for the device, and the parameters are updated before it.
        if self._device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def _run(self) -> torch.Tensor:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            return self._model(self._image)
