"""Several objectives one after the other: which of them pays at which step, and, if wanted, a policy bundle for each.

    add_policy_bundles(model, 2, seed)                          # b_rl_policy_2, behind a fresh adapter's own bundles
    trainer = InSequence(trainer, rewards, own_bundles=True)    # two rewards: each pays half of the steps

What an earlier objective taught lies in a bundle that the later ones leave as it is, to the bit; it goes on writing while they
train. The bundles of the other losses (value, entropy, KL) serve all objectives.
"""
import copy
from dataclasses import replace

import torch

from adapters import Branch
from bundles import BundledLayer
from envs import DetectorWatch
from gates import Gate
from reward_specs import get_reward, names_in
from routing import ARRANGEMENTS, GradientRouter

POLICY = "b_rl_policy"


def check(flags: dict) -> None:
    """What a sequence's flags can get wrong together: rewards, reward, bundle_per_reward, loss_routes, max_steps, env."""
    if not flags["rewards"]:
        if flags["bundle_per_reward"]:
            raise ValueError("--bundle_per_reward gives each of several --rewards a policy bundle: name them")
        return
    names = names_in(flags["rewards"])
    if flags["reward"]:
        raise ValueError(f"--rewards {flags['rewards']} stands in place of --reward {flags['reward']}: give one of them")
    if len(names) < 2:
        raise ValueError(f"--rewards {flags['rewards']} names fewer than two objectives: one is --reward's")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--rewards {flags['rewards']} names {twice[0]} twice: each objective has one share of the steps")
    if len(names) > flags["max_steps"]:
        raise ValueError(f"--rewards {flags['rewards']} are {len(names)} stages: too many for --max_steps {flags['max_steps']}")
    kinds = {name: get_reward(name).prompts for name in names} if flags["env"] == "stories" else {}
    if len(set(kinds.values())) > 1:
        read = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ValueError(f"--rewards must read the same prompts, and these read others: {read}")
    fit = [name for name, (_, table) in ARRANGEMENTS.items() if sets_policy_apart(table)]
    if flags["bundle_per_reward"] and flags["loss_routes"] not in fit:
        raise ValueError(f"--bundle_per_reward needs an arrangement in which {POLICY} is trained by policy_loss alone: "
                         f"--loss_routes {', '.join(fit)}, not {flags['loss_routes'] or 'none'}")


def sets_policy_apart(table: dict[str, tuple[str, ...]]) -> bool:
    """Whether policy_loss trains POLICY, and no other loss does."""
    return [loss for loss, branches in table.items() if POLICY in branches] == ["policy_loss"]


# ------------------------------------------------------------------------------------------------------- stages, bundles


def stage_of(step: int, steps: int, count: int) -> int:
    """Which of `count` objectives, from 0, pays at a step of `steps`: their shares are equal, to a step."""
    return step * count // steps


def bundle_of(stage: int) -> str:
    return POLICY if stage == 0 else f"{POLICY}_{stage + 1}"


def stage_tables(table: dict[str, tuple[str, ...]], count: int) -> list[dict[str, tuple[str, ...]]]:
    """The loss -> branches table of each stage: policy_loss trains the stage's bundle where it would have trained POLICY."""
    trained = table["policy_loss"]
    return [table | {"policy_loss": tuple(bundle_of(stage) if name == POLICY else name for name in trained)}
            for stage in range(count)]  # fmt: skip


def add_policy_bundles(model, count: int, seed: int) -> None:
    """Gives a model with residual bundles a policy bundle for each of `count` objectives, as wide as the one that it has.

    They stand behind its own and are drawn by a generator of their own, so that all others are what they would be without them.
    """
    adapter, generator = model.adapter, torch.Generator().manual_seed(seed * 1_000_003 + 1)
    share = next(branch.rank for branch in adapter.spec.branches if branch.name == POLICY)
    new = [Branch(bundle_of(stage), share, 1.0) for stage in range(1, count)]
    adapter.spec = replace(adapter.spec, branches=(*adapter.spec.branches, *new))
    for branch in new:
        adapter.scales[branch.name], adapter.gates[branch.name], adapter.groups[branch.name] = 1.0, Gate(), {}
    for path, layer in model.named_modules():
        if isinstance(layer, BundledLayer):
            layer.grow(generator)
            for name in (branch.name for branch in new):
                adapter.groups[name] |= {f"{path}.{name}.{key}": p for key, p in layer.parts[name].named_parameters()}


# ------------------------------------------------------------------------------------------------------------- the trainer


def paid_by(env, reward):
    """The same environment, prompts and truth, with another reward."""
    other = copy.copy(env)
    other.reward = reward
    return other


class InSequence:
    """An algorithm's trainer that is paid by one reward after the other, in equal shares of its steps.

    Which one is a function of the steps done, so there is nothing to save. `env` stays what evaluations judge in.
    """

    def __init__(self, trainer, rewards, own_bundles: bool):
        self.trainer, self.env, self.envs = trainer, trainer.env, [paid_by(trainer.env, reward) for reward in rewards]
        tables = stage_tables(trainer.router.table, len(rewards)) if own_bundles else []
        self.routers = [GradientRouter(trainer.model, table) for table in tables] or [trainer.router] * len(rewards)
        stages = [stage_of(step, trainer.config.max_steps, len(rewards)) for step in range(trainer.config.max_steps)]
        self.stages, self.stage_ends = stages, [step for step in range(1, len(stages)) if stages[step] != stages[step - 1]]

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def step(self):
        step, trainer = self.steps_done, self.trainer
        stage = self.stages[step]
        trainer.env, trainer.router = self.envs[stage], self.routers[stage]
        if step in self.stage_ends:
            trainer.watch = DetectorWatch()  # another reward's detector
        metrics, sample = trainer.step()
        return metrics | {"stage": stage + 1.0}, sample
