"""RetNet, every 24th layer full attention (23 of 24, counted from 0).

    python -m experiments.train --config=configs/retnet_r24.py:tiny    # 5.6 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/retnet_r24.py         # 343.2 M, 20 B tokens
    python -m experiments.train --config=configs/retnet_r24.py:1b3     # 1.335 B, 100 B tokens

The study reports: language modelling 0.472 (average accuracy over both sizes); recall (RULER) near zero at every ratio.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("retnet", size, ratio=24)
