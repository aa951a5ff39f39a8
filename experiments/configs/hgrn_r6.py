"""HGRN, every 6th layer full attention (5, 11, 17, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/hgrn_r6.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/hgrn_r6.py         # 341.1 M, 20 B tokens
    python -m experiments.train --config=configs/hgrn_r6.py:1b3     # 1.364 B, 100 B tokens

The study reports: language modelling 0.486 (average accuracy over both sizes); recall (RULER) near zero at every ratio.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("hgrn", size, ratio=6)
