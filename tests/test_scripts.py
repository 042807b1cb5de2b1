"""The three scripts as a user runs them, from a folder that is not the repository."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, TOKENIZER, write_shards

import llama
from llama.cli import default_tokenizer

RULE = b"\n\n==================================\n\n"


def greedy(folder, prompts: list[str], n: int, dtype: str = "float32") -> list[bytes]:
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        texts = llama.load(folder, TOKENIZER).generate(prompts, n, temperature=0)
    finally:
        torch.set_default_dtype(torch.float32)
    return [text.encode() for text in texts]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stdout_is_each_prompt_with_its_continuation_and_a_rule(run_script, checkpoint, dtype):
    prompts = ["Once upon a time", "The end"]
    flags = ["--ckpt_dir", checkpoint, "--tokenizer_path", TOKENIZER, "--dtype", dtype]
    flags += ["--temperature", 0, "--max_gen_len", 12]
    done = run_script("example-cpu.py", *prompts, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"".join(t + RULE for t in greedy(checkpoint, prompts, 12, dtype))


def test_without_a_prompt_or_weights_the_demo_tells_the_meaning_of_life(run_script):
    done = run_script("example-cpu.py", "--temperature", 0, "--max_gen_len", 12)
    (text,) = greedy(DEMO, ["I believe the meaning of life is"], 12)
    assert done.stdout == text + RULE
    assert str(DEMO).encode() in done.stderr


def test_stderr_ends_with_the_timings(run_script, checkpoint):
    flags = ["--ckpt_dir", checkpoint, "--tokenizer_path", TOKENIZER, "--max_gen_len", 5]
    last = run_script("example-cpu.py", *flags).stderr.decode().splitlines()[-1]
    for part in ("loaded in", "prompt", "generated", "tokens/s", "peak memory", "GB"):
        assert part in last


def test_weights_in_model_are_the_default(run_script, weights, tmp_path):
    write_shards(tmp_path / "model", weights, 2)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    done = run_script("example-cpu.py", "a b", "--temperature", 0, "--max_gen_len", 5)
    assert done.stdout == greedy(tmp_path / "model", ["a b"], 5)[0] + RULE
    assert b"demo" not in done.stderr


@pytest.mark.parametrize("script", ["example-cpu.py", "example-chat.py", "merge-weights.py"])
def test_a_mistyped_flag_ends_in_usage_before_anything_is_loaded(run_script, script):
    done = run_script(script, "--temprature", 1)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"--temprature" in done.stderr
    assert b"Usage" in done.stderr
    assert b"demo" not in done.stderr


def test_a_folder_without_weights_is_a_one_line_error(run_script, tmp_path):
    done = run_script("example-cpu.py", "--ckpt_dir", tmp_path)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


def test_merged_shards_continue_prompts_as_the_shards_do(run_script, weights, tmp_path):
    folder = write_shards(tmp_path / "model" / "13B", weights, 2)
    done = run_script("merge-weights.py", "--model_size", "13B")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    expected = greedy(folder, ["Once upon a time"], 10)
    for shard in folder.glob("*.pth"):
        shard.unlink()
    (tmp_path / "merged.pth").rename(folder / "merged.pth")
    assert greedy(folder, ["Once upon a time"], 10) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--overwrite=False"], "merged.pth exists"),
        (["--overwrite=maybe"], "--overwrite takes True or False"),
        (["--output_dir"], "--output_dir takes a text"),
        (["--input_dir", "--quantize", "int8"], "--input_dir takes a text"),
    ],
)
def test_a_flag_of_merge_weights_is_taken_as_what_it_says(
    run_script, checkpoint, tmp_path, flags, said
):
    (tmp_path / "merged.pth").write_text("mine")
    given = ["--input_dir", checkpoint] if "--input_dir" not in flags else []
    done = run_script("merge-weights.py", *given, *flags)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ") and said.encode() in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert (tmp_path / "merged.pth").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes them")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed_stands_for_an_empty_one(checkpoint, tmp_path, closed):
    flags = f"--ckpt_dir {checkpoint} --tokenizer_path {TOKENIZER} --temperature 0 --max_gen_len 5"
    command = f"{sys.executable} {ROOT}/example-cpu.py Hello {flags} {closed}"
    done = subprocess.run(["sh", "-c", command], check=False, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
    assert done.stdout == (greedy(checkpoint, ["Hello"], 5)[0] + RULE if closed != ">&-" else b"")
    assert b"Traceback" not in done.stderr


def test_the_tokenizer_beside_the_scripts_is_found_as_the_weights_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("llama.cli.ROOT", tmp_path / "repo")
    monkeypatch.chdir(tmp_path)
    assert default_tokenizer(tmp_path) == Path("tokenizer/tokenizer.model")  # for the error's text
    beside = tmp_path / "repo" / "tokenizer" / "tokenizer.model"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert default_tokenizer(tmp_path) == beside


def test_chat_answers_each_line_until_the_end_of_input(run_script, checkpoint):
    flags = ["--ckpt_dir", checkpoint, "--tokenizer_path", TOKENIZER, "--max_gen_len", 5]
    done = run_script("example-chat.py", *flags, "--seed", 1, input=b"hello\nyou there?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") >= 2
    assert b"prompt>" not in done.stdout


@pytest.mark.parametrize("text", [b"hello\\\n", b"hello\r\n/exit\r\nhello\n"])
def test_chat_reads_windows_lines_and_a_last_one_that_would_go_on(run_script, checkpoint, text):
    flags = ["--ckpt_dir", checkpoint, "--tokenizer_path", TOKENIZER, "--max_gen_len", 5]
    done = run_script("example-chat.py", *flags, "--seed", 1, input=text)
    assert done.returncode == 0
    assert done.stderr.count(b"tokens/s") == 1
    assert b"no such command" not in done.stderr


def test_pytorch_says_nothing_of_a_numpy_that_is_not_installed():
    code = "import sys; sys.modules['numpy'] = None; import llama"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b""
