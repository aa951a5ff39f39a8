"""RetNet in every layer, no full attention.

    python -m experiments.train --config=configs/retnet_pure.py:tiny    # 1.5 M parameters, minutes on two CPU cores
    python -m experiments.train --config=configs/retnet_pure.py         # 347.4 M, 20 B tokens
    python -m experiments.train --config=configs/retnet_pure.py:1b3     # 1.352 B, 100 B tokens

The study reports: language modelling 0.471 (average accuracy over both sizes); recall (RULER) near zero at every ratio.
"""

from experiments.configs import recipe


def get_config(size: str = "340m"):
    return recipe.get_config("retnet", size)
