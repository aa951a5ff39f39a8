"""Kimi Delta Attention (KDA), every 12th layer full attention (11, 23 of 24, counted from 0).

    python -m experiments.train --config=configs/kda_r12.py:tiny    # 3.4 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/kda_r12.py         # 353.1 M, 20 B tokens
    python -m experiments.train --config=configs/kda_r12.py:1b3     # 1.389 B, 100 B tokens

Beyond the study, which has no KDA: its recipe and widths, with 8 heads of 128 (16 at 1.3B).
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("kda", size, ratio=12)
