"""DeltaNet, every 12th layer full attention (11, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/delta_net_r12.py:tiny    # 3.3 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/delta_net_r12.py         # 341.6 M, 20 B tokens
    python -m experiments.train --config=configs/delta_net_r12.py:1b3     # 1.366 B, 100 B tokens

The study reports: language modelling 0.476 (average accuracy over both sizes), RULER 0.352 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("delta_net", size, ratio=12)
