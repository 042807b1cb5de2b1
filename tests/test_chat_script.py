"""example-chat.py, through a pipe and in a pseudo-terminal."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TOKENIZER

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")

EMOJI = "héllo 🙂 ça va?"
STATUS = r"\d+ tokens?, \d+\.\d tokens/s, context (\d+)/\d+"
PROMPT = "prompt> "


@pytest.fixture(scope="module")
def flags(checkpoint) -> list[str]:
    return ["--ckpt_dir", str(checkpoint), "--tokenizer_path", str(TOKENIZER), "--seed", "1"]


@pytest.fixture(scope="module")
def talk(flags, tmp_path_factory):
    """Start a chat in a terminal of its own."""
    children = []

    def start(*more: object, **env: str) -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "example-chat.py"), *flags, *map(str, more)],
            cwd=str(tmp_path_factory.mktemp("talk")),
            env={**os.environ, "TERM": "xterm", **env},
            encoding="utf-8",
            codec_errors="replace",
            dimensions=(40, 400),
            timeout=60,
        )
        children.append(child)
        child.expect(PROMPT)
        return child

    yield start
    for child in children:
        child.close(force=True)


@pytest.fixture(scope="module")
def echo(talk):
    """A chat whose replies begin with the line itself, for tests that leave it at its prompt."""
    return talk("--style", "complete", "--max_gen_len", 3, LC_ALL="C", NO_COLOR="")


def exit_code(child: pexpect.spawn) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_emoji_and_accents_go_both_ways_whatever_the_locale(echo):
    echo.sendline(EMOJI)
    echo.expect_exact("\n" + EMOJI)
    echo.expect(STATUS)
    echo.expect(PROMPT)


def test_a_line_ending_in_a_backslash_goes_on(echo):
    echo.sendline("first\\")
    echo.expect("      > ")
    echo.sendline("second")
    echo.expect("\nfirst\r\nsecond")
    echo.expect(PROMPT)


def test_lines_are_remembered_where_readline_is(echo):
    pytest.importorskip("readline")
    echo.sendline("abc")
    echo.expect(PROMPT)
    echo.sendline("\033[Ad")  # up: the line before
    echo.expect("\nabcd")
    echo.expect(PROMPT)


def test_the_status_is_dimmed(echo):
    echo.sendline("Hi")
    echo.expect(rf"\033\[2m{STATUS}\033\[0m")
    echo.expect(PROMPT)


def test_help_and_unknown_commands_are_not_for_the_model(echo):
    echo.sendline("/help")
    echo.expect("/reset .*/exit ")
    echo.expect(PROMPT)
    echo.sendline("/foo")
    echo.expect("no such command: /foo")
    echo.expect(PROMPT)
    assert "tokens/s" not in echo.before


def test_exit_leaves(echo):
    echo.sendline("/exit")
    assert exit_code(echo) == 0


def test_ctrl_c_stops_a_reply_and_at_the_prompt_leaves(talk):
    child = talk("--max_gen_len", 10**6, "--max_seq_len", 64, NO_COLOR="1")
    for _ in range(2):
        child.sendline("Hi")
        child.expect(r"Hi\r\n.{20}")
        child.sendintr()
        child.expect(STATUS)
        child.expect(PROMPT)
        assert "\033[0m" not in child.before
    child.sendintr()
    assert exit_code(child) == 130


def test_a_context_that_overflows_a_line_too_long_and_a_reset(talk):
    child = talk("--max_gen_len", 20, "--max_seq_len", 96, "--system", "Kind.")
    used = []
    for line in [*["Tell me more"] * 10, "/reset", "Tell me more"]:
        child.sendline(line)
        if not line.startswith("/"):
            child.expect(STATUS)
            used.append(int(child.match[1]))
        child.expect(PROMPT)
    assert used[-1] < max(used) <= 96
    child.sendline("long " * 99)
    child.expect("tokens long and the context 96")
    child.expect(PROMPT)
    child.sendline("Tell me more")
    child.expect(STATUS)
    child.expect(PROMPT)
    child.sendeof()
    assert exit_code(child) == 0


def test_a_pipe_gets_replies_on_stdout_and_nothing_else(flags, run_script):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "TERM": "xterm"}
    lines = f"{EMOJI}\n/help\n\n/nonsense\none\\\ntwo\n"
    options = ["--style", "complete", "--max_gen_len", "4"]
    result = run_script("example-chat.py", *flags, *options, input=lines.encode(), env=env)
    out, err = result.stdout.decode("utf-8"), result.stderr.decode("utf-8")
    assert result.returncode == 0
    assert out.startswith(EMOJI)
    assert out.count("one\ntwo") == 1
    assert "\033" not in out + err
    assert "prompt>" not in out
    assert "no such command: /nonsense" in err
    assert err.count("tokens/s") == 2


def test_a_line_too_long_in_a_pipe_is_an_error(flags, run_script):
    lines = "Hi\n" + "long " * 999
    result = run_script("example-chat.py", *flags, "--max_gen_len", 4, input=lines, text=True)
    assert result.returncode == 1
    assert "tokens/s" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: this line")


def test_stdout_stays_clean_where_only_stdout_is_piped(flags, tmp_path):
    import pty

    master, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "example-chat.py"), *flags, "--max_gen_len", "3"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
    )
    os.write(master, b"/help\n\x04")
    out, err = child.communicate(timeout=60)
    assert out == b""
    assert b"/reset" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--styl", "dialog"], 2, "no such flag: --styl"),
        (["--style", "polite"], 1, "error: --style takes dialog, complete, llama2"),
    ],
)
def test_a_mistyped_flag_or_value_stops_before_anything_is_loaded(run_script, args, code, message):
    result = run_script("example-chat.py", "--ckpt_dir", "nowhere", *args, text=True)
    assert result.returncode == code
    assert message in result.stderr
    assert "nowhere" not in result.stderr
    assert result.stdout == ""
