"""example-chat.py, through a pipe and in a pseudo-terminal."""

import os
import re
import sys

import pytest
from conftest import ROOT

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")

EMOJI = "héllo 🙂 ça va?"
STATUS = r"\d+ tokens?,\s+\d+\.\d\s+tokens/s,\s+context\s+(\d+)/\d+"
PROMPT = "prompt> "
ENV = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm"}
LINE = r"\n(?:\x1b\[\?2004[hl]|\r)*"  # a new line; bracketed paste goes off and on


@pytest.fixture(scope="module")
def talk(flags, tmp_path_factory, request):
    """Start a chat in a terminal of its own."""

    def start(*more: object, **env: str) -> pexpect.spawn:
        folder = str(tmp_path_factory.mktemp("talk"))
        child = pexpect.spawn(
            sys.executable,
            [str(ROOT / "example-chat.py"), *flags, "--seed", "1", *map(str, more)],
            cwd=folder,
            env={**ENV, "XDG_STATE_HOME": folder, **env},
            encoding="utf-8",
            dimensions=(40, 400),
            timeout=60,
        )
        request.addfinalizer(lambda: child.close(force=True))
        child.expect(PROMPT)
        return child

    return start


@pytest.fixture(scope="module")
def echo(talk):
    """A chat whose replies begin with the message, for tests that leave it at its prompt."""
    child = talk("--style", "complete", "--max_gen_len", 3, LC_ALL="C", NO_COLOR="")
    assert re.search(r"(?s)7B, .* MB.*/help.*\x1b\[\?2004h", child.before)  # bracketed paste
    return child


def visible(text: str) -> str:
    """Output as a terminal shows it: without escape sequences, and with words taken back."""
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", text)
    while "\b \b" in text:
        text = re.sub("[^\b]\b \b", "", text)
    return text


def test_emoji_and_accents_go_both_ways_whatever_the_locale(echo):
    echo.sendline(EMOJI)
    echo.expect(LINE + re.escape(EMOJI) + f".*{STATUS}.*{PROMPT}")


def test_commands_are_not_for_the_model(echo):
    for line, told in {"/help": "/reset .*/retry .*/exit ", "/?": "/exit ", "/foo": "/foo"}.items():
        echo.sendline(line)
        echo.expect(rf"\033\[2m[^\033]*{told}[^\033]*\033\[0m")
        echo.expect(PROMPT)
        assert "tokens/s" not in echo.before
    for line in ("/usr/bin", "// a comment"):
        echo.sendline(line)
        echo.expect(LINE + re.escape(line) + f".*{STATUS}.*{PROMPT}")


def test_ctrl_c_clears_a_line_and_says_on_an_empty_one_how_to_leave(echo):
    echo.send("not this")
    echo.expect("not this")
    echo.sendintr()
    echo.expect(PROMPT)
    assert "/exit" not in echo.before
    echo.sendline("but that")
    echo.expect(LINE + "but that")
    echo.expect(PROMPT)
    assert "not this" not in echo.before
    echo.sendintr()
    echo.expect("Ctrl-D.*/exit")
    echo.expect(PROMPT)


@pytest.mark.parametrize("command", ["/exit\r", "/QUIT\r", "/bye\r", "\x04"])
def test_these_leave(talk, command):
    child = talk()
    child.send(command)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_a_reply_and_the_talk_goes_on(talk):
    child = talk("--max_gen_len", 10**6, "--max_seq_len", 64, NO_COLOR="1")
    for _ in range(2):
        child.sendline("Hi")
        child.expect(LINE + "[^\033]{20}")
        child.sendintr()
        child.expect(STATUS)
        child.expect(PROMPT)
        assert "\033[0m" not in child.before


def test_retry_draws_the_last_reply_again_and_reset_begins_anew(talk):
    child, lengths = talk("--max_gen_len", 20), []
    child.sendline("/retry")
    child.expect("no reply yet")
    for line, shown in {"Hi": STATUS, "/retry": STATUS, "/reset": "new", "Hi ": STATUS}.items():
        child.expect(PROMPT)
        child.sendline(line)
        child.expect(shown)
        lengths += child.match.groups()
    assert lengths == [lengths[0]] * 3  # of the context


def test_a_message_too_long_is_refused_and_can_be_followed_by_another(talk):
    child = talk("--max_gen_len", 20, "--max_seq_len", 64, "--system", "")
    child.sendline("long " * 70)
    child.expect("tokens long and the context 64.*--max_seq_len")
    child.expect(PROMPT)
    child.sendline("Tell me more")
    child.expect(STATUS + ", stopped at --max_gen_len 20")


def test_pasted_lines_are_one_message_that_the_users_state_folder_remembers(talk, tmp_path):
    options = ["--style", "complete", "--max_gen_len", 3]
    child = talk(*options, XDG_STATE_HOME=str(tmp_path))
    child.send("\033[200~erste Zeile\n🙂 zweite\033[201~\r")
    child.expect(LINE + "erste Zeile\r\n🙂 zweite")
    child.expect(f"{STATUS}.*{PROMPT}")
    child.send("\033[A!\r")  # up: the message before
    child.expect(LINE + "erste Zeile\r\n🙂 zweite!")
    child.expect(f"{STATUS}.*{PROMPT}")
    child = talk(*options, XDG_STATE_HOME=str(tmp_path))
    child.send("\033[A?\r")
    child.expect(LINE + "erste Zeile\r\n🙂 zweite!\\?")


def test_replies_wrap_at_words_and_what_is_pasted_meanwhile_is_the_next_message(talk):
    child = talk("--max_gen_len", 60, "--style", "complete")
    child.setwinsize(40, 30)
    child.sendline("the quick brown fox jumps over the lazy dog and runs away")
    child.expect("jumps")
    child.expect(LINE + "the quick")
    child.send("typed, \033[200~and\npasted\033[201~\r")
    child.expect(STATUS)
    shown = "the quick" + visible(child.before)
    assert re.match("the quick brown fox jumps ?\nover the lazy dog and runs ?\naway", shown)
    assert "typed" not in shown
    child.expect(LINE + "typed, and\r\npasted")


def test_a_pipe_gets_replies_on_stdout_and_nothing_is_remembered(flags, run_script, tmp_path):
    state = tmp_path / "state"
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "XDG_STATE_HOME": str(state)}
    lines = f"\ufeff{EMOJI}\r\n/help\n\n/nonsense\none\\\ntwo\n"
    options = ["--style", "complete", "--max_gen_len", "4"]
    result = run_script("example-chat.py", *flags, *options, input=lines.encode(), env=env)
    out, err = result.stdout.decode("utf-8"), result.stderr.decode("utf-8")
    assert result.returncode == 0
    assert out.startswith(EMOJI)
    assert out.count("one\ntwo") == 1
    assert "\033" not in out + err and "prompt>" not in out
    assert "no command /nonsense" in err
    assert err.count("tokens/s") == 2
    assert not state.exists()


def test_a_message_too_long_in_a_pipe_is_an_error(flags, run_script):
    lines = "Hi\n" + "long " * 999
    result = run_script("example-chat.py", *flags, "--max_gen_len", 4, input=lines, text=True)
    assert result.returncode == 1
    assert "tokens/s" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: this message")


def test_stdout_stays_clean_where_only_stdout_is_piped(flags, run_script):
    master, terminal = os.openpty()
    os.write(master, b"/help\n\x04")
    result = run_script("example-chat.py", *flags, stdin=terminal, env=ENV)
    assert result.stdout == b""
    assert b"/reset" in result.stderr and b"prompt> " in result.stderr
