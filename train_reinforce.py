"""REINFORCE toward positive reviews from the command line: one of the methods that configs/estimators.yaml compares.

    python train_reinforce.py                                              # embedded reviews, results/reinforce/
    python train_reinforce.py --model PATH --dataset stanfordnlp/imdb      # folders or Hub ids
    python train_reinforce.py --baseline loo --num_generations 4
    python train_reinforce.py --routing dual --bad_scale 0                 # praise that says nothing trains the bad branch

Flags are the fields of estimators.Flags and of the algorithm's `Config` (rl_reinforce.py), whose defaults estimators.PRESET sets.
"""
import sys
from functools import partial

import tyro

import estimators

RESULT = estimators.RESULT  # in its folder a run is finished
ALGORITHM, CLI = "rl_reinforce", partial(tyro.cli, use_underscores=True, description=__doc__)


def resolve(argv: list[str]):
    """(run folder, resolved config) of a command line, every flag checked, nothing loaded: a sweep asks before it starts."""
    return estimators.resolve(argv, ALGORITHM, CLI)


def main(argv: list[str]) -> int:
    return estimators.main(argv, ALGORITHM, CLI)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
