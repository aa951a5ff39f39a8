"""The (gated) delta rule, a linear recurrence that overwrites what it has stored: see :func:`gated_delta_rule`."""
from pallas_kernels.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step
from pallas_kernels.gated_delta_rule.stretch import gated_delta_rule_stretch

__all__ = ["gated_delta_rule", "gated_delta_rule_step", "gated_delta_rule_stretch"]
