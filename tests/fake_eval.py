"""The evaluation that follows fake_train.py: its verdict again, with `n` added, so that a test sees whose figures it reads."""

import json
import sys
from pathlib import Path

from fake_train import parse

RESULT = "eval.json"


def resolve(argv):
    args = parse(argv, {"model_path": "", "n": 4, "device": "cpu"})
    return Path(args["model_path"]) / "eval", args


def main(argv):
    out, args = resolve(argv)
    if args["n"] == 13:
        raise ValueError("no luck")
    verdict = json.loads((out.parent / "verdict.json").read_text())
    out.mkdir(exist_ok=True)
    rows = {mode: row | {"unique": float(args["n"])} for mode, row in verdict["modes"].items()}
    (out / RESULT).write_text(json.dumps({"modes": rows, "args": args}))


if __name__ == "__main__":
    main(sys.argv[1:])
