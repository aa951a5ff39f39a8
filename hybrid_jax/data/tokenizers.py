"""Text to token ids and back: bytes, any Hugging Face `tokenizer.json`, or a SentencePiece `tokenizer.model`.

A tokenizer has ``encode``, ``encode_batch``, ``decode``, ``vocabulary`` (ids are below it), ``document_end`` (the id that
closes every document), ``name``, ``fingerprint`` (equal for tokenizers that give equal ids) and ``save``.
"""

import hashlib
import json
import os
from collections.abc import Iterable

from hybrid_jax.data import DataError
from hybrid_jax.data.folders import open_folder, reason

FILES = ("tokenizer.json", "tokenizer.model")  # what a folder's tokenizer is in, the first of them that is there
DOCUMENT_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")  # tried where no tokenizer_config.json says


class Tokenizer:
    """What all kinds share: the files they are saved in, and the fingerprint of those files."""

    files: dict[str, bytes]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
        return digest.hexdigest()

    def save(self, folder) -> None:
        """Write the files that `load_tokenizer` needs into ``folder`` (a path or a bucket URL), making it if need be."""
        files = open_folder(folder)
        for write in [files.write(name, content) for name, content in self.files.items()]:
            write.result()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without a mark at its start or end."""
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """The bytes of the UTF-8 text, and 256 at the end of a document."""

    name = "bytes"
    vocabulary = 257
    document_end = 256
    files = {"tokenizer.json": b'{"type": "bytes"}\n'}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; document ends are dropped, bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, used without its own marks, truncation and padding."""

    def __init__(self, content: bytes, document_end: str, name: str):
        self.name = name
        self.files = {"tokenizer.json": content, "tokenizer_config.json": json.dumps({"eos_token": document_end}).encode()}
        self._tokenizer = _parse(content, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as the text they are: a document cannot spell its own end
        ids = self._tokenizer.get_vocab()
        if document_end not in ids:
            raise DataError(f"documents are to end with {document_end!r}, which is not in the vocabulary of {name}: name a token that is")
        self.vocabulary = max(ids.values()) + 1  # not their number: ids may have holes
        self.document_end = ids[document_end]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, special tokens dropped."""
        return self._tokenizer.decode([int(i) for i in ids])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, used without its own marks."""

    def __init__(self, content: bytes, document_end: str, name: str):
        self.name = name
        self.files = {"tokenizer.model": content, "tokenizer_config.json": json.dumps({"eos_token": document_end}).encode()}
        self._pieces = _parse_pieces(content, name)
        self.vocabulary = self._pieces.get_piece_size()
        self.document_end = self._pieces.piece_to_id(document_end)
        if self._pieces.id_to_piece(self.document_end) != document_end:  # of what it does not know it gives <unk>
            raise DataError(f"documents are to end with {document_end!r}, which is not in the vocabulary of {name}: name a token that is")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._pieces.encode(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, control symbols dropped, and what is none of its pieces: a model's vocabulary may be larger."""
        return self._pieces.decode([i for i in map(int, ids) if i < self.vocabulary])


def load_tokenizer(spec, document_end: str | None = None) -> Tokenizer:
    """The tokenizer named by ``spec``: "bytes", a `tokenizer.json` or `tokenizer.model`, or a folder that holds one (the former first).

    ``document_end`` is the token that closes a document. Left open, it is the ``eos_token`` of the `tokenizer_config.json`
    in the same folder, or else the one token of `DOCUMENT_ENDS` that the vocabulary holds.

    Raises `DataError` where there is no such file, it is something else, or the end of a document stays unclear.
    """
    if spec == "bytes":
        if document_end is not None:
            raise DataError(f"the byte tokenizer ends documents with id 256, not with {document_end!r}: leave the document end out")
        return ByteTokenizer()
    spec = str(spec)
    is_folder = not spec.endswith((".json", ".model")) if "://" in spec else os.path.isdir(spec)  # buckets have no folders to ask for
    folder, names = (spec, FILES) if is_folder else (os.path.dirname(spec), (os.path.basename(spec),))
    try:
        read = {name: open_folder(folder).read(name).result() for name in (*names, "tokenizer_config.json")}
    except ValueError as error:
        raise DataError(f"cannot read {spec}: {reason(error)}: check the address and your right to read it") from None
    found = {name: result.value for name, result in read.items() if result.state == "value"}
    name = next((name for name in names if name in found), None)
    if name is None:
        path = os.path.join(folder, names[0])
        accepted = '"bytes", a Hugging Face tokenizer.json, a SentencePiece tokenizer.model, or a folder that holds one'
        raise DataError(f"no tokenizer at {path}: give {accepted}")
    path = os.path.join(folder, name)
    return tokenizer_from_files(found[name], found.get("tokenizer_config.json"), name=path, document_end=document_end)


def tokenizer_from_files(content: bytes, config: bytes | None, *, name: str, document_end: str | None = None) -> Tokenizer:
    """The tokenizer whose file ``name`` (of `FILES`) and `tokenizer_config.json` (None: there is none) were read from somewhere."""
    if content == ByteTokenizer.files["tokenizer.json"]:
        return ByteTokenizer()
    if name.endswith(".model"):
        pieces = _parse_pieces(content, name)
        own = pieces.id_to_piece(pieces.eos_id()) if pieces.eos_id() >= 0 else None
        return SentencePieceTokenizer(content, document_end or _stated_document_end(config, name) or own, name)
    return HuggingFaceTokenizer(content, document_end or _find_document_end(content, config, name), name)


def _parse(content: bytes, name: str):
    import tokenizers  # here, so that byte-level work does not wait for it

    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{name} is not a Hugging Face tokenizer.json: {error}") from None


def _parse_pieces(content: bytes, name: str):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # the library raises several
        raise DataError(f"{name} is not a SentencePiece model: {error}") from None


def _stated_document_end(config: bytes | None, name: str) -> str | None:
    try:
        eos = json.loads(config or b"{}").get("eos_token")
    except (ValueError, AttributeError):
        raise DataError(f"the tokenizer_config.json beside {name} is not a JSON object: mend it or take it away") from None
    return eos["content"] if isinstance(eos, dict) else eos


def _find_document_end(content: bytes, config: bytes | None, name: str) -> str:
    if eos := _stated_document_end(config, name):
        return eos
    vocabulary = _parse(content, name).get_vocab()
    found = [token for token in DOCUMENT_ENDS if token in vocabulary]
    if len(found) != 1:
        raise DataError(
            f"{name} does not say which token ends a document (it has {' and '.join(found) or 'none'} of {', '.join(DOCUMENT_ENDS)}): "
            "name it (--document_end=TOKEN), or put its tokenizer_config.json beside it"
        )
    return found[0]
