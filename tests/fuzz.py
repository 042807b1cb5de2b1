"""Random bad input: each run works or raises UserError, which is printed as one line.

Not a test. FUZZ_SECONDS=600 python -m pytest -n 0 -s tests/fuzz.py takes as long as it says
and prints how many inputs were tried.
"""

import json
import os
import runpy
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TOKENIZER, random_weights, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama
from llama import Sampling
from llama.cli import Parser
from llama.merge import open_source, write_merged

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
N_TESTS = 5
PARAMS = {
    "dim": 32,
    "multiple_of": 32,
    "n_heads": 2,
    "n_layers": 1,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
OPTIONAL = ["n_kv_heads", "ffn_dim_multiplier", "rope_theta", "sliding_window", "max_seq_len"]

numbers = st.one_of(
    st.integers(-2, 130), st.sampled_from([2**20, 10**12, 10**400]), st.integers(), st.floats()
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
any_text = st.text(st.characters(exclude_categories=()), max_size=80)  # half surrogates as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two shards that load, of 80 kB each."""
    sizes = {"wq": 32, "wk": 32, "wv": 32, "wo": 32, "w1": 96, "w2": 32, "w3": 96}
    weights = {}
    for name, weight in random_weights().items():
        if not name.startswith("layers.1"):
            kind = name.split(".")[-2]
            weights[name] = (
                weight[: sizes.get(kind), : 96 if kind == "w2" else 32].clone()
                if weight.dim() == 2
                else weight[:32].clone()
            )
    folder = write_shards(tmp_path_factory.mktemp("fuzz") / "7B", weights, 2)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> llama.LLaMA:
    return llama.load(folder, TOKENIZER, max_seq_len=96)


def fuzz(trial: Callable[[], None]) -> None:
    """Call what hypothesis wraps once, or again and again while this test's time lasts."""
    end = time.monotonic() + SECONDS / N_TESTS
    trial()
    while time.monotonic() < end:
        trial()


def rules(n_examples: int) -> settings:
    return settings(
        max_examples=1000 if SECONDS else n_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def attempt(request):
    """Call a function, to work or to raise UserError; count how often it did which."""
    outcomes = Counter()

    def attempt(function, *args, **options):
        try:
            result = function(*args, **options)
            outcomes["worked"] += 1
            return result
        except llama.UserError:
            outcomes["refused"] += 1

    yield attempt
    if SECONDS:
        print(f"\n{request.node.name}: {outcomes.total()} inputs, {dict(outcomes)}")


def merge(folder: Path, out: Path, quantize: str | None) -> None:
    write_merged(open_source(folder), out, quantize=quantize, overwrite=True)


def use(folder: Path, quantize: str | None = None) -> None:
    model = llama.load(folder, TOKENIZER, max_seq_len=16, quantize=quantize)
    model.generate(["a"], 2, seed=0)


def test_any_params_json_works_or_is_refused(folder, tmp_path, attempt):
    for path in folder.glob("*.pth"):
        (tmp_path / path.name).symlink_to(path)

    @rules(60)
    @given(
        st.one_of(
            st.dictionaries(
                st.sampled_from([*PARAMS, *OPTIONAL]), values, min_size=1, max_size=3
            ).map(lambda changes: json.dumps(PARAMS | changes).encode()),
            values.map(lambda value: json.dumps(value).encode()),
            st.binary(max_size=30),
        )
    )
    def trial(content):
        (tmp_path / "params.json").write_bytes(content)
        attempt(use, tmp_path)

    fuzz(trial)


def structure(path: Path) -> list[int]:
    """Positions of the bytes that are not a tensor's."""
    data = path.read_bytes()
    positions = set(range(len(data)))
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                begin = data.index(info.filename.encode(), info.header_offset)
                positions -= set(range(begin + 100, begin + info.file_size))
    return sorted(positions)


def test_a_checkpoint_with_flipped_bytes_works_or_is_refused(folder, tmp_path, attempt):
    original = (folder / "consolidated.01.pth").read_bytes()
    for name in ("consolidated.00.pth", "params.json"):
        shutil.copy(folder / name, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    position = st.one_of(
        st.sampled_from(structure(folder / "consolidated.01.pth")),
        st.integers(0, len(original) - 1),
    )

    @rules(60)
    @given(
        st.lists(st.tuples(position, st.integers(0, 255)), max_size=4),
        st.one_of(st.none(), st.none(), position),
        st.sampled_from([None, None, "int8", "int4"]),
    )
    def trial(flips, end, quantize):
        data = bytearray(original)
        for at, value in flips:
            data[at] = value
        (tmp_path / "consolidated.01.pth").write_bytes(data[:end])
        attempt(use, tmp_path, quantize)
        attempt(merge, tmp_path, out, quantize)
        assert {path.name for path in out.iterdir()} <= {"merged.pth", "params.json"}

    fuzz(trial)


def test_any_prompt_is_continued_or_refused(model, attempt):
    @rules(60)
    @given(st.lists(any_text, max_size=4))
    def trial(prompts):
        texts = attempt(model.generate, prompts, 3, seed=0)
        assert texts is None or len(texts) == len(prompts)
        for prompt in prompts:
            tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
            attempt(lambda tokens: "".join(model.stream(tokens, 3, seed=0)), tokens)

    fuzz(trial)


def test_any_sampling_flags_draw_tokens_or_are_refused(model, attempt):
    flags = {
        "max_gen_len": st.integers(-2, 5),
        "temperature": st.one_of(st.floats(), st.floats(0, 2)),
        "top_p": st.one_of(st.floats(), st.floats(0, 1)),
        "top_k": st.one_of(st.none(), st.integers(), st.integers(0, 100)),
        "repetition_penalty": st.one_of(st.floats(), st.floats(0.1, 2)),
        "seed": st.one_of(st.none(), st.integers()),
    }

    @rules(60)
    @given(st.fixed_dictionaries(flags))
    def trial(options):
        attempt(model.generate, ["a", "b"], **options)

    fuzz(trial)


def test_any_command_line_is_understood_or_refused(attempt, capsys):
    names = [*vars(Sampling(1)), "ckpt_dir", "dtype", "quantize", "verbose", "prompt_file", "x"]
    words = st.one_of(
        st.sampled_from(names).map("--{}".format),
        st.tuples(st.sampled_from(names), any_text).map("--{0[0]}={0[1]}".format),
        numbers.map(str),
        any_text,
        st.just("--"),
    )
    script = runpy.run_path(str(ROOT / "example-cpu.py"))
    parser = Parser("", script["FLAGS"], script["PROMPTS"])

    @rules(100)
    @given(st.lists(words, max_size=6))
    def trial(argv):
        try:
            attempt(parser.parse, argv)
        except SystemExit as end:
            assert end.code in (0, 2)

    fuzz(trial)
    capsys.readouterr()
