"""What several algorithms need, as pure functions: tensors in, tensors out.

Every loss here is a weighted sum over tokens. The normaliser (per sequence, per token, per fixed length) is a weight per
token that is computed once for the whole batch, `token_weights`; a micro-batch then sums its own part, so how a batch is
split cannot change a gradient.
"""
import torch

from model import product

# -------------------------------------------------------------------------------------------------- log-probabilities


class TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / T)[y], a chunk of rows at a time: logits never outlive their chunk.

    d logprob / d h = (W[y] - p W) / T does not depend on what the loss makes of the log-probability, so the forward pass
    computes it while it has p, and the backward pass is one multiplication. Only a W that trains itself (full
    fine-tuning) needs p again in the backward pass.
    """

    @staticmethod
    def probs(hidden, weight, targets, temperature, support):
        """Probabilities (n, V) and log-probabilities of the targets (n, 1), in fp32 (float64 stays)."""
        logits = product(hidden, weight)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if temperature != 1:
            logits /= temperature
        if support is not None:
            logits.masked_fill_(~support, float("-inf"))
        top = logits.amax(-1, keepdim=True)
        picked = logits.gather(-1, targets[:, None]) - top
        probs = logits.sub_(top).exp_()
        total = probs.sum(-1, keepdim=True)
        return probs.div_(total), picked - total.log()

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, support, chunk):
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        parts = []
        for i in range(0, hidden.shape[0], chunk):
            rows = slice(i, i + chunk)
            allowed = None if support is None else support[rows]
            probs, logprobs = TokenLogprobs.probs(hidden[rows], weight, targets[rows], temperature, allowed)
            parts.append(logprobs)
            if jacobian is not None:
                jacobian[rows] = weight[targets[rows]] - product(probs.to(weight.dtype), weight.t())
        keep = ctx.needs_input_grad[1]
        ctx.save_for_backward(jacobian, *((hidden, weight, targets, support) if keep else (None,) * 4))
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(parts).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        jacobian, hidden, weight, targets, support = ctx.saved_tensors
        grad = (grad / ctx.temperature)[:, None]
        grad_hidden = None if jacobian is None else (jacobian * grad).to(jacobian.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for i in range(0, hidden.shape[0], ctx.chunk):
                rows = slice(i, i + ctx.chunk)
                allowed = None if support is None else support[rows]
                probs, _ = TokenLogprobs.probs(hidden[rows], weight, targets[rows], ctx.temperature, allowed)
                grad_logits = probs.mul_(-grad[rows]).scatter_add_(1, targets[rows, None], grad[rows])
                grad_weight += grad_logits.to(hidden.dtype).t() @ hidden[rows]
        return grad_hidden, grad_weight, None, None, None, None


def token_logprobs(hidden, weight, targets, temperature: float = 1.0, support=None, chunk: int | None = None):
    """Log-probabilities of tokens under the law that sampled them, differentiable in hidden and weight.

    hidden (n, C) final states that score the tokens, weight (V, C) the output embedding, targets (n,) long, support (n, V)
    bool or None the tokens that could be drawn (the law is renormalised over them). Returns (n,) fp32. `chunk` rows have
    their logits at a time (default: 4 MB of fp32 on a CPU, which its cache holds; 256 MB on a GPU).
    Raises ValueError for a target outside its support.
    """
    if support is not None and not bool(support.gather(1, targets[:, None]).all()):
        raise ValueError("a token lies outside the support that was stored when it was sampled")
    chunk = chunk or max(16, (2**26 if hidden.is_cuda else 2**20) // weight.shape[0])
    return TokenLogprobs.apply(hidden, weight, targets, temperature, support, chunk)


class TokenLaw(torch.autograd.Function):
    """`TokenLogprobs` for losses that look at the whole law p = softmax(h W^T / T), not at the drawn token alone.

    k figures a row: log p[y], the entropy H and, beside a reference law q, KL(p || q). Their derivatives by the logits over T,
    onehot(y) - p, -p (log p + H) and p (log p - log q - KL), are taken to h in the forward pass, as above.
    """

    @staticmethod
    def figures(hidden, weight, targets, temperature, support, ref_hidden, ref_weight, ref_support):
        """k figures (k, n) and their derivatives (k, n, V)."""
        log_p = log_law(hidden, weight, temperature, support)
        p, picked = log_p.exp(), log_p.gather(1, targets[:, None])
        if support is not None:
            log_p.masked_fill_(~support, 0)  # 0 log 0 is 0
        entropy = -(p * log_p).sum(-1, keepdim=True)
        figures = [picked, entropy]
        slopes = [(-p).scatter_add_(1, targets[:, None], torch.ones_like(picked)), -p * (log_p + entropy)]
        if ref_hidden is not None:
            log_q = log_law(ref_hidden, ref_weight, temperature, ref_support)
            gap = log_p - (log_q if ref_support is None else log_q.masked_fill_(~ref_support, 0))  # where p is 0 it is finite
            kl = (p * gap).sum(-1, keepdim=True)
            figures, slopes = [*figures, kl], [*slopes, p * (gap - kl)]
        return torch.stack(figures).squeeze(-1), torch.stack(slopes)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, support, *ref):
        figures, slopes = TokenLaw.figures(hidden, weight, targets, temperature, support, *ref)
        jacobian = None
        if ctx.needs_input_grad[0]:
            jacobian = product(slopes.flatten(0, 1).to(weight.dtype), weight.t()).unflatten(0, slopes.shape[:2])  # (k, n, C)
        again = (hidden, weight, targets, support, *ref) if ctx.needs_input_grad[1] else (None,) * 7
        ctx.save_for_backward(jacobian, *again)
        ctx.temperature = temperature
        return figures

    @staticmethod
    def backward(ctx, grad):  # (k, n)
        jacobian, hidden, weight, targets, support, *ref = ctx.saved_tensors
        grad, grad_weight = grad / ctx.temperature, None
        grad_hidden = None if jacobian is None else (jacobian * grad[..., None].to(jacobian.dtype)).sum(0)
        if ctx.needs_input_grad[1]:
            _, slopes = TokenLaw.figures(hidden, weight, targets, ctx.temperature, support, *ref)
            grad_weight = (slopes * grad[..., None]).sum(0).to(hidden.dtype).t() @ hidden
        return grad_hidden, grad_weight, *[None] * 6


def log_law(hidden, weight, temperature, support):
    """log softmax(h W^T / T) (n, V) in fp32 (float64 stays), -inf outside the support."""
    logits = product(hidden, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return (logits if support is None else logits.masked_fill(~support, float("-inf"))).log_softmax(-1)


def token_law(hidden, weight, targets, temperature: float = 1.0, support=None, ref=None, chunk: int | None = None):
    """(log-probabilities of the targets, entropies, KL to a reference) of the laws that scored tokens, (n,) fp32 each.

    Arguments as `token_logprobs`; ref: (hidden states (n, C), output embedding (V, C), support (n, V) bool or None) of the
    reference. Its support is what any policy may write (minimum length), never the policy's own: on that, one that is certain
    would be at KL 0 from any reference. It has to hold the policy's. None: no KL is returned. All are differentiable in hidden
    and weight. Sums are exact, over all V tokens.
    """
    chunk = chunk or max(16, (2**26 if hidden.is_cuda else 2**20) // weight.shape[0])
    ref_hidden, ref_weight, ref_support = ref or (None, None, None)
    support, ref_hidden, ref_support = (None if x is None else x.split(chunk) for x in (support, ref_hidden, ref_support))
    parts = [
        TokenLaw.apply(h, weight, y, temperature, support and support[i], ref_hidden and ref_hidden[i], ref_weight,
                       ref_support and ref_support[i])
        for i, (h, y) in enumerate(zip(hidden.split(chunk), targets.split(chunk)))
    ]  # fmt: skip
    return torch.cat(parts, 1).unbind()


def text_logprobs(model, ids, mask):
    """Log-probabilities (n_valid,) of the tokens of whole texts after the first, in row-major order, differentiable.

    ids (B, T) long, mask (B, T) bool, filled up on the right: causal attention never sees the filling.
    """
    valid = mask[:, 1:]
    hidden = model.hidden(ids[:, :-1])[valid]  # the state at t - 1 scores token t
    return token_logprobs(hidden, model.head_weight, ids[:, 1:][valid])


# ---------------------------------------------------------------------------------------------------- normalisers

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def token_weights(mask, loss_type: str, max_new_tokens: int) -> torch.Tensor:
    """The weight of each token in a loss that is a sum over the whole batch. mask (N, T) bool -> (N, T) fp32.

    grpo: mean over the tokens of a sequence, then over sequences. bnpo and dapo: mean over all valid tokens of the batch.
    dr_grpo: sum over tokens divided by N * max_new_tokens, a constant, so that length earns nothing.
    """
    mask = mask.float()
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.shape[0]
    if loss_type in ("bnpo", "dapo"):
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (mask.shape[0] * max_new_tokens)
    raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")


# -------------------------------------------------------------------------------------------------- KL estimators


def k1(logprobs, ref_logprobs):
    """log(pi/ref) per token: unbiased for KL(pi || ref) in value; its gradient as a loss has mean zero, so never a loss."""
    return logprobs - ref_logprobs


def k3(logprobs, ref_logprobs):
    """exp(ref - pi) - (ref - pi) - 1 per token: unbiased, never negative (Schulman, http://joschu.net/blog/kl-approx.html)."""
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


# ---------------------------------------------------------------------------------------------- group statistics


def group_stats(rewards, size: int, keep=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, sample standard deviation and count of each group of `size` consecutive rewards, over the kept ones.

    rewards (N,), keep (N,) bool or None -> three tensors (N,), each group's figure repeated for its members. A group of
    one has deviation 0, a group of none mean 0.
    """
    groups = rewards.double().view(-1, size)  # in fp32 sixteen times .7 has a deviation
    keep = torch.ones_like(groups, dtype=torch.bool) if keep is None else keep.view(-1, size)
    count = keep.sum(1, keepdim=True).double()
    mean = (groups * keep).sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((groups - mean).square() * keep).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return tuple(x.expand_as(groups).reshape(-1).to(rewards.dtype) for x in (mean, variance.sqrt(), count))
