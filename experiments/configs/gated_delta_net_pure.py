"""Gated DeltaNet in every layer, no full attention.

    python -m experiments.train --config=configs/gated_delta_net_pure.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/gated_delta_net_pure.py         # 366.8 M, 20 B tokens
    python -m experiments.train --config=configs/gated_delta_net_pure.py:1b3     # 1.466 B, 100 B tokens

The study reports: language modelling 0.487 (average accuracy over both sizes), RULER 0.356 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("gated_delta_net", size)
