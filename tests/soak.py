"""A long talk with the demo model, and many tokens: python tests/soak.py [N_TURNS N_TOKENS].

Memory must stay flat while contexts overflow, replies must be what a cache begun anew gives from
the tokens kept, and logits must be finite in each type. No test: it takes minutes, and prints.
"""

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import llama
from llama import STYLES, Chat, Sampling, system
from llama.model import Segment

DEMO = ROOT / "model" / "demo"
LINES = ["Tell me a story.", "What did the cat do?", "And then?", "Why?", "Who is Tom?"]


def open_demo(quantize: str | None = None, max_seq_len: int = 512) -> llama.LLaMA:
    return llama.load(DEMO, DEMO / "tokenizer.model", max_seq_len, quantize=quantize)


def resident() -> float:
    """MB that this process holds."""
    return system.read_number(Path("/proc/self/status"), "VmRSS") / 1e6


def talk(n_turns: int) -> None:
    demo = open_demo(max_seq_len=128)
    chat = Chat(demo, STYLES["dialog"], None, Sampling(8, temperature=0))
    rng = random.Random(0)
    n_checked = n_equal = 0
    warm = 0.0
    for turn in range(n_turns):
        reply = "".join(chat.reply(rng.choice(LINES)))
        assert len(chat.sequence.tokens) <= 128
        if turn % 100 == 99:  # the same tokens, computed anew
            n_checked += 1
            kept = chat.sequence.tokens
            n_cached = min(chat.sequence.n_cached, len(kept) - 1)
            segments = [Segment(n_cached, len(kept) - n_cached, chat.sequence.cache)]
            with torch.inference_mode():
                hidden = demo.model.hidden(torch.tensor(kept[n_cached:]), segments)
                shifted = demo.model.output(hidden[-1:]).float()
                hidden = demo.model.hidden(torch.tensor(kept), [Segment(0, len(kept))])
                same = demo.model.output(hidden[-1:]).float()
            n_equal += int(shifted.argmax() == same.argmax())
            assert (shifted - same).norm() / same.norm() < 0.2, (turn, reply)
        if turn == n_turns // 10:
            warm = resident()
        if turn % (n_turns // 10 or 1) == 0:
            print(f"turn {turn}: {resident():.0f} MB, {reply!r}", flush=True)
    print(
        f"{n_turns} turns: {resident() - warm:+.1f} MB since the first tenth; next token equal to "
        f"that of a fresh cache {n_equal} of {n_checked} times",
        flush=True,
    )


def count(n_tokens: int) -> None:
    corpus = torch.randint(
        3, 2000, (n_tokens // 512 + 1, 512), generator=torch.Generator().manual_seed(0)
    )
    for dtype, quantize in [
        ("float32", None),
        ("bfloat16", None),
        ("float32", "int8"),
        ("float32", "int4"),
    ]:
        torch.set_default_dtype(getattr(torch, dtype))
        model = open_demo(quantize).model
        n_finite = 0
        with torch.inference_mode():
            for row in corpus:
                logits = model.output(model.hidden(row, [Segment(0, len(row))])).float()
                n_finite += int(logits.isfinite().all(-1).sum())
        total = corpus.numel()
        print(
            f"{dtype} {quantize or ''}: logits of {n_finite} of {total} tokens are finite",
            flush=True,
        )
        assert n_finite == total
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    n_turns, n_tokens = map(int, sys.argv[1:] or (10_000, 100_000))
    talk(n_turns)
    count(n_tokens)
