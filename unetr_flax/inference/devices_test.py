import subprocess
import sys

SCRIPT = """
import jax
jax.config.update("jax_num_cpu_devices", 3)
import numpy as np
from unetr_flax import UNETR, UNETRConfig
from unetr_flax.inference.predictor import Predictor, Weights, windows_per_device
from unetr_flax.inference.streaming import stream_logits
from unetr_flax.model.abstract import abstract_variables

cfg = UNETRConfig.reference(
    (8, 16, 8), 1, 2, light_r=32, patch_size=8, hidden_size=8, mlp_dim=8, num_heads=2, num_layers=4
)
rng = np.random.default_rng(0)
draw = lambda leaf: rng.uniform(0.1, 0.8, leaf.shape).astype(np.float32)
variables = jax.tree.map(draw, abstract_variables(UNETR(cfg)))
image = rng.normal(size=(17, 16, 12, 1)).astype(np.float32)
results = []
for devices in (jax.devices()[:1], jax.devices()):
    predictor = Predictor([Weights(cfg, variables)], devices=devices)
    assert predictor.batch_size == len(devices) * windows_per_device("cpu", cfg.img_size)
    outputs = predictor(np.zeros((predictor.batch_size, *cfg.img_size, 1), np.float32))
    assert len(outputs.sharding.device_set) == len(devices)
    blocks = stream_logits(
        image, predictor, 2, cfg.img_size,
        overlap=0.5, batch_size=predictor.batch_size, device=predictor.device,
    )
    results.append(np.concatenate([block[bool(start[0]) :] for start, block in blocks]))
one, three = results
assert one.shape == three.shape == (17, 16, 12, 2)
assert np.abs(one - three).max() <= 1e-6 * np.abs(one).max()
print("equal")
"""


def test_several_devices_share_the_windows():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "equal\n", run.stderr
