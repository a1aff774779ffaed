"""What a report says of its tables and figures, whatever the numbers."""

from __future__ import annotations

_READING = """
Every method got the same examples in the same order and the same number of passes over them. Where it had several
learning rates to choose from, one was chosen on a split of the training data. Seeds are paired: with one seed all
methods see the same data. A run that failed or gave no number is counted under "seeds", named below the tables, and
ranked last. Means, deviations and tests are over the runs that have a score, which flatters a method that fails.

Scores are multiplied by 100. "std" is the standard deviation over seeds (n - 1). "95% interval" is the percentile
bootstrap interval of the mean over seeds (9,999 resamples). With few seeds it is too narrow: for five normally
distributed scores it holds the true mean in about 84 of 100 cases, for ten in 90, for twenty in 93. It tells of seeds
only, not of how the test examples were drawn.

"vs" is the mean difference to the method that it names over the seeds that both have, in points. "p" is that of a
paired permutation test, two-sided: if the methods did not differ, each difference could as well have the other sign.
Up to 14 pairs all sign patterns are gone through; beyond, 16,384 are drawn. The smallest p that n pairs allow is 2 /
2^n. "p (Holm)" is corrected for the number of methods tested in the table. It is not corrected for the number of
tables: of 20 tables without any true difference, one may well show something.

"mean rank": in each seed the methods are ranked by their score, 1 for the best; equal scores share their mean rank.
The rank of a task is the mean over its seeds, and that of all tasks is the mean over the tasks, each in the domain it
was trained on. The test over all tasks flips the sign of every pair of every task, and tasks weigh alike. It is the
one with enough pairs to show something when each task has few seeds. It takes the tasks as given: it does not say
that another task would come out the same.

Costs are medians over the runs that finished. "entries trained" includes the head. Peak memory is what training added
to the process before the model was built, or the peak on the device. Step times, where there are any, are measured
apart, one step of each method in turn, so that noise hits all alike; their median hides the one step per cycle in
which DPS selects, which training time holds. Training times of runs that shared a machine say little; steps and step
times hold there. How many steps a method takes to a score is known only as finely as the validation split is looked
at.
"""

READING = tuple(" ".join(paragraph.split()) for paragraph in _READING.strip().split("\n\n"))
"""How to read a report, a paragraph each."""

CAPTIONS = {
    "costs": (
        "Mean score against costs, with 95% intervals. No method is both cheaper and better "
        "than one on the Pareto front."
    ),
    "seeds": (
        "The score of every run. A thin line joins the runs of one seed; the bar below the points is the mean with "
        "its 95% interval."
    ),
    "curves": (
        "Training loss and validation score by step, means over the seeds. Shaded: SUBNETWORK, in which DPS updates "
        "only the best-scored entries."
    ),
    "selection": (
        "The fraction of each weight's entries that DPS selects, by layer and cycle, mean over the seeds. Methods "
        "that select the same fraction of every weight, as their scope demands, are left out."
    ),
    "overlap": (
        "How much of the mask stays from one cycle to the next: entries in both masks over entries in either. "
        "Dotted: what two independent random masks of the same sizes share."
    ),
    "overlap-by-layer": "The same overlap, by layer and cycle, mean over the seeds.",
}
"""Per kind of figure, what it shows."""
