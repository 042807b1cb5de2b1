"""example-cpu.py, and the command line of all scripts."""

import sys

import pytest
from conftest import TOKENIZER

import llama
from llama.cli import parse

RULE = f"\n\n{'=' * 34}\n\n"


@pytest.fixture(scope="module")
def flags(checkpoint) -> list[str]:
    return ["--ckpt_dir", str(checkpoint), "--tokenizer_path", str(TOKENIZER), "--temperature", "0"]


@pytest.fixture(scope="module")
def model(checkpoint) -> llama.LLaMA:
    return llama.load(checkpoint, TOKENIZER)


def example(
    *prompts: str, top_p: float = 0.95, top_k: int | None = None, quiet: bool = False
) -> None:
    """Do something.

    Args:
        prompts: What.
        top_p: How.
        top_k: How many.
        quiet: Whether.
    """


def test_a_letter_stands_for_the_one_flag_that_begins_with_it():
    assert parse(example, ["-q"]) == ([], {"quiet": True})
    with pytest.raises(SystemExit):
        parse(example, ["-t", "1"])  # top_p or top_k


def test_what_looks_like_a_literal_is_text_and_flags_stand_anywhere():
    argv = ["123", "--top_p", "0.5", "[1]", "None", '"quoted"', "--quiet", "-5", "", "--top_k=3"]
    args, flags = parse(example, [*argv, "--", "--led", "-h"])
    assert args == ["123", "[1]", "None", '"quoted"', "-5", "", "--led", "-h"]
    assert flags == {"top_p": 0.5, "quiet": True, "top_k": 3}


@pytest.mark.parametrize("argv", [["--help"], ["two words", "--top_k", "2", "-h"]])
def test_help_names_each_flag_with_its_default(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(example, argv)
    assert not end.value.code
    shown = " ".join(capsys.readouterr().err.split())
    for line in ("--top_p=TOP_P Type: float Default: 0.95 How.", "Do something."):
        assert line in shown
    assert "words" not in shown


@pytest.mark.parametrize("argv", [["--topp", "1"], ["--top=1"], ["-x"]])
def test_an_unknown_flag_shows_the_usage(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example.py"])
    with pytest.raises(SystemExit) as end:
        parse(example, argv)
    assert end.value.code == 2
    assert "Usage: example.py <flags> [PROMPTS]..." in capsys.readouterr().err


def test_a_value_of_another_type_is_refused_with_its_flag():
    with pytest.raises(llama.UserError, match="--top_k takes a whole number, not 'many'"):
        parse(example, ["--top_k", "many"])
    with pytest.raises(llama.UserError, match="--top_p takes a number"):
        parse(example, ["--top_p"])


def test_one_prompt_is_streamed_as_the_same_bytes(model, flags, run_script):
    prompt = "déjà vu 🙂"
    (text,) = model.generate([prompt], 8, temperature=0)
    result = run_script("example-cpu.py", prompt, *flags, "--max_gen_len", 8)
    assert result.stdout.decode() == text + RULE


def test_prompts_from_stdin_and_from_a_file(model, flags, run_script, tmp_path):
    (tmp_path / "prompt.txt").write_text("Zwölf\nlines\n", encoding="utf-8")
    texts = model.generate(["einß\ntwo", "Zwölf\nlines\n"], 8, temperature=0)
    args = ["-", "--prompt_file", "prompt.txt", *flags, "--max_gen_len", 8]
    result = run_script("example-cpu.py", *args, input="einß\ntwo".encode())
    assert result.stdout.decode() == "".join(text + RULE for text in texts)
    assert b"\r" not in result.stderr  # no bar, which belongs on a terminal


def test_a_prompt_longer_than_the_context_names_both_lengths_and_the_flag(flags, run_script):
    result = run_script("example-cpu.py", "word " * 30, *flags, "--max_seq_len", 20, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the prompt is ")
    assert "and the context 20" in result.stderr
    assert "--max_seq_len" in result.stderr


def test_a_prompt_file_that_is_not_there_stops_before_the_weights_are_read(run_script):
    args = ["--prompt_file", "none.txt", "--ckpt_dir", "nowhere"]
    result = run_script("example-cpu.py", *args, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --prompt_file none.txt")
