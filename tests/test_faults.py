"""Ctrl-C, streams that are closed or full, memory and threads that end."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import ROOT, TOKENIZER, error_line, printed, python, run_code

resource = pytest.importorskip("resource", reason="limits are set through POSIX")


@pytest.mark.parametrize(("script", "prompt"), [("example-cpu.py", ["-"]), ("example-chat.py", [])])
def test_ctrl_c_ends_in_130_without_a_traceback(flags, script, prompt):
    flags = [*flags, "--max_seq_len", "20000", "--max_gen_len", "19000"]
    command = [sys.executable, ROOT / script, *prompt, *flags]
    with subprocess.Popen(command, **dict.fromkeys(("stdin", "stdout", "stderr"), PIPE)) as process:
        process.stdin.write(b"Hello\n")
        process.stdin.close()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors


def test_ctrl_c_while_pytorch_is_imported_does_too():
    code = """
import os, signal, sys
class Interrupt:
    def find_spec(name, path, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
import llama
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed_stands_for_an_empty_one(checkpoint, flags, tmp_path, closed):
    command = [sys.executable, f"{ROOT}/example-cpu.py", "Hello", *flags, "--max_gen_len", "5"]
    command = ["sh", "-c", f"exec {' '.join(command)} {closed}"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
    text = "" if closed == ">&-" else printed(checkpoint, ["Hello"], 5)
    assert done.stdout.decode() == text
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_the_run_quietly(flags):
    command = [sys.executable, ROOT / "example-cpu.py", "Hello\n", *flags, "--max_gen_len", "400"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout.readline() == b"Hello\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"rror" not in errors and b"Traceback" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("script", ["example-cpu.py", "example-chat.py"])
def test_a_full_disk_under_stdout_is_one_error_line(run_script, flags, script):
    with open("/dev/full", "w") as full:
        result = run_script(script, *flags, "--max_gen_len", 5, stdout=full, input=b"Hi\n")
    assert error_line(result).startswith("error: reading or writing failed: No space")


@pytest.fixture(scope="module")
def imported() -> int:
    """Bytes of address space that PyTorch takes, with CUDA's libraries or without."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells")
    code = "import llama; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    return 1024 * int(run_code(code))


def test_memory_that_ends_is_one_error_line(tmp_path, flags, run_script, imported):
    (tmp_path / "long.txt").touch()
    os.truncate(tmp_path / "long.txt", 2 * 10**9)
    limit = imported + 10**9
    result = run_script(
        *("example-cpu.py", *flags, "--prompt_file", "long.txt"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert error_line(result).startswith("error: out of memory: ")


def test_prompts_that_do_not_fit_in_memory_together_run_in_smaller_batches(checkpoint, imported):
    """32 caches of 0.2 GB each, where 1.5 GB are left. The model ends each text at once."""
    code = """
import resource, sys, torch, llama
model = llama.load(sys.argv[1], sys.argv[2], max_seq_len=100_000)
class End(torch.nn.Module):
    def forward(self, hidden):
        return 1000 * torch.eye(2048)[[model.tokenizer.eos_id] * len(hidden)]
model.model.output = End()
n_bytes = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
print(set(model.generate(["Hello"] * 32, 99_000)))
"""
    assert run_code(code, checkpoint, TOKENIZER, imported + 15 * 10**8) == "{'Hello'}\n"


def test_no_new_threads_are_one_error_line():
    """libgomp ends the process with a line of its own; Python and PyTorch raise this."""
    code = """
from llama import cli
def main(args):
    raise RuntimeError("can't start new thread")
cli.run(main, "", {})
"""
    assert error_line(python("-c", code)).startswith("error: the system allows no more threads: ")


def test_a_bug_shows_its_traceback():
    code = "from llama import cli\ncli.run(lambda args: {}['x'], '', {})"
    errors = python("-c", code, text=True).stderr
    assert "Traceback" in errors and "KeyError" in errors
