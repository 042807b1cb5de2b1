"""Chat with a LLaMA model, on the CPU."""

from llama.cli import open_model, run


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.8,
    top_p: float = 0.95,
    max_seq_len: int = 512,
    max_gen_len: int = 256,
    dtype: str = "float32",
    quantize: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
) -> None:
    """Answer line after line until the end of input."""
    llama = open_model(ckpt_dir, tokenizer_path, max_seq_len, 1, dtype, quantize)
    while True:
        try:
            line = input("prompt> ")
        except EOFError:
            return
        (text,) = llama.generate([line], max_gen_len, temperature, top_p, seed=seed)
        print(text, flush=True)


if __name__ == "__main__":
    run(main)
