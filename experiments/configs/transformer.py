"""The Transformer baseline: full attention in every layer.

    python -m experiments.train --config=configs/transformer.py:tiny    # 1.7 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/transformer.py         # 341.1 M, 20 B tokens
    python -m experiments.train --config=configs/transformer.py:1b3     # 1.364 B, 100 B tokens

The study reports: language modelling 0.444 at 340M and 0.548 at 1.3B (average accuracy), RULER 0.423 at 1.3B.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("attention", size)
