"""Generating: batches, turns, chunks, stops and seeds change nothing about what a prompt is followed by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_jax
from hybrid_jax import config, generation
from hybrid_jax.data.tokenizers import Tokenizer
from hybrid_jax.generation import Session
from hybrid_jax.sampling import Sampling, sampling
from tests.hybrid_jax.test_model import SMALL, build

PROMPTS = [[1, 2, 3], [7] * 20, list(range(40)), [5]]


class Pairs(Tokenizer):
    """Each of 61 ids is a pair of letters; 60 ends a document."""

    name, vocabulary, document_end, files = "pairs", 61, 60, {}
    LETTERS = "abcdefgh"

    def encode_batch(self, texts):
        return [[8 * self.LETTERS.index(a) + self.LETTERS.index(b) for a, b in zip(t[::2], t[1::2], strict=True)] for t in texts]

    def decode(self, ids):
        return "".join(self.LETTERS[i // 8] + self.LETTERS[i % 8] for i in ids if i != self.document_end)


@pytest.fixture(scope="module")
def model():
    """Of one linear layer and one of attention, and lively enough that it does not repeat one token."""
    model = build(config.GLA(heads=2, conv_width=4), layers=2, ratio=2, attention=config.Attention(heads=4, kv_heads=2))
    model.tokenizer = Pairs()
    return model


def generate(model, prompts, tokens=12, **options):
    return hybrid_jax.generate(model, prompts, max_new_tokens=tokens, stop_tokens=options.pop("stop_tokens", ()), **options)


@pytest.fixture(scope="module")
def greedy(model):
    """Twelve likeliest tokens after each of PROMPTS, in a batch."""
    return generate(model, PROMPTS)


def test_greedy_is_the_argmax_of_full_forwards(model, greedy):
    forward = jax.jit(model)
    for prompt, written in zip(PROMPTS, greedy, strict=True):
        row = jnp.pad(jnp.array(prompt + written), (0, 52 - len(prompt) - 12))[None]  # one length, one compilation
        expected = jnp.argmax(forward(row)[0], axis=-1)[len(prompt) - 1 :][:12]
        assert written == expected.tolist()
    assert len({token for written in greedy for token in written}) > 8


def test_each_alone_is_as_in_the_batch(model, greedy):
    assert [generate(model, [PROMPTS[row]])[0] for row in (0, 2)] == [greedy[0], greedy[2]]


def test_a_long_prompt_is_read_in_chunks(model, greedy, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 16)
    assert generate(model, PROMPTS) == greedy


def test_texts_and_tokens_are_one(model, greedy):
    pairs = model.tokenizer
    texts = [pairs.decode(prompt) for prompt in PROMPTS]
    assert generate(model, texts) == [pairs.decode(written) for written in greedy]
    pieces = list(hybrid_jax.stream(model, texts, max_new_tokens=12, stop_tokens=()))
    assert [row for row, _ in pieces] == [0, 1, 2, 3] * 12  # as they come
    assert ["".join(piece for at, piece in pieces if at == row) for row in range(4)] == [pairs.decode(written) for written in greedy]
    begun = generate(model, [[7, *prompt] for prompt in PROMPTS])
    assert begun != greedy and generate(model, texts, beginning=7) == [pairs.decode(written) for written in begun]


def first_time(token, written):
    return written.index(token) if token in written else len(written)


def test_stop_tokens_end_a_row_and_not_the_others(model, greedy):
    for stop in ([greedy[0][3]], [greedy[1][5], greedy[2][0]]):
        expected = [written[: min(first_time(token, written) for token in stop)] for written in greedy]
        assert generate(model, PROMPTS, stop_tokens=stop) == expected
    model.tokenizer.document_end = greedy[0][3]  # which ends a row where nothing else is said
    try:
        expected = [written[: first_time(greedy[0][3], written)] for written in greedy]
        assert hybrid_jax.generate(model, PROMPTS, max_new_tokens=12) == expected
    finally:
        del model.tokenizer.document_end


def test_stop_strings_may_span_tokens(model, greedy):
    texts = [model.tokenizer.decode(written) for written in greedy]
    stop = texts[0][5:8]  # from the middle of one token to the end of the next but one
    assert generate(model, [model.tokenizer.decode(p) for p in PROMPTS], stop=[stop, texts[1][7:10]]) == [
        text[: min(at for s in (stop, texts[1][7:10]) if (at := text.find(s)) >= 0)] if stop in text or texts[1][7:10] in text else text
        for text in texts
    ]
    tokens = generate(model, PROMPTS[:1], stop=stop)[0]  # up to the token that completes it
    assert tokens == greedy[0][: -(-(texts[0].find(stop) + 3) // 2)]


ENDS = {  # how a turn may end: options of write, and how many tokens are looked at before it is closed
    "at the most": (dict(max_new_tokens=5), None),
    "closed": (dict(max_new_tokens=12), 4),
    "stop token": (dict(max_new_tokens=12, stop_tokens="third"), None),
    "stop string": (dict(max_new_tokens=12, stop="third"), None),
}


@pytest.mark.parametrize("options, looked_at", ENDS.values(), ids=ENDS.keys())
def test_turns_are_one_long_prompt(model, greedy, options, looked_at):
    """However a turn ends, the next goes on from what was read and given out; rows end at different times."""
    prompts, more = PROMPTS[:2], [[9, 8], [4, 4, 4]]
    third = greedy[0][3]
    options = {"stop_tokens": (), "texts": False} | options
    if options.get("stop"):
        options["stop"] = model.tokenizer.decode([third])
    if options["stop_tokens"]:
        options["stop_tokens"] = [third]
    session = Session(model, 2)
    session.read(prompts)
    written = [[], []]
    turn = session.write(settings=Sampling(), **options)
    for number, (row, token) in enumerate(turn, 1):
        written[row].append(token)
        if number == looked_at:
            turn.close()
    assert all(w == g[: len(w)] for w, g in zip(written, greedy, strict=False)) and written[0]
    session.read(more)
    assert session.lengths.tolist() == [len(p) + len(w) + len(m) for p, w, m in zip(prompts, written, more, strict=True)]
    assert session._cache.lengths.tolist() == session.lengths.tolist()
    whole = [p + w + m for p, w, m in zip(prompts, written, more, strict=True)]
    again = list(session.write(8, Sampling(), stop_tokens=(), texts=False))
    assert [[token for at, token in again if at == row] for row in range(2)] == generate(model, whole, tokens=8)


def test_closed_between_two_rows_both_remember_the_step(model):
    session = Session(model, 2)
    session.read(PROMPTS[:2])
    turn = session.write(12, Sampling(), stop_tokens=(), texts=False)
    next(turn)
    turn.close()
    session.read([[9], [9]])
    assert session.lengths.tolist() == session._cache.lengths.tolist() == [len(prompt) + 2 for prompt in PROMPTS[:2]]


def test_the_end_of_a_row_does_not_reach_a_step_under_way(model, greedy):
    """Devices that are late read which rows have ended as it was when they were asked, also where they read it in place."""
    session = Session(model, 1)
    buffer = np.zeros(128, bool)
    session._ended = buffer[-buffer.ctypes.data % 64 :][:1]  # what JAX reads in place on CPU
    late, slow = jax.jit(lambda done, x: done | (jnp.sum(x @ x @ x) < 0)), jnp.ones((1000, 1000))
    step = session._programs.step

    def with_late_ends(*arguments):
        tokens, done, cache = step(*arguments)
        return tokens, late(done, slow), cache

    session._programs = session._programs._replace(step=with_late_ends)
    session.read(PROMPTS[:1])
    stop = model.tokenizer.decode(greedy[0][3:4])
    written = [token for _, token in session.write(12, Sampling(), stop=stop, stop_tokens=(), texts=False)]
    session.read([[9]])
    assert session.lengths.tolist() == session._cache.lengths.tolist() == [len(PROMPTS[0]) + len(written) + 1]


def test_a_conversation_grows(model):
    session, said = Session(model, 1), []
    for turn in range(2):
        prompt = [(7 * turn + i) % 60 for i in range(30)]
        session.read([prompt])
        said += prompt
        said += [token for _, token in session.write(20, Sampling(), stop_tokens=(), texts=False)]
    assert session._slots >= 100 and session.lengths == [100]
    assert generate(model, [said[:-20]], tokens=20) == [said[-20:]]


def test_a_window_keeps_what_it_sees_and_a_chunk(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 16)
    model = build(config.Attention(heads=4, kv_heads=2, window=16), layers=1, ratio=None)
    session = Session(model, 1)
    session.read([list(range(50))], room=30)
    assert session._cache.stages[0][0].state.k.shape[4] == 16 + 16
    written = [token for _, token in session.write(30, Sampling(), texts=False)]
    row = jnp.array([[*range(50), *written]])
    assert written == jnp.argmax(jax.jit(model)(row)[0], axis=-1)[49:-1].tolist()


def test_seeds(model, greedy):
    drawn = generate(model, PROMPTS, temperature=1.0, seed=3)
    assert drawn == generate(model, PROMPTS, temperature=1.0, seed=3)
    assert drawn != generate(model, PROMPTS, temperature=1.0, seed=4)
    assert generate(model, PROMPTS[:1], temperature=1.0, seed=3) == drawn[:1]  # whatever else is in the batch
    same = generate(model, [[1, 2, 3]] * 4, temperature=1.0, seed=3)
    assert len({tuple(row) for row in same}) == 4  # rows draw apart
    assert generate(model, PROMPTS, temperature=2.0, top_k=1, seed=5) == greedy
    assert generate(model, PROMPTS, temperature=1.0, top_p=1e-6, min_p=0.5) == greedy


def test_every_draw_has_noise_of_its_own(model):
    """Of a model that finds all tokens alike: the noise of one draw, used again, would draw the same token again."""
    graph, params = nnx.split(model)
    params["output"]["kernel"].set_value(jnp.zeros_like(params["output"]["kernel"].get_value()))
    session, written = Session(nnx.merge(graph, params), 4, seed=3), [[] for _ in PROMPTS]
    for _ in range(2):
        session.read(PROMPTS)
        for row, token in session.write(12, sampling(1.0), stop_tokens=(), texts=False):
            written[row].append(token)
    for row in written:
        assert len(set(row)) > 12 and row[:12] != row[12:]  # of 61 tokens 24 draws give 20 on average; and in turns


def test_the_first_token_has_the_models_distribution(model):
    """Frequencies in 200 batches of four rows of one prompt, against the softmax of the forward pass."""
    logits = model(jnp.array([PROMPTS[0]]))[0, -1]
    counts = np.zeros(SMALL["vocabulary"])
    for seed in range(200):
        for (token,) in generate(model, [PROMPTS[0]] * 4, tokens=1, temperature=0.7, seed=seed):
            counts[token] += 1
    expected = 800 * np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 3)


def test_one_step_is_compiled_and_its_cache_is_given_to_it(model):
    generate(model, PROMPTS, temperature=0.5, top_k=3)
    session = Session(model, 4)
    compiled = session._programs.step._cache_size()
    session.read(PROMPTS[::-1])
    turn = session.write(20, sampling(0.7, top_k=5), stop_tokens=(), texts=False)  # other prompts, lengths and settings
    next(turn)
    given = jax.tree.leaves(session._cache)
    list(turn)
    assert all(array.is_deleted() for array in given)
    assert session._programs.step._cache_size() == compiled


def test_weights_are_cast_once_where_they_would_be_at_every_use():
    model = build(config.GatedDeltaNet(heads=2, head_width=8), layers=2, ratio=2, attention=config.Attention(heads=2), dtype="bfloat16")
    cast, before = (dict(nnx.to_flat_state(params)) for params in (Session(model, 1)._params, nnx.state(model)))
    names = {path[-2:] for path, leaf in cast.items() if leaf[...].dtype == jnp.bfloat16}
    assert {("embedding", "table"), ("q_proj", "kernel"), ("down_proj", "kernel"), ("output", "kernel")} <= names
    assert not {name for _, name in names} & {"scale", "A_log", "dt_bias", "weight"}  # of norms, gates and convolutions
    for path, leaf in before.items():
        assert leaf[...].dtype == jnp.float32 and jnp.array_equal(cast[path][...], leaf[...].astype(cast[path][...].dtype))


MISTAKES = {
    "a text for a list": (dict(prompts="abc"), "prompts is 'abc', needs a list"),
    "no prompts": (dict(prompts=[]), r"prompts is \[\], needs a list"),
    "both kinds": (dict(prompts=["ab", [1]]), "mixes texts and lists"),
    "an empty prompt": (dict(prompts=[[1], []]), r"prompts\[1\] is empty, needs at least one token"),
    "an empty text": (dict(prompts=["ab", ""]), r"prompts\[1\] is empty"),
    "a token too large": (dict(prompts=[[1], [2, 61]]), r"prompts\[1\] holds token 61, needs tokens from 0 to 60"),
    "a negative token": (dict(prompts=[[-1]]), r"prompts\[0\] holds token -1"),
    "nothing to write": (dict(max_new_tokens=0), "max_new_tokens is 0, needs to be at least 1"),
    "temperature": (dict(temperature=-1.0), "temperature is -1.0"),
    "a beginning of tokens": (dict(beginning=1), "beginning stands before texts, and prompts are tokens: put it first"),
    "an empty stop": (dict(stop=["a", ""]), "stop holds an empty string"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told_before_anything_runs(model, options, message):
    with pytest.raises(ValueError, match=message):
        hybrid_jax.stream(model, **({"prompts": [[1]]} | options))  # at the call, not at the first piece


def test_an_option_that_there_is_not_is_told_with_those_that_there_are(model):
    with pytest.raises(TypeError, match="^generate has no parameter 'max_tokens'; .*it takes max_new_tokens, temperature, .*, beginning$"):
        hybrid_jax.generate(model, [[1]], max_tokens=5)


def test_without_a_tokenizer():
    model = build(config.GLA(heads=2), layers=1, ratio=None)
    with pytest.raises(ValueError, match="no tokenizer: give lists of token ids, or set model.tokenizer"):
        hybrid_jax.generate(model, ["text"])
    with pytest.raises(ValueError, match="no tokenizer: give stop_tokens"):
        hybrid_jax.generate(model, [[1]], stop=["x"])


def test_nothing_is_written_before_something_is_read(model):
    with pytest.raises(ValueError, match="read a prompt before each write"):
        next(Session(model, 1).write(3, Sampling()))
