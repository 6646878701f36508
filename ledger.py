"""The bytes that a stretch of code takes, on any device; on meta, where tensors have shapes and no numbers, nothing is computed.

    with Ledger("meta") as ledger, as_on_cuda():
        y = model(torch.zeros(16, 2048, dtype=torch.long, device="meta"))
    print(ledger.now, ledger.peak)

A ledger hears of every storage that is made, by forward and backward passes alike, and of when it is freed. What a kernel takes
and frees by itself it does not see.
"""
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch
from weakref import finalize

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Ledger(TorchDispatchMode):
    """Bytes on a device: `now` in use, and the `peak` of them since `mark` was called."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.alive, self.now, self.peak = device, set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self.enter, function(*args, **(kwargs or {})))

    def enter(self, tensor):
        if tensor.device.type == self.device and (key := (storage := tensor.untyped_storage())._cdata) not in self.alive:
            self.alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            finalize(storage, self.leave, key, storage.nbytes())
        return tensor

    def leave(self, key: int, size: int):
        self.alive.discard(key)
        self.now -= size

    def mark(self):
        self.peak = self.now


# ----------------------------------------------------------------------------------- what CUDA does, by shape alone


class FusedNorm(torch.autograd.Function):
    """CUDA's rms_norm: keeps its input and a number a row."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None, None, None


def fused_attention(math, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """The kernel that CUDA chooses: flash without a mask, memory-efficient with one; in fp32 `math` where heads share keys."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is None and enable_gqa:
        return math(q, k, v, is_causal=is_causal, enable_gqa=True)
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad, 0.0, is_causal)[0]


@contextmanager
def as_on_cuda():
    """Tensors on the meta device take the branches that the code has for CUDA, and what its fused kernels keep."""
    attention = partial(fused_attention, F.scaled_dot_product_attention)
    with patch.object(torch.Tensor, "is_cuda", True), patch.object(F, "rms_norm", FusedNorm.apply):
        with patch.object(F, "scaled_dot_product_attention", attention):
            yield
