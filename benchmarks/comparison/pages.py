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
# Sides that explain a ratio, and are no peers.
EXPLAIN = ("plain_nsl", "art_compiled", "advreg_all_steps")


def page(found):
    """The tables of a run, as `compare.run` returns it."""
    return "\n\n".join([summary(found), *parts(found)])


def parts(found):
    """A table for each kind of work and each curve, and where all was measured."""
    tables = []
    for kind, title in KINDS.items():
        results = [r for r in found["works"] if r["name"].startswith(f"{kind}/")]
        if results:
            tables.append(table(title, results))
    tables += [curve(result) for result in found["curves"]]
    return [*tables, circumstances(found)]


def summary(found):
    """The ratios of a run that matter most, in one table."""
    by_name = {result["name"]: result for result in found["works"]}
    results = [by_name[name] for name in SUMMARY if name in by_name]
    peers = peers_of(results, without=EXPLAIN)
    rows = []
    for result in results:
        ratios = (result["ratios"].get(peer) for peer in peers)
        cells = ["" if ratio is None else f"{ratio[1]:.2f}" for ratio in ratios]
        rows.append([SUMMARY[result["name"]], *cells])
    return markdown(["advreg beside", *(PEERS[peer] for peer in peers)], rows)


def peers_of(results, without=()):
    """The sides that results have beside advreg, in the order of `SIDES`."""
    there = {side for result in results for side in result["ratios"]}
    return [side for side in SIDES if side in there and side not in without]


def table(title, results):
    """A line for each result: what advreg takes, and the ratio to each peer."""
    peers = peers_of(results)
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
