"""HGRN2, every 24th layer full attention (23 of 24, counted from 0).

    python -m experiments.train --config=configs/hgrn2_r24.py:tiny    # 6.4 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/hgrn2_r24.py         # 341.1 M, 20 B tokens
    python -m experiments.train --config=configs/hgrn2_r24.py:1b3     # 1.364 B, 100 B tokens

The study reports: language modelling 0.488 (average accuracy over both sizes), RULER 0.303 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("hgrn2", size, ratio=24)
