"""flash-linear-attention's side of a comparison: its Triton operators and models, in a process of their own, with torch.

Nothing but the functions that run there imports torch or fla. Arrays come and go as numpy's, in float32: bfloat16 is exact in it.
"""

import functools
import importlib.metadata
import math
import sys
from collections.abc import Callable

import numpy as np

from experiments.benchmarks import fla_import
from experiments.benchmarks.batches import STEP_SECONDS, batches

# float32 arrays by name, and the dtype that each has: what an operator is given.
Arrays = dict[str, tuple[np.ndarray, str]]


def _alone(function: Callable) -> Callable:
    """A function whose failures are RuntimeErrors, which a process without torch can read too; it leaves a card's memory to others."""

    @functools.wraps(function)
    def run(*arguments):
        try:
            return function(*arguments)
        except ImportError as error:
            raise RuntimeError(f"fla, which this is measured beside, is not here ({error}): pip install -e '.[parity]'") from None
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        finally:
            if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    return run


def has(operator: str, sizes: dict) -> bool:
    """Whether fla has an operator for a shape."""
    return (operator, sizes.get("decay")) in OPERATORS


def _hgrn(decay, x, initial_state):
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(x, decay, initial_state, output_final_state=True)


def _retention(q, k, v, log_decay, initial_state):  # whose decays are RetNet's own
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v, initial_state=initial_state, output_final_state=True)


def _simple_gla(q, k, v, log_decay, initial_state):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=log_decay, initial_state=initial_state, output_final_state=True)


def _gla(q, k, v, log_decay, initial_state):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, g=log_decay, initial_state=initial_state, output_final_state=True)


def _delta_rule(q, k, v, beta, initial_state):
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta, initial_state=initial_state, output_final_state=True)


def _gated_delta_rule(q, k, v, beta, log_decay, initial_state):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, initial_state=initial_state, output_final_state=True)


def _kda(q, k, v, beta, log_decay, initial_state):
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g=log_decay, beta=beta, initial_state=initial_state, output_final_state=True)


def _causal_conv(x, weight, initial_state):  # whose states have one input more, the oldest, which no tap reaches
    import torch
    from fla.modules.causal_conv1d import causal_conv1d

    state = torch.nn.functional.pad(initial_state.transpose(1, 2), (1, 0))
    output, state = causal_conv1d(x, weight, initial_state=state, output_final_state=True, activation="silu")
    return output, state[:, :, 1:].transpose(1, 2)


def _attention(q, k, v, documents):
    from fla.ops.attn import parallel_attn

    if documents == 1:
        return parallel_attn(q, k, v), None
    B, T = q.shape[:2]
    packed = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v))
    return parallel_attn(*packed, cu_seqlens=_starts_there(B, T, documents, q.device)).reshape(B, T, q.shape[2], v.shape[3]), None


def starts(B: int, T: int, documents: int) -> list[int]:
    """Where each document starts in B rows one after the other, as :mod:`pallas_kernels.attention.shapes` packs them, and where all end."""
    within = [-(-T * number // documents) for number in range(documents)]
    return [row * T + start for row in range(B) for start in within] + [B * T]


@functools.cache  # fla keeps what it derives of the lengths by the tensor that holds them
def _starts_there(B: int, T: int, documents: int, device):
    import torch

    return torch.tensor(starts(B, T, documents), dtype=torch.long, device=device)


# (operator, decay of its shape) -> of arrays by the names that ours has, those of linear_scan with the decay's logarithm: the output and
# the final state, if there is one.
OPERATORS = {
    ("linear_scan", None): _hgrn,
    ("gated_linear_attention", "fixed"): _retention,
    ("gated_linear_attention", "head"): _simple_gla,
    ("gated_linear_attention", "channel"): _gla,
    ("gated_delta_rule", "none"): _delta_rule,
    ("gated_delta_rule", "head"): _gated_delta_rule,
    ("gated_delta_rule", "channel"): _kda,
    ("attention", None): _attention,
    ("causal_conv", None): _causal_conv,
}


def _operator(name: str, sizes: dict) -> Callable:
    """fla's for a shape of these sizes, a function of tensors by name."""
    packed = {"documents": sizes["documents"]} if "documents" in sizes else {}
    return functools.partial(OPERATORS[name, sizes.get("decay")], **packed)


def _tensor(values: np.ndarray, dtype: str):
    import torch

    return torch.tensor(values, dtype=getattr(torch, dtype), device="cuda")


def _prepared(operator: str, inputs: Arrays) -> dict:
    """The operator's tensors, each a leaf; a linear decay as its logarithm, which is what fla takes."""
    logged = {
        name: (np.log(values), dtype) if (operator, name) == ("linear_scan", "decay") else (values, dtype)
        for name, (values, dtype) in inputs.items()
    }
    return {name: _tensor(values, dtype).requires_grad_() for name, (values, dtype) in logged.items()}


@_alone
def outputs(operator: str, sizes: dict, inputs: Arrays, cotangent: Arrays) -> dict[str, np.ndarray]:
    """Output, final state if there is one, and the gradients that fla has, of the output alone: not all of its operators have them of the
    final state.
    """
    import torch

    fla_import.prepare()
    tensors = _prepared(operator, inputs)
    output, final_state = _operator(operator, sizes)(**tensors)
    gradients = torch.autograd.grad(output, list(tensors.values()), _tensor(*cotangent["output"]), allow_unused=True)
    found = {"output": output, "final_state": final_state}
    found |= {f"gradient of {name}": g for name, g in zip(tensors, gradients, strict=True)}
    arrays = {name: a.detach().float().cpu().numpy() for name, a in found.items() if a is not None}
    if operator == "linear_scan":
        arrays["gradient of decay"] /= inputs["decay"][0]
    return arrays


@_alone
def time_operator(operator: str, sizes: dict, inputs: Arrays, pass_name: str) -> dict:
    """Of a row: seconds a call at ``sizes``, whose rows and tokens repeat those of ``inputs``, and the memory that one takes at most."""
    import torch

    fla_import.prepare()

    def repeated(name, values):
        if "state" in name:
            return np.resize(values, (sizes["B"], *values.shape[1:]))
        if values.ndim < 3:  # a fixed decay, [H]
            return values
        return np.resize(values[:1], (1, sizes["T"], *values.shape[2:])).repeat(sizes["B"], 0)

    tensors = _prepared(operator, {name: (repeated(name, values), dtype) for name, (values, dtype) in inputs.items()})
    run = functools.partial(_operator(operator, sizes), **tensors)
    leaves = [t for name, t in tensors.items() if not (sizes.get("decay") == "fixed" and name == "log_decay")]
    cotangent = torch.randn_like(run()[0])

    def forward():
        with torch.no_grad():
            return run()

    def forward_backward():
        return torch.autograd.grad(run()[0], leaves, cotangent, allow_unused=True)

    forward_backward()  # whatever is timed: Triton chooses at its first call, which is to be one of this size
    call = {"forward": forward, "forward_backward": forward_backward}[pass_name]
    times = batches(call, lambda _: torch.cuda.synchronize())
    return {"seconds": times, "peak_bytes": _peak(call)} | versions()


def _peak(call: Callable) -> int:
    """Bytes that a call allocates at most, its results among them."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def versions() -> dict:
    """What a row's numbers depend on beside the case."""
    import torch

    return {"peer_device": torch.cuda.get_device_name(), "peer_versions": installed(), "peer_notes": list(fla_import.prepare())}


def installed() -> dict[str, str]:
    """The versions of fla and of what it stands on, as far as they are installed."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: found[name] for name in ("torch", "triton", "flash-linear-attention", "transformers") if name in found}


@_alone
def time_step(options: dict, B: int, T: int) -> dict:
    """Of a row: seconds of a training step of fla's model of a config.json, with torch.compile, in bfloat16 with float32 parameters."""
    import torch

    fla_import.prepare()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = dict(options)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config).to(device="cuda", dtype=torch.float32).train()
    # Autocast leaves embeddings as they are, and so all that is added to them: activations between layers are to be bfloat16, as ours.
    model.get_input_embeddings().register_forward_hook(lambda module, given, embedded: embedded.to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(config.vocab_size, (B, T), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = float(step())
    if not math.isfinite(first):
        raise RuntimeError(f"its first loss is {first}")
    times = batches(step, lambda _: torch.cuda.synchronize(), STEP_SECONDS)
    return {"seconds": times, "loss": first, "peak_bytes": torch.cuda.max_memory_allocated()} | versions()
