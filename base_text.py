"""Base text: taught before reinforcement learning, so that there is something to protect, and, if wanted, between its steps.

    text = TextTrainer(model, texts, tokenizer.pad_id, text_branches(model), lr=1e-3, batch_size=16, seed=0)
    teach(run, text, steps=200, held_out=...)            # then the model as it is becomes the reference policy
    trainer = Interleaved(trainer, text, every=4)        # a step on text after every fourth step of the algorithm

A residual bundle that was never trained writes 0, and what is not there cannot be spoilt. Every arm is taught alike: its SSL
bundles learn, or, in an adapter that has none, all of it.
"""
import copy
import math
import time

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from adapter_files import save_reference
from adapters import branch_parameters, dropping, freeze_reference, set_adapter_tensors
from bundles import bundle_alphas
from data import right_pad
from losses import text_logprobs
from routing import SEPARATE, clip_per_branch, gates
from verdict import REFERENCE, text_loss


def text_branches(model) -> tuple[str, ...]:
    """The branches that base text is taught to: the SSL bundles; all of an adapter without them."""
    names = tuple(branch_parameters(model))
    return tuple(name for name in SEPARATE["lm_loss"] if name in names) or names


class TextTrainer:
    """Cross-entropy on whole texts (lists of ids), by AdamW on some branches; the gates of the others are closed."""

    def __init__(self, model, texts: list[list[int]], pad_id: int, branches, lr: float, batch_size: int, seed: int):
        self.model, self.texts, self.pad_id, self.batch_size, self.seed, self.lr = model, texts, pad_id, batch_size, seed, lr
        self.closed = {name: 0.0 for name in model.adapter.names if name not in branches}
        parameters = [p for name in branches for p in branch_parameters(model)[name].values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def step(self, step: int, max_norm: float = 1.0) -> float:
        """One optimizer step on texts that are a function of `step`. Returns the mean loss a token before it, in nats.

        Raises FloatingPointError, with the weights as they were, for a loss or gradient that is not finite.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.texts), (self.batch_size,), generator=generator).tolist()
        ids, mask = (x.to(self.model.device) for x in right_pad([self.texts[i] for i in chosen], self.pad_id))
        self.model.zero_grad(set_to_none=True)  # also what other losses left: None keeps momentum and decay away
        with gates(self.model, **self.closed), dropping(self.model, self.seed * 1_000_003 + step):
            loss = -text_logprobs(self.model, ids, mask).mean()
            loss.backward()
        norms = clip_per_branch(self.model, max_norm)
        if not all(map(math.isfinite, (loss.item(), *norms.values()))):
            raise FloatingPointError(f"the loss on base text is {loss.item()}, gradients {norms} (lower --ssl_lr {self.lr}?)")
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss.item()


def teach(run, text: TextTrainer, steps: int, held_out: list[list[int]]) -> None:
    """Phase 0: `steps` steps on base text; then the model as it is is the reference policy, kept in the run folder, from where a
    run that goes on from a checkpoint takes it. Without one the phase begins again: its steps are the same."""
    model, path = text.model, run.folder / REFERENCE
    if run.checkpoint:
        if not path.is_file():
            raise ValueError(f"{path} is gone, the reference policy of this run: start again in another --output_dir")
        set_adapter_tensors(model, load_file(path), str(path))
        freeze_reference(model)
        return
    start, before = time.perf_counter(), text_loss(model, held_out, text.pad_id)
    losses = [text.step(step) for step in tqdm(range(steps), desc="base text")]
    freeze_reference(model)
    save_reference(model, path)
    after, late = text_loss(model, held_out, text.pad_id), losses[-max(1, steps // 10) :]
    run.log(0, {"ssl/loss": sum(late) / len(late), "ssl/perplexity_before": math.exp(before), "ssl/perplexity": math.exp(after)})
    seconds = time.perf_counter() - start
    change = f"{math.exp(before):.3f}, now {math.exp(after):.3f}"
    run.print(f"base text: {steps} steps in {seconds:.0f} s; held-out perplexity {change}")


class Interleaved:
    """An algorithm's trainer that takes a step on base text after every `every` of its own (0: none), and logs alphas.

    That step is the first thing of the next one, and is undone where the next one fails.
    """

    def __init__(self, trainer, text: TextTrainer, every: int):
        self.trainer, self.text, self.every = trainer, text, every

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def step(self):
        metrics, before, step = {}, None, self.trainer.steps_done
        if self.every and step and step % self.every == 0:
            before = copy.deepcopy(self.state())
            metrics["loss/lm"] = self.text.step(step)
        try:
            own, sample = self.trainer.step()
        except FloatingPointError:
            if before:
                self.restore(*before)
            raise
        if self.model.adapter.spec.kind == "bundles":
            metrics |= {f"alpha/{name}": alpha for name, alpha in bundle_alphas(self.model).items()}
        return own | metrics, sample

    def state(self):
        tensors, state = self.trainer.state()
        return tensors, {"algorithm": state, "text": self.text.optimizer.state_dict()}

    def restore(self, tensors, state) -> None:
        self.trainer.restore(tensors, state["algorithm"])
        self.text.optimizer.load_state_dict(state["text"])
