"""RetNet, every 3rd layer full attention (2, 5, 8, 11, 14, 17, 20, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/retnet_r3.py:tiny    # 1.4 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/retnet_r3.py         # 313.8 M, 20 B tokens
    python -m experiments.train --config=configs/retnet_r3.py:1b3     # 1.218 B, 100 B tokens

The study reports: language modelling 0.468 (average accuracy over both sizes); recall (RULER) near zero at every ratio.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("retnet", size, ratio=3)
