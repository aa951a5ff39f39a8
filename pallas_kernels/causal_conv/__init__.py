"""Depthwise causal convolution over time: see :func:`causal_conv`."""
from pallas_kernels.causal_conv.api import causal_conv, causal_conv_step
from pallas_kernels.causal_conv.stretch import causal_conv_stretch

__all__ = ["causal_conv", "causal_conv_step", "causal_conv_stretch"]
