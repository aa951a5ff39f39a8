"""Causal softmax attention: see :func:`attention`."""
from pallas_kernels.attention.api import attention, attention_prefill, attention_step
from pallas_kernels.attention.stretch import attention_stretch

__all__ = ["attention", "attention_prefill", "attention_step", "attention_stretch"]
