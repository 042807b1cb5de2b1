"""What benchmark.py compares with: llama.cpp and transformers, on the same weights.

`pip install transformers gguf && CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python
--no-binary llama-cpp-python`: from its sources, for this machine's instructions.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

import llama
from llama.checkpoint import open_checkpoint
from llama.huggingface import foreign_name

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
    weights = open_checkpoint([folder / "merged.pth"])
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


def transformers(folder: Path, dtype: str, max_seq_len: int) -> Step:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    args = llama.ModelArgs(**json.loads((folder / "params.json").read_text()))
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=max_seq_len,
    )
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = open_checkpoint([folder / "merged.pth"])
    state = {foreign_name(name): w.read(getattr(torch, dtype)) for name, w in weights.items()}
    model.load_state_dict(state, assign=True)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its angles were on the meta device, too
    cache = None

    @torch.inference_mode()
    def step(tokens: list[int], position: int) -> None:
        nonlocal cache
        cache = DynamicCache(config=config) if position == 0 else cache
        model.eval()(torch.tensor([tokens]), cache=cache, logits_to_keep=1)

    return step


class GGUFTokenizer:
    """The tokenizer in a GGUF file, as transformers reads it; it puts no token before a text."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        return self.tokenizer.encode(s)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def convert_gguf(path: Path, folder: Path) -> None:
    """A LLaMA in llama.cpp's format as params.json and consolidated.00.pth, in fp16."""
    import gguf

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
    params = {key: reader.fields[f"llama.{field}"].contents() for key, field in fields.items()}
    (folder / "params.json").write_text(json.dumps(params))
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).half()
        for tensor in reader.tensors
    }
    tensors.setdefault("output.weight", tensors["token_embd.weight"])
    with torch.device("meta"):
        names = llama.Transformer(llama.ModelArgs(**params)).state_dict()
    torch.save({name: tensors[gguf_name(name)] for name in names}, folder / "consolidated.00.pth")


PEERS = {"llama.cpp": llama_cpp, "transformers": transformers}
