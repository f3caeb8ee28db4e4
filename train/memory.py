"""The memory that training needs, compared with what there is."""

import math

import jax
from jax.sharding import Mesh

from train.config import Config
from train.data.headers import Need
from train.run_dir import OptionError
from train.sharding import FSDP
from unetr_flax import UNETRConfig
from unetr_flax.runtime.memory import available_memory, show_bytes

# A crop of which no volume fills this share is a slip of the pen.
LEAST_FILLED = 0.02


def check_size(cfg: Config, mesh: Mesh) -> None:
    """Refuses a model or a batch that is far beyond the memory, before anything is made of them.

    The estimate is below what a step really takes, which `check_step` knows once it is compiled.

    Args:
      cfg: the options.
      mesh: the devices; the share of one is compared with its memory.

    Raises:
      OptionError: naming the options.
    """
    config = cfg.model_config(in_channels=1, out_channels=2)
    memory = device_memory()
    # Weights, their gradients and two moments, in float32; --fsdp splits the kernels.
    weights = 16 * _fewest_parameters(config) // mesh.shape[FSDP]
    if weights > memory:
        raise OptionError(
            f"--hidden-size {config.hidden_size} --num-layers {config.num_layers} --light-r "
            f"{cfg.model.light_r}: training takes over {show_bytes(weights)} for the parameters "
            f"alone{_share(mesh)}, there are {show_bytes(memory)}"
        )
    # The image, two logits, and the decoder's last concatenation, in two bytes at the least.
    maps = 3 + 2 * config.channels[0]
    volumes = cfg.data.batch_size // cfg.training.accumulate
    batch = 2 * maps * math.prod(config.img_size) * volumes // mesh.size
    if batch > memory:
        roi = " ".join(map(str, config.img_size))
        raise OptionError(
            f"--roi-size {roi} --batch-size {cfg.data.batch_size}: a step takes over "
            f"{show_bytes(batch)}{_share(mesh)}, there are {show_bytes(memory)}"
        )


def check_roi(cfg: Config, need: Need) -> None:
    """Refuses crops that would be padding nearly everywhere.

    Raises:
      OptionError: naming --roi-size.
    """
    roi, largest = cfg.data.roi_size, need.largest_shape
    if roi is None or not largest:
        return
    filled = math.prod(min(r, n) for r, n in zip(roi, largest, strict=True)) / math.prod(roi)
    if filled < LEAST_FILLED:
        raise OptionError(
            f"--roi-size {' '.join(map(str, roi))}: the volumes have at most "
            f"{' x '.join(map(str, largest))} voxels, {filled:.2g} of such a crop"
        )


def device_memory() -> int:
    """Returns the bytes of memory of a device: its own, or on CPU its share of this process's."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    return available_memory() // jax.local_device_count()


def step_memory(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes that a compiled step takes on one device, as the compiler counts them.

    These are its arguments, results and temporary arrays; None where the compiler does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = ("argument", "output", "temp", "generated_code")
    total = sum(getattr(analysis, f"{name}_size_in_bytes") for name in sizes)
    return total - analysis.alias_size_in_bytes


def check_step(compiled: jax.stages.Compiled, memory: int) -> str:
    """Compares the memory of a compiled step with that of the device.

    Args:
      compiled: the step.
      memory: bytes of memory of the device before the state is made, which the step counts, too.

    Returns:
      A line that states both.

    Raises:
      OptionError: if the step takes more than there is.
    """
    need = step_memory(compiled)
    if need is None:
        return f"each device has {show_bytes(memory)} of memory"
    if need > memory:
        raise OptionError(
            f"a step takes {show_bytes(need)} of memory on each device, there are "
            f"{show_bytes(memory)}; --remat, --accumulate, or a smaller --roi-size or --batch-size "
            "takes less"
        )
    return f"a step takes {show_bytes(need)} of {show_bytes(memory)} of memory on each device"


def _share(mesh: Mesh) -> str:
    return " on each device" if mesh.size > 1 else ""


def _fewest_parameters(config: UNETRConfig) -> int:
    """Bounds the number of parameters from below: the blocks' products and one convolution."""
    blocks = 12 * config.hidden_size**2 * config.num_layers
    return blocks + 27 * config.channels[-1] ** 2
