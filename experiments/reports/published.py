"""What the study published: "A Systematic Analysis of Hybrid Linear Attention" (arXiv 2507.06457), every number from one seed.

Tables 2 to 6 of its first version. The averages of Table 4 are not the means of Tables 2 and 3, and of Table 6 the
Transformer's average is not the mean of its groups; both are kept as printed.
"""

# Accuracy on six zero-shot tasks, the best ratio of each family (Tables 2 and 3): {(family, ratio): {measure: value}}.
_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "average")


def _lm(*values: float) -> dict[str, float]:
    return {f"lm/{task}": value for task, value in zip(_TASKS, values, strict=True)}


_BEST = {
    "340M": {
        ("delta_net", "6:1"): _lm(0.299, 0.594, 0.410, 0.334, 0.334, 0.675, 0.441),
        ("gated_delta_net", "pure"): _lm(0.291, 0.602, 0.415, 0.348, 0.338, 0.661, 0.442),
        ("gla", "6:1"): _lm(0.287, 0.588, 0.421, 0.343, 0.334, 0.671, 0.441),
        ("hgrn", "6:1"): _lm(0.298, 0.601, 0.433, 0.339, 0.340, 0.678, 0.448),
        ("hgrn2", "6:1"): _lm(0.300, 0.617, 0.436, 0.347, 0.346, 0.690, 0.456),
        ("retnet", "24:1"): _lm(0.287, 0.574, 0.411, 0.309, 0.364, 0.672, 0.436),
        ("attention", "full"): _lm(0.276, 0.612, 0.424, 0.353, 0.330, 0.670, 0.444),
    },
    "1.3B": {
        ("delta_net", "6:1"): _lm(0.403, 0.730, 0.586, 0.475, 0.384, 0.741, 0.553),
        ("gated_delta_net", "24:1"): _lm(0.410, 0.733, 0.598, 0.502, 0.406, 0.741, 0.565),
        ("gla", "3:1"): _lm(0.398, 0.721, 0.586, 0.488, 0.388, 0.725, 0.551),
        ("hgrn", "6:1"): _lm(0.392, 0.732, 0.602, 0.482, 0.412, 0.733, 0.559),
        ("hgrn2", "6:1"): _lm(0.404, 0.729, 0.604, 0.500, 0.420, 0.733, 0.565),
        ("retnet", "6:1"): _lm(0.380, 0.718, 0.584, 0.475, 0.400, 0.727, 0.547),
        ("attention", "full"): _lm(0.395, 0.704, 0.589, 0.474, 0.400, 0.729, 0.548),
    },
}

# RULER by group at 1.3B (Table 6). Multi-key and single-needle are three tasks each, the words and the questions two.
_GROUPS = ("MK", "MQ", "MV", "Single", "CWE+FWE", "QA", "VT")
_RULER_GROUPS = {
    ("delta_net", "3:1"): (0.349, 0.471, 0.361, 0.791, 0.155, 0.391, 0.191),
    ("gla", "3:1"): (0.313, 0.220, 0.196, 0.784, 0.063, 0.342, 0.234),
    ("gated_delta_net", "3:1"): (0.293, 0.542, 0.502, 0.875, 0.271, 0.300, 0.024),
    ("hgrn2", "6:1"): (0.358, 0.509, 0.507, 0.660, 0.412, 0.364, 0.014),
    ("attention", "full"): (0.332, 0.464, 0.472, 0.559, 0.284, 0.412, 0.066),
}

# RULER's mean at 1.3B, by ratio (Table 5).
_RULER_FAMILIES = ("delta_net", "gated_delta_net", "gla", "hgrn2")
_RULER = {
    "24:1": (0.417, 0.341, 0.293, 0.303),
    "12:1": (0.352, 0.352, 0.288, 0.368),
    "6:1": (0.371, 0.425, 0.330, 0.434),
    "3:1": (0.426, 0.436, 0.332, 0.395),
    "pure": (0.320, 0.356, 0.144, 0.203),
}

# The language-modelling average over both sizes, by ratio (Table 4).
_LM_FAMILIES = ("delta_net", "gated_delta_net", "gla", "hgrn", "hgrn2", "retnet")
_LM = {
    "24:1": (0.472, 0.468, 0.470, 0.488, 0.488, 0.472),
    "12:1": (0.476, 0.478, 0.474, 0.482, 0.488, 0.472),
    "6:1": (0.478, 0.481, 0.471, 0.486, 0.494, 0.472),
    "3:1": (0.475, 0.478, 0.478, 0.483, 0.489, 0.468),
    "pure": (0.472, 0.487, 0.459, 0.459, 0.486, 0.471),
}


def _by_ratio(table: dict[str, tuple[float, ...]], families: tuple[str, ...], measure: str) -> dict:
    return {(family, ratio): {measure: value} for ratio, values in table.items() for family, value in zip(families, values, strict=True)}


def scores(size: str) -> dict[tuple[str, str], dict[str, float]]:
    """{(family, ratio): {measure: value}} of the models of ``size``, measures named as those of :class:`collect.Run`.

    size: "340M", "1.3B", or "both": the averages over both that Table 4 gives. Other sizes have none.
    """
    if size == "both":
        return _by_ratio(_LM, _LM_FAMILIES, "lm/average")
    found = {model: dict(values) for model, values in _BEST.get(size, {}).items()}
    if size == "1.3B":
        ruler = _by_ratio(_RULER, _RULER_FAMILIES, "ruler/average") | {("attention", "full"): {"ruler/average": 0.423}}
        for model, groups in _RULER_GROUPS.items():
            ruler[model] = ruler[model] | {f"ruler/{group}": value for group, value in zip(_GROUPS, groups, strict=True)}
        for model, values in ruler.items():
            found[model] = found.get(model, {}) | values
    return found
