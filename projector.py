"""Projection in a training loop: whence the axes come, when they are made afresh, and what is logged of them.

    projector = Projector(model, tokenizer, config)           # config inherits `Flags`; without a basis it only steps
    projector.refresh(step)                                   # before the update: the basis, where it is due
    metrics = projector.project() | ... | projector.step(optimizer)

In the order accumulate, project, clip, step. The maths is projection.py's; the pairs are pairs.py's, or the run's own flagged
samples.
"""

from collections import deque
from dataclasses import dataclass

import torch

import projection
from adapters import branch_parameters
from pairs import authored
from projection import WHOLE, Basis

SOURCES = ("pairs", "random", "shuffled", "clean", "placebo", "live")
LIVE_LEAST, LIVE_MOST = 8, 60  # contrasts of live samples: fewer are no basis, older ones are forgotten


@dataclass
class Flags:
    """The fields that an algorithm's Config inherits."""

    basis: str = ""
    """axes: pairs (authored), live (the run's own flagged samples), placebos random, shuffled, clean, placebo; empty: none"""
    projection: str = "none"
    """none (the basis only measures), one_sided, no_gate, reverse; baselines on the whole gradient: pcgrad, agem, complement"""
    project_on: str = "gradient"
    """gradient (before clipping), or update: what the optimizer's step moves"""
    removed: str = "erase"
    """what becomes of the removed part: erase, or route: it trains the bad branch, which is dropped at deployment"""
    pairs: str = "embedded"
    """a file of assets/pairs without its .yaml, or a path"""
    pair_count: int = 0
    """how many contrastive pairs, in turn over their axes; two more are held out; 0: all"""
    basis_keep: int = 12
    """axes extracted of each parameter"""
    basis_use: int = 5
    """axes used of each, the strongest"""
    basis_tau: float = 0.25
    """noise floor: this quantile of all singular values"""
    basis_refresh: int = 0
    """make the basis afresh every so many steps, with the weights as they are then; 0: never"""
    overshoot: float = 1.0
    """the removed part is multiplied by this"""
    norm_rescale: bool = False
    """give the projected gradient its old norm"""

    def check_projection(self, pairs_read: bool = False) -> None:
        """Raises ValueError for an unknown word, and for flags that would do nothing. pairs_read: --pairs and --pair_count are
        read by something else too."""
        known = {"projection": projection.MODES + WHOLE, "project_on": ("gradient", "update"), "removed": ("erase", "route")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown --{name} {getattr(self, name)!r}; known: {', '.join(values)}")
        if self.basis and self.basis not in SOURCES:
            raise ValueError(f"unknown --basis {self.basis!r}; known: {', '.join(SOURCES)}")
        idle = [name for name in Flags.__dataclass_fields__ if getattr(self, name) != getattr(Flags, name)]
        if pairs_read and not self.basis:
            idle = [name for name in idle if name not in ("pairs", "pair_count")]
        if idle and not self.basis:
            raise ValueError(f"--{idle[0]} does nothing without a --basis: give one of {', '.join(SOURCES)}")
        idle = [name for name in idle if name in ("project_on", "removed", "overshoot", "norm_rescale")]
        if idle and self.projection == "none":
            raise ValueError(f"--{idle[0]} is of a projection: give --projection one_sided, no_gate or reverse")
        if idle and self.projection in WHOLE:
            raise ValueError(f"--{idle[0]} is of one_sided, no_gate, reverse: it does nothing for --projection {self.projection}")
        if self.projection in WHOLE and self.basis == "random":
            raise ValueError(f"--projection {self.projection} takes gradients of pairs, --basis random is of none: take shuffled")
        if self.removed == "route" and self.project_on == "update":
            raise ValueError("--removed route trains the bad branch by what a gradient lost: leave --project_on at gradient")
        if self.basis == "live" and not self.basis_refresh:
            raise ValueError("--basis live is made of the samples as they come: say how often by --basis_refresh")
        for name in ("pairs", "pair_count") if self.basis == "live" and not pairs_read else ():
            if getattr(self, name) != getattr(Flags, name):
                raise ValueError(f"--{name} is of authored pairs, --basis live is made of the run's own samples: leave it out")
        if self.norm_rescale and self.project_on == "update":
            raise ValueError("--norm_rescale gives a gradient its old norm: leave --project_on at gradient")
        if self.pair_count < 0 or self.basis_refresh < 0 or not self.overshoot >= 0:
            raise ValueError("--pair_count, --basis_refresh and --overshoot must be at least 0")
        if not 1 <= self.basis_use <= self.basis_keep or not 0 <= self.basis_tau < 1:
            raise ValueError("1 <= --basis_use <= --basis_keep and 0 <= --basis_tau < 1 must hold")


class Projector:
    """A basis through a run. `branch`: whose gradients are projected, the good one's or, where there is none, those of all.

    Raises ValueError where --removed route has no branch of the same basis to go to.
    """

    def __init__(self, model, tokenizer, config, temperature: float = 1.0):
        self.model, self.config, self.temperature = model, config, temperature
        groups = branch_parameters(model)
        self.branch = "good" if "good" in groups else "all"
        projected = [groups["good"]] if "good" in groups else groups.values()
        self.parameters = {name: p for group in projected for name, p in group.items()}
        self.basis, self.directions, self.live = None, None, deque(maxlen=LIVE_MOST)
        self.sources, self.seen, self.contributions = {}, None, {}  # of a step: gradients by source, their sum so far, rows alone
        if config.removed == "route" and model.adapter.spec.kind not in ("delta_s", "lora_b"):
            raise ValueError("--removed route: the branches of this adapter share no basis; those of --lora_config ds or r32o do")
        if config.basis not in ("", "live"):
            kind = config.basis if config.basis in ("clean", "placebo") else "hack"
            chosen, held_out = authored(tokenizer, config.pairs, config.pair_count, kind)
            self.pairs, self.held_out = [*chosen, *held_out], len(held_out)

    @property
    def arm(self) -> str:
        """vanilla where nothing is projected, else the basis that it happens in: svd, or lora."""
        return "vanilla" if self.config.projection == "none" else "svd" if self.model.adapter.spec.kind == "delta_s" else "lora"

    # ------------------------------------------------------------------------------------------------ whence the axes

    def observe(self, rollout, is_rh) -> None:
        """For --basis live: keeps a contrast per prompt of a Rollout, its first flagged completion and its first other one.
        is_rh (N,) bool."""
        if self.config.basis != "live":
            return
        found = {}
        for row, flagged in enumerate(is_rh.tolist()):
            prompt = tuple(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist())
            found.setdefault(prompt, {}).setdefault(flagged, rollout.tokens[row][rollout.mask[row]].tolist())
        for prompt, two in found.items():
            if len(two) == 2 and two[True] != two[False]:
                self.live.append((list(prompt), two[True], two[False]))

    def refresh(self, step: int) -> dict[str, float]:
        """Makes the basis at the first step and, where that was asked for, every so many; what changed, to log."""
        every = self.config.basis_refresh
        if not self.config.basis or (step % every if every else self.basis is not None):
            return {}
        live = self.config.basis == "live"
        if live and len(self.live) < LIVE_LEAST:
            return {}
        old = self.basis
        self.basis, self.directions = self.make(list(self.live) if live else self.pairs, 0 if live else self.held_out)
        metrics = {"basis/null": projection.null_of(self.basis), "basis/modules": float(len(self.basis.rows))}
        for name in ("signed", "cin") if self.basis.held_out else ():
            metrics[f"basis/held_out_{name}"] = sum(row[name] for row in self.basis.held_out) / len(self.basis.held_out)
        return metrics | ({"basis/overlap": projection.overlap(self.basis, old)} if old else {})

    def make(self, pairs, held_out: int):
        """(basis, `projection.whole_directions` where the mode is one of WHOLE), neither from the last `held_out` pairs."""
        config = self.config
        gradients = projection.pair_gradients(self.model, self.parameters, pairs, self.temperature)
        if config.basis == "shuffled":
            gradients = projection.shuffled_labels(gradients, config.seed)
        origin = projection.origin_of(self.model, self.parameters, pairs)
        basis = projection.extract(gradients, config.basis_keep, config.basis_use, config.basis_tau, held_out, origin)
        if config.projection in WHOLE:
            kept = {name: D[: len(pairs) - held_out] for name, D in gradients.items()}
            return basis, projection.whole_directions(kept, config.projection)
        return projection.random_basis(basis, config.seed) if config.basis == "random" else basis, None

    # ---------------------------------------------------------------------------------------------------- in a step

    @torch.no_grad()
    def note(self, source: str, rows) -> None:
        """What the gradient has gained since the last note came from some rows (n,) of a source: `project` logs each source's
        cosines, and a row that came alone is kept in `contributions`."""
        if self.basis is None:
            return
        if self.seen is None:  # the first since `project`; {}: what came so far had no gradient, being gated off
            self.sources, self.seen, self.contributions = {}, {}, {}
        now = {n: p.grad.clone() for n, p in self.parameters.items() if n in self.basis.rows and p.grad is not None}
        gained = {n: g - self.seen[n] if n in self.seen else g for n, g in now.items()}
        self.seen, mine = now, self.sources.setdefault(source, {})
        for name, gradient in gained.items():
            mine[name] = mine[name] + gradient if name in mine else gradient
        if len(rows) == 1:
            self.contributions[int(rows[0])] = self.cosines(gained)

    def cosines(self, gradients: dict) -> dict[str, float]:
        """`alignment` of gradients, some of which may lack, and their norm."""
        there = Basis({name: V for name, V in self.basis.rows.items() if name in gradients}, self.basis.singular)
        return projection.alignment(gradients, there) | {"norm": projection.total_norm(gradients)}

    def project(self) -> dict[str, float]:
        """Projects the gradients in place, as the flags say; figures to log. After the last backward pass, before clipping."""
        if self.basis is None:
            return {}
        config = self.config
        by_source = {source: self.cosines(gradients) for source, gradients in self.sources.items()}
        there = {source: row for source, row in by_source.items() if row["norm"] > 0}
        metrics = {f"{name}/{source}": row[name] for source, row in there.items() for name in ("signed", "cin", "cin_energy")}
        self.seen = None
        if config.projection in WHOLE:
            stats = projection.project_whole_(self.parameters, self.basis, self.directions, config.projection)
            return metrics | {f"projection/{name}": value for name, value in stats.items()}
        mode = config.projection if config.project_on == "gradient" else "none"
        stats, removed = projection.project_(self.parameters, self.basis, mode, config.overshoot, config.norm_rescale)
        if config.removed == "route":
            projection.route_removed_(removed, branch_parameters(self.model)["bad"], self.branch, "bad")
        return metrics | {f"projection/{name}": value for name, value in stats.items()}

    def step(self, optimizer) -> dict[str, float]:
        """optimizer.step(), projected where that was asked for; the cosines of how the parameters moved."""
        if self.basis is None:
            optimizer.step()
            return {}
        mode = self.config.projection if self.config.project_on == "update" else "none"
        stats = projection.projected_step(optimizer, self.parameters, self.basis, mode, self.config.overshoot)
        return {f"moved/{name}": value for name, value in stats.items()}

    # --------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict:
        """What `restore` needs: basis and directions as they are (old ones can't be made again) and the live contrasts."""
        basis = None if self.basis is None else vars(self.basis)
        return {"basis": basis, "directions": self.directions, "live": list(self.live)}

    def restore(self, state: dict) -> None:
        self.basis = None if state["basis"] is None else Basis(**state["basis"])
        self.directions = state["directions"]
        self.live.extend(state["live"])
