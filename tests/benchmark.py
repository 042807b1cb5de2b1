"""Memory, speed and accuracy of each dtype, for the README's tables.

`python tests/benchmark.py speed --size 1B` makes itself a checkpoint with random weights in the
shapes of `size` (they are honest for memory and speed, and say nothing about text) in a temporary
folder, and runs each dtype in a process of its own. Prefill and decode are medians over rounds in
which the dtypes take turns. `python tests/benchmark.py accuracy --data DIR` scores the demo model
on DIR/valid.jsonl, of which train.py tells.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama
from llama import memory
from llama.checkpoint import find_files, read_index, reserve
from model.demo.train import bits_per_byte, read
from tests.peers import PEERS

SIZES = {  # dim, heads, layers; "1B" has 953M parameters
    "1B": (2048, 16, 16),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (6656, 52, 60),
    "65B": (8192, 64, 80),
}
DTYPES = ("float32", "bfloat16", "int8", "int4")
MISSING = {("transformers", "int8"), ("transformers", "int4")}
TOKENIZER = Path(__file__).resolve().parent.parent / "model" / "demo" / "tokenizer.model"


def make_checkpoint(folder: Path, size: str) -> None:
    """One merged.pth of random fp16 weights, streamed: a block of them, again and again."""
    dim, n_heads, n_layers = SIZES[size]
    params = {"dim": dim, "n_heads": n_heads, "n_layers": n_layers, "multiple_of": 256}
    params |= {"norm_eps": 1e-6, "vocab_size": 32000}
    (folder / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        state = llama.Transformer(llama.ModelArgs(**params)).half().state_dict()
    path = folder / "merged.pth"
    reserve(path, state)
    block = bytearray(2**24)
    torch.frombuffer(block, dtype=torch.half).normal_(std=0.02)
    with path.open("r+b", buffering=0) as file:
        for name, place in read_index(path).items():
            n_bytes = state[name].nbytes
            file.seek(place.offset)
            for start in range(0, n_bytes, len(block)):
                file.write(memoryview(block)[: n_bytes - start])


def bandwidth() -> float:
    """Bytes a second at which this process's threads read memory."""
    x = torch.ones(2**28, dtype=torch.float32)
    x.sum()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - begin)
    return x.nbytes / min(seconds)


def serve(program: str, folder: str, dtype: str, prompt: int, new: int, max_seq_len: int) -> None:
    """Load, say so, then measure once for each line of stdin: the child process of a row."""
    begin = time.perf_counter()
    n_bytes, plan = 0, {}
    if program in PEERS:
        step = PEERS[program](Path(folder), dtype, max_seq_len)
    else:
        model = load(folder, dtype, max_seq_len)
        n_bytes, plan = model.weight_bytes, model.plan
        cache = model.model.new_cache(max_seq_len)

        def step(tokens: list[int], position: int) -> torch.Tensor:
            return model.model([torch.tensor(tokens)], [position], [cache])

    seconds = time.perf_counter() - begin
    print(json.dumps([n_bytes, memory.peak(), seconds, plan]), flush=True)
    tokens = torch.randint(3, 32000, (prompt,)).tolist()
    for _ in sys.stdin:
        begin = time.perf_counter()
        step(tokens, 0)
        prefill = time.perf_counter() - begin
        begin = time.perf_counter()
        for position in range(prompt, prompt + new):
            step(tokens[:1], position)
        print(json.dumps([prefill, time.perf_counter() - begin]), flush=True)


def accuracy(data: str) -> None:
    """Print the demo model's bits per byte on valid.jsonl in `data`, and how its perplexity grows."""
    stories = [story["story"] for story in read(Path(data, "valid.jsonl"))]
    first = None
    print("| dtype | bits per byte | perplexity, of fp32's |")
    print("|---|---|---|")
    for dtype in DTYPES:
        model = load(TOKENIZER.parent, dtype, 512)
        bits = bits_per_byte(model.model, model.tokenizer, stories)
        first = first or bits
        tokens = sum(len(model.tokenizer.encode(s, bos=False, eos=False)) for s in stories)
        ratio = 2 ** ((bits - first) * sum(len(s.encode()) for s in stories) / tokens)
        print(f"| {dtype} | {bits:.4f} | {ratio:.4f} |", flush=True)


def load(folder: str | Path, dtype: str, max_seq_len: int) -> llama.LLaMA:
    torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    return llama.load(folder, TOKENIZER, max_seq_len, 1, dtype if dtype.startswith("int") else None)


def speed(
    size: str = "1B",
    dtypes: tuple[str, ...] = DTYPES,
    prompt: int = 128,
    new: int = 64,
    rounds: int = 3,
    folder: str | None = None,
    peers: bool = False,
) -> None:
    """Print a table of memory and speed.

    Args:
        size: 1B (953M parameters), 7B, 13B, 30B or 65B.
        dtypes: Such as bfloat16,int8 (for one alone: int8,); each waits in memory for its turn.
        prompt: Tokens of the prompt.
        new: Tokens generated.
        rounds: How often each is measured.
        folder: Where a checkpoint of `size` is, or is made and kept. Default: a temporary one.
        peers: Take turns with llama.cpp and transformers, a dtype at a time; see peers.py.
    """
    where = Path(folder or tempfile.mkdtemp(prefix="benchmark-"))
    try:
        where.mkdir(exist_ok=True)
        if not find_files(where):
            make_checkpoint(where, size)
        print(f"{torch.get_num_threads()} threads read memory at {bandwidth() / 1e9:.1f} GB/s")
        print("| | weights | peak | load | prompt | generated | of the memory's speed |")
        print("|---|---|---|---|---|---|---|")
        if peers:
            for dtype in dtypes:
                others = [(peer, dtype) for peer in PEERS if not (peer, dtype) in MISSING]
                measure(where, [("", dtype), *others], prompt, new, rounds)
        else:
            measure(where, [("", dtype) for dtype in dtypes], prompt, new, rounds)
    finally:
        if not folder:
            shutil.rmtree(where)


def measure(folder: Path, rows: list[tuple[str, str]], prompt: int, new: int, rounds: int) -> None:
    children, loaded, times = {}, {}, {row: [] for row in rows}
    for row in rows:
        numbers = map(str, (prompt, new, prompt + new))
        command = [sys.executable, __file__, "serve", row[0], str(folder), row[1], *numbers]
        children[row] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        loaded[row] = json.loads(children[row].stdout.readline())
    for _ in range(rounds):
        for row, child in children.items():
            print(file=child.stdin, flush=True)
            times[row].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate()

    read = bandwidth()
    for row in rows:
        n_bytes, peak, seconds, plan = loaded[row]
        prefill, decode = (statistics.median(column) for column in zip(*times[row]))
        rate = new / decode
        print(
            f"| {' '.join(row).strip()} | {n_bytes / 1e9:.2f} GB | {peak / 1e9:.2f} GB "
            f"| {seconds:.1f} s | {prompt / prefill:.1f} tokens/s | {rate:.1f} tokens/s "
            f"| {rate * n_bytes / read:.0%} |",
            flush=True,
        )
        for form, ways in plan.items():
            print(f"{row[1]}, {form}: {ways}", file=sys.stderr)


if __name__ == "__main__":
    fire.Fire({"speed": speed, "accuracy": accuracy, "serve": serve})
