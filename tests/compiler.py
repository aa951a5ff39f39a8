"""How the tests have XLA compile for the CPU: what most of their time is, on programs that run once."""

import jax

# Not optimised, which takes a third off; and, as long as XLA has them, by its older emitters of fusions, which takes off another third.
QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
