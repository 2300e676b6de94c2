"""What all benchmarks share: sides take turns, and medians and ratios tell the cost.

A machine whose speed drifts slows all sides that take turns, so that their ratios stay.
"""

import random
import statistics
import time

SECONDS_OF_A_TURN = 0.3


def seconds(run, *arguments):
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def take_turns(sides, turns, warm=0):
    """Calls functions in turns, in each turn in another order.

    Args:
        sides: Functions by their names.
        turns: How often each is called.
        warm: How often each is called before that.

    Returns:
        What each function returned, by name.
    """
    found = {name: [] for name in sides}
    for turn in range(-warm, turns):
        for name in random.Random(turn).sample(list(sides), len(sides)):
            value = sides[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def steps_of_a_turn(seconds_of_a_step):
    """Returns how many steps make a turn that is long enough to be timed."""
    return max(1, min(200, round(SECONDS_OF_A_TURN / seconds_of_a_step)))


def quartiles(values):
    """Returns the first quartile, the median and the third."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratio(own, other):
    """Returns the ratio of the medians, between quartiles of the ratios of the turns.

    A machine that slows down while the sides take turns moves the medians, and hardly
    the quartiles.
    """
    low, _, high = quartiles([a / b for a, b in zip(own, other, strict=True)])
    return low, statistics.median(own) / statistics.median(other), high


def table(head, rows):
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
