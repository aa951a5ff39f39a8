"""The cases of a benchmark: an operator, an implementation, a named shape, a dtype and a pass; and the program each stands for."""

import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType

import jax
import jax.numpy as jnp

OPERATORS = ("linear_scan", "gated_linear_attention", "gated_delta_rule", "attention", "causal_conv")
PASSES = ("forward", "forward_backward")
OPTIONS = {"causal_conv": {"activation": "silu"}}  # of operators that have any: as the models use them
MODELS = ("340m", "1b3")  # how the names of models' shapes end
TOKENS = 32768  # of a step on one card


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be measured."""

    operator: str
    implementation: str
    shape_name: str
    shape: object  # a frozen dataclass of the operator's shapes.py, with T among its fields
    dtype: str
    pass_name: str

    def __str__(self):
        return f"{self.operator} {self.implementation} {self.shape_name} {self.dtype} {self.pass_name}"

    @property
    def identity(self) -> dict:
        """Of a row: which case it is of."""
        names = {name: getattr(self, name) for name in ("operator", "implementation", "dtype")}
        return names | {"shape": self.shape_name, "sizes": dataclasses.asdict(self.shape), "pass": self.pass_name}

    @property
    def shapes(self) -> ModuleType:
        return importlib.import_module(f"pallas_kernels.{self.operator}.shapes")

    def work(self) -> dict[str, int]:
        """FLOPs and bytes by the operator's own count; a backward pass is taken to be two forward ones."""
        passes = 3 if self.pass_name == "forward_backward" else 1
        return {"flops": passes * self.shapes.flops(self.shape), "bytes": passes * self.shapes.bytes_moved(self.shape, self.dtype)}


def api(operator: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.{operator}.api")


def program(case: Case) -> Callable[..., dict[str, jax.Array]]:
    """A function of ``arguments(case)``: the outputs and, with the backward pass, the gradient of every floating argument, by name."""

    def forward(floating, others):
        options = OPTIONS.get(case.operator, {}) | {"implementation": case.implementation}
        outputs = getattr(api(case.operator), case.operator)(**floating, **others, **options)
        return dict(zip(("output", "final_state"), jax.tree.leaves(outputs), strict=False))  # attention has no state

    def forward_backward(floating, others, cotangents):
        outputs, pull = jax.vjp(lambda floating: forward(floating, others), floating)
        return outputs | {f"gradient of {name}": a for name, a in pull(cotangents)[0].items()}

    return {"forward": forward, "forward_backward": forward_backward}[case.pass_name]


def arguments(case: Case) -> tuple[dict, ...]:
    """The program's arguments: floating point, others and, for the backward pass, the outputs' cotangents."""
    values = case.shapes.inputs(case.shape, jax.random.key(0), jnp.dtype(case.dtype))
    floating = {name: a for name, a in values.items() if jnp.issubdtype(jnp.result_type(a), jnp.floating)}
    others = {name: a for name, a in values.items() if name not in floating}
    if case.pass_name == "forward":
        return floating, others
    outputs = jax.eval_shape(program(dataclasses.replace(case, pass_name="forward")), floating, others)
    keys = dict(zip(outputs, jax.random.split(jax.random.key(1), len(outputs)), strict=True))
    return floating, others, {name: jax.random.normal(keys[name], a.shape, a.dtype) for name, a in outputs.items()}


def at_lengths(case: Case, lengths: Iterable[int]) -> list[Case]:
    """The case of a model's shape at each length, in as many rows as make ``TOKENS``; any other as it is."""
    if not case.shape_name.endswith(MODELS):
        return [case]
    return [
        dataclasses.replace(case, shape_name=f"{case.shape_name} T={T}", shape=dataclasses.replace(case.shape, B=TOKENS // T, T=T))
        for T in lengths
    ]


def both_passes(case: Case) -> Iterable[Case]:
    return (dataclasses.replace(case, pass_name=name) for name in PASSES)


def select(operators: list[str], implementations: list[str], shapes: list[str], dtype: str) -> list[Case]:
    """The forward cases asked for by patterns of names; an empty list stands for all.

    Raises ValueError for a pattern that fits nothing.
    """
    named = {o: importlib.import_module(f"pallas_kernels.{o}.shapes").SHAPES for o in _matching("operators", operators, OPERATORS)}
    implementations = _matching("implementations", implementations, {i: None for o in named for i in api(o).IMPLEMENTATIONS})
    shapes = _matching("shapes", shapes, {name: None for o in named for name in named[o]})
    return [
        Case(operator, implementation, name, shape, dtype, "forward")
        for operator in named
        for name, shape in named[operator].items()
        if name in shapes
        for implementation in api(operator).IMPLEMENTATIONS
        if implementation in implementations
    ]


def _matching(flag: str, patterns: list[str], known: Iterable[str]) -> list[str]:
    unknown = [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]
    if unknown:
        raise ValueError(f"--{flag}: nothing is called {', '.join(unknown)}; choose from {', '.join(known)}")
    return [name for name in known if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
