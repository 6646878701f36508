"""The singular vectors of frozen weights, computed once: kept in files that are named by the weight's hash.

    U, Vt = singular_vectors(weight, rank=32)         # W = U diag(S) Vt, the largest singular values first

The files lie in ~/.cache/sluice/svd, or $SLUICE_CACHE/svd, and may be deleted at any time.
"""
import hashlib
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from checkpoints import atomic_write


def cache_folder() -> Path:
    return Path(os.environ.get("SLUICE_CACHE") or Path.home() / ".cache" / "sluice") / "svd"


def tensor_hash(*tensors: torch.Tensor) -> str:
    """sha256 over shapes and fp32 values: equal for a weight in bfloat16 and the same values in fp32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def singular_vectors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U (out, k) and Vt (k, in) of the largest k = min(rank, out, in) singular values, fp32, on the weight's device.

    weight (out, in), of any float dtype; the decomposition is of its fp32 values. A file that is damaged is computed again,
    with a warning. Raises ValueError for a weight that is not finite, or a cache folder that can't be written.
    """
    path = cache_folder() / f"{tensor_hash(weight)}.safetensors"
    parts = read(path) if path.exists() else None
    if parts is None:
        if not bool(weight.isfinite().all()):
            raise ValueError(f"a weight {tuple(weight.shape)} is not finite: no singular vectors (damaged model file?)")
        parts = [part.contiguous().cpu() for part in torch.linalg.svd(weight.detach().float(), full_matrices=False)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save(dict(zip(("U", "S", "Vt"), parts)), metadata={"hash": tensor_hash(*parts)}))
        except OSError as error:
            raise ValueError(f"cannot keep singular vectors in {path.parent}: {error}; set SLUICE_CACHE to a folder") from error
    U, _, Vt = parts
    return U[:, :rank].contiguous().to(weight.device), Vt[:rank].contiguous().to(weight.device)


def read(path: Path) -> list[torch.Tensor] | None:
    """U, S, Vt from a file whose own hash says that they are as written; None, with a warning, where it does not."""
    try:
        data = path.read_bytes()
        tensors = load(data)
        parts = [tensors[name] for name in ("U", "S", "Vt")]
        if f'"{tensor_hash(*parts)}"'.encode() in data[: 8 + int.from_bytes(data[:8], "little")]:  # the header
            return parts
        error = "its numbers are not those that were written"
    except (SafetensorError, OSError, KeyError) as caught:
        error = caught
    warnings.warn(f"{path} is damaged ({error}): computed again", stacklevel=3)
    return None
