"""Gated DeltaNet, every 24th layer full attention (23 of 24, counted from 0).

    python -m experiments.train --config=configs/gated_delta_net_r24.py:tiny    # 6.4 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/gated_delta_net_r24.py         # 365.7 M, 20 B tokens
    python -m experiments.train --config=configs/gated_delta_net_r24.py:1b3     # 1.462 B, 100 B tokens

The study reports: language modelling 0.468 (average accuracy over both sizes), RULER 0.341 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("gated_delta_net", size, ratio=24)
