"""Documents, tokenizers and sources that the tests of the data share."""

import gzip
import json

import numpy as np
import tokenizers

from hybrid_jax.data.token_source import ArraySource
from hybrid_jax.data.tokenizers import ByteTokenizer


def texts(count: int, seed: int = 0, longest: int = 300) -> list[str]:
    """``count`` different texts, of ASCII and of characters two to four bytes long, with line breaks and quotes in them."""
    rng = np.random.default_rng(seed)
    alphabet = np.array(list('abcdefgh \n\r\t"\\{}0123é\u2028漢😀'))
    return [f"{i}: " + "".join(rng.choice(alphabet, rng.integers(0, longest))) for i in range(count)]


def array_source(lengths: list[int], seed: int = 0) -> ArraySource:
    """Documents of ``lengths`` tokens, their ends included, with random bytes in them."""
    tokens = np.random.default_rng(seed).integers(0, 256, sum(lengths)).astype(np.uint16)
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens[ends - 1] = ByteTokenizer.document_end
    return ArraySource(tokens, ends, tokenizer=ByteTokenizer(), bytes=sum(lengths) - len(lengths), name="a sample")


def bpe_tokenizer(special_tokens: list[str]) -> bytes:
    """The content of a small byte-level BPE `tokenizer.json`, with truncation, padding and a mark at the start of every text set."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<mark>", *special_tokens], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(50), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<mark> $A", special_tokens=[("<mark>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    return tokenizer.to_str().encode()


def write_texts(folder, documents: list[str]) -> None:
    """Each document a .txt file, in the order of their names."""
    folder.mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())


def write_jsonl(path, documents: list[str], field: str = "text") -> None:
    """All documents in one .jsonl, .jsonl.gz or .jsonl.zst file, with other fields around the text."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, field: text, "more": [1]}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(documents))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines.encode())
    else:
        path.write_bytes(lines.encode())


def write_parquet(path, documents: list[str], rows_a_group: int) -> None:
    """A table of the shape of FineWeb-Edu: the text and columns about it."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents, "score": [3.5] * len(documents)})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_a_group)


def documents_of(source) -> list[str]:
    """The texts of a source, back from its tokens; each document is checked to end as documents do, and only there."""
    out, start = [], 0
    for stop in source.documents:
        tokens = source.read(start, int(stop))
        assert tokens[-1] == source.tokenizer.document_end and source.tokenizer.document_end not in tokens[:-1]
        out.append(source.tokenizer.decode(tokens[:-1]))
        start = int(stop)
    assert start == len(source)
    return out
