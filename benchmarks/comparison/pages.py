"""What a run found, as tables of a page in Markdown: a line for each work."""

import statistics

from comparison.printing import UNITS, unit_of
from comparison.works import SIDES, is_weaker

# How names of works begin, and what the column of their names is called.
KINDS = {
    "step": "a step of training",
    "evaluate": "`evaluate`",
    "predict": "`predict`",
    "first-step": "the first step",
    "memory": "the peak of memory",
    "attack": "an attack",
}
PEERS = {
    "plain": "plain Keras",
    "loop": "minimal loop",
    "nsl": "NSL",
    "plain_nsl": "plain Keras 2",
    "art": "ART",
    "art_compiled": "ART, compiled",
    "torch": "PyTorch",
    "foolbox": "Foolbox",
    "cleverhans": "CleverHans",
    "advreg_all_steps": "advreg, no early stop",
}


def page(found):
    """The tables of a run, as `compare.run` returns it."""
    parts = []
    for kind, title in KINDS.items():
        results = [r for r in found["works"] if r["name"].startswith(f"{kind}/")]
        if results:
            parts.append(table(title, results))
    parts += [curve(result) for result in found["curves"]]
    return "\n\n".join([*parts, circumstances(found)])


def table(title, results):
    """A line for each result: what advreg takes, and the ratio to each peer."""
    peers = [side for side in SIDES if any(side in r["ratios"] for r in results)]
    unit, scale, digits = UNITS[unit_of(results[0])]
    head = [title, f"advreg, {unit}", *(f"/ {PEERS[peer]}" for peer in peers)]
    rows = []
    for result in results:
        own = statistics.median(result["values"]["advreg"]) * scale
        _, *name = result["name"].split("/")
        row = [", ".join(name), f"{own:.{digits}f}{left(result, 'advreg')}"]
        row += [ratio_to(peer, result) for peer in peers]
        rows.append(row)
    return markdown(head, rows)


def ratio_to(peer, result):
    """The cell of a peer: the ratio of medians, and the quartiles of the turns."""
    if peer not in result["ratios"]:
        return ""
    low, ratio, high = result["ratios"][peer]
    cell = f"{ratio:.2f} ({low:.2f}–{high:.2f}){left(result, peer)}"
    return f"{cell}, a stronger attack" if is_weaker(result, peer) else cell


def left(result, side):
    """What an attack leaves of the accuracy."""
    accuracy = result["accuracy"].get(side)
    return "" if accuracy is None else f", leaves {100 * accuracy:.1f} %"


def curve(result):
    """A line for each point of a curve, and the straight line through them."""
    name = result["name"]
    rows = [
        [
            str(point[name]),
            f"{point['ms per step']:.2f}",
            f"{point['µs per example']:.1f}",
        ]
        for point in result["points"]
    ]
    return (
        f"{markdown([name, 'ms per step', 'µs per example'], rows)}\n\n"
        f"{result['ms at 0']:.3g} ms + {result['ms per unit']:.3g} ms × "
        f"{result['straight in']}, from which no step is further than "
        f"{result['largest residual']:.0%} of its time."
    )


def circumstances(found):
    """Where, and with what, a run was made."""
    machine = found["machine"]
    commits = {result["commit"] for result in found["works"] + found["curves"]}
    environments = [
        f"- {environment or 'advreg'}: {described(found['versions'][side])}"
        for environment, side in one_of_each(found["versions"]).items()
    ]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['system']}; advreg at {', '.join(sorted(commits))}.\n\n"
        "The libraries of the environments:\n\n" + "\n".join(sorted(environments))
    )


def one_of_each(sides):
    """A side of each environment."""
    return {SIDES[side]: side for side in sides}


def described(versions):
    """The libraries of an environment, but for advreg, whose commit is told."""
    return ", ".join(f"{name} {v}" for name, v in versions.items() if name != "advreg")


def markdown(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
