"""What a run found, as tables in a terminal."""

import statistics

from advreg.tables import text_table
from comparison.works import is_weaker

UNITS = {"peak": ("MB", 1e-6, 0), "step": ("ms", 1e3, 2), "whole": ("s", 1, 2)}
# What a result may have besides: its name, a factor, and digits.
BESIDES = (("accuracy", 1, 4), ("moved", 1, 3), ("growth", 1e-6, 0))


def table_of(result):
    """The table of a work, a line for each peer."""
    unit, scale, digits = UNITS[unit_of(result)]
    own = statistics.median(result["values"]["advreg"]) * scale
    besides = [column for column in BESIDES if result.get(column[0])]
    head = [result["name"], f"peer {unit}", f"advreg {unit}", "ratio", "quartiles"]
    for name, _, _ in besides:
        head += [f"peer {name}", f"advreg {name}"]
    rows = []
    for peer, (low, ratio, high) in result["ratios"].items():
        theirs = statistics.median(result["values"][peer]) * scale
        row = [peer, f"{theirs:.{digits}f}", f"{own:.{digits}f}", f"{ratio:.3f}"]
        if is_weaker(result, peer):
            row[-1] += " at more accuracy"
        row.append(f"{low:.3f}–{high:.3f}")
        for name, factor, places in besides:
            values = (result[name][side] * factor for side in (peer, "advreg"))
            row += [f"{value:.{places}f}" for value in values]
        rows.append(row)
    return "\n".join([text_table(head, rows), *data_of(result)])


def data_of(result):
    """A line on the data, where they are no random ones."""
    data = result["data"]
    if "clean accuracy" in data:
        yield (
            f"{result['counts']['advreg']} test images of {data['data']}; the accuracy "
            f"on all test images is {data['clean accuracy']:.4f}."
        )


def unit_of(result):
    if result["measure"] == "peak":
        return "peak"
    return "step" if result["job"]["kind"] == "step" else "whole"


def print_targets(found):
    rows = [
        (
            line["work"],
            line["peer"],
            str(line["most"]),
            "" if line["measured"] is None else f"{line['measured']:.3f}",
            line["met"],
        )
        for line in found
    ]
    print(text_table(("target", "peer", "at most", "measured", "met"), rows))


def print_curve(found):
    name = found["name"]
    rows = [
        (
            str(point[name]),
            f"{point['ms per step']:.2f}",
            "{0:.2f}–{2:.2f}".format(*point["quartiles of ms"]),
            f"{point['µs per example']:.1f}",
        )
        for point in found["points"]
    ]
    head = (name, "ms per step", "quartiles", "µs per example")
    print(f"\n{text_table(head, rows)}")
    print(line_through(found), flush=True)


def line_through(found):
    """The straight line through the points of a curve."""
    return (
        f"{found['ms at 0']:.3g} ms + {found['ms per unit']:.3g} ms × "
        f"{found['straight in']}, from which no step is further than "
        f"{found['largest residual']:.0%} of its time."
    )
