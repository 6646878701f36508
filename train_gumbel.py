"""GRADE and GRADE-STE toward positive reviews from the command line: methods that configs/estimators.yaml compares.

    python train_gumbel.py                                                 # embedded reviews, results/grade/
    python train_gumbel.py --estimator ste                                 # results/grade_ste/
    python train_gumbel.py --model PATH --dataset stanfordnlp/imdb         # folders or Hub ids
    python train_gumbel.py --routing dual --bad_scale 0                    # praise that says nothing trains the bad branch

Flags are the fields of estimators.Flags and of the algorithm's `Config` (rl_gumbel.py), whose defaults estimators.PRESET sets.
"""
import sys
from functools import partial

import tyro

import estimators

RESULT = estimators.RESULT  # in its folder a run is finished
ALGORITHM, CLI = "rl_gumbel", partial(tyro.cli, use_underscores=True, description=__doc__)


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
