"""Tokenizers: round trips, what a document ends with, saving, and what is refused."""

import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.data import DataError
from hybrid_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from tests.hybrid_jax.data_samples import bpe_tokenizer, texts

EVERY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # what has a UTF-8 form


@given(EVERY_TEXT)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode([*ids, tokenizer.document_end]) == text


def test_bytes_that_are_no_text_still_decode():
    assert ByteTokenizer().decode([0xFF, 65, 256, 300]) == "\ufffdA"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(bpe_tokenizer(["<|endoftext|>"]))
    return folder


def test_hugging_face_round_trip(folder):
    """Truncation, padding and the mark that the file asks for would each lose or add something here."""
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(texts(30), tokenizer.encode_batch(texts(30)), strict=True):
        assert ids == tokenizer.encode(text) and max(ids, default=0) < tokenizer.vocabulary
        assert tokenizer.decode([*ids, tokenizer.document_end]) == text and 0 not in ids  # <mark>
    assert any(len(ids) > 64 for ids in tokenizer.encode_batch(texts(30)))
    assert tokenizer.document_end == 1  # after <mark>


def test_text_cannot_spell_the_end_of_a_document(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.document_end not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_vocabulary_counts_holes(tmp_path):
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 9}, "unk_token": "a"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.document_end) == (10, 9)


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_document_end_from_config(tmp_path, eos):
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>", "<|endoftext|>", "<stop>"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path / "tokenizer.json").document_end == 3
    assert load_tokenizer(tmp_path, document_end="</s>").document_end == 1  # said outright


@pytest.mark.parametrize("spec", ["bytes", "folder"])
def test_saved_is_the_same(tmp_path, folder, spec):
    tokenizer = load_tokenizer(folder if spec == "folder" else spec)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocabulary, again.document_end) == (tokenizer.vocabulary, tokenizer.document_end)
    assert again.encode(texts(1)[0]) == tokenizer.encode(texts(1)[0])


def test_fingerprint_tells_document_ends_apart(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe_tokenizer(["</s>", "<|endoftext|>"]))
    ends = [load_tokenizer(tmp_path, document_end=end).fingerprint for end in ("</s>", "<|endoftext|>")]
    assert len({*ends, ByteTokenizer().fingerprint}) == 3


def test_refused(tmp_path):
    def refuses(match, spec, **options):
        with pytest.raises(DataError, match=match) as error:
            load_tokenizer(spec, **options)
        assert "\n" not in str(error.value)

    refuses("no tokenizer at .*nowhere.*: give", tmp_path / "nowhere")
    refuses("no tokenizer at .*tokenizer.json", tmp_path)
    refuses("byte tokenizer ends documents with id 256", "bytes", document_end="</s>")
    file = tmp_path / "tokenizer.json"
    file.write_text('{"a": 1}')
    refuses("is not a Hugging Face tokenizer.json", file)
    file.write_bytes(bpe_tokenizer([]))
    refuses(r"does not say which token ends a document \(it has none of", file)
    refuses("documents are to end with '<no>', which is not in the vocabulary", file, document_end="<no>")
    file.write_bytes(bpe_tokenizer(["</s>", "<eos>"]))
    refuses("it has </s> and <eos> of", file)
    (tmp_path / "tokenizer_config.json").write_text("{")
    refuses("tokenizer_config.json beside .* is not a JSON object", file)


def test_a_sentencepiece_model(tmp_path):
    """As old checkpoints have it: tokenizer.model alone in a folder, the end of a document its own."""
    texts = [f"The {i}th line of {i * i} words, of which some are the same." for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=90, model_type="bpe", byte_fallback=False
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocabulary, tokenizer.document_end) == (90, 2)
    for text in (texts[7], "some words"):
        ids = tokenizer.encode(text)
        assert max(ids) < 90 and tokenizer.decode([*ids, tokenizer.document_end, 90, 1000]) == text  # a model may have more tokens
    assert tokenizer.encode_batch(texts[:3]) == [tokenizer.encode(text) for text in texts[:3]]
    assert tokenizer.document_end not in tokenizer.encode("a document that spells </s>")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match="'<end>', which is not in the vocabulary"):
        load_tokenizer(tmp_path, document_end="<end>")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="tokenizer.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)
