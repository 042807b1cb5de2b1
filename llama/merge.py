"""Writing a checkpoint as one merged.pth: in the dtype of its files, another one, or quantized."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from .checkpoint import (
    VERSION,
    Checkpoint,
    check_folder,
    empty_model,
    find_files,
    find_shards,
    is_huggingface,
    nearest_tokenizer,
)
from .errors import UserError
from .loading import open_checkpoint
from .weights import FORMAT_KEY, as_bytes, open_shards, quantization_of


def open_source(
    folder: Path, tokenizer_path: Path | None = None, copy_files: bool = True
) -> Checkpoint:
    """Open Meta's shards or merged.pth, or a Hugging Face folder.

    Args:
        folder: The directory of the weights. Without params.json they can be merged, not quantized.
        tokenizer_path: The tokenizer for the calibration text. Default: the nearest one.
        copy_files: Copy Meta's params.json and tokenizer.model too. Those of a Hugging Face folder
            are always written.
    """
    check_folder(folder, "input_dir")
    params_path = folder / "params.json"
    paths = find_shards(folder) or ([] if is_huggingface(folder) else find_files(folder))
    if paths and not params_path.exists():
        return Checkpoint(open_shards(paths), {}, None, None, {})
    checkpoint = open_checkpoint(folder, tokenizer_path, originals=True)
    if copy_files and not checkpoint.files:
        extras = (params_path, nearest_tokenizer(folder))
        checkpoint.files.update({path.name: path.read_bytes() for path in extras if path.exists()})
    return checkpoint


def write_merged(
    source: Checkpoint,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as output_dir/merged.pth, with source.files beside it.

    Args:
        source: The checkpoint, see `open_source`.
        dtype: Convert the weights. Default: keep their dtype.
        quantize: int8 or int4, to quantize them. Default: do not.
        overwrite: Replace files that exist.
    Returns:
        The file that was written. Nothing appears under its name before it is complete.
    Raises:
        UserError: A file exists, the disk is too small, or a weight does not fit the dtype.
    """
    if quantization_of(source.weights):
        raise UserError("the weights are quantized already: use the original ones")
    if quantize and dtype:
        raise UserError("`dtype` has no effect with `quantize`: leave it out")
    if quantize and not source.args:
        raise UserError("quantizing needs the params.json that belongs to the weights")
    if output_dir.suffix == ".pth" or output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is not a directory: set `output_dir` to one")
    is_new = not output_dir.exists()
    with writing_to(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    target = output_dir / "merged.pth"
    with ExitStack() as stack:
        # The stack ends in reverse: merged.pth is renamed last, an empty new folder is removed.
        if is_new:
            stack.callback(remove_if_empty, output_dir)
        partial = stack.enter_context(atomic_write(target, overwrite))
        paths = {output_dir / name: content for name, content in source.files.items()}
        changed = [p for p, c in paths.items() if not (p.is_file() and p.read_bytes() == c)]
        for path in changed:
            stack.enter_context(atomic_write(path, overwrite)).write_bytes(paths[path])
        if quantize:
            save_quantized(partial, source, quantize)
        else:
            save_converted(partial, source, dtype)
        if overwrite and changed:  # old weights are never beside new params.json
            target.unlink(missing_ok=True)
    return target


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise UserError where the system refuses to write to the output directory."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be written to ({error.strerror})"
        raise UserError(f"{folder} {reason}: set `output_dir` to another directory") from None


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def atomic_write(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to. If the block succeeds, the file is renamed to `path`.

    Raises:
        UserError: `path` exists, now or at the end, and is not to be overwritten.
    """
    exists = UserError(f"{path} exists: set another `output_dir`, or `overwrite`")
    if path.is_dir() or not overwrite and os.path.lexists(path):
        raise exists
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with writing_to(path.parent):
            partial.touch()
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        if overwrite:
            partial.replace(path)
            return
        try:
            os.link(partial, path)  # fails if the path exists, where rename would replace it
        except FileExistsError:
            raise exists from None
        except OSError:  # this file system has no hard links
            if os.path.lexists(path):
                raise exists from None
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def save_converted(target: Path, source: Checkpoint, dtype: torch.dtype | None) -> None:
    """Save the weights of a checkpoint, in this dtype or as they are."""
    state = {}
    for name, weight in source.weights.items():
        kept = weight.dtype if dtype is None or not weight.dtype.is_floating_point else dtype
        state[name] = torch.empty(weight.shape, dtype=kept, device="meta")
    with tensor_writer(target, state) as write:
        for name, weight in source.weights.items():
            write(name, weight.read(state[name].dtype))


def save_quantized(target: Path, source: Checkpoint, scheme: str) -> None:
    """Save a checkpoint whose weights are quantized on the way."""
    from .quantization.calibration import calibrate, calibration_tokens

    model = empty_model(source.args, scheme)
    version = torch.tensor([VERSION], dtype=torch.uint8)
    with tensor_writer(target, model.state_dict() | {FORMAT_KEY: version}) as write:

        def on_quantized(path: str, layer: nn.Module) -> None:
            for name, buffer in layer.state_dict(prefix=f"{path}.").items():
                write(name, buffer)
            layer.to("meta")

        write(FORMAT_KEY, version)
        for name, tensor in model.named_parameters():
            write(name, source.weights[name].read(tensor.dtype))
        tokens = calibration_tokens(source.tokenizer, source.args.vocab_size)
        calibrate(model, source.weights, tokens, on_quantized)


@contextmanager
def tensor_writer(path: Path, state: Mapping[str, Tensor]) -> Iterator[Callable]:
    """Write a checkpoint tensor by tensor.

    Args:
        path: The file.
        state: All tensors; only their shapes and dtypes are used.
    Yields:
        write(name, tensor), to be called for each of them.
    """
    needed, free = sum(t.nbytes for t in state.values()), shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"merged.pth needs {needed / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} free"
        )
    offsets = reserve(path, state)
    options = {"unit": "B", "unit_scale": True, "disable": None}
    with path.open("r+b") as file, tqdm(desc="writing", total=needed, **options) as bar:

        def write(name: str, tensor: Tensor) -> None:
            tensor = tensor.contiguous()
            file.seek(offsets[name])
            file.write(as_bytes(tensor))
            bar.update(tensor.nbytes)

        yield write
        file.flush()
        os.fsync(file.fileno())  # on the disk, before anything is replaced


def reserve(path: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a checkpoint without the tensors' bytes; returns the offset of each tensor."""
    with FakeTensorMode():
        fakes = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(fakes, path)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written ({error}): is the disk full?") from None
    index = torch.load(path, map_location="meta", weights_only=True)
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in index.items()}
