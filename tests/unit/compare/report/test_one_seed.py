from __future__ import annotations

import pytest

from peft_dps.compare.report.conclusion import conclusion
from peft_dps.compare.report.experiment import experiments_of
from peft_dps.compare.report.one_seed import one_seed
from peft_dps.compare.runs.plan import Plan
from peft_dps.compare.runs.results import Results
from peft_dps.compare.runs.run import Retention, Run, Timing

MIB = 2**20
# Score, peak memory, size of the file, what is kept.
METHODS = {
    "full": (0.5, 1000, 80, 0.7),
    "chosen": (0.6, 400, 2, 0.9),
    "drawn": (0.6, 420, 3, 0.8),
    "copy": (0.6, 1500, 80, 0.75),
}
UNKNOWN = "One seed cannot tell which method is more accurate."


def experiment(methods=METHODS, seeds=1, probes=("articles",), metric="AUC", timings=(), reference=None):
    runs = {}
    for method, (score, memory, size, kept) in methods.items():
        for seed in range(seeds):
            run = Run(
                Plan(method, 1e-4, "reviews", seed, "tiny"),
                method,
                metrics=["m"],
                scores={"here": {"m": score}},
                peak_memory=memory * MIB,
                file_size=size * MIB,
                retention=[Retention(probe, metric, 0.95, kept) for probe in probes],
            )
            runs[run.plan.key] = run
    (found,) = experiments_of(Results(runs, list(timings)), reference)
    return found


def test_costs_and_what_is_kept_are_told_and_accuracy_is_not():
    timing = Timing("tiny", "reviews", 16, 8, {"full": [2.0], "chosen": [1.0], "drawn": [1.2], "copy": [2.2]})
    found = experiment(timings=[timing])
    said = (
        "chosen and drawn take the least memory: 0.40 to 0.42 of that of full, 0.50 to 0.60 of its step time and a "
        "file of 2.00 MiB to 3.00 MiB instead of 80 MiB. copy takes the most memory, 1.50 of it. On articles, which "
        f"no method was trained for, chosen went from 95.0 to 90.0 and full to 70.0. {UNKNOWN}"
    )
    assert one_seed(found) == conclusion([found]) == said


def test_what_was_not_measured_is_not_told():
    alone = {"full": (0.5, 0, 0, 0.7), "chosen": (0.6, 0, 0, 0.9)}
    assert one_seed(experiment(alone, probes=())) == UNKNOWN
    dear = {"full": (0.5, 100, 0, 0.7), "chosen": (0.6, 200, 0, 0.9)}
    assert one_seed(experiment(dear, probes=())) == f"No method takes less memory than full. {UNKNOWN}"
    no_file = {"full": (0.5, 100, 0, 0.7), "chosen": (0.6, 50, 2, 0.9)}
    assert (
        one_seed(experiment(no_file, probes=())) == f"chosen takes the least memory: 0.50 of that of full. {UNKNOWN}"
    )


def test_of_a_loss_the_lowest_is_kept_best():
    losses = {"full": (0.5, 0, 0, 3.0), "chosen": (0.6, 0, 0, 2.0)}
    said = one_seed(experiment(losses, metric="loss"))
    assert "chosen went from 0.95 to 2.00 and full to 3.00" in said


@pytest.mark.parametrize(
    ("names", "seeds"), [(METHODS, 2), (["full"], 1), (["chosen", "drawn"], 1)], ids=["seeds", "alone", "no reference"]
)
def test_only_of_one_seed_and_beside_a_reference(names, seeds):
    assert one_seed(experiment({name: METHODS[name] for name in names}, seeds, reference="full")) == ""
