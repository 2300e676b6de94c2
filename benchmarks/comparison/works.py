"""What is compared, and what the comparison is to show."""

import dataclasses

# The environment of each side, `None` for that of advreg. The module has its name.
SIDES = {
    "advreg": None,
    "advreg_all_steps": None,
    "plain": None,
    "loop": None,
    "nsl": "nsl",
    "plain_nsl": "nsl",
    "art": "art",
    "art_compiled": "art",
    "torch": "torch",
    "foolbox": "foolbox",
    "cleverhans": "cleverhans",
}
ALL_STEPS = (
    *("advreg", "plain", "loop", "nsl", "plain_nsl"),
    *("art", "art_compiled", "torch"),
)
BATCHES = (32, 256)
# Name, iterations and step size of the attacks of training.
ATTACKS = (("fgsm", 1, 0.2), ("pgd-10", 10, 0.05))
# Accuracies under the same attack may differ by so much to be called equal: random
# starts differ. Of 2,000 images it is ten, of 200 one.
SAME_ACCURACY = 0.005


@dataclasses.dataclass(frozen=True)
class Work:
    """A row of the comparison.

    Args:
        name: Its name, parts between slashes.
        sides: The sides that do it, advreg first.
        job: Fields of the `Job`, but for its file.
        turns: Turns of each side.
        measure: `"seconds"` or `"peak"`, the memory.
        fresh: Whether each turn is in a new process.
        trained: Whether the network is trained.
        count: What a turn does; by default as many steps as make it long enough.
        warm: What each side does before the turns, one after the other.
    """

    name: str
    sides: tuple
    job: dict
    turns: int
    measure: str = "seconds"
    fresh: bool = False
    trained: bool = False
    count: int | None = None
    warm: tuple = ()


def training_steps(batches):
    for network in ("mnist", "resnet", "mlp"):
        for attack, iterations, step_size in ATTACKS:
            for batch in batches:
                job = step_job(network, batch, iterations, step_size)
                turns = 20 if iterations == 1 else 10
                name = f"step/{network}/{attack}/{batch}"
                yield Work(name, ALL_STEPS, job, turns, warm=(1, 1, 1))
    tiny = step_job("tiny", 32, 1, 0.2)
    sides = ("advreg", "plain", "loop", "nsl")
    yield Work("step/tiny/fgsm/32", sides, tiny, 20, warm=(1, 1, 1))


def step_job(network, batch, iterations, step_size, kind="step"):
    return {
        "kind": kind,
        "network": network,
        "batch": batch,
        "iterations": iterations,
        "step_size": step_size,
    }


def evaluations(batches, images):
    for attack, iterations, step_size in (("fgsm", 1, 0.2), ("pgd-3", 3, 0.1)):
        for batch in batches:
            job = step_job("mnist", batch, iterations, step_size, "evaluate")
            yield Work(
                f"evaluate/mnist/{attack}/{batch}",
                ("advreg", "plain", "nsl", "plain_nsl"),
                {**job, "examples": images},
                10,
                count=images,
                warm=(images, images),
            )


def predictions(batches, images):
    for batch in batches:
        job = step_job("mnist", batch, 1, 0.2, "predict")
        yield Work(
            f"predict/mnist/{batch}",
            ("advreg", "plain"),
            {**job, "examples": images},
            10,
            count=images,
            warm=(images, images),
        )


def first_steps(batches):
    for attack, iterations, step_size in ATTACKS:
        for batch in batches:
            job = step_job("mnist", batch, iterations, step_size, "first_step")
            name = f"first-step/mnist/{attack}/{batch}"
            sides = ("advreg", "plain", "nsl", "plain_nsl")
            yield Work(name, sides, job, 5, fresh=True, count=1)


def memory(batches):
    for batch in batches:
        job = step_job("mnist", batch, 1, 0.2)
        yield Work(
            f"memory/mnist/fgsm/{batch}",
            ALL_STEPS,
            job,
            5,
            measure="peak",
            fresh=True,
            count=5,
        )


def attacks(images, hard_images):
    everyone = ("advreg", "advreg_all_steps", "art", "foolbox", "cleverhans")
    for epsilon, step_size, batch, sides in (
        (0.1, 0.01, 250, everyone),
        (0.3, 0.0375, 250, everyone),
        (0.1, 0.01, 32, ("advreg", "advreg_all_steps", "art")),  # ART's default.
    ):
        job = attack_job("pgd", epsilon, batch, images)
        yield Work(
            f"attack/mnist/pgd-20/{epsilon}/{batch}",
            sides,
            {**job, "iterations": 20, "step_size": step_size},
            5,
            trained=True,
            count=images,
            warm=(min(images, 64),),
        )
    yield Work(
        "attack/mnist/autoattack/0.1/100",
        ("advreg", "art"),
        attack_job("autoattack", 0.1, 100, hard_images),
        1,  # It takes ART a quarter of an hour.
        trained=True,
        count=hard_images,  # Few would take ART as long: there is no warming up.
    )


def attack_job(attack, epsilon, batch, images):
    return {
        "kind": "attack",
        "network": "mnist",
        "attack": attack,
        "epsilon": epsilon,
        "batch": batch,
        "examples": images,
    }


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of medians that the comparison is to show, at the full size of the work.

    Args:
        work: Name of the work.
        peer: The side that advreg is compared with.
        most: The ratio may be as high as this.
    """

    work: str
    peer: str
    most: float


TARGETS = (
    Target("step/mnist/fgsm/32", "plain", 2.05),
    Target("step/mnist/fgsm/256", "plain", 2.2),
    Target("step/mnist/fgsm/32", "loop", 1.03),
    Target("step/mnist/fgsm/256", "loop", 1.03),
    Target("step/mnist/fgsm/32", "nsl", 1.0),
    Target("step/mnist/fgsm/256", "nsl", 0.95),
    Target("step/mnist/pgd-10/32", "nsl", 0.9),
    Target("step/mnist/pgd-10/256", "nsl", 0.7),
    *(
        Target(f"evaluate/mnist/{attack}/{batch}", "nsl", most)
        for attack, most in (("fgsm", 0.25), ("pgd-3", 0.13))
        for batch in BATCHES
    ),
    Target("step/mnist/fgsm/256", "torch", 0.6),
    Target("step/mnist/fgsm/256", "art", 0.28),
    Target("attack/mnist/pgd-20/0.1/250", "art", 0.3),
    Target("attack/mnist/pgd-20/0.1/250", "foolbox", 0.38),
    Target("attack/mnist/pgd-20/0.1/250", "cleverhans", 0.4),
    Target("attack/mnist/autoattack/0.1/100", "art", 0.05),
    Target("first-step/mnist/fgsm/32", "plain", 2.5),
    Target("first-step/mnist/fgsm/256", "plain", 2.5),
    Target("memory/mnist/fgsm/256", "plain", 1.3),
    Target("step/tiny/fgsm/32", "plain", 2.2),
)


def verdict(target, result, full_size=True):
    """What a result says of a target: the ratio, and a word.

    Args:
        target: The `Target`.
        result: The result of its work as `measuring.measure` gives it, or `None`.
        full_size: Whether the work was as large, and as often, as the target means.
    """
    ratio = None if result is None else result["ratios"].get(target.peer)
    if ratio is None:
        return None, "not measured"
    _, value, _ = ratio
    if not full_size:
        return value, "not at full size"
    if result["data"]["data"] == "digits":
        return value, "not on MNIST"
    if is_weaker(result, target.peer):
        return value, "NO, a weaker attack"
    return value, "yes" if value <= target.most else "NO"


def is_weaker(result, peer):
    """Whether advreg's attack leaves more accuracy than a peer's."""
    accuracy = result["accuracy"]
    if not accuracy:
        return False
    return accuracy["advreg"] - accuracy[peer] > SAME_ACCURACY + 1e-9  # One of 200.
