"""Text as it comes: whole characters, nothing of a stop string, and in the end what decoding everything at once gives."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from hybrid_jax.text_stream import TextStream

TEXT = "Straße, 日本語, 👩‍👩‍👧 and e\u0301; "


def pieces(tokenizer, tokens, stop=(), before=()):
    """What comes of each token and at the end."""
    stream = TextStream(tokenizer, stop, before)
    given_out = []
    for token in tokens:
        given_out.append(stream.push(token))
        if stream.stopped:
            break
    return [*given_out, stream.flush()]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "the cat and the hat and the bat"] * 5, trainer)
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Tokens that begin with a space that is not there at the start of a text, as SentencePiece's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "▁the": 1, "▁cat": 2, "s": 3}, unk_token="</s>"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    file = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """What is not in the vocabulary as bytes, as Llama's and Mistral's: of a row of them none is decoded while one is missing."""
    byte = {f"<0x{i:02X}>": i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({**byte, "a": 256, "b": 257, "</s>": 258}, [], byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    file = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(file))
    return load_tokenizer(file)


@given(st.text(), st.text())
def test_any_text_of_bytes_comes_whole(text, before):
    tokenizer = ByteTokenizer()
    given_out = pieces(tokenizer, tokenizer.encode(text), before=tokenizer.encode(before))
    assert "".join(given_out) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert given_out[-1] == ""  # nothing was late


@given(st.lists(st.integers(0, 256)))
def test_any_bytes_come_as_they_are_decoded_at_once(tokens):
    assert "".join(pieces(ByteTokenizer(), tokens)) == ByteTokenizer().decode(tokens)


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_of_a_bpe(bpe, tokens):
    assert "".join(pieces(bpe, tokens)) == bpe.decode(tokens)


def cut_anywhere(tokenizer, text, cut):
    """What comes where a text's first tokens came before, and what is expected: the text from its first character that was not whole."""
    tokens = tokenizer.encode(text)
    before, after = tokens[: cut % (len(tokens) + 1)], tokens[cut % (len(tokens) + 1) :]
    whole = max((tokenizer.decode(before[:n]).rstrip("\N{REPLACEMENT CHARACTER}") for n in range(len(before) + 1)), key=len)
    return "".join(pieces(tokenizer, after, before=before)), text[len(whole) :] if after else ""


TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"))


@given(TEXTS, st.integers(0))
def test_a_character_that_began_before_is_not_lost(text, cut):
    found, expected = cut_anywhere(ByteTokenizer(), text, cut)
    assert found == expected


@given(st.lists(st.sampled_from([*TEXT, " ", "the "]), max_size=20).map("".join), st.integers(0))
def test_nor_where_tokens_hold_parts_of_two(bpe, text, cut):
    found, expected = cut_anywhere(bpe, text, cut)
    assert found == expected


@given(st.text(alphabet="ab👩語é"), st.integers(0))
def test_nor_where_one_part_spoils_the_bytes_around_it(fallback, text, cut):
    found, expected = cut_anywhere(fallback, text, cut)
    assert found == expected


def test_characters_of_several_tokens_come_when_they_are_whole():
    given_out = pieces(ByteTokenizer(), "aß日".encode())
    assert given_out == ["a", "", "ß", "", "", "日", ""]


def test_the_space_between_the_prompt_and_the_first_token(words):
    assert words.decode([1, 2, 3]) == "the cats"
    assert pieces(words, [2, 3, 1], before=[1]) == [" cat", "s", " the", ""]
    assert pieces(words, [2, 0, 3]) == ["cat", "", "s", ""]  # and a special token, which has no text


@pytest.mark.parametrize(
    "stop, expected",
    [
        (["and"], "the cat "),
        (["xyz", " hat", "hat"], "the cat and the"),
        (["e ha", "nd the hat and"], "the cat and th"),
        (["the cat and the hat and the bat!"], "the cat and the hat and the bat"),
        (["t"], ""),
    ],
)
def test_a_stop_string_anywhere_in_the_tokens(bpe, stop, expected):
    text = "the cat and the hat and the bat"
    for tokenizer in (bpe, ByteTokenizer()):
        given_out = pieces(tokenizer, tokenizer.encode(text), stop)
        assert "".join(given_out) == expected
        stream = TextStream(tokenizer, stop)
        for token in tokenizer.encode(text):
            stream.push(token)
            if stream.stopped:
                break
        assert stream.stopped == (expected != text) and (not stream.stopped or stream.flush() == "")


@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_any_stop_strings(text, stop):
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    given_out = pieces(ByteTokenizer(), text.encode(), stop)
    if not ends:
        assert "".join(given_out) == text
    else:  # the first that is complete ends the text, before the earliest that is there by then
        seen = text[: min(ends)]
        assert "".join(given_out) == seen[: min(at for s in stop if (at := seen.find(s)) >= 0)]
