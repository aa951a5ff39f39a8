"""DeltaNet, every 3rd layer full attention (2, 5, 8, 11, 14, 17, 20, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/delta_net_r3.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/delta_net_r3.py         # 341.4 M, 20 B tokens
    python -m experiments.train --config=configs/delta_net_r3.py:1b3     # 1.365 B, 100 B tokens

The study reports: language modelling 0.475 (average accuracy over both sizes), RULER 0.426 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("delta_net", size, ratio=3)
