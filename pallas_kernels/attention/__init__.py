"""Causal softmax attention: see :func:`attention`."""
from pallas_kernels.attention.api import attention, attention_prefill, attention_step

__all__ = ["attention", "attention_prefill", "attention_step"]
