"""Hugging Face checkpoints of flash-linear-attention (fla), read and written without it.

options.py   config.json to and from a ModelConfig: every option honoured, or refused by its name
names.py     where each of fla's tensors lies in our stacked parameters
tensors.py   safetensors, one file or sharded, read tensor by tensor and written shard by shard
convert.py   a folder to a run's workdir, and back
"""
