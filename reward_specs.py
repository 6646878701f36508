"""Named rewards: what configs/rewards.yaml says, read strictly, and scored.

    python reward_specs.py                 # lists every named reward with its components and detector

    spec = get_reward("sentence_length_5_smooth_plus_happy")
    values = spec.evaluate(completions, prompts)             # task, hack, reward, detected, ...: arrays of shape (N,)

The functions that a reward is made of, and how to add one: rewards.py. Unknown keys, functions and parameters, and values of
the wrong type or out of bounds, are refused when the file is read.
"""
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from rewards import COMPONENTS, DETECTORS, Registered

DEFAULT_PATH = Path(__file__).resolve().parent / "configs" / "rewards.yaml"
ROLES = ("task", "hack")
PROMPT_KINDS = ("stories", "arithmetic", "sorting")  # made by envs.PROMPTS


@dataclass(frozen=True)
class Bound:
    """A registered function with its parameters: `call` is the functools.partial."""

    name: str
    params: dict
    call: Callable


@dataclass(frozen=True)
class ComponentSpec:
    """One line of a reward's `components`: value = scale · function(completion, prompt)."""

    label: str
    role: str  # "task" or "hack"
    scale: float
    function: Bound


@dataclass(frozen=True)
class RewardValues:
    """What `RewardSpec.evaluate` returns for N completions; float64 or bool arrays of shape (N,)."""

    components: dict[str, np.ndarray]  # by label, scaled
    task: np.ndarray  # sum of the task components
    hack_reward: np.ndarray  # sum of the hack components, before any cap
    reward: np.ndarray  # task + hack_reward, at most `cap`
    reward_without_hack: np.ndarray  # task, at most `cap`: what a completion that may not profit from the hack is paid
    hack: np.ndarray  # bool, the true measure, any hack component above 0: for evaluation, never for training
    detected: np.ndarray  # bool, what the detector says; all False where the reward has none


@dataclass(frozen=True)
class RewardSpec:
    """A named reward: its components, an upper limit on the sum, its detector, and which of envs.PROMPTS it reads."""

    name: str
    components: tuple[ComponentSpec, ...]
    cap: float | None = None
    detector: Bound | None = None
    prompts: str = "stories"

    def evaluate(self, completions: Sequence[str], prompts: Sequence[str]) -> RewardValues:
        """Score N completions (text after the prompt, special tokens removed) of N prompts.

        Raises ValueError for no completion, unequal numbers, a non-finite component or a detector of the wrong length.
        """
        if len(completions) == 0 or len(completions) != len(prompts):
            raise ValueError(
                f"reward {self.name!r} got {len(completions)} completions and {len(prompts)} prompts; "
                "give at least one completion, and one prompt for each"
            )
        n = len(completions)
        scaled, task, hack_reward, hack_values = {}, np.zeros(n), np.zeros(n), np.zeros(n)
        for part in self.components:
            raw = np.array(list(map(part.function.call, completions, prompts)), dtype=np.float64)
            if raw.shape != (n,) or not np.isfinite(raw).all():
                raise ValueError(f"reward {self.name!r}: {part.label!r} must give one finite number per completion")
            scaled[part.label] = part.scale * raw
            if part.role == "hack":
                hack_reward += scaled[part.label]
                hack_values = np.maximum(hack_values, raw)
            else:
                task += scaled[part.label]
        detected = np.zeros(n, dtype=bool)
        if self.detector:
            detected = np.asarray(self.detector.call(completions, prompts, hack_values, task), dtype=bool)
            if detected.shape != (n,):
                raise ValueError(f"detector {self.detector.name!r} gave shape {detected.shape} for {n} completions")
        limit = math.inf if self.cap is None else self.cap
        return RewardValues(
            components=scaled,
            task=task,
            hack_reward=hack_reward,
            reward=np.minimum(task + hack_reward, limit),
            reward_without_hack=np.minimum(task, limit),
            hack=hack_values > 0,
            detected=detected,
        )


# ------------------------------------------------------------------------------
# Reading the YAML, strictly


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"line {node.start_mark.line + 1}: {', '.join(twice)} given twice; rename or remove one")
        return super().construct_mapping(node, deep)


def _unknown(what: str, name: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}"


def _check_keys(where: str, entry: object, allowed: Sequence[str], required: Sequence[str]) -> dict:
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise ValueError(f"{where}: expected a mapping with {', '.join(allowed)}, got {entry!r}")
    for key in entry:
        if key not in allowed:
            raise ValueError(f"{where}: {_unknown('key', key, allowed)}")
    for key in required:
        if key not in entry:
            raise ValueError(f"{where}: {key!r} is missing")
    return entry


def _number(where: str, value: object, low: float | None = None, high: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value!r} (YAML reads 1e-3 as text: write 0.001)")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{where}: {value!r} is out of bounds [{low}, {high}]")
    return value


def _check_param(where: str, value: object, kind: object, bounds: tuple) -> None:
    if kind in (int, float):
        _number(where, value, *bounds)
        if kind is int and not isinstance(value, int):
            raise ValueError(f"{where}: expected a whole number, got {value!r}")
    elif kind == list[str]:
        # A bare string would be read letter by letter, and YAML turns an unquoted yes, no or on into a bool.
        if not isinstance(value, list) or not value or not all(isinstance(x, str) and x.strip() for x in value):
            raise ValueError(f"{where}: expected a list of non-empty strings (in quotes), got {value!r}")
    elif kind in (str, bool) and not isinstance(value, kind):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}")


def _bind(where: str, what: str, table: dict[str, Registered], name: object, params: object) -> Bound:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{where}: {_unknown(what, name, list(table))}")
    registered, params = table[name], {} if params is None else params
    parameters = [p for p in inspect.signature(registered.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    required = [p.name for p in parameters if p.default is p.empty]
    _check_keys(f"{where}: params of {name}", params, [p.name for p in parameters], required)
    kinds = typing.get_type_hints(registered.function)
    for key, value in params.items():
        _check_param(f"{where}: {name}.{key}", value, kinds.get(key), registered.bounds.get(key, (None, None)))
    if registered.check is not None:
        try:
            registered.check(**params)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
    return Bound(name, dict(params), functools.partial(registered.function, **params))


def _parse_component(where: str, entry: object) -> ComponentSpec:
    _check_keys(where, entry, ("name", "as", "role", "scale", "params"), ("name", "role"))
    function = _bind(where, "component", COMPONENTS, entry["name"], entry.get("params"))
    if entry["role"] not in ROLES:
        raise ValueError(f"{where}: {_unknown('role', entry['role'], ROLES)}")
    scale, label = _number(f"{where}: scale", entry.get("scale", 1.0)), entry.get("as", entry["name"])
    if scale == 0 or (entry["role"] == "hack" and scale < 0):
        raise ValueError(f"{where}: scale {scale} must not be 0, nor below 0 for a hack; leave the component out instead")
    if not isinstance(label, str) or not label:
        raise ValueError(f"{where}: 'as' must be a non-empty string, got {label!r}")
    return ComponentSpec(label, entry["role"], float(scale), function)


def parse_reward(name: str, entry: dict, source: str = "reward") -> RewardSpec:
    """Validate one entry (what stands under a reward's name in the YAML); ValueError says what is wrong and where."""
    where = f"{source}: {name!r}"
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: a reward's name must be text; put it in quotes")
    _check_keys(where, entry, ("components", "cap", "detector", "prompts"), ("components",))
    if not isinstance(entry["components"], list) or not entry["components"]:
        raise ValueError(f"{where}: 'components' must be a list with at least one component")
    parts = enumerate(entry["components"], start=1)
    components = tuple(_parse_component(f"{where}, component {i}", part) for i, part in parts)
    labels = [part.label for part in components]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: two components are labelled {label!r}; give one another label with 'as'")

    found = None
    if "detector" in entry:
        _check_keys(f"{where}, detector", entry["detector"], ("name", "params"), ("name",))
        found = _bind(f"{where}, detector", "detector", DETECTORS, entry["detector"]["name"], entry["detector"].get("params"))
        if not any(part.role == "hack" for part in components):
            raise ValueError(f"{where}: a detector finds a hack, and no component has role hack")
    cap = None if "cap" not in entry else float(_number(f"{where}: cap", entry["cap"]))
    prompts = entry.get("prompts", "stories")
    if prompts not in PROMPT_KINDS:
        raise ValueError(f"{where}: {_unknown('prompts', prompts, PROMPT_KINDS)}")
    return RewardSpec(name, components, cap, found, prompts)


def load_rewards(path: str | Path | None = None) -> dict[str, RewardSpec]:
    """Every reward of a YAML file (default configs/rewards.yaml) by name.

    Raises ValueError, naming the file, the reward and the known choices, for unknown keys, functions, parameters or
    roles, for values of the wrong type or out of bounds, and for names given twice; FileNotFoundError without the file.
    """
    path = Path(path or DEFAULT_PATH)
    with path.open(encoding="utf-8") as file:
        try:
            entries = yaml.load(file, Loader=StrictLoader)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: expected a mapping from reward names to their components")
    return {name: parse_reward(name, entry, source=path.name) for name, entry in entries.items()}


def names_in(text: str) -> list[str]:
    """"a, b" -> ["a", "b"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def objectives(flags: dict) -> list[str]:
    """By name, what pays a run, given by its flags: its `rewards` in their order, or its one `reward`."""
    return names_in(flags.get("rewards", "")) or [flags["reward"]]


def get_reward(name: str, path: str | Path | None = None) -> RewardSpec:
    """The reward called `name`; an unknown name raises ValueError that suggests near ones and lists all."""
    rewards = load_rewards(path)
    if name not in rewards:
        raise ValueError(_unknown("reward", name, list(rewards)))
    return rewards[name]


def get_trait(text: str, path: str | Path | None = None) -> RewardSpec:
    """A trait that texts may have, as a reward: one of the YAML by name, whose hack component is the measure and whose detector
    labels; or single words parted by commas ("dragon,dragons"), any of which is the trait. Raises ValueError for neither."""
    rewards = load_rewards(path)
    if text in rewards:
        if rewards[text].detector is None:
            raise ValueError(f"reward {text!r} has no detector to label a trait by: give it one, or name another")
        return rewards[text]
    params = {"words": [word.strip() for word in text.split(",")]}
    words = {"name": "contains_words", "params": params}
    try:
        return parse_reward(text, {"components": [words | {"as": "trait", "role": "hack"}], "detector": words}, "trait")
    except ValueError as error:
        raise ValueError(f"trait {text!r} is neither a reward of {Path(path or DEFAULT_PATH).name} nor single words parted by "
                         f"commas ({error})") from error


def describe(spec: RewardSpec) -> str:
    """One line: name, components as role:scale*function(params), cap, detector."""

    def call(bound: Bound) -> str:
        shown = (f"{k}={v if len(str(v)) < 40 else f'[{len(v)} items]'}" for k, v in bound.params.items())
        return f"{bound.name}({', '.join(shown)})"

    parts = " + ".join(f"{part.role}:{part.scale:g}*{call(part.function)}" for part in spec.components)
    cap = "" if spec.cap is None else f", at most {spec.cap:g}"
    return f"{spec.name} = {parts}{cap}" + (f"  [detector {call(spec.detector)}]" if spec.detector else "")


if __name__ == "__main__":
    for reward in load_rewards().values():
        print(describe(reward))
