"""Train the demo model: `python -m model.demo.train --data DIR` in the repository's root.

DIR holds train.jsonl and valid.jsonl, a {"title": ..., "story": ...} a line. Writes
tokenizer.model, params.json and consolidated.00.pth, Meta's layout in fp16, into --output_dir.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import fire
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.model import ModelArgs, Segment, Transformer
from llama.tokenizer import Tokenizer

PARAMS = {
    "dim": 160,
    "multiple_of": 32,
    "n_heads": 5,
    "n_layers": 6,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}
VOCAB_SIZE = 2048
SEQ_LEN = 512

PREAMBLE = "This is a dialog between a user and a kind AI that tells stories.\n\n"
GREETINGS = ["Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hi there!", "Hey", "Good morning!"]
WELCOMES = [
    "Hello! I am so happy to see you. Would you like to hear a story?",
    "Hi there! Shall I tell you a story? Just tell me what it should be about.",
    "Hello, my friend! What kind of story would you like to hear today?",
]
THANKS = ["Thank you!", "Thanks!", "thank you", "That was a nice story.", "I liked that story!"]
FAREWELLS = [
    "You're welcome! Would you like to hear another story?",
    "I am so glad that you liked it! Shall I tell you another one?",
    "You're very welcome! Come back whenever you want to hear a story.",
]
REQUESTS = [
    "Tell me a story about {}",
    "Tell me a story called {}",
    "Please tell me a story about {}",
    "Can you tell me a story about {}?",
    "Could you please tell me the story of {}?",
    "Write a story about {}",
    "Write a story with the title {}",
    "I want to hear a story about {}",
    "I would like a story about {}, please",
    "Do you know a story about {}?",
    "How about a story of {}?",
    "A story about {}",
]
OPEN_REQUESTS = [
    "Tell me a story",
    "Tell me another story",
    "Can you tell me a story?",
    "Yes, please!",
    "Tell me a bedtime story",
]


def request(title: str, rng: random.Random) -> str:
    """One way in which a child could ask for the story of this title."""
    if rng.random() < 0.1:
        ask = rng.choice(OPEN_REQUESTS)
    else:
        if rng.random() < 0.3:
            title = title[0].lower() + title[1:]
        ask = rng.choice(REQUESTS).format(title)
    if ask[-1] not in "?!":
        ask += rng.choice(["", ".", "."])
    return ask if rng.random() < 0.8 else ask[0].lower() + ask[1:]


def dialog(title: str, story: str, rng: random.Random) -> str:
    """A request for the story and the story, now and then with a greeting before, thanks after."""
    turns = [(request(title, rng), story)]
    if rng.random() < 0.15:
        turns.insert(0, (rng.choice(GREETINGS), rng.choice(WELCOMES)))
    if rng.random() < 0.1:
        turns.append((rng.choice(THANKS), rng.choice(FAREWELLS)))
    text = "\n".join(f"User: {ask}\nAI: {reply}" for ask, reply in turns)
    return PREAMBLE + text if rng.random() < 0.5 else text


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(stories: list[dict[str, str]], prefix: Path) -> Tokenizer:
    """BPE with the options that LLaMA's tokenizer was made with."""
    rng = random.Random(0)
    texts = [s["story"] for s in stories]
    texts += [dialog(s["title"], s["story"][:200], rng) for s in stories]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=1,
    )
    prefix.with_suffix(".vocab").unlink()
    return Tokenizer(prefix.with_suffix(".model"))


def batches(
    stories: list[dict[str, str]], tokenizer: Tokenizer, batch_size: int, rng: random.Random
) -> Iterator[Tensor]:
    """For ever: (batch_size, SEQ_LEN + 1) windows of both forms of all stories, in new order."""
    window = batch_size * SEQ_LEN + 1
    stream: list[int] = []
    while True:
        for story in rng.sample(stories * 2, 2 * len(stories)):
            bare = rng.random() < 0.5
            text = story["story"] if bare else dialog(story["title"], story["story"], rng)
            stream += tokenizer.encode(text, bos=True, eos=True)
            if len(stream) >= window:
                block = torch.tensor(stream[:window])
                yield block[:-1].view(batch_size, SEQ_LEN), block[1:].view(batch_size, SEQ_LEN)
                stream = stream[window - 1 :]


def init_weights(model: Transformer) -> None:
    """Normal, 0.02; what ends in the residual stream smaller by sqrt(2 n_layers), as in GPT-2."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * model.args.n_layers) if into_residual else 0.02
            nn.init.normal_(weight, std=std)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made nearly orthogonal before each step (Jordan et al., 2024).

    torch.optim.Muon does this in bf16, one matrix at a time: on a CPU without bf16 arithmetic
    that takes as long as the rest of the step. Here it is fp32, all matrices of a shape at once.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float, weight_decay: float):
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, lr = group["params"], group["lr"]
            grad = torch.stack([weight.grad for weight in weights])
            average = self.state[weights[0]].setdefault("momentum", torch.zeros_like(grad))
            average.lerp_(grad, 1 - group["momentum"])
            update = orthogonalize(grad.lerp(average, group["momentum"]))
            rows, columns = weights[0].shape
            for weight, change in zip(weights, update):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(change, alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalize(x: Tensor) -> Tensor:
    """Singular values of each matrix of (n, rows, columns) to about 1: Newton-Schulz, quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@torch.no_grad()
def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Over each text's tokens after bos, in windows that overlap by half."""
    nats, n_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, bos=True, eos=False))
        scored = 1
        for begin in range(0, max(len(ids) - SEQ_LEN // 2, 1), SEQ_LEN // 2):
            window = ids[begin : begin + SEQ_LEN]
            logits = model.output(model.hidden(window[:-1], [Segment(0, len(window) - 1)])).float()
            nll = F.cross_entropy(logits, window[1:], reduction="none")
            nats += nll[scored - begin - 1 :].sum().item()
            scored = begin + len(window)
        n_bytes += len(text.encode())
    return nats / math.log(2) / n_bytes


def save(model: Transformer, output_dir: Path) -> None:
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    head_dim = model.args.head_dim
    state["rope.freqs"] = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    torch.save(state, output_dir / "consolidated.00.pth")
    (output_dir / "params.json").write_text(json.dumps(PARAMS) + "\n", encoding="utf-8")


def main(
    data: str,
    output_dir: str = str(Path(__file__).parent),
    steps: int = 3000,
    batch_size: int = 8,
    muon_lr: float = 0.02,
    adam_lr: float = 4e-3,
    seed: int = 0,
) -> None:
    out = Path(output_dir)
    stories, valid = read(Path(data, "train.jsonl")), read(Path(data, "valid.jsonl"))
    tokenizer = train_tokenizer(stories, out / "tokenizer")
    torch.manual_seed(seed)
    args = {**PARAMS, "vocab_size": tokenizer.n_words}
    model = Transformer(ModelArgs(**args, max_seq_len=SEQ_LEN))
    init_weights(model)
    weights = dict(model.named_parameters())
    matrices = [w for name, w in weights.items() if "layers" in name and w.dim() == 2]
    others = [w for name, w in weights.items() if "layers" not in name or w.dim() == 1]
    optimizers = [
        Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    warmup, decay = steps // 50, steps // 2
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warmup, 1.0, (steps - i) / decay)
        )
        for optimizer in optimizers
    ]
    print(f"{sum(w.numel() for w in weights.values()):,} parameters", flush=True)
    begin = time.time()
    for step, (x, y) in zip(
        range(1, steps + 1), batches(stories, tokenizer, batch_size, random.Random(seed))
    ):
        logits = model.output(model.hidden(x.flatten(), [Segment(0, x.shape[1])] * batch_size))
        loss = F.cross_entropy(logits, y.flatten())
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.time() - begin:.0f} s", flush=True)
        if step % 500 == 0 or step == steps:
            bpb = bits_per_byte(model, tokenizer, [s["story"] for s in valid])
            print(f"step {step} valid {bpb:.4f} bits per byte", flush=True)
            save(model, out)


if __name__ == "__main__":
    fire.Fire(main)
