"""Kimi Delta Attention (KDA), every 6th layer full attention (5, 11, 17, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/kda_r6.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/kda_r6.py         # 352.0 M, 20 B tokens
    python -m experiments.train --config=configs/kda_r6.py:1b3     # 1.387 B, 100 B tokens

Beyond the study, which has no KDA: its recipe and widths, with 8 heads of 128 (16 at 1.3B).
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("kda", size, ratio=6)
