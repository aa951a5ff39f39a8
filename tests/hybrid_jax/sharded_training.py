"""Train a small model on one device and on the named meshes of eight; print each one's losses as JSON. Run by test_sharding.py."""

import json
import sys

import jax
import numpy as np

from hybrid_jax import config, sharding
from hybrid_jax.train.step import make_program

MESHES = {
    "data 8": dict(data=8, fsdp=1),
    "fsdp 8": dict(fsdp=8),
    "fsdp 2, tensor 4": dict(fsdp=2, tensor=4),
    "data 2, seq 4": dict(data=2, fsdp=1, seq=4),
    "fsdp 2, seq 2, tensor 2": dict(fsdp=2, seq=2, tensor=2),
    "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
}
STEPS = 3


def losses(run: config.RunConfig, mesh: jax.sharding.Mesh) -> list[float]:
    program = make_program(run, mesh)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(run.train.seed))
        found = []
        for _ in range(STEPS):
            tokens = rng.integers(0, run.model.vocabulary, (run.train.batch, run.data.window + 1)).astype(np.int32)
            segment_ids = np.sort(rng.integers(1, 4, (run.train.batch, run.data.window)).astype(np.int32), axis=1)
            weights = np.ones(segment_ids.shape, np.float32)
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "segment_ids": segment_ids}
            state, metrics = program.step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            found.append(float(metrics.loss))
    assert program.step._cache_size() == 1, "the step was compiled more than once"
    return found


def main(mixer: config.Mixer, meshes: list[str]) -> None:
    model = config.ModelConfig(
        mixer=mixer, attention=config.Attention(heads=4), layers=2, ratio=2, width=32, vocabulary=64, mlp_width=64, dtype="float32"
    )
    run = config.RunConfig(
        model=model,
        data=config.DataConfig(window=40),
        optimizer=config.OptimizerConfig(learning_rate=0.01, warmup_steps=0),
        train=config.TrainConfig(steps=10, batch=16, microbatch=8),
    )
    found = {"one": losses(run, sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]))}
    for name in meshes:
        found[name] = losses(run, sharding.make_mesh(config.MeshConfig(**MESHES[name])))
    print(json.dumps(found))


if __name__ == "__main__":
    main(config.from_dict(config.Mixer, json.loads(sys.argv[1])), sys.argv[2:])
