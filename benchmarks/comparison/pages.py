"""What a run found, as tables of a page in Markdown: a line for each work."""

import statistics

from comparison.printing import UNITS, line_through, unit_of
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
COMMON = ("python", "tensorflow", "keras", "numpy")
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
        row = [", ".join(name), f"{own:.{digits}f}{besides(result, 'advreg')}"]
        row += [ratio_to(peer, result) for peer in peers]
        rows.append(row)
    return markdown(head, rows)


def ratio_to(peer, result):
    """The cell of a peer: the ratio of medians, and the quartiles of the turns."""
    if peer not in result["ratios"]:
        return ""
    low, ratio, high = result["ratios"][peer]
    cell = f"{ratio:.2f} ({low:.2f}–{high:.2f}){besides(result, peer)}"
    return f"{cell}, a stronger attack" if is_weaker(result, peer) else cell


def besides(result, side):
    """What an attack leaves of the accuracy; what steps add to the memory."""
    if side in result["accuracy"]:
        return f", leaves {100 * result['accuracy'][side]:.1f} %"
    if "growth" in result:
        return f", +{result['growth'][side] * 1e-6:.0f} MB"
    return ""


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
    table = markdown([name, "ms per step", "µs per example"], rows)
    return f"{table}\n\n{line_through(result)}"


def circumstances(found):
    """Where, and with what, a run was made."""
    machine = found["machine"]
    commits = {result["commit"] for result in found["works"] + found["curves"]}
    one_of_each = {SIDES[side]: side for side in found["versions"]}
    environments = [
        f"- {name or 'advreg'}: {libraries(name, found['versions'][side])}"
        for name, side in one_of_each.items()
    ]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['system']}; advreg at {', '.join(sorted(commits))}.\n\n"
        "The libraries of the environments:\n\n" + "\n".join(sorted(environments))
    )


def libraries(environment, versions):
    """What matters in an environment: peers that advreg's has besides do not."""
    of_peers = environment is not None
    return ", ".join(
        f"{name} {version}"
        for name, version in versions.items()
        if name in COMMON or (of_peers and name != "advreg")
    )


def markdown(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
