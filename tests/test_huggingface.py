"""Hugging Face folders, run and converted, against transformers."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER, relative_error
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from test_chat import TEMPLATES
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import llama
from llama.merge import open_source, write_merged

TOKENS = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(1))
SMALL = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 8, "initializer_range": 0.1, "tie_word_embeddings": False}
SMALL |= {"intermediate_size": 345}  # no multiple of any power of two
ROPE = {"rope_type": "default", "rope_theta": 1e6}
FOLDERS = {
    "llama": LlamaConfig(**SMALL),
    "grouped": LlamaConfig(**SMALL, num_key_value_heads=2, rms_norm_eps=1e-3, rope_parameters=ROPE),
    "tied": LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    "narrow": LlamaConfig(**SMALL | {"intermediate_size": 200}),  # less than 2/3 of 4 dim
    "padded": LlamaConfig(**SMALL | {"vocab_size": 2050}),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
}


def write_folder(folder: Path, name: str = "llama", kind: str = "whole") -> Path:
    """A folder as transformers writes it, with tokenizer.model."""
    torch.manual_seed(0)
    model = (MistralForCausalLM if name == "mistral" else LlamaForCausalLM)(FOLDERS[name])
    for parameter, weight in model.named_parameters():
        if "norm" in parameter:
            torch.nn.init.normal_(weight, 1, 0.1)
    model.save_pretrained(folder, max_shard_size="500KB" if kind == "sharded" else "1GB")
    if kind == "bin":  # as transformers wrote it before its fifth version
        state = list(model.state_dict().items())
        state.append(("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)))
        for n, part in enumerate((state[:9], state[9:]), 1):
            torch.save(dict(part), folder / f"pytorch_model-{n:05}-of-00002.bin")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text("{}")  # its files were not downloaded
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return folder


def edit_json(path: Path, **fields: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def convert(folder: Path, out: Path, **options) -> llama.LLaMA:
    """The model that a conversion writes."""
    write_merged(open_source(folder), out, **options)
    return llama.load(out, max_seq_len=64)


def refusal(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(llama.UserError) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "whole") for name in FOLDERS), ("grouped", "sharded"), ("grouped", "bin")],
)
def test_a_folder_and_its_conversion_agree_with_transformers(name, kind, tmp_path):
    folder = write_folder(tmp_path / "in", name, kind)
    assert kind != "sharded" or len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    model = llama.load(folder, max_seq_len=64).model
    converted = convert(folder, tmp_path / "out").model
    assert torch.equal(converted(TOKENS, 0), model(TOKENS, 0))
    if kind == "bin":
        write_folder(folder, name)  # transformers reads what it writes now
    cls = MistralForCausalLM if name == "mistral" else LlamaForCausalLM
    with torch.no_grad():
        expected = cls.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits
    assert relative_error(model(TOKENS, 0), expected[:, -1]) < 1e-4


def test_config_json_of_earlier_transformers_is_understood(tmp_path):
    folder = write_folder(tmp_path, "grouped")
    expected = open_source(folder).args
    absent = {"rope_parameters": None, "head_dim": None, "mlp_bias": None}
    edit_json(folder / "config.json", **absent, rope_theta=1e6, rope_scaling={"type": "default"})
    assert open_source(folder).args == expected
    for rope in ({"rope_type": "default"}, {"rope_theta": 1e6}):
        edit_json(folder / "config.json", rope_parameters=rope)
        assert open_source(folder).args == expected


def test_the_script_converts_the_originals_of_a_folder_where_they_are(tmp_path, run_script):
    folder = write_folder(tmp_path / "in")
    for flags in (["--quantize", "int4"], ["--dtype", "float32", "--overwrite"]):
        places = ["--input_dir", folder, "--output_dir", folder]
        done = run_script("merge-weights.py", *places, *flags)
        assert (done.returncode, done.stdout) == (0, b""), done.stderr
    merged = llama.load(folder).model(TOKENS, 0)
    (folder / "merged.pth").unlink()
    assert torch.equal(merged, llama.load(folder).model(TOKENS, 0))


ADDED = {"<|im_start|>": 2048, "<|im_end|>": 2049}


@pytest.mark.parametrize(
    ("eos_token_id", "where"),
    [(2049, "config.json"), ([2, 2049], "config.json"), ([2, 2049], "generation_config.json")],
)
def test_a_reply_ends_where_transformers_ends_it(eos_token_id, where, tmp_path):
    folder = write_folder(tmp_path / "in", "padded")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 1000
    weights["lm_head.weight"][2049, 0] = 100  # so that <|im_end|> follows each token
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / where, eos_token_id=eos_token_id)
    edit_json(folder / "added_tokens.json", **ADDED)
    llm, peer = convert(folder, tmp_path / "out"), LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([llm.tokenizer.encode("Once upon a time", bos=True, eos=False)])
    theirs = peer.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    assert theirs == [2049]
    assert llm.generate("Once upon a time", 12, temperature=0) == ["Once upon a time"]


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_one_id_in_both_directions(file, tmp_path):
    folder = write_folder(tmp_path / "in", "padded")
    if file == "tokenizer_config.json":
        decoder = {str(token): {"content": text} for text, token in ADDED.items()}
        edit_json(folder / file, added_tokens_decoder=decoder | {"1": {"content": "<s>"}})
    else:
        edit_json(folder / file, **ADDED)
    tokenizer = convert(folder, tmp_path / "out").tokenizer
    text = "<|im_start|>Once upon<|im_end|>"
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert (ids[:2], ids[-1]) == ([1, 2048], 2049)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("<s>", bos=False, eos=False)) > 1  # a user cannot write it


def test_mistrals_control_tokens_are_its_prompt_format(tmp_path):
    options = {"model_prefix": tmp_path / "tokenizer", "control_symbols": ["[INST]", "[/INST]"]}
    options["remove_extra_whitespaces"] = False  # like LLaMA's
    corpus = iter(["Once upon a time there was a little fox", "Hi there"] * 20)
    SentencePieceTrainer.train(sentence_iterator=corpus, vocab_size=26, minloglevel=2, **options)
    folder = write_folder(tmp_path / "in")
    shutil.copy(tmp_path / "tokenizer.model", folder)
    template = "{% for m in messages %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endfor %}"
    added = {"1": {"content": "<s>"}, "3": {"content": "[INST]"}, "4": {"content": "[/INST]"}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added, chat_template=template)
    llm = llama.load(folder)
    chat = llama.Chat(llm, sampling=llama.Sampling(1))
    list(chat.reply("Hi there"))
    ids = [1, 3, *llm.tokenizer.sp_model.encode("Hi there"), 4]
    assert chat.sequence.tokens[: len(ids)] == ids
    assert llm.tokenizer.decode(ids) == "[INST] Hi there[/INST]"


FIELDS = {
    "eos_token_id": ["2", -2, [2, None]],
    "model_type": ["qwen2"],
    "hidden_act": ["gelu"],
    "attention_bias": [True, 0],
    "mlp_bias": [True],
    "head_dim": [32],
    "rope_scaling": [{"type": "linear", "factor": 2.0}],
    "rope_parameters": [{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}, [1]],
    "rope_theta": [0, "", [], False, -1.0, "10000", True],
    "hidden_size": [None],
    "num_key_value_heads": [0],
    "rms_norm_eps": ["1e-6"],
    "tie_word_embeddings": ["false", 1],
    "quantization_config": [{"quant_method": "gptq"}],
}


@pytest.mark.parametrize(("field", "values"), FIELDS.items())
def test_a_field_of_another_architecture_or_type_is_refused_by_name(field, values, tmp_path):
    folder = write_folder(tmp_path)
    for value in values:
        edit_json(folder / "config.json", **{"rope_parameters": None, field: value})
        assert field in refusal(folder), value


def sets(folder: Path) -> list[Path]:
    return sorted([*folder.glob("model-*-of-*"), *folder.glob("pytorch_model-*-of-*")])


def other_set(folder: Path) -> None:
    """Rename the second file as one of a larger set: it fills a hole, and is not part of this."""
    (folder / "model.safetensors.index.json").unlink()
    paths = sets(folder)
    paths[1].rename(paths[1].with_name(f"model-00002-of-{len(paths) + 1:05}.safetensors"))


SETS = {
    "cut": ("sharded", lambda f: os.truncate(sets(f)[0], 1000), "model-00001"),
    "a file missing": ("sharded", lambda f: sets(f)[0].unlink(), "model-00001"),
    "a file of another set": ("sharded", other_set, "is not part"),
    "the same file twice": ("bin", lambda f: shutil.copy(*sets(f)), "is in two files"),
}


@pytest.mark.parametrize(("kind", "damage", "expected"), SETS.values(), ids=SETS)
def test_a_set_of_files_that_is_not_whole_is_refused(kind, damage, expected, tmp_path):
    folder = write_folder(tmp_path, kind=kind)
    damage(folder)
    assert expected in refusal(folder)


def test_files_of_two_models_are_told_apart_by_the_index(tmp_path):
    sharded = write_folder(tmp_path, kind="sharded")
    expected = open_source(sharded).weights["output.weight"].read(torch.float32)
    for path in sharded.glob("model-*.safetensors"):
        other = {name: torch.zeros_like(weight) for name, weight in load_file(path).items()}
        save_file(other, sharded / path.name.replace("of-0", "of-9"))
    found = open_source(sharded).weights["output.weight"].read(torch.float32)
    assert torch.equal(found, expected)
    (sharded / "model.safetensors.index.json").unlink()
    assert "two models" in refusal(sharded)


UP = "model.layers.1.mlp.up_proj.weight"
CHANGES = [
    ({UP: torch.ones(345, 128).to(torch.float8_e4m3fn)}, f"{UP} is .*float8"),
    ({UP: torch.ones(345, 128).to(torch.int8)}, f"{UP} is .*int8"),
    ({UP: torch.ones(344, 128)}, rf"{UP} is float \(344, 128\), but by config.json"),
    ({UP: None}, f"{UP} is not there"),
    ({"layers.1.feed_forward.w3.weight": torch.ones(345, 128)}, "layers.1.feed_forward.w3.weight,"),
    ({UP.replace("weight", "bias"): torch.ones(345)}, "bias, which config.json's model does not"),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_weights_that_are_not_llamas_are_refused_by_name(change, expected, tmp_path):
    folder = write_folder(tmp_path)
    weights = load_file(folder / "model.safetensors") | change
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert re.search(expected, refusal(folder))


def test_safetensors_is_asked_for_by_name(tmp_path, monkeypatch):
    folder = write_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # importing it fails
    assert "pip install safetensors" in refusal(folder)


def test_a_context_longer_than_the_sliding_window_is_refused(tmp_path):
    with pytest.raises(llama.UserError, match="max_seq_len.* 64.*sliding_window"):
        llama.load(write_folder(tmp_path, "mistral"), max_seq_len=65)


TULU = TEMPLATES["zephyr"].replace("eos_token", "'\n'", 1)  # like zephyr's, but for </s>
UNKNOWN = [("unknown", TULU), ("unknown", 1)]


@pytest.mark.parametrize(("style", "template"), [*TEMPLATES.items(), *UNKNOWN])
def test_the_prompt_format_is_kept(tmp_path, template, style):
    folder = write_folder(tmp_path / "in")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    params = json.loads(open_source(folder).files["params.json"])
    assert params.get("chat_style") == style
