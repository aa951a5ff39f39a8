"""GLA in every layer, no full attention.

    python -m experiments.train --config=configs/gla_pure.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/gla_pure.py         # 341.7 M, 20 B tokens
    python -m experiments.train --config=configs/gla_pure.py:1b3     # 1.366 B, 100 B tokens

The study reports: language modelling 0.459 (average accuracy over both sizes), RULER 0.144 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("gla", size)
