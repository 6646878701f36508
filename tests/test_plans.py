"""From a file to runs: names, precedence, and every wrong flag found before anything starts."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import plans
from plans import cells, commands_of, import_script, plan, read_experiment, state_of, words_of

FAKE = str(Path(__file__).parent / "fake_train.py")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def file_of(text: str) -> dict:
    Path("experiment.yaml").write_text(text)
    return {"script": FAKE} | read_experiment("experiment.yaml")


ARMS = """
fixed: {max_steps: 5, beta: 1e-3}
grid: {seed: [42, 1, 2]}
arms:
  none: {}
  routing: {beta: 0.5, text: a/b}
  ranks: {grid: {seed: [42], task: [.5, .25]}, text: -1}
"""


def test_arms_grid_and_names():
    root, planned = plan(file_of(ARMS))
    assert root == Path("output/experiment")
    assert [run.name for run in planned] == ["none_s42", "none_s1", "none_s2", "routing_s42", "routing_s1", "routing_s2",
                                             "ranks_task0.5_s42", "ranks_task0.25_s42"]  # fmt: skip
    assert [(run.arm, run.swept) for run in planned[5:]] == [("routing", {}), ("ranks", {"task": 0.5}), ("ranks", {"task": 0.25})]
    first, routed, rank = planned[0], planned[3], planned[-1]
    assert first.arm == "none" and first.folder == root / "none_s42"
    assert first.flags == {"max_steps": 5, "beta": 0.001, "seed": 42}  # 1e-3 is a text to YAML, a number to the script
    assert routed.config["beta"] == 0.5 and routed.config["text"] == "a/b" and rank.config["text"] == "-1"
    assert all(run.config["max_steps"] == 5 and run.config["output_dir"] == str(run.folder) for run in planned)
    assert " ".join(first.words) == "--max_steps 5 --beta 1e-3 --seed 42 --threads 1 --output_dir output/experiment/none_s42"


def test_an_arm_with_a_script_of_its_own_takes_none_of_the_common_flags():
    Path("other.py").write_text(Path(FAKE).read_text().replace("beta", "gamma"))
    arms = """
fixed: {max_steps: 5}
grid: {beta: [0.1, 0.2]}
arms:
  none: {}
  other: {script: other.py, gamma: 0.5, grid: {seed: [1]}}
"""
    _, planned = plan(file_of(arms), evaluate=False)
    assert [(run.name, run.script.path.name) for run in planned] == [
        ("none_b0.1", Path(FAKE).name), ("none_b0.2", Path(FAKE).name), ("other_s1", "other.py"),
    ]  # fmt: skip
    assert "--max_steps" not in planned[-1].words and planned[-1].config["gamma"] == 0.5
    assert commands_of(planned[-1])["train"][1].endswith("other.py")
    with pytest.raises(ValueError, match="arm other: script must be text, not 3"):
        file_of("arms: {other: {script: 3}}")


def test_the_command_line_wins_over_arms_and_file_and_a_fixed_flag_is_swept_no_more():
    _, planned = plan(file_of(ARMS), given={"seed": "7", "max_steps": "2"}, swept={"beta": ["0.1", "0.10000001"]})
    assert [run.name for run in planned] == [
        "none_b0.1", "none_b0.10000001", "routing_b0.1", "routing_b0.10000001",
        "ranks_b0.1_task0.5", "ranks_b0.10000001_task0.5", "ranks_b0.1_task0.25", "ranks_b0.10000001_task0.25",
    ]  # fmt: skip
    assert {(run.config["seed"], run.config["max_steps"]) for run in planned} == {(7, 2)}


def test_an_experiment_without_a_file_is_called_by_what_is_fixed():
    root, planned = plan({"script": FAKE}, {"text": "stories", "max_steps": "20"}, {"beta": ["1e-5", "0.02"], "seed": ["3"]})
    assert root == Path("output/fake_train_textstories_max_steps20")
    assert [run.name for run in planned] == ["b1e-5_s3", "b0.02_s3"] and planned[0].arm == ""
    root, planned = plan({"script": FAKE}, {}, {"seed": ["1", "2"]}, root="here")
    assert root == Path("here") and [(run.name, run.arm, run.swept) for run in planned] == [("s1", "", {}), ("s2", "", {})]


def test_the_evaluation_runs_where_the_run_did_unless_told_otherwise():
    _, [run] = plan({"script": FAKE, "name": "e"}, {"device": "gpu"})
    assert run.judge_words == ["--model_path", "output/e/run", "--device", "gpu"] and run.judge_config["device"] == "gpu"
    _, [run] = plan({"script": FAKE, "name": "e", "eval": {"device": "cpu"}}, {"device": "gpu"})
    assert run.judge_config["device"] == "cpu"


def test_cells_are_the_cartesian_product_in_order():
    assert cells([("f", {"a": 1}, {"b": [1, 2], "c": [3, 4]})]) == [({"a": 1}, {"b": b, "c": c}) for b in (1, 2) for c in (3, 4)]
    assert cells([("f", {}, {})]) == [({}, {})]
    assert cells([("f", {"a": 1}, {"b": [2]}), ("g", {"b": 3}, {"a": [4]})]) == [({"b": 3}, {"a": 4})]


def test_words_survive_the_script_s_own_parser():
    flags = {"beta": 1e-05, "verbose": True, "text": "-x y", "resume": False}
    assert words_of(flags) == ["--beta", "1e-05", "--verbose", "--text=-x y", "--no_resume"]
    assert words_of({"top": [1, 2]}) == ["--top", "1", "2"]
    _, config = import_script(FAKE).module.resolve(words_of(flags))
    assert {key: config[key] for key in flags} == flags


@pytest.mark.parametrize("text, error", [
    ("nome: x", "unknown key 'nome'; known: name, script"),
    ("grid: [1]", "grid must be a mapping"),
    ("grid: {seed: 1}", "grid: seed must be a list of values, not 1"),
    ("grid: {seed: []}", "grid: seed must be a list of values"),
    ("grid: {seed: [1, 1]}", "two runs would be called s1"),
    ("grid: {beta: [0.001, 1e-3]}", "two runs would be called b1e-3"),
    ("{fixed: {seed: 1}, grid: {seed: [1]}}", "seed is both fixed and swept"),
    ("fixed: {output_dir: x}", "output_dir is set for each run by the sweep"),
    ("arms: {no: {}}", "arm False must be letters"),
    ("arms: {a b: {}}", "arm 'a b' must be letters"),
    ("arms: {a: 1}", "arm a must map flags to values"),
    ("arms: {good: {}, bad: {beta: -1}}", "arm bad: --beta must be at least 0, not -1.0"),
    ("arms: {good: {}, bad: {bata: 1}}", "arm bad: unknown flag --bata"),
    ("eval: {m: 3}", "eval: unknown flag --m"),
    ("script: gone.py", "script gone.py: no such file"),
    ("- a", "must map name"),
    ("a: [", "is no YAML"),
])  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(text, error):
    with pytest.raises(ValueError) as caught:
        plan(file_of(text))
    assert error in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("utf8", [True, False])
def test_a_refusal_in_tyro_s_frame_is_one_line(utf8, monkeypatch):
    frames = {
        True: "╭─ Value error ───╮\n│ Error parsing --lr: could not   │\n│ convert 'x'  │\n│ ──────── │\n│ help --lr │\n╰────╯\n",
        False: "Value error\n--------\nError parsing --lr: could not\nconvert 'x'\n---------\nhelp --lr\n",
    }

    def refuse(argv):
        print(frames[utf8], file=sys.stderr)
        raise SystemExit(2)

    script = import_script(FAKE)
    monkeypatch.setattr(script.module, "resolve", refuse)
    with pytest.raises(ValueError, match=r"^arm a: Error parsing --lr: could not convert 'x'$"):
        plans.resolve(script, [], "arm a")


@pytest.mark.parametrize(
    "flag", ["--lrr 1", "--lr foo", "--lora_config r0", "--reward nope", "--routing dual --reward happy_exp --x"]
)
def test_train_grpo_s_refusals_are_one_line(flag):
    with pytest.raises(ValueError, match=f"^x: .*{flag.split()[-1]}") as caught:
        plans.resolve(import_script("train_grpo.py"), flag.split(), "x")
    assert not set("\n│─") & set(str(caught.value)) and "helptext" not in str(caught.value)


def test_every_script_of_the_house_resolves_without_loading_anything(monkeypatch):
    import model

    monkeypatch.setattr(model, "load", None)
    for name, words in (
        ("train_grpo.py", ["--routing", "dual"]),
        ("train_sft.py", ["--routing", "dual"]),
        ("train_tiny.py", []),
        ("eval_run.py", ["--model_path", "x"]),
    ):
        script = import_script(name)
        folder, config = script.module.resolve(words)
        assert isinstance(folder, Path) and not folder.exists() and script.module.RESULT and len(config) > 5
        assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_what_is_left_to_do_follows_from_the_folder():
    _, [run] = plan({"script": FAKE, "name": "e"}, {"beta": "0.1"})
    assert state_of(run) == "new" and list(commands_of(run)) == ["train", "eval"]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml.7.tmp").write_text("cut")
    assert state_of(run) == "new" and "--resume" not in commands_of(run)["train"]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config | {"output_dir": "moved", "resume": True}))
    assert state_of(run) == "interrupted" and commands_of(run)["train"][-1] == "--resume"
    (run.folder / "verdict.json").write_text("{}")
    assert state_of(run) == "finished" and list(commands_of(run)) == ["eval"]
    run.report.parent.mkdir()
    run.report.write_text(json.dumps({"args": run.judge_config | {"model_path": "moved"}}))
    assert commands_of(run) == {}
    run.report.write_text(json.dumps({"args": run.judge_config | {"n": 5}}))
    assert list(commands_of(run)) == ["eval"]
    _, [other] = plan({"script": FAKE, "name": "e"}, {"beta": "0.2", "task": "0.75"})
    with pytest.raises(ValueError, match="beta: 0.1 in the folder, 0.2 now; task: 0.5 in the folder, 0.75 now. Delete"):
        state_of(other)
    (run.folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="holds files but no config.yaml"):
        state_of(run)
