"""What a run of `compare.py` found, as tables in Markdown: a line for each work."""

import statistics

import numpy as np
from turns import table
from works import EXPLAIN, SIDES

# How names of works begin, what the column of their names is called, and the unit.
KINDS = {
    "step": ("a step of training", "ms", 1e3, 2),
    "evaluate": ("`evaluate`", "s", 1, 2),
    "predict": ("`predict`", "s", 1, 2),
    "first-step": ("the first step", "s", 1, 2),
    "memory": ("the peak of memory", "MB", 1e-6, 0),
    "attack": ("an attack", "s", 1, 2),
}
COMMON = ("python", "tensorflow", "keras", "numpy")
# Accuracies under the same attack may differ by so much to be called equal: random
# starts differ. Of 2,000 images it is ten, of 200 one.
SAME_ACCURACY = 0.005
# The works of the README's table, and what they are called there.
SUMMARY = {
    "step/mnist/fgsm/32": "training step, FGSM, batch 32",
    "step/mnist/fgsm/256": "training step, FGSM, batch 256",
    "step/mnist/pgd-10/32": "training step, PGD-10, batch 32",
    "step/mnist/pgd-10/256": "training step, PGD-10, batch 256",
    "step/resnet/fgsm/256": "training step, small ResNet, FGSM, batch 256",
    "evaluate/mnist/fgsm/32": "`evaluate`, trained with FGSM, batch 32",
    "evaluate/mnist/fgsm/256": "`evaluate`, trained with FGSM, batch 256",
    "evaluate/mnist/pgd-3/32": "`evaluate`, trained with PGD-3, batch 32",
    "evaluate/mnist/pgd-3/256": "`evaluate`, trained with PGD-3, batch 256",
    "predict/mnist/256": "`predict`, batch 256",
    "first-step/mnist/fgsm/256": "first step, compiling included",
    "memory/mnist/fgsm/256": "peak of memory of FGSM steps, batch 256",
    "attack/mnist/pgd-20/0.1/250": "PGD-20, ε 0.1, 2,000 images",
    "attack/mnist/pgd-20/0.3/250": "PGD-20, ε 0.3, 2,000 images",
    "attack/mnist/autoattack/0.1/100": "AutoAttack, ε 0.1, 200 images",
}


def parts(found, curves):
    """Returns all tables of what is kept of a run."""
    works = found["works"]
    tables = [summary(works)]
    for kind in KINDS:
        results = [r for r in works.values() if r["name"].startswith(f"{kind}/")]
        if results:
            tables.append(table_of(kind, results))
    tables += [curve(curves[name], works[name]) for name in curves if name in works]
    return [*tables, circumstances(found)]


def summary(works):
    """Returns the ratios that matter most, in one table."""
    results = [works[name] for name in SUMMARY if name in works]
    peers = [peer for peer in peers_of(results) if peer not in EXPLAIN]
    rows = []
    for result in results:
        ratios = (result["ratios"].get(peer) for peer in peers)
        cells = ("" if ratio is None else f"{ratio[1]:.2f}" for ratio in ratios)
        rows.append([SUMMARY[result["name"]], *cells])
    return table(["advreg beside", *(SIDES[peer][1] for peer in peers)], rows)


def peers_of(results):
    """Returns the sides that results have beside advreg."""
    there = {side for result in results for side in result["ratios"]}
    return [side for side in SIDES if side in there]


def table_of(kind, results):
    """Returns a line for each result: what advreg takes, and the ratio to each peer."""
    peers, (title, unit, scale, digits) = peers_of(results), KINDS[kind]
    rows = []
    for result in results:
        own = statistics.median(result["values"]["advreg"]) * scale
        _, *name = result["name"].split("/")
        row = [", ".join(name), f"{own:.{digits}f}{besides(result, 'advreg')}"]
        rows.append(row + [ratio_to(peer, result) for peer in peers])
    head = [title, f"advreg, {unit}", *(f"/ {SIDES[peer][1]}" for peer in peers)]
    return table(head, rows)


def ratio_to(peer, result):
    """Returns the cell of a peer: the ratio of medians, and the quartiles of turns."""
    if peer not in result["ratios"]:
        return ""
    low, ratio, high = result["ratios"][peer]
    cell = f"{ratio:.2f} ({low:.2f}–{high:.2f}){besides(result, peer)}"
    own, other = (result["accuracy"].get(side, 0.0) for side in ("advreg", peer))
    is_weaker = own - other > SAME_ACCURACY + 1e-9  # One of 200.
    return f"{cell}, a stronger attack" if is_weaker else cell


def besides(result, side):
    """Returns what an attack leaves of the accuracy, or what steps add to memory."""
    if side in result["accuracy"]:
        return f", leaves {100 * result['accuracy'][side]:.1f} %"
    if side in result.get("growth", {}):
        return f", +{result['growth'][side] * 1e-6:.0f} MB"
    return ""


def curve(work, result):
    """Returns a line for each point of a curve, and the straight line through them."""
    (title, abscissae), name, rows = work.line, work.name.removeprefix("curve/"), []
    x, costs = np.array(abscissae, "f8"), np.zeros(len(abscissae))
    for index, (label, (_, job)) in enumerate(work.jobs.items()):
        costs[index] = cost = 1e3 * statistics.median(result["values"][label])
        per_example = cost / job.get("batch", 32) * 1e3
        rows.append([label, f"{cost:.2f}", f"{per_example:.1f}"])
    slope, start = np.polyfit(x, costs, 1, w=1 / costs)  # Each relative to itself.
    residual = np.max(np.abs(start + slope * x - costs) / costs)
    return (
        f"{table([name, 'ms per step', 'µs per example'], rows)}\n\n"
        f"{start:.3g} ms + {slope:.3g} ms × {title}, from which no step is further "
        f"than {residual:.0%} of its time."
    )


def circumstances(found):
    """Returns where, and with what, a run was made."""
    machine = found["machine"]
    commits = sorted({result["commit"] for result in found["works"].values()})
    environments = {}
    for side, versions in found["versions"].items():
        name = SIDES[side][0].removeprefix("peer_").removesuffix(".py")
        # Peers that advreg's environment has besides do not matter.
        shown = COMMON if name == "advreg" else versions
        told = [f"{library} {versions[library]}" for library in shown]
        environments[name] = f"- {name}: {', '.join(told)}"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['system']}; advreg at {', '.join(commits)}.\n\n"
        "The libraries of the environments:\n\n"
        + "\n".join(sorted(environments.values()))
    )
