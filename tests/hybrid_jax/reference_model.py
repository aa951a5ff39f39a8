"""The models once more, in float64 numpy, token by token and layer by layer, from the equations of the papers and of
flash-linear-attention. Slow, without scans, chunks, padding or dtypes: what the real ones are compared with.

Parameters come as the tree of the real model's, already cut to one layer.
"""

import numpy as np

from hybrid_jax import config


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


FEATURE_MAPS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "logsigmoid": lambda x: -np.logaddexp(0, -x),
    "silu": silu,
    "sqrelu": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def norm_scale(p, name):
    return p[name]["scale"] if name in p else 1.0  # a norm without a scale has no parameters


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def conv(x, p, activation):
    """x [T,D]; y_t = act(sum_w weight[:, w] x_{t-W+1+w})."""
    weight = p["weight"]
    W = weight.shape[1]
    padded = np.concatenate([np.zeros((W - 1, x.shape[1])), x])
    return activation(np.stack([(padded[t : t + W] * weight.T).sum(0) for t in range(len(x))]))


def rotate(x, theta):
    """x [T,H,K]."""
    T, _, K = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for i in range(K // 2):
            angle = t * theta ** (-2 * i / K)
            a, b = x[t, :, i], x[t, :, i + K // 2]
            out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, :, i + K // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def heads(x, H):
    return x.reshape(len(x), H, -1)


def recurrence(q, k, v, decay, beta=None):
    """q,k [T,H,K], v [T,H,V], decay [T,H,K]: the state decays, erases along k where beta is given, takes k v^T; o = S^T q / sqrt(K)."""
    T, H, K = q.shape
    out = np.empty_like(v)
    for h in range(H):
        S = np.zeros((K, v.shape[-1]))
        for t in range(T):
            S = decay[t, h][:, None] * S
            write = v[t, h] if beta is None else beta[t, h] * (v[t, h] - S.T @ k[t, h])
            S = S + np.outer(k[t, h], write)
            out[t, h] = S.T @ q[t, h] / np.sqrt(K)
    return out


def attention(m: config.Attention, model, p, x, bound):
    H, HK = m.heads, m.kv_heads or m.heads
    q, k, v = (heads(linear(x, p[f"{n}_proj"]), h) for n, h in (("q", H), ("k", HK), ("v", HK)))
    if m.qk_norm:
        q, k = rms_norm(q, p["q_norm"]["scale"], 1e-5), rms_norm(k, p["k_norm"]["scale"], 1e-5)
    if m.rope_theta is not None:
        q, k = rotate(q, m.rope_theta), rotate(k, m.rope_theta)
    T, _, K = q.shape
    out = np.empty((T, H, K))
    for h in range(H):
        for t in range(T):
            first = 0 if m.window is None else max(0, t - m.window + 1)
            keys, values = k[first : t + 1, h // (H // HK)], v[first : t + 1, h // (H // HK)]
            out[t, h] = softmax(keys @ q[t, h] / np.sqrt(K)) @ values
    return linear(out.reshape(T, -1), p["o_proj"])


def hgrn(m: config.HGRN, model, p, x, bound):
    i, f = linear(x, p["i_proj"]), linear(x, p["f_proj"])
    if m.conv_width:
        i, f = conv(i, p["i_conv"], lambda y: y), conv(f, p["f_conv"], lambda y: y)
    a = bound + (1 - bound) * sigmoid(f)
    h, hs = np.zeros(i.shape[1]), []
    for t in range(len(x)):
        h = a[t] * h + silu(i[t]) * (1 - a[t])
        hs.append(h)
    return linear(rms_norm(np.stack(hs), norm_scale(p, "g_norm"), model.norm_eps) * silu(linear(x, p["g_proj"])), p["o_proj"])


def hgrn2(m: config.HGRN2, model, p, x, bound):
    q, f, v = linear(x, p["q_proj"]), linear(x, p["f_proj"]), linear(x, p["i_proj"])
    if m.conv_width:
        q, f, v = (conv(a, p[f"{n}_conv"], lambda y: y) for n, a in (("q", q), ("f", f), ("i", v)))
    H = model.width // m.expand_ratio
    a = heads(bound + (1 - bound) * sigmoid(f), H)
    o = recurrence(heads(silu(q), H), 1 - a, heads(v, H), a)
    return linear(rms_norm(o.reshape(len(x), -1), norm_scale(p, "g_norm"), 1e-5), p["o_proj"])


def gated_norm(o, x, p, norm, eps, activation=silu):
    y = rms_norm(o, norm_scale(p, norm), eps)
    y = y * activation(heads(linear(x, p["g_proj"]), o.shape[1])) if "g_proj" in p else y
    return linear(y.reshape(len(x), -1), p["o_proj"])


def retnet(m: config.RetNet, model, p, x, bound):
    H, HK = m.heads, m.kv_heads or m.heads
    q, k, v = (heads(linear(x, p[f"{n}_proj"]), h) for n, h in (("q", H), ("k", HK), ("v", HK)))
    q, k = FEATURE_MAPS[m.feature_map](q), FEATURE_MAPS[m.feature_map](k)
    k, v = np.repeat(rotate(k, 1e4), H // HK, axis=1), np.repeat(v, H // HK, axis=1)
    decay = np.broadcast_to((1 - 2.0 ** (-5 - np.arange(H)))[None, :, None], k.shape)
    return gated_norm(recurrence(rotate(q, 1e4), k, v, decay), x, p, "g_norm", model.norm_eps)


def gla(m: config.GLA, model, p, x, bound):
    H, HK = m.heads, m.kv_heads or m.heads
    q, k, v = (linear(x, p[f"{n}_proj"]) for n in "qkv")
    if m.conv_width:
        q, k, v = (conv(a, p[f"{n}_conv"], silu) for n, a in zip("qkv", (q, k, v), strict=True))
    q, k = FEATURE_MAPS[m.feature_map](q), FEATURE_MAPS[m.feature_map](k)
    g = np.log(sigmoid(linear(linear(x, p["decay_in"]), p["decay_out"]))) / 16
    if m.log_decay_min is not None:
        g = np.maximum(g, m.log_decay_min)
    k, v, g = (np.repeat(heads(a, HK), H // HK, axis=1) for a in (k, v, g))
    return gated_norm(recurrence(heads(q, H), k, v, np.exp(g)), x, p, "g_norm", model.norm_eps)


def delta_net(m: config.DeltaNet, model, p, x, bound):
    act = {"silu": silu, "relu": lambda y: np.maximum(y, 0), "elu": lambda y: np.where(y > 0, y + 1, np.exp(y)), "identity": lambda y: y}
    q, k, v = (linear(x, p[f"{n}_proj"]) for n in "qkv")
    phi = act[m.qk_activation]
    if m.conv_width:
        q, k, v = conv(q, p["q_conv"], phi), conv(k, p["k_conv"], phi), conv(v, p["v_conv"], silu)
    else:
        q, k, v = phi(q), phi(k), silu(v)
    q, k, v = (heads(a, m.heads) for a in (q, k, v))
    if m.qk_norm == "l2":
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    else:
        q, k = (a / np.maximum(np.abs(a).sum(-1, keepdims=True), 1e-6) for a in (q, k))
    beta = sigmoid(linear(x, p["b_proj"])) if m.beta else np.ones(q.shape[:2])
    o = recurrence(q, k, v, np.ones(k.shape), beta * (2 if m.negative_eigenvalues else 1))
    return gated_norm(o, x, p, "o_norm", model.norm_eps)


def delta_rule(m: config.GatedDeltaNet | config.KDA, p, x):
    """q, k [T,HV,K] of length one, v [T,HV,V], beta [T,HV]."""
    HV = m.value_heads or m.heads
    q, k, v = (linear(x, p[f"{n}_proj"]) for n in "qkv")
    q, k, v = (conv(a, p[f"{n}_conv"], silu) if m.conv_width else silu(a) for n, a in zip("qkv", (q, k, v), strict=True))
    q, k = (np.repeat(heads(a, m.heads), HV // m.heads, axis=1) for a in (q, k))
    q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    return q, k, heads(v, HV), sigmoid(linear(x, p["b_proj"])) * (2 if m.negative_eigenvalues else 1)


def gated_delta_net(m: config.GatedDeltaNet, model, p, x, bound):
    q, k, v, beta = delta_rule(m, p, x)
    g = -np.exp(p["A_log"]) * np.log1p(np.exp(linear(x, p["a_proj"]) + p["dt_bias"]))
    decay = np.broadcast_to(np.exp(g)[..., None], k.shape)
    activation = {"silu": silu, "sigmoid": sigmoid}[m.gate_activation]
    return gated_norm(recurrence(q, k, v, decay, beta), x, p, "o_norm", model.norm_eps, activation)


def kda(m: config.KDA, model, p, x, bound):
    q, k, v, beta = delta_rule(m, p, x)
    f = heads(linear(linear(x, p["decay_in"]), p["decay_out"]) + p["dt_bias"], v.shape[1])
    A = np.exp(p["A_log"])[:, None]
    g = -A * np.log1p(np.exp(f)) if m.log_decay_min is None else m.log_decay_min * sigmoid(A * f)
    o = rms_norm(recurrence(q, k, v, np.exp(g), beta), p["o_norm"]["scale"], model.norm_eps)
    gate = sigmoid(linear(linear(x, p["gate_in"]), p["gate_out"]))
    return linear(o.reshape(len(x), -1) * gate, p["o_proj"])


MIXERS = {f.__name__: f for f in (attention, hgrn, hgrn2, retnet, gla, delta_net, gated_delta_net, kda)}


def logits(model: config.ModelConfig, params: dict, layer_params, tokens) -> np.ndarray:
    """tokens [T] -> logits [T,vocabulary]. ``layer_params(layer)`` gives one layer's block."""
    x = params["embedding"]["table"][tokens]
    bounds = np.zeros((model.layers, 1))
    if "lower_bounds" in params:
        shares = softmax(params["lower_bounds"], axis=0)
        bounds = np.cumsum(shares, axis=0) - shares[0]
    for layer, kind in enumerate(model.layer_kinds):
        p = layer_params(layer)
        mixer = model.full_attention if kind == "attention" else model.mixer
        x = x + MIXERS[kind](mixer, model, p["mixer"], rms_norm(x, p["attn_norm"]["scale"], model.norm_eps), bounds[layer])
        y = rms_norm(x, p["mlp_norm"]["scale"], model.norm_eps)
        mlp = p["mlp"]
        x = x + linear(silu(linear(y, mlp["gate_proj"])) * linear(y, mlp["up_proj"]), mlp["down_proj"])
    x = rms_norm(x, params["norm"]["scale"], model.norm_eps)
    return x @ (params["embedding"]["table"].T if model.tied else params["output"]["kernel"])
