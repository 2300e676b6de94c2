"""What `compare.py` compares."""

import dataclasses

# The script of each side, and its name on the pages.
SIDES = {
    "advreg": ("peer_advreg.py", "advreg"),
    "advreg_all_steps": ("peer_advreg.py", "advreg, no early stop"),
    "plain": ("peer_advreg.py", "plain Keras"),
    "loop": ("peer_advreg.py", "minimal loop"),
    "nsl": ("peer_nsl.py", "NSL"),
    "plain_nsl": ("peer_nsl.py", "plain Keras 2"),
    "art": ("peer_art.py", "ART"),
    "art_compiled": ("peer_art.py", "ART, compiled"),
    "torch": ("peer_torch.py", "PyTorch"),
    "foolbox": ("peer_foolbox.py", "Foolbox"),
    "cleverhans": ("peer_cleverhans.py", "CleverHans"),
}
# Sides that explain a ratio, and are no peers.
EXPLAIN = ("plain_nsl", "art_compiled", "advreg_all_steps")
NSL_AND_KERAS = ("advreg", "plain", "nsl", "plain_nsl")
ALL_STEPS = (*NSL_AND_KERAS, "loop", "art", "art_compiled", "torch")
BATCHES = (32, 256)
FULL = {"images": 2000, "hard_images": 200, "evaluated": 10_000, "epochs": 5}
QUICK = {"images": 64, "hard_images": 10, "evaluated": 512, "epochs": 0}


@dataclasses.dataclass(frozen=True)
class Work:
    """A row of the comparison, or a curve."""

    name: str
    # What is timed side by side: for each label a side, and fields of its `Job`. The
    # labels of a row are the sides, advreg first, those of a curve the quantity.
    jobs: dict
    turns: int
    measure: str = "seconds"  # Or "peak", the memory.
    fresh: bool = False  # Whether each turn is in a new process.
    epochs: int | None = None  # Of the network's training; random weights without.
    count: int | None = None  # What a turn does; as many steps as fill it without.
    warm: tuple = (1, 1, 1)  # What each side does before the turns.
    line: tuple | None = None  # What a curve is a straight line in, and its abscissae.


def each(sides, kind, network, **job):
    """Returns the same job for all sides."""
    return {side: (side, {"kind": kind, "network": network, **job}) for side in sides}


FGSM = {"iterations": 1}
PGD_3 = {"iterations": 3, "step_size": 0.1}
PGD_10 = {"iterations": 10, "step_size": 0.05}


def all_works(images, hard_images, evaluated, epochs):
    """Returns every work and every curve, in the order of the pages."""
    return [
        *training_steps(),
        *inference(evaluated),
        *fresh_processes(),
        *attacks(images, hard_images, epochs),
        *curves(),
    ]


def training_steps():
    for network in ("mnist", "resnet", "mlp"):
        for attack, turns, steps in (("fgsm", 20, FGSM), ("pgd-10", 10, PGD_10)):
            for batch in BATCHES:
                jobs = each(ALL_STEPS, "step", network, batch=batch, **steps)
                yield Work(f"step/{network}/{attack}/{batch}", jobs, turns)
    sides = ("advreg", "plain", "loop", "nsl")
    yield Work("step/tiny/fgsm/32", each(sides, "step", "tiny"), 20)


def inference(images):
    many = {"count": images, "warm": (images, images)}
    for attack, steps in (("fgsm", FGSM), ("pgd-3", PGD_3)):
        for batch in BATCHES:
            job = {"batch": batch, "examples": images, **steps}
            jobs = each(NSL_AND_KERAS, "evaluate", "mnist", **job)
            yield Work(f"evaluate/mnist/{attack}/{batch}", jobs, 10, **many)
    for batch in BATCHES:
        job = {"batch": batch, "examples": images}
        jobs = each(NSL_AND_KERAS[:2], "predict", "mnist", **job)
        yield Work(f"predict/mnist/{batch}", jobs, 10, **many)


def fresh_processes():
    for attack, steps in (("fgsm", FGSM), ("pgd-10", PGD_10)):
        for batch in BATCHES:
            jobs = each(NSL_AND_KERAS, "first_step", "mnist", batch=batch, **steps)
            name = f"first-step/mnist/{attack}/{batch}"
            yield Work(name, jobs, 5, fresh=True, count=1)
    for batch in BATCHES:
        jobs = each(ALL_STEPS, "step", "mnist", batch=batch)
        name = f"memory/mnist/fgsm/{batch}"
        yield Work(name, jobs, 5, measure="peak", fresh=True, count=5)


def attacks(images, hard_images, epochs):
    everyone = ("advreg", "advreg_all_steps", "art", "foolbox", "cleverhans")
    for epsilon, step_size, batch, sides in (
        (0.1, 0.01, 250, everyone),
        (0.3, 0.0375, 250, everyone),
        (0.1, 0.01, 32, everyone[:3]),  # ART's default.
    ):
        job = {"batch": batch, "epsilon": epsilon, "examples": images}
        job |= {"iterations": 20, "step_size": step_size}
        name = f"attack/mnist/pgd-20/{epsilon}/{batch}"
        few = {"epochs": epochs, "count": images, "warm": (min(images, 64),)}
        yield Work(name, each(sides, "attack", "mnist", **job), 5, **few)
    job = {"attack": "autoattack", "batch": 100, "epsilon": 0.1}
    job["examples"] = hard_images
    jobs = each(("advreg", "art"), "attack", "mnist", **job)
    # It takes ART a quarter of an hour, and would for fewer to warm up with.
    once = {"epochs": epochs, "count": hard_images, "warm": ()}
    yield Work("attack/mnist/autoattack/0.1/100", jobs, 1, **once)


def curves():
    """Yields what a step of advreg costs against one quantity at a time."""
    mnist = {"kind": "step", "network": "mnist"}
    mlp = {"kind": "step", "network": "mlp", "batch": 256}
    batches = (8, 16, 32, 64, 128, 256, 512, 1024)
    widths, depths = (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32)
    iterations = {
        n: {**mnist, **PGD_10, "iterations": n} for n in (1, 2, 3, 5, 10, 20, 40)
    }
    for name, title, jobs in (
        ("iterations", "iterations", iterations),
        ("batch", "examples", {n: {**mnist, "batch": n} for n in batches}),
        ("width", "weights", {n: {**mlp, "sizes": {"width": n}} for n in widths}),
        ("depth", "layers", {n: {**mlp, "sizes": {"depth": n}} for n in depths}),
    ):
        abscissae = list(jobs)
        if name == "width":  # The weights of matrices: 100 features, 10 classes.
            abscissae = [100 * width + width**2 + 10 * width for width in widths]
        labelled = {str(label): ("advreg", job) for label, job in jobs.items()}
        yield Work(f"curve/{name}", labelled, 10, line=(title, abscissae))
