"""Full disks, kills, interrupts: one line that says so, and nothing half-written left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOKENIZER

import llama
from llama.checkpoint import merge, reserve
from llama.stored import Stored, read_index

resource = pytest.importorskip("resource", reason="limits are set through POSIX")
TRACEBACK = "Traceback"


def limit(kind: int, n_bytes: int):
    return lambda: resource.setrlimit(kind, (n_bytes, n_bytes))


@pytest.fixture
def big(tmp_path) -> Path:
    """A checkpoint of 5 GB in fp32, all zeros, that takes no room on the disk."""
    sizes = {"dim": 4096, "n_layers": 6, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6}
    with torch.device("meta"):
        model = llama.Transformer(llama.ModelArgs(**sizes, vocab_size=2048, max_seq_len=1))
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    reserve(tmp_path / "consolidated.00.pth", state)
    (tmp_path / "params.json").write_text(str(sizes).replace("'", '"'))
    return tmp_path


# Merging


def failure(result: subprocess.CompletedProcess) -> str:
    """The one line that a run ended in."""
    assert result.returncode == 1
    assert result.stdout == b""
    last = result.stderr.decode().replace("\r", "\n").rstrip("\n").split("\n")[-1]
    assert last.startswith("error: ") and TRACEBACK not in result.stderr.decode()
    return last


@pytest.mark.parametrize("n_bytes", [1000, 200_000, 1_500_000])
def test_a_disk_that_fills_up_while_merging(checkpoint, tmp_path, run_script, n_bytes):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = run_script(
        *("merge-weights.py", "--model_size", "7B", "--input_dir", checkpoint.parent),
        *("--output_dir", out),
        preexec_fn=limit(resource.RLIMIT_FSIZE, n_bytes),
    )
    assert str(out / ".merged.pth.") in failure(result)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_disk_that_is_too_small_is_seen_before(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(llama.UserError, match="merged.pth needs .* GB"):
        merge(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "ro"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=16M", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a read-only file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_output_folder_that_is_read_only(checkpoint, read_only, run_script):
    result = run_script(
        *("merge-weights.py", "--model_size", "7B", "--input_dir", checkpoint.parent),
        *("--output_dir", read_only),
    )
    assert str(read_only) in failure(result)


def test_an_output_folder_that_is_a_file(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(llama.UserError, match="out is no folder"):
        merge(checkpoint, out)
    assert out.read_text() == "mine"


MERGE = """
import os, signal, sys
from pathlib import Path
from llama import checkpoint, stored
folder, out = map(Path, sys.argv[1:])
stored.BLOCK = 65536
checkpoint.reserve(out / "warm", {})  # what it imports, once for all children
(out / "warm").unlink()
rows = stored.Stored.rows
for point in range(10):
    pid = os.fork()
    if not pid:
        n_read = 0
        def killed(self, which):
            global n_read
            n_read += 1
            if n_read > 4 * point:
                os.kill(os.getpid(), signal.SIGKILL)
            return rows(self, which)
        stored.Stored.rows = killed
        checkpoint.merge(folder, out, overwrite=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(status, sorted(path.name for path in out.iterdir()), (out / "merged.pth").read_text())
"""


def test_a_merge_that_is_killed_leaves_nothing_that_matters(checkpoint, tmp_path, weights):
    """Its temporary file is neither read by anything nor in the way: the next run removes it."""
    (tmp_path / "merged.pth").write_text("mine")
    result = subprocess.run(
        [sys.executable, "-c", MERGE, checkpoint, tmp_path],
        check=True,
        capture_output=True,
        cwd=ROOT,
        text=True,
        timeout=120,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        assert re.fullmatch(r"9 \[('.merged.pth.[0-9a-f]+.partial', )?'merged.pth'\] mine", line)
    assert "partial" in lines[-1]
    merged = torch.load(merge(checkpoint, tmp_path, overwrite=True), weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["merged.pth"]
    assert all(torch.equal(merged[name], weight) for name, weight in weights.items())


def test_two_merges_into_one_folder_do_not_mix(checkpoint, tmp_path, run_script, monkeypatch):
    rows = Stored.rows

    def taken_over(self, which):
        if any(tmp_path.iterdir()):
            monkeypatch.setattr(Stored, "rows", rows)
            command = "merge-weights.py", "--input_dir", checkpoint, "--output_dir", tmp_path
            assert run_script(*command).returncode == 0
        return rows(self, which)

    monkeypatch.setattr(Stored, "rows", taken_over)
    with pytest.raises(llama.UserError, match="another run"):
        merge(checkpoint, tmp_path)
    assert (
        read_index(tmp_path / "merged.pth").keys()
        == read_index(checkpoint / "consolidated.00.pth").keys()
    )


def test_a_merge_for_which_there_is_no_room_removes_nothing(checkpoint, tmp_path, monkeypatch):
    other = tmp_path / ".merged.pth.1.partial"
    other.write_text("theirs")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(llama.UserError, match="0.0 GB are free"):
        merge(checkpoint, tmp_path)
    assert other.read_text() == "theirs"


def test_what_killed_runs_have_left_counts_as_free_and_is_removed(
    checkpoint, tmp_path, monkeypatch
):
    for name in ("merged.pth", "params.json"):
        (tmp_path / f".{name}.1.partial").write_bytes(bytes(10**7))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    merged = merge(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == [merged]


def test_a_merge_does_not_remove_what_a_later_one_is_writing(checkpoint, tmp_path, monkeypatch):
    rows, other = Stored.rows, tmp_path / ".merged.pth.1.partial"

    def begun(self, which):
        for mine in tmp_path.iterdir():
            mine.unlink()
            other.write_text("theirs")
        return rows(self, which)

    monkeypatch.setattr(Stored, "rows", begun)
    with pytest.raises(llama.UserError, match="another run"):
        merge(checkpoint, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_target_that_appears_while_a_merge_runs_is_kept(checkpoint, tmp_path, monkeypatch, kind):
    rows, target = Stored.rows, tmp_path / "merged.pth"

    def made(self, which):
        if not os.path.lexists(target):
            if kind == "file":
                target.write_text("mine")
            elif kind == "folder":
                target.mkdir()
            else:
                target.symlink_to(tmp_path / "nowhere")
        return rows(self, which)

    monkeypatch.setattr(Stored, "rows", made)
    with pytest.raises(llama.UserError, match="exists"):
        merge(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    assert kind != "file" or target.read_text() == "mine"


# A file that changes while it is read


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    other.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, 100_000)


@pytest.mark.parametrize("change", [touch, replace, truncate])
@pytest.mark.parametrize("n_reads", [0, 1, 10])
def test_a_shard_rewritten_while_it_is_read(checkpoint, tmp_path, monkeypatch, change, n_reads):
    folder = shutil.copytree(checkpoint, tmp_path / "7B")
    rows, n_read = Stored.rows, 0

    def changed(self, which):
        nonlocal n_read
        n_read += 1
        if n_read == n_reads + 1:
            change(self.path)
        return rows(self, which)

    monkeypatch.setattr(Stored, "rows", changed)
    with pytest.raises(llama.UserError, match="00.pth (was written to|ends too early)"):
        llama.load(folder, TOKENIZER)


# Interrupts and streams


INTERRUPT = """
import os, runpy, signal, sys
def interrupt(owner, name, when):
    function = getattr(owner, name)
    def interrupted(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)
    setattr(owner, name, interrupted)
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)
stage, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, os.path.dirname(script))
if stage == "import":
    sys.meta_path.insert(0, Finder)
else:
    from llama.model import Transformer
    from llama.stored import Stored
    if stage in ("load", "merge"):
        interrupt(Stored, "rows", lambda self, which: "layers.1" in self.name)
    elif stage == "prefill":
        interrupt(Transformer, "forward", lambda self, tokens, *_: len(tokens[0]) > 1)
    else:
        interrupt(Transformer, "forward", lambda self, tokens, *_: len(tokens[0]) == 1)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("stage", ["import", "load", "merge", "prefill", "decode"])
def test_ctrl_c_ends_in_130_without_a_traceback(checkpoint, tmp_path, stage):
    if stage == "merge":
        command = ["merge-weights.py", "--model_size", "7B", "--input_dir", checkpoint.parent]
    else:
        command = ["example-cpu.py", "Hello", "--ckpt_dir", checkpoint]
        command += ["--tokenizer_path", TOKENIZER]
    command[0] = ROOT / command[0]
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPT, stage, *map(str, command)],
        check=False,
        capture_output=True,
        cwd=tmp_path,
        text=True,
        timeout=120,
    )
    assert result.returncode == 130
    assert TRACEBACK not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("reader", ["leaves", "is full"])
def test_a_stdout_that_takes_no_more(checkpoint, tmp_path, reader):
    command = [sys.executable, ROOT / "example-cpu.py", "Hello\n", "--ckpt_dir", checkpoint]
    command += ["--tokenizer_path", TOKENIZER, "--max_gen_len", "200"]
    if reader == "is full":
        env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                command, check=False, stdout=full, stderr=subprocess.PIPE, timeout=120, env=env
            )
        assert result.returncode == 1
        assert result.stderr.decode().splitlines()[-1].startswith("error: [Errno 28] No space")
        assert TRACEBACK not in result.stderr.decode()
    else:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"Hello\n"
            process.stdout.close()
            errors = process.stderr.read().decode()
        assert process.returncode == 141
        assert "error" not in errors.lower() and TRACEBACK not in errors


# Memory


@pytest.fixture(scope="module")
def imported() -> int:
    """Bytes of address space that PyTorch takes, with CUDA's libraries or without."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells")
    code = "import llama; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    return 1024 * int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


def test_a_model_beyond_ulimit_v_is_refused_with_the_flags_that_fit(big, run_script, imported):
    result = run_script(
        *("example-cpu.py", "--ckpt_dir", big, "--tokenizer_path", TOKENIZER),
        preexec_fn=limit(resource.RLIMIT_AS, imported + 22 * 10**8),
    )
    assert failure(result).endswith("give --quantize int8 or --quantize int4")


def test_memory_that_ends_while_generating_is_told_in_one_line(checkpoint, run_script, imported):
    result = run_script(
        *("example-cpu.py", "--ckpt_dir", checkpoint, "--tokenizer_path", TOKENIZER),
        *["Hello"] * 40,
        *("--max_seq_len", 200_000, "--max_gen_len", 199_000),
        preexec_fn=limit(resource.RLIMIT_AS, imported + 3 * 10**9),
    )
    assert failure(result).startswith("error: out of memory: ")


def test_a_bug_shows_its_traceback(checkpoint, tmp_path):
    bug = "import llama.cli as cli\ndef main(): {}['x']\nmain.__doc__ = 'x'\ncli.run(main)"
    result = subprocess.run(
        [sys.executable, "-c", bug], check=False, capture_output=True, cwd=ROOT, timeout=120
    )
    assert b"KeyError" in result.stderr and TRACEBACK.encode() in result.stderr


def test_signals_are_as_python_sets_them():
    """Importing the package leaves Ctrl-C to the program that imports it."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
