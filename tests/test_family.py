"""LLaMA's family: grouped-query attention, Meta's later params.json, and Hugging Face's folders."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, write_shards
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import llama
from llama.huggingface import convert_folder, open_folder, to_params
from llama.linear import Int8Linear
from llama.model import precompute_freqs_cis
from llama.stored import Stored
from llama.tune import tune

GROUPED = {  # two query heads to each of eight kv heads, as many as Llama 2 70B's
    "dim": 128,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 16,
    "n_kv_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 2048,
}
GROUPED_HIDDEN = 448  # 32 * ceil(int(1.3 * int(2 / 3 * 4 * 128)) / 32)
TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def grouped_weights() -> dict[str, Tensor]:
    """Random fp16 weights of GROUPED."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    weights = {"tok_embeddings.weight": normal(2048, 128) * 8}
    for layer in range(2):
        for name, shape in {
            "attention.wq": (128, 128),
            "attention.wk": (64, 128),
            "attention.wv": (64, 128),
            "attention.wo": (128, 128),
            "feed_forward.w1": (GROUPED_HIDDEN, 128),
            "feed_forward.w2": (128, GROUPED_HIDDEN),
            "feed_forward.w3": (GROUPED_HIDDEN, 128),
            "attention_norm": (128,),
            "ffn_norm": (128,),
        }.items():
            weights[f"layers.{layer}.{name}.weight"] = normal(*shape) + ("norm" in name)
    return weights | {"norm.weight": 1 + normal(128), "output.weight": normal(2048, 128)}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, grouped_weights) -> dict[int, Path]:
    """Folders of GROUPED in Meta's format, by the number of shards."""
    folders = {}
    for n_shards in (1, 2, 4):
        folder = tmp_path_factory.mktemp("grouped") / "70B"
        folders[n_shards] = write_shards(folder, grouped_weights, n_shards)
        (folder / "params.json").write_text(json.dumps(GROUPED))
    return folders


def repeat_kv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with a key head of its own, a copy, for each query head."""
    return {
        name: weight.unflatten(0, (8, 8)).repeat_interleave(2, 0).flatten(0, 1)
        if ".wk" in name or ".wv" in name
        else weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("read", [2**23, 1])  # numbers of all heads at a time, and of one
def test_grouped_query_attention_equals_attention_with_repeated_heads(
    grouped, grouped_weights, monkeypatch, read
):
    monkeypatch.setattr("llama.cache.READ", read)
    model = llama.load(grouped[1], TOKENIZER).model
    peer = llama.Transformer(llama.ModelArgs(**GROUPED | {"n_kv_heads": 16}))
    peer.load_state_dict(repeat_kv(grouped_weights))
    assert relative_error(model(TOKENS[:, :9], 0), peer(TOKENS[:, :9], 0)) < 1e-5
    assert relative_error(model(TOKENS[:, 9:16], 9), peer(TOKENS[:, 9:16], 9)) < 1e-5
    for position in range(16, 24):
        token = TOKENS[:, position : position + 1]
        assert relative_error(model(token, position), peer(token, position)) < 1e-5


def test_a_prompt_of_one_token_attends_to_it_alone(grouped, grouped_weights):
    model = llama.load(grouped[1], TOKENIZER).model
    peer = llama.Transformer(llama.ModelArgs(**GROUPED | {"n_kv_heads": 16}))
    peer.load_state_dict(repeat_kv(grouped_weights))
    assert relative_error(model(TOKENS[:, :1], 0), peer(TOKENS[:, :1], 0)) < 1e-5


@pytest.mark.parametrize("n_new", [1, 4])
def test_the_cache_is_kept_by_kv_head_and_never_copied_by_query_head(n_new):
    args = llama.ModelArgs(
        dim=512, n_heads=32, n_kv_heads=2, n_layers=1, vocab_size=64, max_seq_len=8192
    )
    model = llama.Transformer(args)
    cache = model.new_cache(8000)
    assert cache.values.shape == (1, 2, 8000, 16)
    tokens = torch.ones(1, n_new, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(tokens, [7000], [cache])
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert largest < cache.keys.nbytes


@pytest.mark.parametrize("n_shards", [2, 4])
def test_grouped_query_shards_run_unmerged_as_the_whole_does(grouped, n_shards):
    whole = llama.load(grouped[1], TOKENIZER).model
    parts = llama.load(grouped[n_shards], TOKENIZER).model
    assert torch.equal(parts(TOKENS, 0), whole(TOKENS, 0))


@pytest.mark.parametrize("n_shards", [2, 4])
def test_grouped_query_shards_merge_bit_for_bit(
    grouped, grouped_weights, n_shards, run_script, tmp_path
):
    (tmp_path / "in").symlink_to(grouped[n_shards].parent)
    process = run_script("merge-weights.py", "--input_dir", "in", "--model_size", "70B")
    assert process.returncode == 0, process.stderr
    merged = torch.load(tmp_path / "merged.pth")
    assert merged.keys() == grouped_weights.keys()
    for name, weight in grouped_weights.items():
        assert torch.equal(merged[name], weight), name


def test_the_published_shapes_of_later_models_follow_from_their_params():
    sizes = {  # parameters and width of the feed-forward layer, as published
        (6.74e9, 11008): {"dim": 4096, "n_heads": 32, "n_layers": 32},
        (34.0e9, 22016): {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 48},
        (69.0e9, 28672): {
            "dim": 8192,
            "n_heads": 64,
            "n_kv_heads": 8,
            "n_layers": 80,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
        },
    }
    for (n_params, hidden_dim), params in sizes.items():
        args = llama.ModelArgs(**params, vocab_size=32000)
        with torch.device("meta"):
            model = llama.Transformer(args)
        assert args.hidden_dim == hidden_dim
        assert sum(w.numel() for w in model.parameters()) == pytest.approx(n_params, rel=0.01)


SMALL = {  # a feed-forward layer of no multiple of any power of two
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 345,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
FOLDERS = {
    "llama": LlamaConfig(**SMALL),
    "grouped": LlamaConfig(
        **SMALL | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "intermediate_size": 344}
    ),
    "tied": LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    "rope_theta": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "narrow": LlamaConfig(**SMALL | {"intermediate_size": 200}),  # less than 2/3 of 4 dim
    "padded": LlamaConfig(**SMALL | {"vocab_size": 2050}),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
}


def write_folder(folder: Path, config: LlamaConfig | MistralConfig, kind: str = "whole") -> Path:
    """A folder as its peers' own code writes it: config.json, tokenizer.model and weights."""
    torch.manual_seed(0)
    classes = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}
    model = classes[config.model_type](config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.1)
    model.to({"half": torch.half, "bfloat16": torch.bfloat16}.get(kind, torch.float32))
    model.save_pretrained(folder, max_shard_size="500KB" if kind == "sharded" else "1GB")
    if kind == "bin":  # as transformers wrote it before its fifth version
        state = list(model.state_dict().items())
        state.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)))
        for n, part in enumerate((state[:9], state[9:]), 1):
            torch.save(dict(part), folder / f"pytorch_model-{n:05}-of-00002.bin")
        (folder / "model.safetensors").unlink()
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return folder


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def peer_logits(folder: Path) -> Tensor:
    """Every position's, in fp32: (bsz, seqlen, vocab_size)."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}
    peer = classes[config["model_type"]].from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return peer(TOKENS).logits


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def convert(
    folder: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """What merged.pth holds afterwards."""
    return torch.load(convert_folder(folder, out, dtype, quantize, overwrite), weights_only=True)


def refusal(folder: Path, out: Path) -> str:
    """The one line with which a folder is refused, before anything is written."""
    before = sorted(out.iterdir())
    with pytest.raises(llama.UserError) as caught:
        convert(folder, out)
    assert sorted(out.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_converted_folder_agrees_with_transformers(name, tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS[name])
    convert(folder, out)
    model = llama.load(out, out / "tokenizer.model", max_seq_len=64).model
    expected = peer_logits(folder)
    assert relative_error(model(TOKENS[:, :20], 0), expected[:, 19]) < 1e-4
    assert relative_error(model(TOKENS[:, 20:23], 20), expected[:, 22]) < 1e-4
    assert relative_error(model(TOKENS[:, 23:], 23), expected[:, 23]) < 1e-4


@pytest.mark.parametrize("kind", ["sharded", "bin", "half", "bfloat16"])
def test_every_format_of_weights_agrees_with_transformers(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("llama.stored.BLOCK", 10000)  # less than a weight, more than a head
    folder = write_folder(tmp_path, FOLDERS["grouped"], kind)
    if kind == "sharded":
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    weights, params = open_folder(folder)
    del params["sliding_window"]
    model = llama.Transformer(llama.ModelArgs(**params))
    model.load_state_dict({name: w.read(torch.float32) for name, w in weights.items()})
    if kind == "bin":
        write_folder(folder, FOLDERS["grouped"])  # transformers reads what it writes now
    assert relative_error(model(TOKENS, 0), peer_logits(folder)[:, -1]) < 1e-4


def test_config_json_of_earlier_transformers_is_understood(tmp_path):
    folder = write_folder(tmp_path, FOLDERS["rope_theta"])
    config = json.loads((folder / "config.json").read_text())
    for field in ("rope_parameters", "head_dim", "num_key_value_heads", "mlp_bias"):
        config.pop(field)
    config |= {"rope_theta": 1e6, "rope_scaling": None}
    expected = open_folder(folder)[1]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_folder(folder)[1] == expected


def test_any_intermediate_size_follows_from_params_json():
    for dim in (8, 100, 2048, 3200, 4096, 8192):
        for hidden_dim in (1, 7, 345, 5632, 8640, 11008, 14336, 28672):
            config = SMALL | {"hidden_size": dim, "intermediate_size": hidden_dim}
            config |= {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
            params = to_params(config | {"num_attention_heads": 4}, Path("config.json"))
            assert llama.ModelArgs(**params).hidden_dim == hidden_dim


def test_positions_up_to_16384_turn_as_in_transformers():
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), torch.arange(16384)[None])
    ours = precompute_freqs_cis(16, 16384, 1e6)
    torch.testing.assert_close(ours, torch.complex(cos, sin)[0, :, :8], atol=1e-6, rtol=0)


def test_int8_multiplies_rows_of_any_length(monkeypatch):
    monkeypatch.setattr("llama.tune.SMALL", 0)
    weight = torch.randn(16, 345, generator=torch.Generator().manual_seed(0))
    module = Int8Linear(16, 345)
    module.load_state_dict(Int8Linear.quantize(weight))
    tune(module)
    for n_tokens in (1, 5, 40):
        x = torch.randn(n_tokens, 345, generator=torch.Generator().manual_seed(1))
        assert relative_error(module(x), x @ weight.T) < 0.03


def test_conversion_keeps_the_dtype_or_changes_it(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["grouped"], "bfloat16")
    kept = convert(folder, out)
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    changed = convert(folder, out, dtype=torch.float32, overwrite=True)
    assert {weight.dtype for weight in changed.values()} == {torch.float32}
    for name, weight in kept.items():
        assert torch.equal(changed[name], weight.float()), name


def test_conversion_quantizes_as_loading_does(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["grouped"])
    convert(folder, out)
    expected = llama.load(out, TOKENIZER, quantize="int8").model.state_dict()
    convert(folder, out, quantize="int8", overwrite=True)
    quantized = llama.load(out, TOKENIZER).model.state_dict()
    assert quantized.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(quantized[name], tensor), name


def test_the_script_recognises_a_folder_and_what_it_writes_runs(tmp_path, out, run_script):
    folder = write_folder(tmp_path / "in", FOLDERS["grouped"], "sharded")
    process = run_script("merge-weights.py", "--input_dir", folder, "--output_dir", "out")
    assert process.returncode == 0, process.stderr
    assert process.stdout == b""
    assert sorted(path.name for path in out.iterdir()) == [
        "merged.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert llama.load(out, out / "tokenizer.model").generate(["Once"], 4)[0].startswith("Once")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("head_dim", 32),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ("rope_parameters", [1]),
        ("sliding_window", "x"),
        ("vocab_size", 100),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_what_is_not_llamas_architecture_is_refused_by_field(field, value, tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    edit_config(folder, **{field: value})
    assert field in refusal(folder, out)


def test_a_tokenizer_that_is_not_sentencepiece_is_refused(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert "tokenizer.model" in refusal(folder, out)
    (folder / "tokenizer.model").unlink()
    assert "tokenizer.model" in refusal(folder, out)


def test_a_missing_or_damaged_file_of_weights_is_named(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"], "sharded")
    first = min(folder.glob("model-*"))
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    assert first.name in refusal(folder, out)
    first.unlink()
    assert "model." in refusal(folder, out)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64])
def test_weights_that_are_no_floats_are_refused(dtype, tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(
        dtype
    )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "layers.1.mlp.up_proj.weight is" in refusal(folder, out)


def test_a_number_among_the_weights_is_refused(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    weights = load_file(folder / "model.safetensors") | {"a.scalar": torch.tensor(1.0)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.safetensors" in refusal(folder, out)


def test_safetensors_is_asked_for_by_name(tmp_path, out, monkeypatch):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    monkeypatch.setitem(sys.modules, "safetensors", None)  # importing it fails
    assert "pip install safetensors" in refusal(folder, out)


@pytest.mark.parametrize("name", ["merged.pth", "params.json", "tokenizer.model"])
def test_conversion_overwrites_nothing_unless_told(name, tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    mine = out / name
    mine.write_text("mine")
    assert "--overwrite" in refusal(folder, out)
    assert mine.read_text() == "mine"
    convert(folder, out, overwrite=True)
    assert mine.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model"])
def test_what_appears_while_a_folder_is_converted_is_kept(name, tmp_path, out, monkeypatch):
    folder, rows = write_folder(tmp_path / "in", FOLDERS["llama"]), Stored.rows

    def made(self, which):
        (out / name).write_text("mine")
        return rows(self, which)

    monkeypatch.setattr(Stored, "rows", made)
    with pytest.raises(llama.UserError, match=f"{name} exists"):
        convert(folder, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("n_renamed", [0, 1])
def test_weights_never_lie_beside_another_models_params(n_renamed, tmp_path, out, monkeypatch):
    folder = write_folder(tmp_path / "in", FOLDERS["llama"])
    convert(folder, out)
    edit_config(folder, rms_norm_eps=1e-3)
    replace, renamed = Path.replace, []

    def interrupted(self, target):
        if len(renamed) == n_renamed:
            raise KeyboardInterrupt
        renamed.append(replace(self, target).name)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"params.json", "tokenizer.model"}


def test_conversion_makes_the_folder_it_writes_to(tmp_path):
    out = tmp_path / "new" / "out"
    convert(write_folder(tmp_path / "in", FOLDERS["llama"]), out)
    assert (out / "params.json").exists()


def test_a_folder_can_be_converted_where_it_is(tmp_path):
    folder = write_folder(tmp_path, FOLDERS["llama"])
    convert(folder, folder)
    assert (folder / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_context_longer_than_the_sliding_window_is_refused(tmp_path, out):
    convert(write_folder(tmp_path / "in", FOLDERS["mistral"]), out)
    with pytest.raises(llama.UserError, match="max_seq_len.* 64.*sliding_window"):
        llama.load(out, TOKENIZER, max_seq_len=65)


def test_tokens_beyond_the_tokenizer_are_never_drawn(tmp_path, out):
    folder = write_folder(tmp_path / "in", FOLDERS["padded"])
    (folder / "added_tokens.json").write_text('{"[PAD]": 2048, "<|im_end|>": 2049}')
    convert(folder, out)
    llm = llama.load(out, out / "tokenizer.model")
    with torch.no_grad():  # so that nothing else would be drawn
        llm.model.output.weight[:2048] = 0
        llm.model.output.weight[2048:] = llm.model.norm.weight.sign() * 1e4
    for temperature in (0, 0.8):
        text = llm.generate(["Once upon"], 8, temperature=temperature, seed=0)[0]
        assert text.startswith("Once upon")


@pytest.mark.parametrize("key", ["use_scaled_rope", "moe"])
def test_an_unknown_key_of_params_json_is_refused_by_name(key, grouped, tmp_path):
    params = tmp_path / "params.json"
    params.write_text(json.dumps(GROUPED | {key: True}))
    (tmp_path / "merged.pth").symlink_to(grouped[1] / "consolidated.00.pth")
    with pytest.raises(llama.UserError, match=key):
        llama.load(tmp_path, TOKENIZER)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(grouped, tmp_path):
    params = tmp_path / "params.json"
    params.write_text(json.dumps(GROUPED | {"vocab_size": 2000}))
    (tmp_path / "merged.pth").symlink_to(grouped[1] / "consolidated.00.pth")
    with pytest.raises(llama.UserError, match="2000.*2048"):
        llama.load(tmp_path, TOKENIZER)
