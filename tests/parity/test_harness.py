"""The harness's questions, answered as by its own `HFLM` of the same model and tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from hybrid_jax import config
from hybrid_jax.data.tokenizers import load_tokenizer
from hybrid_jax.evals.harness import HarnessModel
from tests.hybrid_jax.data_samples import bpe_tokenizer, texts
from tests.hybrid_jax.test_model import build

MAX_LENGTH = 64
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, a function of whether texts begin with a mark: theirs, whose logits are ours)."""
    try:
        import torch
        import transformers
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        pytest.fail(f"these tests need torch, transformers and lm_eval[hf] ({error}): pip install -e '.[test,parity]'", pytrace=False)
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(bpe_tokenizer(["<end>"]))
    ours = build(config.GatedDeltaNet(heads=2, head_width=12), layers=2, ratio=2, vocabulary=402)
    ours.tokenizer = load_tokenizer(folder / "tokenizer.json", "<end>")
    forward = jax.jit(ours)

    class Theirs(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            rows = np.zeros((len(input_ids), MAX_LENGTH), np.int32)
            rows[:, : input_ids.shape[1]] = input_ids.numpy()
            logits = torch.tensor(np.asarray(forward(jnp.array(rows))))[:, : input_ids.shape[1]]
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    def theirs(mark):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="<end>", **({"bos_token": "<mark>"} if mark else {})
        )
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        model = Theirs(transformers.LlamaConfig(vocab_size=402, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        # Without its cache of logits, which reads the wrong ones where two requests are one text with different continuations (0.4.13).
        options = dict(max_length=MAX_LENGTH, batch_size=3, device="cpu", add_bos_token=mark, logits_cache=False)
        return HFLM(pretrained=model, tokenizer=tokenizer, **options)

    return ours, theirs


@pytest.mark.parametrize("mark", [False, True])
def test_answers(models, mark):
    ours, theirs = models
    theirs, ours = theirs(mark), HarnessModel(ours, max_length=MAX_LENGTH, batch=2, beginning=0 if mark else None)
    contexts = ["", "a", "spaces after  ", *texts(8, seed=3, longest=120)]
    continuations = [" b", "a\nc ", *texts(3, seed=4, longest=30)]
    pairs = [Instance("loglikelihood", {}, (context, text), 0) for context in contexts for text in continuations]
    found, expected = ours.loglikelihood(pairs), theirs.loglikelihood(pairs)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts(6, seed=5, longest=300)]
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling), rtol=2e-5)
