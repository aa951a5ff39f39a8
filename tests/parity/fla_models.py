"""fla's own models on a CPU: its modules, configurations and reference operators, without its Triton kernels.

Each kernel that a model of ours calls is replaced by fla's `naive_*` of the same operator, or, for norms, activations and
convolutions, by the line of torch that it computes. A packed row is cut into its sequences, one call each.
"""

import importlib.machinery
import os
import sys
import types

os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = os.environ["FLA_DISABLE_TENSOR_CACHE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F


def packed(operator):
    """``operator`` on [1,T,...] tensors, applied to each sequence of ``cu_seqlens`` alone; gives (output, no state)."""

    def apply(*tensors, cu_seqlens=None, **options):
        if cu_seqlens is None:
            return operator(*tensors, **options), None
        pieces = [operator(*(t[:, a:b] for t in tensors), **options) for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
        return torch.cat(pieces, 1), None

    return apply


def attend(q, k, v, window):
    """Causal softmax attention [B,T,H,K] in a window of (left, right) keys, -1 for no limit; key heads shared by groups."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (distance < 0) | (distance > window[0] if window[0] >= 0 else False)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_func(q, k, v, causal, window_size):
    return attend(q, k, v, window_size)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, window_size, **_):
    return packed(attend)(q[None], k[None], v[None], cu_seqlens=cu_seqlens_q, window=window_size)[0][0]


sys.modules["flash_attn"] = types.ModuleType("flash_attn")  # it has no CPU build, and fla's Attention asks for it
sys.modules["flash_attn"].__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
sys.modules["flash_attn"].flash_attn_func = flash_attn_func
sys.modules["flash_attn"].flash_attn_varlen_func = flash_attn_varlen_func

import fla.models  # noqa: E402
from fla.layers import delta_net, gated_deltanet, gla, hgrn, hgrn2, kda, multiscale_retention  # noqa: E402
from fla.modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding, ShortConvolution, activations, mlp  # noqa: E402
from fla.ops.delta_rule.naive import delta_rule_recurrence  # noqa: E402
from fla.ops.gated_delta_rule.gate import naive_gdn_gate  # noqa: E402
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule  # noqa: E402
from fla.ops.gla.naive import naive_recurrent_gla  # noqa: E402
from fla.ops.hgrn.naive import naive_recurrent_hgrn  # noqa: E402
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate  # noqa: E402
from fla.ops.kda.naive import naive_recurrent_kda  # noqa: E402
from fla.ops.retention.naive import naive_retention  # noqa: E402

rotary = sys.modules[RotaryEmbedding.__module__]


def head_first(operator):
    return lambda *tensors: operator(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)


def gla_op(q, k, v, gk=None, g=None, cu_seqlens=None, **_):
    return packed(lambda *x: naive_recurrent_gla(*x)[0])(q, k, v, g if gk is None else gk, cu_seqlens=cu_seqlens)


def hgrn_op(x, g, cu_seqlens=None, **_):
    return packed(lambda *x: naive_recurrent_hgrn(*x)[0])(x, g, cu_seqlens=cu_seqlens)


def retention_op(q, k, v, cu_seqlens=None, **_):
    return packed(head_first(naive_retention))(q, k, v, cu_seqlens=cu_seqlens)


def l2_normalize(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def delta_op(q, k, v, beta, use_qk_l2norm_in_kernel=False, cu_seqlens=None, **_):
    q, k = (l2_normalize(q), l2_normalize(k)) if use_qk_l2norm_in_kernel else (q, k)
    return packed(head_first(lambda *x: delta_rule_recurrence(*x)[0]))(q, k, v, beta, cu_seqlens=cu_seqlens)


def gated_delta_op(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, cu_seqlens=None, **_):
    group = v.shape[2] // q.shape[2]
    q, k = (l2_normalize(x).repeat_interleave(group, 2) for x in (q, k))
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    gate = naive_gdn_gate(g, A_log, dt_bias)
    return packed(lambda *x: naive_recurrent_gated_delta_rule(*x)[0])(q, k, v, beta, gate, cu_seqlens=cu_seqlens)


def kda_op(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, lower_bound=None, cu_seqlens=None, **_):
    q, k = l2_normalize(q), l2_normalize(k)
    beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    if lower_bound is None:
        gate = naive_kda_gate(g, A_log, dt_bias)
    else:
        gate = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
    return packed(lambda *x: naive_recurrent_kda(*x)[0])(q, k, v, gate, beta, cu_seqlens=cu_seqlens)


def convolve(x, weight, activation):
    """y_t = act(sum_w weight[:, w] x_{t-W+1+w}); x [B,T,D], weight [D,W]."""
    W = weight.shape[1]
    padded = F.pad(x, (0, 0, W - 1, 0))
    y = sum(padded[:, w : w + x.shape[1]] * weight[:, w] for w in range(W))
    return F.silu(y) if activation in ("silu", "swish") else y


def short_convolution(self, x, mask=None, cu_seqlens=None, **_):
    x = x if mask is None else x * mask[..., None]
    return packed(lambda x: convolve(x, self.weight[:, 0], self.activation))(x, cu_seqlens=cu_seqlens)


def rms_norm(x, weight, eps):
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def norm_forward(self, x, residual=None, prenorm=False, **_):
    x = x if residual is None else x + residual
    y = rms_norm(x, self.weight, self.eps)
    return (y, x) if prenorm else y


def gated_norm_forward(self, x, g, **_):
    return rms_norm(x, self.weight, self.eps) * (F.sigmoid(g) if self.activation == "sigmoid" else F.silu(g))


def rotate(x, cos, sin, cu_seqlens=None, **_):
    return packed(lambda x: rotary.rotary_embedding_ref(x, cos[: x.shape[1]], sin[: x.shape[1]]))(x, cu_seqlens=cu_seqlens)[0]


def swiglu(x, y):
    return F.silu(x) * y


gla.chunk_gla = gla.fused_recurrent_gla = hgrn2.chunk_gla = hgrn2.fused_recurrent_gla = gla_op
hgrn.chunk_hgrn = hgrn.fused_recurrent_hgrn = hgrn_op
multiscale_retention.chunk_retention = multiscale_retention.fused_recurrent_retention = retention_op
delta_net.chunk_delta_rule = delta_net.fused_recurrent_delta_rule = delta_op
gated_deltanet.chunk_gated_delta_rule = gated_deltanet.fused_recurrent_gated_delta_rule = gated_delta_op
kda.chunk_kda = kda.fused_recurrent_kda = kda_op
gated_deltanet.causal_conv1d = lambda x, weight, activation, **_: (convolve(x, weight, activation), None)
ShortConvolution.forward = short_convolution
RMSNorm.forward, FusedRMSNormGated.forward = norm_forward, gated_norm_forward
# HGRN2's layer gives the kernel no eps, whose default is 1e-5
hgrn2.rms_norm_linear = lambda x, norm, _, weight, bias, eps=1e-5: F.linear(rms_norm(x, norm, eps), weight, bias)
rotary.rotary_embedding = rotate
hgrn2.swish = F.silu
hgrn.swiglu = mlp.swiglu = swiglu
mlp.swiglu_linear = lambda gate, up, weight, bias: F.linear(swiglu(gate, up), weight, bias)
activations.ACT2FN.update(silu=F.silu, swish=F.silu, sigmoid=F.sigmoid, logsigmoid=F.logsigmoid)


def build(model_type: str, seed: int = 0, **options) -> torch.nn.Module:
    """A small model of fla's, float32, every parameter random: ones and zeros would hide mistakes."""
    configs = {config.model_type: (config, causal_lm) for config, causal_lm in _classes()}
    config, causal_lm = configs[model_type]
    torch.manual_seed(seed)
    model = causal_lm(config(fuse_cross_entropy=False, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def _classes():
    for prefix in ("HGRN", "HGRN2", "RetNet", "GLA", "DeltaNet", "GatedDeltaNet", "KDA", "Transformer"):
        yield getattr(fla.models, f"{prefix}Config"), getattr(fla.models, f"{prefix}ForCausalLM")


def load(folder) -> torch.nn.Module:
    """The model in ``folder`` as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    model.config.fuse_cross_entropy = False
    return model.eval()


def run(model, tokens, labels, mask=None, cu_seqlens=None):
    """(logits, loss, the gradient of the loss by parameter name) as numpy; a tied head is counted once."""
    given = {"attention_mask": torch.tensor(mask)} if mask is not None else {}
    given |= {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)} if cu_seqlens is not None else {}
    model.zero_grad()
    out = model(torch.tensor(tokens), labels=torch.tensor(labels), use_cache=False, **given)
    out.loss.backward()
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    return out.logits.detach().numpy(), out.loss.item(), gradients
