"""HGRN2 in every layer, no full attention.

    python -m experiments.train --config=configs/hgrn2_pure.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/hgrn2_pure.py         # 341.1 M, 20 B tokens
    python -m experiments.train --config=configs/hgrn2_pure.py:1b3     # 1.364 B, 100 B tokens

The study reports: language modelling 0.486 (average accuracy over both sizes), RULER 0.203 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("hgrn2", size)
