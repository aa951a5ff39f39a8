"""Kimi Delta Attention (KDA), every 3rd layer full attention (2, 5, 8, 11, 14, 17, 20, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/kda_r3.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/kda_r3.py         # 349.9 M, 20 B tokens
    python -m experiments.train --config=configs/kda_r3.py:1b3     # 1.382 B, 100 B tokens

Beyond the study, which has no KDA: its recipe and widths, with 8 heads of 128 (16 at 1.3B).
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("kda", size, ratio=3)
