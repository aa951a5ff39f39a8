"""The command that generates: on a trained run, a converted checkpoint and a Hugging Face folder; in one go and in turns."""

import contextlib
import io
import json
import os
import sys

import pytest
import tokenizers
from absl import flags

import hybrid_jax
from experiments import convert, generate
from hybrid_jax.generation import Session
from hybrid_jax.sampling import Sampling
from tests.experiments.commands import run
from tests.hybrid_jax import hf_folders

FLAGS = ("prompt", "prompt_tokens", "interactive", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "tokenizer")


def run_generate(*arguments):
    for name in FLAGS:
        flags.FLAGS[name].unparse()
    return run(generate.main, *arguments)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Hugging Face folder without a tokenizer."""
    described = hf_folders.fla_options("gla", num_hidden_layers=2, attn=dict(layers=[1], num_heads=2))
    return hf_folders.write(tmp_path_factory.mktemp("theirs") / "gla", described, hf_folders.random_tensors(described))


def test_a_trained_run_goes_on_from_a_prompt(finished):
    result = run_generate(f"--workdir={finished}", "--prompt=Straße", "--max_new_tokens=10")
    model = hybrid_jax.load(finished)
    assert result == (0, "Straße" + hybrid_jax.generate(model, ["Straße"], max_new_tokens=10)[0] + "\n", "")
    begun = run_generate(f"--workdir={finished}", "--prompt=Straße", "--max_new_tokens=10", "--beginning=260")
    assert begun == (0, "Straße" + hybrid_jax.generate(model, ["Straße"], max_new_tokens=10, beginning=260)[0] + "\n", "")
    short = (f"--workdir={finished}", "--prompt=def", "--max_new_tokens=10")
    drawn = [run_generate(*short, "--temperature=2", f"--seed={seed}") for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    first = hybrid_jax.load(finished, step=4)
    assert run_generate(*short, "--dtype=float32") == run_generate(*short)  # which is its own
    result = run_generate(*short, "--step=4", "--top_p=0.9")
    assert result.out == "def" + hybrid_jax.generate(first, ["def"], max_new_tokens=10)[0] + "\n"


def test_every_flag_of_the_draws_and_the_end_is_passed_on(finished, monkeypatch):
    given = []
    monkeypatch.setattr(Session, "read", lambda *_, **__: None)
    monkeypatch.setattr(Session, "write", lambda session, *of, **named: given.append((*of, named)) or iter(()))
    draws = ("--temperature=0.5", "--top_k=7", "--top_p=0.75", "--min_p=0.125", "--max_new_tokens=9")
    result = run_generate(f"--workdir={finished}", "--prompt=def", *draws, "--stop=\\n\\n", "--stop=end")
    assert result == (0, "def\n", "")
    assert given == [(9, Sampling(0.5, 7, 0.75, 0.125), {"stop": ["\n\n", "end"], "texts": True})]


def test_programs_are_kept_in_a_run_alone(finished, theirs, monkeypatch):
    kept = []
    monkeypatch.setattr(generate, "keep_programs", kept.append)
    for folder in (finished, theirs):
        assert run_generate(f"--workdir={folder}", "--prompt_tokens=1", "--max_new_tokens=1").code == 0
    assert kept == [finished]
    monkeypatch.setattr(os, "access", lambda folder, mode: (folder, mode) != (finished, os.W_OK))  # which root has anyway
    assert run_generate(f"--workdir={finished}", "--prompt_tokens=1", "--max_new_tokens=1").code == 0 and kept == [finished]


def test_turns_go_on_from_all_there_was(finished, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\\n    return\n\nimport\n"))
    result = run_generate(f"--workdir={finished}", "--interactive", "--max_new_tokens=6", "--beginning=260")
    assert result.code == 0, result.err
    model = hybrid_jax.load(finished)
    session, turns = Session(model, 1), []
    for first, line in (([260], "def f(x):\n    return"), ([], "import")):  # which stands before the first turn alone
        session.read([first + model.tokenizer.encode(line)], room=6)
        turns.append("".join(piece for _, piece in session.write(6, Sampling())))
    assert result.out.splitlines()[0].startswith("Type some text and press Enter")
    assert result.out.split("\n", 1)[1] == "\n".join([*turns, "", ""])


@pytest.mark.parametrize("in_a_terminal", [True, False])
def test_ctrl_c_at_the_prompt(in_a_terminal, monkeypatch, capsys):
    """In a terminal it ends the line, as in a shell; where lines come from elsewhere nobody would see a new prompt."""
    typed, prompts = [KeyboardInterrupt, "", KeyboardInterrupt, EOFError], []

    def answer(prompt):
        prompts.append(prompt)
        if isinstance(line := typed.pop(0), str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(generate.sys.stdin, "isatty", lambda: in_a_terminal)
    with contextlib.nullcontext() if in_a_terminal else pytest.raises(KeyboardInterrupt):
        generate.converse(None, None, [])
    assert prompts == (["> "] * 4 if in_a_terminal else [""])
    assert capsys.readouterr().out.count("\n") == (4 if in_a_terminal else 1)


def test_a_folder_without_a_tokenizer_takes_tokens(theirs, tmp_path):
    result = run_generate(f"--workdir={theirs}", "--prompt=def")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "has no tokenizer: give one (--tokenizer=FOLDER or --tokenizer=bytes), or prompt with --prompt_tokens=IDS" in result.err
    result = run_generate(f"--workdir={theirs}", "--prompt_tokens=5,17,60", "--max_new_tokens=7")
    written = hybrid_jax.generate(hybrid_jax.load(theirs), [[5, 17, 60]], max_new_tokens=7)[0]
    assert result == (0, " ".join(map(str, written)) + " \n", "")

    for name in ("from_hf", "to_hf", "from_run", "to_dtype"):
        flags.FLAGS[name].unparse()
    assert run(convert.main, f"--from_hf={theirs}", f"--workdir={tmp_path / 'run'}").code == 0
    assert run_generate(f"--workdir={tmp_path / 'run'}", "--prompt=def").code == 2  # it was not trained on bytes
    assert run_generate(f"--workdir={tmp_path / 'run'}", "--prompt_tokens=5,17,60", "--max_new_tokens=7") == result


def test_a_tokenizer_that_comes_along_or_is_given(theirs, tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(60)} | {"</s>": 60}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    given = run_generate(f"--workdir={theirs}", "--prompt=w5 w7", f"--tokenizer={tmp_path / 'tokenizer.json'}", "--max_new_tokens=5")
    assert given.code == 0 and len(given.out.split()) == 7 and given.out.startswith("w5 w7")
    for file in theirs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert run_generate(f"--workdir={tmp_path}", "--prompt=w5 w7", "--max_new_tokens=5") == given
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    with pytest.warns(UserWarning, match="the model has no tokenizer, so that it takes tokens only: .* is not a Hugging Face tokenizer"):
        assert hybrid_jax.load(tmp_path).tokenizer is None


MISTAKES = {
    "no prompt": (["--workdir={run}"], "give one of --prompt=TEXT, --prompt_tokens=IDS and --interactive"),
    "two prompts": (["--workdir={run}", "--prompt=a", "--interactive"], "give one of --prompt"),
    "an empty prompt": (["--workdir={run}", "--prompt="], "--prompt is empty: give at least one character"),
    "no workdir": (["--prompt=a"], "give the --workdir of a training run"),
    "no run": (["--workdir=nowhere", "--prompt=a"], "nowhere holds no model: it has no config.json"),
    "a beginning of tokens": (["--workdir={run}", "--prompt_tokens=1", "--beginning=1"], "put it first in --prompt_tokens"),
    "tokens that are none": (["--workdir={run}", "--prompt_tokens=1,x"], "--prompt_tokens=1,x must be integers"),
    "a token out of the vocabulary": (["--workdir={run}", "--prompt_tokens=1,264"], "holds token 264, needs tokens from 0 to 263"),
    "temperature": (["--workdir={run}", "--prompt=a", "--temperature=-1"], "temperature is -1.0, needs a number of at least 0"),
    "top_p": (["--workdir={run}", "--prompt=a", "--top_p=1.5"], "top_p is 1.5, needs to be above 0 and at most 1"),
    "no tokens": (["--workdir={run}", "--prompt=a", "--max_new_tokens=0"], "max_new_tokens=0"),
    "no such tokenizer": (["--workdir={run}", "--prompt=a", "--tokenizer=nowhere"], "no tokenizer at nowhere"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told_in_a_line(finished, arguments, message):
    result = run_generate(*(argument.format(run=finished) for argument in arguments))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert message in result.err
