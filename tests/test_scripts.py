"""The three scripts as a user runs them, from a folder that is not the repository."""

import os
import re
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, TOKENIZER, error_line, printed, write_shards

MODEL_FLAGS = (
    "ckpt_dir tokenizer_path temperature top_p top_k repetition_penalty prompt_lookup max_seq_len "
    "max_gen_len dtype quantize seed"
)
FLAGS = {
    "example-cpu.py": f"{MODEL_FLAGS} max_batch_size prompt_file threads verbose",
    "example-chat.py": f"{MODEL_FLAGS} style system threads verbose",
    "merge-weights.py": "model_size input_dir output_dir dtype quantize overwrite",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [["Once upon a time", "The end"], ["déjà vu 🙂"]])
def test_stdout_is_each_text_and_a_rule(run_script, checkpoint, flags, prompts, dtype):
    done = run_script("example-cpu.py", *prompts, *flags, "--dtype", dtype, "--max_gen_len", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == printed(checkpoint, prompts, 12, dtype)
    assert b"\r" not in done.stderr  # progress bars belong on a terminal


@pytest.mark.skipif(
    any(ROOT.glob("model/*.json")), reason="the developer's own weights are the default"
)
def test_without_weights_the_demo_tells_a_story_and_stderr_says_so(run_script):
    done = run_script("example-cpu.py", "--temperature", 0, "--max_gen_len", 12)
    assert done.stdout.decode() == printed(DEMO, ["Once upon a time"], 12)
    model, prompt, timings = done.stderr.decode().splitlines()
    assert "no prompt is given" in prompt
    assert str(DEMO) in model
    assert re.match("loaded in .* prompt .* generated .* tokens/s.* peak memory .* GB", timings)


def test_weights_in_model_are_the_default_and_so_is_the_usual_prompt(run_script, weights, tmp_path):
    folder = write_shards(tmp_path / "model", weights, 2)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    done = run_script("example-cpu.py", "--temperature", 0, "--max_gen_len", 5, "--verbose")
    assert done.stdout.decode() == printed(folder, ["I believe the meaning of life is"], 5)
    assert b"demo" not in done.stderr
    assert b"2 layers" in done.stderr and b" thread" in done.stderr


def test_a_larger_model_finds_the_tokenizer_in_the_folder_of_7b(run_script, weights, tmp_path):
    folder = write_shards(tmp_path / "model", weights, 1)
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    write_shards(folder / "13B", weights, 2)
    done = run_script("example-cpu.py", "--ckpt_dir", "model/13B", "--max_gen_len", 1)
    assert done.returncode == 0, done.stderr
    assert f"tokenizer of another model, {Path('model', 'tokenizer.model')}" in done.stderr.decode()


def test_a_folder_in_model_is_the_nearest_miss(run_script, weights, tmp_path):
    write_shards(tmp_path / "model" / "13B", weights, 2)
    done = run_script("example-cpu.py", "--ckpt_dir", "13B")
    assert f"did you mean --ckpt_dir {Path('model', '13B')}?" in error_line(done)


def test_a_context_beyond_the_training_is_one_line_of_warning(run_script):
    args = ["--ckpt_dir", DEMO, "--max_gen_len", 2, "--max_seq_len"]
    assert b"warning" not in run_script("example-cpu.py", *args, 512).stderr
    errors = run_script("example-cpu.py", *args, 600).stderr.decode()
    assert re.findall("^warning: .* 512 .*--max_seq_len is 600", errors, re.MULTILINE)
    assert errors.count("512 tokens") == 1


@pytest.mark.parametrize("limit", ["--max_gen_len 8", "--max_seq_len 12"])
def test_the_last_line_says_which_limit_ended_a_text(run_script, limit):
    args = ["Once upon", "a time", *limit.split(), "--seed", 1]
    done = run_script("example-cpu.py", *args, text=True)
    assert f"stopped at {limit}," in done.stderr


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompts_from_stdin_and_from_files(run_script, checkpoint, flags, tmp_path, mark):
    """Without a byte order mark and the last newline, and with Windows' line ends as newlines."""
    (tmp_path / "prompt.txt").write_bytes(mark + "Zwölf\r\nlines\r\n".encode())
    (tmp_path / "other.txt").write_text("other")
    files = ["--prompt_file", "prompt.txt", "--prompt_file", "other.txt"]
    args = ["-", *files, *flags, "--max_gen_len", 8]
    result = run_script("example-cpu.py", *args, input=mark + "einß\r\ntwo".encode())
    assert result.stdout.decode() == printed(checkpoint, ["einß\ntwo", "Zwölf\nlines", "other"], 8)


def test_a_prompt_is_utf_8_in_any_locale_and_what_is_not_is_replaced(run_script, checkpoint, flags):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    prompts = ["déjà vu", os.fsdecode(b"a\xffb")]
    done = run_script("example-cpu.py", *prompts, *flags, "--max_gen_len", 8, env=env)
    assert done.stdout.decode() == printed(checkpoint, ["déjà vu", "a\ufffdb"], 8)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--", "--help"]])
@pytest.mark.parametrize("script", FLAGS)
def test_help_is_a_manual_page_on_stdout(run_script, script, argv):
    done = run_script(script, *argv, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python {script} ")
    assert all(f"\n  --{name} " in done.stdout for name in FLAGS[script].split())
    assert f"Examples:\n  python {script}" in done.stdout
    assert "None" not in done.stdout and "Optional" not in done.stdout


@pytest.mark.parametrize("flag", ["--quantise", "--Quantize=int8", "-x", "-hello"])
def test_an_unknown_flag_ends_before_loading_with_the_nearest_one(run_script, flag):
    done = run_script("example-cpu.py", flag, "int8", text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no flag {flag.partition('=')[0]}" in done.stderr
    assert ("did you mean --quantize?" in done.stderr) == ("uanti" in flag)
    assert ("prompts that begin with - go after --" in done.stderr) == ("uanti" not in flag)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", "8"), ("BF16", "Int8"), ("BF16", "4")])
def test_flags_with_dashes_and_values_in_short_are_understood(run_script, flags, dtype, quantize):
    values = ["--max-gen-len=4", "--temperature=1e-5", f"--dtype={dtype}", f"--quantize={quantize}"]
    assert run_script("example-cpu.py", "a", *flags, *values).returncode == 0


def test_what_looks_like_a_literal_is_text_and_flags_stand_anywhere(run_script, checkpoint, flags):
    prompts = ["123", "[1]", "None", '"quoted"', "-5", "1e3", "-- a well-known --max-len"]
    argv = [*prompts[:3], "--max_gen_len=2", *prompts[3:], *flags, "--", "--led-on", "-"]
    done = run_script("example-cpu.py", *argv, input=b"read\n")
    assert done.stdout.decode() == printed(checkpoint, [*prompts, "--led-on", "read"], 2)


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        ("example-cpu.py", ["--top_p", "1.5"], "--top_p must be "),
        ("example-cpu.py", ["--threads", "0"], "--threads must be 1 to"),
        ("example-cpu.py", ["--threads", "100000"], "--threads must be 1 to"),
        ("example-cpu.py", ["--max_seq_len", "0"], "--max_seq_len must be "),
        ("example-cpu.py", ["--prompt_file", "none.txt"], "--prompt_file none.txt"),
        ("example-cpu.py", ["--prompt_file", "a\n\x1b[31mred" + "x" * 5000], "red"),
        ("example-cpu.py", ["-"], "stdin is empty"),
        ("example-chat.py", ["Hello"], "'Hello' has no flag before it"),
        ("example-chat.py", ["--style", "poem"], "argument --style: invalid choice: 'poem'"),
        ("merge-weights.py", ["--", "7B"], "'7B' has no flag before it"),
        ("merge-weights.py", ["--input_dir", "nowhere"], "--input_dir"),
    ],
)
def test_a_wrong_value_is_refused_in_one_short_line_with_its_flag(run_script, script, argv, said):
    flags = [] if script == "merge-weights.py" else ["--ckpt_dir", DEMO]
    result = run_script(script, *argv, *flags)
    message = error_line(result)
    assert said in message and "\x1b" not in message
    assert len(message) < 520 and result.stderr.count(b"\n") == 1
