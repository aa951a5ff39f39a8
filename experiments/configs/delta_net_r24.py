"""DeltaNet, every 24th layer full attention (23 of 24, counted from 0).

    python -m experiments.train --config=configs/delta_net_r24.py:tiny    # 6.5 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/delta_net_r24.py         # 341.6 M, 20 B tokens
    python -m experiments.train --config=configs/delta_net_r24.py:1b3     # 1.366 B, 100 B tokens

The study reports: language modelling 0.472 (average accuracy over both sizes), RULER 0.417 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("delta_net", size, ratio=24)
