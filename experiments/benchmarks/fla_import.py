"""flash-linear-attention as it can be measured where flash_attn, or the Triton that it asks for, is not installed.

What is done about either is noted in the rows.
"""

import functools
import importlib.machinery
import importlib.util
import sys
import types


def _attend(q, k, v, causal=True, window_size=(-1, -1), **_):
    """As flash_attn_func, [B,T,H,K]: by torch, whose kernels on a GPU are cuDNN's and FlashAttention's own."""
    from torch.nn.functional import scaled_dot_product_attention

    if window_size != (-1, -1):
        raise NotImplementedError("attention with a window is measured with flash_attn alone: install it")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def _attend_packed(*_, **__):
    raise NotImplementedError("attention of packed documents is measured with flash_attn alone: install it")


@functools.cache
def prepare() -> tuple[str, ...]:
    """Import fla and its models; what was put in the place of what is not here, for the rows. Raises ImportError where there is no fla."""
    import transformers  # noqa: F401 (first, as it looks for flash_attn too)

    notes, instead = [], {}
    if importlib.util.find_spec("flash_attn") is None:
        module = types.ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        module.flash_attn_func, module.flash_attn_varlen_func = _attend, _attend_packed
        instead = {"flash_attn": module}
        notes.append("full attention by torch's scaled_dot_product_attention, as flash_attn is not installed")
    sys.modules |= instead
    try:
        import fla.models  # noqa: F401 (which makes them known to transformers)
    finally:
        for name in instead:
            del sys.modules[name]
    from fla.ops.common import chunk_o

    # fla refuses gradients of gated operators by Triton 3.4 to 3.7.0 on Hopper, where blocks of 64 keys come out wrong (its issue 640). The
    # study's heads take blocks of 128, and what an operator gives is checked before it is timed.
    if getattr(chunk_o, "IS_NVIDIA_HOPPER", False) and not getattr(chunk_o, "TRITON_ABOVE_3_7_1", True):
        chunk_o.TRITON_ABOVE_3_7_1 = True
        notes.append("gradients of gated operators by a Triton below 3.7.1, which fla refuses for blocks of 64 keys (its issue 640)")
    return tuple(notes)


def choose_nothing() -> None:
    """From now on Triton compiles every choice of block sizes and takes the first: where a card is not quiet their times mean nothing."""
    from triton.runtime.autotuner import Autotuner

    def once(call, quantiles=None):
        call()
        return [0.0, 0.0, 0.0]

    Autotuner.do_bench = staticmethod(once)
