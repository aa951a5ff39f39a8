"""RULER's tasks against lm-evaluation-harness itself: the prompts its own runs give a model, its word lists, its scores."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_jax.evals.ruler import score, wordlists
from hybrid_jax.evals.ruler.tasks import TASKS, make_examples
from hybrid_jax.evals.ruler.texts import Texts
from tests.hybrid_jax import ruler_samples

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ruler_samples.write_folder(tmp_path_factory.mktemp("ruler") / "texts")


@pytest.mark.parametrize(("task", "seed"), [*((task, 7) for task in TASKS), ("ruler_vt", 140)])
def test_a_run_of_the_harness_gives_the_same_500_prompts(task, seed, ruler_harness, folder):
    """With seed 140 two variables of the solved example come to have one name, and it is drawn again."""
    options = {"length": 2048, "seed": seed}
    theirs = ruler_harness.samples(task, ruler_samples.WORDS, folder=folder, **options)
    ours = make_examples(task, ruler_samples.WORDS, Texts(folder), **options)[1]
    assert [(row["prompt"], row["answers"], row["tokens"]) for row in theirs] == [tuple(example) for example in ours]
    assert {row["new_tokens"] for row in theirs} == {TASKS[task].new_tokens}


def test_every_key_is_the_same(ruler_harness):
    from lm_eval.tasks.ruler.prepare_niah import WORDS

    assert WORDS == list(wordlists.keys())


@settings(deadline=None)
@given(
    st.text(alphabet="abAB1\u00e9\n\t\x01 .", max_size=30),
    st.lists(st.text(alphabet="abAB1\u00e9 ", min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_scores(ruler_harness, text, answers):
    from lm_eval.tasks.ruler import common_utils

    doc = {"max_length": 4096, "outputs": answers}
    for function in common_utils.process_results, common_utils.process_results_part:
        assert function(doc, [text])["4096"] == pytest.approx(score.share_found(text, answers))
