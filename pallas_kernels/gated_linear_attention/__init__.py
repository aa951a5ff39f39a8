"""S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t: the recurrence of RetNet, GLA and HGRN2."""
from pallas_kernels.gated_linear_attention.api import gated_linear_attention as gated_linear_attention
from pallas_kernels.gated_linear_attention.api import gated_linear_attention_step as gated_linear_attention_step
from pallas_kernels.gated_linear_attention.stretch import gated_linear_attention_stretch as gated_linear_attention_stretch
