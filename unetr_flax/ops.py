"""How a convolution or an up-sampling is lowered; nothing else in the project knows."""

import flax.linen as nn
import jax

conv_general_dilated = jax.lax.conv_general_dilated
ConvTranspose = nn.ConvTranspose
