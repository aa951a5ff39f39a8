"""Kimi Delta Attention (KDA) in every layer, no full attention.

    python -m experiments.train --config=configs/kda_pure.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/kda_pure.py         # 354.2 M, 20 B tokens
    python -m experiments.train --config=configs/kda_pure.py:1b3     # 1.391 B, 100 B tokens

Beyond the study, which has no KDA: its recipe and widths, with 8 heads of 128 (16 at 1.3B).
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("kda", size)
