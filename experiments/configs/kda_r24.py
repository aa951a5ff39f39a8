"""Kimi Delta Attention (KDA), every 24th layer full attention (23 of 24, counted from 0).

    python -m experiments.train --config=configs/kda_r24.py:tiny    # 6.6 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/kda_r24.py         # 353.7 M, 20 B tokens
    python -m experiments.train --config=configs/kda_r24.py:1b3     # 1.390 B, 100 B tokens

Beyond the study, which has no KDA: its recipe and widths, with 8 heads of 128 (16 at 1.3B).
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("kda", size, ratio=24)
