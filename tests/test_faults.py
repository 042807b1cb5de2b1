"""Ctrl-C, streams that are closed or full, memory and threads that end, files that change."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, ROOT, TOKENIZER, error_line, run_python

import llama
from llama.merge import reserve

resource = pytest.importorskip("resource", reason="limits are set through POSIX")


@pytest.fixture(scope="module")
def flags(checkpoint) -> list[str]:
    return ["--ckpt_dir", str(checkpoint), "--tokenizer_path", str(TOKENIZER), "--temperature", "0"]


# Ctrl-C. What stands for it is sent at a call of PyTorch's that every stage has to make.

INTERRUPT = """
import os, runpy, signal, sys
stage, script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, os.path.dirname(script))
def interrupted(function, when=lambda *args: True):
    def interrupt(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)
    return interrupt
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
if stage == "import":
    sys.meta_path.insert(0, Finder)
else:
    import llama, torch, torch.nn.functional as F
    if stage == "load":
        torch.load = interrupted(torch.load)
    elif stage == "merge":
        torch.save = interrupted(torch.save)
    else:  # RMSNorm's input is (n_tokens, dim)
        one = stage == "decode"
        F.rms_norm = interrupted(F.rms_norm, lambda x, *_: (len(x) == 1) == one)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("stage", "script"),
    [
        ("import", "example-cpu.py"),
        ("load", "example-cpu.py"),
        ("merge", "merge-weights.py"),
        ("prefill", "example-cpu.py"),
        ("decode", "example-cpu.py"),
        ("decode", "example-chat.py"),
    ],
)
def test_ctrl_c_ends_in_130_without_a_traceback(checkpoint, flags, tmp_path, stage, script):
    options = ["--input_dir", checkpoint] if script == "merge-weights.py" else flags
    options = ["Hello", *options, "--prompt_lookup", 0] if script == "example-cpu.py" else options
    command = [*map(str, [sys.executable, "-c", INTERRUPT, stage, ROOT / script, *options])]
    result = subprocess.run(
        command, check=False, cwd=tmp_path, input=b"Hello\n", capture_output=True, timeout=120
    )
    assert result.returncode == 130, result.stderr
    assert b"Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


# Streams


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed_stands_for_an_empty_one(
    checkpoint, flags, tmp_path, run_script, closed
):
    script = f"exec {sys.executable} {ROOT}/example-cpu.py Hello {' '.join(flags)} "
    script += f"--max_gen_len 5 {closed}"
    done = subprocess.run(["sh", "-c", script], check=False, cwd=tmp_path, capture_output=True)
    text = llama.load(checkpoint, TOKENIZER).generate("Hello", 5, temperature=0)[0]
    assert done.returncode == 0
    assert done.stdout.decode() == ("" if closed == ">&-" else f"{text}\n\n{'=' * 34}\n\n")
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_the_run_quietly(flags):
    command = [sys.executable, ROOT / "example-cpu.py", "Hello\n", *flags, "--max_gen_len", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"Hello\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"rror" not in errors and b"Traceback" not in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("script", ["example-cpu.py", "example-chat.py"])
def test_a_full_disk_under_stdout_is_one_error_line(flags, script):
    command = [sys.executable, ROOT / script, *flags, "--max_gen_len", "5"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, check=False, stdout=full, stderr=subprocess.PIPE, input=b"Hi\n", timeout=120
        )
    assert error_line(result).startswith("error: [Errno 28] No space")


# Memory and threads


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


@pytest.fixture(scope="module")
def imported() -> int:
    """Bytes of address space that PyTorch takes, with CUDA's libraries or without."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells")
    code = "import llama; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    return 1024 * int(run_python(code))


def test_a_model_beyond_ulimit_v_is_refused_with_the_flags_that_fit(tmp_path, run_script, imported):
    """Of 5 GB in fp32 and 2.5 in fp16, all zeros, which take no room on the disk."""
    params = PARAMS | {"dim": 4096, "n_layers": 6, "n_heads": 32, "multiple_of": 256}
    with torch.device("meta"):
        args = llama.ModelArgs(**params | {"vocab_size": 2048, "max_seq_len": 1})
        state = llama.Transformer(args).half().state_dict()
    reserve(tmp_path / "merged.pth", state)
    (tmp_path / "params.json").write_text(str(params).replace("'", '"'))
    n_bytes = imported + (tmp_path / "merged.pth").stat().st_size  # the file is mapped
    result = run_script(
        *("example-cpu.py", "--ckpt_dir", tmp_path, "--tokenizer_path", TOKENIZER),
        preexec_fn=limit(resource.RLIMIT_AS, n_bytes + 24 * 10**8),
    )
    assert error_line(result).endswith("use --quantize int8 or --quantize int4")


def test_memory_that_ends_while_generating_is_one_error_line(flags, run_script, imported):
    result = run_script(
        *("example-cpu.py", *flags, *["Hello"] * 40),
        *("--max_seq_len", 200_000, "--max_gen_len", 199_000),
        preexec_fn=limit(resource.RLIMIT_AS, imported + 3 * 10**9),
    )
    assert error_line(result).startswith("error: out of memory: ")


def test_no_new_threads_end_in_no_traceback(flags):
    """As for a user who may have no more processes; root has no such limit."""
    if os.geteuid() or not all(path.stat().st_mode & 5 == 5 for path in (ROOT, *ROOT.parents)):
        pytest.skip("becoming another user takes root, and a folder that this user may read")
    code = """
import os, resource, runpy, sys
import llama.cli, torch
torch.set_num_threads(1)
llama.load("model/demo").generate("Hi", 2)  # imports all that is needed, as root
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.argv = ["example-cpu.py", *sys.argv[1:]]
runpy.run_path("example-cpu.py", run_name="__main__")
"""
    demo = ["--ckpt_dir", str(ROOT / "model" / "demo"), "--max_gen_len", "2"]
    command = [sys.executable, "-c", code, "Hi", *demo, "--threads", "2"]
    result = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, timeout=120)
    assert b"Traceback" not in result.stderr
    assert result.returncode == 0 or b"Resource temporarily unavailable" in result.stderr


def test_a_bug_shows_its_traceback():
    code = "from llama import cli\ndef main():\n    'x'\n    {}['x']\ncli.run(main)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, cwd=ROOT, timeout=120
    )
    assert b"Traceback" in result.stderr and b"KeyError" in result.stderr
