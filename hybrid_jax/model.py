"""The language model: embedding, a stack of blocks folded into scans, final norm, output projection."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybrid_jax import cache as caches
from hybrid_jax import layout, mixers
from hybrid_jax.cache import Cache
from hybrid_jax.config import HGRN, HGRN2, ModelConfig, RunConfig
from hybrid_jax.layers import Embedding, Linear, RMSNorm, SwiGLU
from hybrid_jax.layers.gates import lower_bounds
from hybrid_jax.layers.rotary import positions
from hybrid_jax.mixers import Context, Memory
from hybrid_jax.sharding import constrain
from pallas_kernels import kept, platforms

_ATTENTION = jax.checkpoint_policies.save_only_these_names(kept.ATTENTION)
REMAT_POLICIES = {
    "operators": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION),
    "block": _ATTENTION,
}


class Block(nnx.Module):
    """x += mixer(RMSNorm(x)); x += SwiGLU(RMSNorm(x))."""

    def __init__(self, kind: str, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.kind = kind
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = mixers.build(config.full_attention if kind == "attention" else config.mixer, config, rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        stds = dict(std=config.init_std, std_down=config.residual_std(config.mlp_hidden))
        self.mlp = SwiGLU(config.width, config.mlp_hidden, **stds, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context, memory: Memory) -> tuple[jax.Array, Memory]:
        with jax.named_scope(self.kind):
            y, memory = self.mixer(self.attn_norm(x), context, memory)
        x = x + y
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "time", None), memory


class Stage(nnx.Module):
    """Consecutive layers as scans: over the repeats of a pattern, and in each over its runs of one kind.

    ``runs[i]`` is one Block whose parameters carry two leading axes, [repeats, length of the run]. On GPUs the layers stand one
    after the other: there XLA writes what a scan keeps for the backward pass twice, and a scan within another three times (docs/gpu.md).
    """

    def __init__(self, stage: layout.Stage, config: ModelConfig, *, rngs: nnx.Rngs):
        self.layout = stage
        self.remat = config.remat
        self.runs = nnx.List([_stacked_block(run, stage.repeats, config, rngs) for run in stage.runs])

    def __call__(self, x: jax.Array, context: Context, bounds: jax.Array | None, memories: list[Memory] | None = None):
        """x [B,T,D] through the stage: (x, the memories with x in them).

        bounds [L,D] are the forget gates' lower bounds of all layers, if the model has them. memories: of each run, leaves
        [repeats, length of the run, B, ...]; None where there are none, as in training.
        """
        graphs, params = zip(*(nnx.split(run) for run in self.runs), strict=True)
        per_run = [None if bounds is None else bounds[jnp.array(self.layout.layers(i))] for i in range(len(self.runs))]
        remat, in_loops = "none" if memories else self.remat, platforms.platform() != "gpu"
        scan = jax.lax.scan if in_loops else _one_after_the_other

        def block(graph, length):
            def call(carry, layer):
                x, memory = carry
                params, bound, at = layer
                x, new = nnx.merge(graph, params)(x, context._replace(lower_bound=bound), caches.read(memory, at))
                return (x, caches.write(memory, at, new, context.real) if memories else memory), None

            # A loop keeps forward and backward apart; without one, and XLA unrolls loops of one layer, what backward computes again is not
            # to be that of forward, kept.
            loops = in_loops and self.layout.repeats * length > 1
            return call if remat == "none" else jax.checkpoint(call, policy=REMAT_POLICIES[remat], prevent_cse=not loops)

        def repeat(carry, layers):
            x, memories = carry
            written = []
            for graph, run, memory, layer in zip(graphs, self.layout.runs, memories, layers, strict=True):
                (x, memory), _ = scan(block(graph, run.length), (x, memory), layer)
                written.append(memory)
            return (x, written), None

        places = [jnp.moveaxis(jnp.indices((self.layout.repeats, run.length)), 0, -1) for run in self.layout.runs]
        carry = x, memories or [Memory()] * len(self.runs)
        return scan(repeat, carry, list(zip(params, per_run, places, strict=True)))[0]

    def empty_memories(self, batch: int, slots: int) -> list[Memory]:
        """Memories of nothing, with room for ``slots`` keys and values a row."""

        def empty(run: layout.Run, blocks: Block) -> Memory:
            layers, mixer = (self.layout.repeats, run.length), blocks.mixer
            width, dtype = blocks.attn_norm.scale.shape[-1], blocks.mlp.gate_proj.dtype
            if run.kind == "attention":
                return caches.empty_rings(layers, batch, mixer.kv_heads, slots, width // mixer.config.heads, dtype)
            graph, params = nnx.split(mixer)
            one = jax.tree.map(lambda a: a[0, 0], params)
            x = jnp.zeros((batch, 1, width), dtype)
            return caches.empty(jax.eval_shape(lambda: nnx.merge(graph, one)(x)[1]), layers)

        return [empty(*pair) for pair in zip(self.layout.runs, self.runs, strict=True)]


def _one_after_the_other(f, carry, xs):
    """``jax.lax.scan(f, carry, xs)`` without a loop, of an ``f`` without outputs, which is traced once.

    xs are cut all at once: so their gradients are joined once, not added.
    """
    leaves, tree = jax.tree.flatten(xs)
    cut = ([x.squeeze(0) for x in jax.lax.split(leaf, [1] * len(leaf))] for leaf in leaves)
    f = jax.jit(f)
    for x in zip(*cut, strict=True):
        carry, _ = f(carry, tree.unflatten(x))
    return carry, None


def _stacked_block(run: layout.Run, repeats: int, config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """A Block with the parameters of all layers of a run, each [repeats, length, ...], every layer its own draw."""

    def block(key):
        return Block(run.kind, config, rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), (repeats, run.length))
    graph = nnx.graphdef(nnx.eval_shape(block, keys[0, 0]))
    return nnx.merge(graph, jax.vmap(jax.vmap(lambda key: nnx.state(block(key))))(keys))


class Model(nnx.Module):
    """Tokens to logits.

    config: the ModelConfig it was built from.
    tokenizer: of the tokens, where the folder it was loaded from has one (``hybrid_jax.load``); any may be set. Else None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.tokenizer = None
        self.embedding = Embedding(config.vocabulary, config.width, std=config.init_std, dtype=dtype, rngs=rngs)
        self.stages = nnx.List([Stage(stage, config, rngs=rngs) for stage in layout.stages(config.layer_kinds)])
        bounded = isinstance(config.mixer, (HGRN, HGRN2)) and config.mixer.lower_bound
        self.lower_bounds = nnx.Param(jnp.zeros((config.layers, _gate_width(config))), axes=("layers", None)) if bounded else None
        self.norm = RMSNorm(config.width, config.norm_eps)
        init = dict(std=config.init_std, dtype=dtype, rngs=rngs)
        self.output = None if config.tied else Linear(config.width, config.vocabulary, ("embed", "vocabulary"), **init)

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """tokens [B,T] int -> [B,T,D] in the compute dtype, after the final norm. segment_ids [B,T]: documents of a row, 0 padding."""
        return self._run(tokens, Context(segment_ids, positions(*tokens.shape, segment_ids)))[0]

    def extend(self, tokens: jax.Array, real: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Tokens that go on from those of ``cache``: :meth:`hidden` of them, and the cache with them in it.

        tokens [B,T] int; real [B,T] bool, False at padding, which leaves the cache as it is and whose output means nothing.
        """
        # One token takes the operators' steps, which know no padding: writing to the cache passes over it.
        segment_ids = real.astype(jnp.int32) if tokens.shape[1] > 1 else None
        places = cache.lengths[:, None] + positions(*tokens.shape, segment_ids)
        x, stages = self._run(tokens, Context(segment_ids, places, cache.lengths, real), cache.stages)
        return x, Cache(cache.lengths + jnp.sum(real, axis=1, dtype=jnp.int32), stages)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache of ``batch`` rows that holds nothing, with room for ``slots`` keys and values at each full-attention layer."""
        return Cache(jnp.zeros(batch, jnp.int32), [stage.empty_memories(batch, slots) for stage in self.stages])

    def _run(self, tokens: jax.Array, context: Context, memories: list[list[Memory]] | None = None):
        """(the hidden states [B,T,D] after the final norm, the memories of each stage's runs with the tokens in them)."""
        bounds = None if self.lower_bounds is None else lower_bounds(self.lower_bounds[...])
        x = constrain(self.embedding(tokens), "batch", "time", None)
        written = []
        for stage, memory in zip(self.stages, memories or [None] * len(self.stages), strict=True):
            x, memory = stage(x, context, bounds, memory)
            written.append(memory)
        return self.norm(x), written

    def output_kernel(self) -> jax.Array:
        """[D,vocabulary] in the parameters' dtype: the output projection, the embedding transposed where they are tied."""
        return self.embedding.table[...].T if self.output is None else self.output.kernel[...]

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """tokens [B,T] int -> logits [B,T,vocabulary] float32. segment_ids [B,T]: documents of a row, 0 padding.

        Lists and numpy's arrays do too; compiled once for each shape. Raises ValueError for tokens of another rank or dtype, or, where
        they are known, out of the vocabulary.
        """
        if not isinstance(tokens, jax.core.Tracer) and getattr(tokens, "is_fully_addressable", True):
            tokens = _checked(tokens, self.config.vocabulary)
        return _logits(*nnx.split(self), tokens, None if segment_ids is None else jnp.asarray(segment_ids))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[...,D] -> [...,vocabulary] float32."""
        return jnp.matmul(hidden, self.output_kernel().astype(hidden.dtype), preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    model = nnx.merge(graph, params)
    return model.logits(model.hidden(tokens, segment_ids))


def _checked(tokens, vocabulary: int) -> jax.Array:
    """The tokens as an array; looked up, those that do not exist would be taken for others."""
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens has shape {ids.shape} and dtype {ids.dtype}, needs [B,T] of integers")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"tokens holds {wrong}, needs tokens from 0 to {vocabulary - 1}, the model's vocabulary")
    return tokens if isinstance(tokens, jax.Array) else jnp.asarray(ids, jnp.int32)


def _gate_width(config: ModelConfig) -> int:
    """Channels of the forget gate: HGRN's state, or HGRN2's keys (both D at the study's settings)."""
    return config.width * config.mixer.expand_ratio if isinstance(config.mixer, HGRN) else config.width


def build(config: ModelConfig | RunConfig, seed: int = 0) -> Model:
    """A model with fresh parameters, float32, drawn from ``seed``. Raises TypeError for a config that is neither."""
    if isinstance(config, RunConfig):
        config = config.model
    if not isinstance(config, ModelConfig):
        raise TypeError(f"build takes a hybrid_jax.config.ModelConfig or RunConfig, got a {type(config).__name__}")
    return nnx.merge(*_fresh(config, jax.random.key(seed)))


def initialize(config: ModelConfig, key: jax.Array) -> nnx.State:
    """Fresh parameters of a model, as the state that ``nnx.merge`` takes; a pure function of ``key``, to be jitted with shardings."""
    return _fresh(config, key)[1]


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph and its parameters as shapes, nothing allocated."""
    return _fresh.eval_shape(config, jax.eval_shape(jax.random.key, 0))


@partial(jax.jit, static_argnums=0)  # so that a model is traced once, however often it is asked for
def _fresh(config: ModelConfig, key: jax.Array) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(Model(config, rngs=nnx.Rngs(key)))
