"""`benchmarks/compare.py`: what of it needs no peer."""

import contextlib
import json
import pathlib
import subprocess
import sys
import types

import compare
import compare_worker
import environments
import keras
import numpy as np
import pytest
from comparison import curves, kept, machine, measuring, pages, printing, ratios, works
from comparison.protocol import Worker, WorkerError
from peers import advreg as advreg_side
from peers import advreg_all_steps, keras_networks, materials
from peers.job import Job, Task

from advreg.demo import mnist_network

# A worker that knows a few words: what it is told to say, or how to die.
FAKE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print("noise", file=sys.stderr)
    if request["do"] == "die":
        sys.exit("that was too much")
    if request["do"] == "stammer":
        sys.exit(print('{"seconds": 0', flush=True))
    print(json.dumps(request["say"]), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    with Worker([sys.executable, "-c", FAKE], tmp_path / "log") as worker:
        yield worker


def test_a_worker_answers_each_request(fake):
    for answer in ({"seconds": 0.5}, {"accuracy": {"ü": [1, 2]}}, {}):
        assert fake.ask("run", say=answer) == answer


def test_errors_of_a_worker_are_told(fake):
    with pytest.raises(WorkerError, match=r"^ValueError: no$"):
        fake.ask("run", say={"error": "ValueError: no"})
    assert fake.ask("run", say={}) == {}


def test_the_last_words_of_a_dead_worker_are_told(fake):
    for _ in range(2):
        with pytest.raises(WorkerError, match="status 1: noise\nthat was too much"):
            fake.ask("die")


def test_a_worker_that_is_cut_off_is_told(fake):
    with pytest.raises(WorkerError, match="status 0: noise"):
        fake.ask("stammer")


def test_nobody_waits_for_a_worker_for_ever(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        Worker(command, tmp_path / "log", patience=0.1) as worker,
        pytest.raises(WorkerError, match=r"no answer to 'run' within 0\.1 s"),
    ):
        worker.ask("run")


def test_a_closed_worker_has_ended(fake):
    fake.close()
    assert fake.process.returncode == 0


class FakeModule:
    """A side whose network gives the sums of its examples, which it just shifts."""

    def __init__(self):
        self.done, self.shift = [], 0.0

    def attack(self, job):
        x, _ = job.data(job.examples)

        def turn():
            self.done.append("ready")
            if self.shift is None:
                return lambda count: x[: count - 1]
            return lambda count: x[:count] + np.float32(self.shift)

        return Task(turn, lambda x: np.stack([-x.sum(1), x.sum(1)], 1))


@pytest.fixture
def side(tmp_path, monkeypatch):
    """A side, and a job for it: of three examples two are classified rightly."""
    x = np.array([[0.5, 0.5], [0.25, 0.25], [0.75, 0.75]], "float32")
    logits = np.stack([-x.sum(1), x.sum(1)], 1) + np.float32(0.25)
    path = tmp_path / "file.npz"
    np.savez(path, x=x, y=np.array([1, 1, 0]), logits=logits)
    monkeypatch.setattr(
        compare_worker.importlib, "import_module", lambda name: FakeModule()
    )
    job = {"kind": "attack", "network": "none", "file": str(path), "batch": 2}
    return compare_worker.Side("none"), {**job, "examples": 3}


def ask(side, do, **arguments):
    return compare_worker.answer(side, json.dumps({"do": do, **arguments}))


def test_a_worker_does_its_jobs(side):
    side, job = side
    assert "error" not in ask(side, "set_up", job="a", **job)
    assert ask(side, "check", job="a") == {"difference": pytest.approx(0.25)}
    answer = ask(side, "run", job="a", count=3)
    assert answer["accuracy"] == pytest.approx(2 / 3)
    assert answer["seconds"] >= 0
    assert answer["peak"] is None or answer["peak"] > 1e7
    assert ask(side, "run", job="a", count=2)["accuracy"] == 1.0
    assert side.module.done == ["ready", "ready"]
    assert ask(side, "drop", job="a") == {}
    assert ask(side, "run", job="a", count=1) == {"error": "KeyError: 'a'"}


@pytest.mark.parametrize(
    ("shift", "told"),
    [
        (0.21, "perturbed by 0.21"),  # Of a radius of 0.2.
        (float("nan"), "perturbed by nan"),
        (None, "came back"),
    ],
)
def test_a_worker_checks_what_attacks_return(side, shift, told):
    side, job = side
    side.module.shift = shift
    ask(side, "set_up", job="a", **job)
    assert told in ask(side, "run", job="a", count=3)["error"]


@pytest.mark.parametrize(("count", "shift"), [(3, 0.2), (3, -0.2), (2, 0.0)])
def test_examples_may_move_within_the_ball_and_the_range(side, count, shift):
    job = Job(**{**side[1], "epsilon": 0.25})
    x, _ = job.data(count)
    compare_worker.check_perturbed(job, x + np.float32(shift), count)
    large = Job(**{**side[1], "epsilon": 9.0})
    for value in (1.001, -0.001):
        outside = np.where(x == x.max(), np.float32(value), x)
        with pytest.raises(ValueError, match="into"):
            compare_worker.check_perturbed(large, outside, count)
    with pytest.raises(ValueError, match="came back"):
        compare_worker.check_perturbed(job, x[1:], count)


def test_a_worker_tells_what_it_cannot_do(side):
    side, job = side
    assert "no_such" in ask(side, "no_such")["error"]
    assert "JSONDecodeError" in compare_worker.answer(side, "{")["error"]
    answer = ask(side, "set_up", job="a", **{**job, "examples": 4})
    assert answer["error"].endswith("Received: 4")


def test_a_worker_tells_its_versions(side):
    assert ask(side[0], "hello")["versions"]["keras"] == keras.__version__


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([1.0, 2.0], (1.25, 1.5, 1.75)),
        ([5.0, 1.0, 2.0, 4.0, 3.0], (2.0, 3.0, 4.0)),
    ],
)
def test_quartiles(values, expected):
    assert ratios.quartiles(values) == expected


def test_a_ratio_is_that_of_medians_and_its_spread_that_within_turns():
    # The machine slowed down tenfold, and both sides with it.
    own, other = [1.0, 2.0, 30.0], [1.0, 4.0, 10.0]
    assert ratios.ratio(own, other) == (0.75, 0.5, 2.0)
    with pytest.raises(ValueError, match="zip"):
        ratios.ratio(own, other[:2])


def test_a_straight_line_is_found_with_what_is_off_it():
    x = np.array([1.0, 2.0, 5.0, 40.0])
    start, slope, residual = ratios.straight_line(x, 3 + 2 * x)
    assert (start, slope) == pytest.approx((3, 2))
    assert residual < 1e-9
    assert ratios.straight_line(x, x**2)[-1] > 0.3


def test_a_curve_is_described_per_step_and_per_example():
    (curve,) = (curve for curve in curves.curves() if curve.name == "batch")
    batches = [quantity for quantity, _, _ in curve.points]
    assert (batches[0], batches[-1]) == (8, 1024)
    found = curves.described(curve, [0.5 + 0.25 * batch for batch in batches])
    assert found["points"][0] == {
        "batch": 8,
        "ms per step": 2.5,
        "µs per example": 312.5,
    }
    assert found["ms at 0"] == pytest.approx(0.5)
    assert found["ms per unit"] == pytest.approx(0.25)
    assert found["largest residual"] < 1e-9


def test_curves_cover_their_ranges():
    ranges = {c.name: (c.points[0][0], c.points[-1][0]) for c in curves.curves()}
    assert set(ranges) == {"iterations", "batch", "width", "depth"}
    assert ranges["iterations"] == (1, 40)
    # The abscissa of the line over the width is the number of weights of matrices.
    network = keras_networks.build("mlp", {"width": 64, "depth": 3})
    matrices = [w for w in network.weights if len(w.shape) == 2]
    assert sum(np.prod(w.shape) for w in matrices) == curves.weights(64, 3)


TARGET = works.Target("attack", "art", 0.3)


@pytest.mark.parametrize(
    ("ratio", "accuracy", "told"),
    [
        (0.3, {}, "yes"),
        (0.301, {}, "NO"),
        (0.2, {"advreg": 0.804, "art": 0.80}, "yes"),
        (0.2, {"advreg": 0.70, "art": 0.80}, "yes"),
        (0.2, {"advreg": 0.81, "art": 0.80}, "NO, a weaker attack"),
    ],
)
def test_targets_are_met_up_to_their_ratio_by_attacks_as_strong(ratio, accuracy, told):
    ratios = {"art": (0.1, ratio, 0.9)}
    result = {"ratios": ratios, "accuracy": accuracy, "data": {"data": "mnist"}}
    assert works.verdict(TARGET, result) == (ratio, told)
    assert works.verdict(TARGET, result, full_size=False) == (ratio, "not at full size")
    result["data"]["data"] = "digits"
    assert works.verdict(TARGET, result) == (ratio, "not on MNIST")


@pytest.mark.parametrize("result", [None, {"ratios": {}, "accuracy": {}}])
def test_targets_that_were_not_measured_are_told(result):
    assert works.verdict(TARGET, result) == (None, "not measured")


def test_each_target_is_one_of_a_work_and_its_sides():
    every = {work.name: work for work in compare.chosen(compare.parse([]))}
    for target in works.TARGETS:
        assert target.peer in every[target.work].sides
    assert all(work.sides[0] == "advreg" for work in every.values())
    fields = [{**work.job, "file": ""} for work in every.values()]
    assert all(Job(**job).network in keras_networks.SHAPES for job in fields)


def test_the_summary_is_of_works_that_there_are():
    every = compare.chosen(compare.parse([]))
    assert set(pages.SUMMARY) <= {work.name for work in every}
    assert {*pages.EXPLAIN, *pages.PEERS} <= set(works.SIDES)


def test_options_choose_works():
    settings = compare.parse(["--only", "step/m", "memory", "--batch", "8"])
    assert [work.name for work in compare.chosen(settings)] == [
        "step/mnist/fgsm/8",
        "step/mnist/pgd-10/8",
        "step/mlp/fgsm/8",
        "step/mlp/pgd-10/8",
        "memory/mnist/fgsm/8",
    ]
    assert compare.parse(["--quick"]).images < compare.parse([]).images == 2000
    assert compare.parse(["--quick", "--images", "64"]).images == 64


@pytest.mark.parametrize(
    ("options", "full"),
    [([], True), (["--images", "2000", "--only", "step"], True)]
    + [([f"--{name}", "1"], False) for name in ("turns", "evaluated", "threads")]
    + [(["--quick"], False)],
)
def test_targets_are_judged_at_full_size(options, full):
    assert compare.parse(options).full_size == full


@pytest.mark.parametrize("options", [["step", "stpe"], ["width", "--curves"], ["step"]])
def test_each_beginning_must_be_one_of_a_name(options):
    settings = compare.parse(["--only", *options])
    if options == ["step", "stpe"]:
        with pytest.raises(SystemExit, match="Received: stpe"):
            compare.chosen(settings)
    else:
        chosen = compare.chosen(settings)
        assert chosen
        assert all(item.name.startswith(options[0]) for item in chosen)
    if options == ["step"]:
        settings.curves = True
        with pytest.raises(SystemExit, match="Received: step"):
            compare.chosen(settings)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--turns", "0"], "Received: 0"),
        (["--images", "9", "--hard-images", "10"], "Received: 10"),
        (["--sides", "nsl", "none"], "none"),
        (["--json", "no/such/folder/file"], "Received: no"),
        (["--json", "."], "Received: ."),
    ],
)
def test_options_are_checked(options, told, capsys):
    with pytest.raises(SystemExit):
        compare.parse(options)
    assert told in capsys.readouterr().err


class FakeSides:
    """Sides that answer at once, some with a defect; they keep what they were asked."""

    def __init__(self, defects):
        self.defects, self.asked, self.running = defects, [], {}
        self.versions = {}
        self.settings = types.SimpleNamespace(turns=3)

    def file(self, work):
        return "file.npz", {"data": "random", "examples": 1024}

    def worker(self, side):
        def ask(do, **arguments):
            self.asked.append((side, do, arguments.get("count")))
            if self.defects.get(side) == do:
                raise WorkerError("it fails")
            if do == "check":
                good = self.defects.get(side) != "logits"
                return {"difference": 1e-6 if good else float("nan")}
            seconds = 0.01 if side == "advreg" else 0.04
            return {"seconds": seconds * arguments.get("count", 1), "peak": 1}

        return types.SimpleNamespace(ask=ask)

    def keep(self, needed):
        pass


def work(**changes):
    fields = {"name": "step", "sides": ("advreg", "plain", "nsl"), "turns": 9}
    return works.Work(**{**fields, "job": {"kind": "step"}, "warm": (1,), **changes})


def test_sides_take_turns_of_equal_length():
    sides = FakeSides({})
    result, failures = measuring.measure(sides, work(), work().sides)
    assert failures == []
    assert result["counts"] == {"advreg": 30, "plain": 8, "nsl": 8}
    assert result["values"]["nsl"] == pytest.approx([0.04] * 3)
    assert result["ratios"]["nsl"] == pytest.approx((0.25,) * 3)
    assert result["moved"] == {"advreg": 1e-6, "plain": 1e-6, "nsl": 1e-6}
    runs = [side for side, do, count in sides.asked if do == "run" and count != 1]
    turns = [tuple(runs[start : start + 3]) for start in (0, 3, 6)]
    assert all(set(turn) == {"advreg", "plain", "nsl"} for turn in turns)
    assert len(set(turns)) > 1
    assert [
        line.split()[:2] for line in printing.table_of(result).splitlines()[2:]
    ] == [
        ["plain", "40.00"],
        ["nsl", "40.00"],
    ]
    json.dumps(result)


@pytest.mark.parametrize("defect", ["set_up", "check", "run", "logits"])
def test_a_side_that_fails_drops_out(defect):
    sides = FakeSides({"nsl": defect})
    result, (failure,) = measuring.measure(sides, work(), work().sides)
    assert set(result["values"]) == {"advreg", "plain"}
    assert failure.startswith("step: nsl: ")
    timed = [side for side, do, count in sides.asked if do == "run" and count != 1]
    assert "nsl" not in timed


def test_works_and_curves_that_fail_are_told_and_the_others_go_on(capsys):
    sides = FakeSides({"advreg": "set_up"})
    sides.pythons = dict.fromkeys(work().sides)
    found = list(compare.compare(sides, [work(), work(name="other")]))
    assert found == [
        (None, ["step: advreg: it fails"]),
        (None, ["other: advreg: it fails"]),
    ]
    some = curves.curves()[:2]
    assert list(compare.draw(sides, some)) == [
        (None, [f"{curve.name}: it fails"]) for curve in some
    ]
    assert "other: advreg, plain, nsl" in capsys.readouterr().err


def test_what_is_there_is_kept_whole(tmp_path):
    file = tmp_path / "found.json"
    kept.write(file, {"works": [1]})
    with pytest.raises(TypeError):
        kept.write(file, {"works": [object()]})
    assert json.loads(file.read_text()) == {"works": [1]}
    kept.write(None, {})


def test_a_run_goes_on_with_what_is_kept(tmp_path):
    file = tmp_path / "found.json"
    fresh = compare.beginning(compare.parse(["--quick"]))
    assert kept.read(file, fresh) is fresh
    assert kept.read(None, fresh) is fresh
    kept.write(file, {**fresh, "works": [1]})
    assert kept.read(file, fresh)["works"] == [1]
    other = compare.beginning(compare.parse([]))
    with pytest.raises(SystemExit, match=r"the same sizes, .*Received: .*found\.json"):
        kept.read(file, other)
    for text in ("{}", "[]", "nothing"):
        file.write_text(text)
        with pytest.raises(SystemExit, match=r"begun\. Received: .*found\.json"):
            kept.read(file, fresh)


def test_a_work_is_finished_when_all_have_done_it_that_can():
    step = {"values": {"advreg": [1], "nsl": [2]}, "job": work().job}
    results = {"step": step, "width": {}}
    (width, depth) = curves.curves()[2:]
    assert kept.is_finished(width, results, ["advreg"])
    assert not kept.is_finished(depth, results, ["advreg"])
    assert kept.is_finished(work(), results, ["advreg", "nsl"])
    assert not kept.is_finished(work(), results, ["advreg", "nsl", "plain"])
    assert not kept.is_finished(work(job={}), results, ["advreg"])
    assert not kept.is_finished(work(name="other"), results, ["advreg"])


def test_what_has_more_sides_is_not_replaced():
    full = {"name": "step", "values": {"advreg": [1], "nsl": [2]}, "job": {}}
    less = {**full, "values": {"advreg": [3]}}
    results = {}
    assert kept.put(full, results) == []
    assert kept.put(less, results) == [
        "step: what is kept stays, for it has nsl besides"
    ]
    assert results == {"step": full}
    assert kept.put({**less, "job": {"kind": "step"}}, results) == []
    assert results["step"]["values"] == less["values"]
    assert kept.put({"name": "width", "points": []}, results) == []


def test_a_side_goes_on_with_its_libraries():
    old = {"nsl": {"keras": "2"}}
    kept.check_versions(old, {"nsl": {"keras": "2"}, "art": {"keras": "3"}})
    with pytest.raises(SystemExit, match=r"of nsl have changed\. Received: .*'2'.*'3'"):
        kept.check_versions(old, {"nsl": {"keras": "3"}})


def test_the_commit_is_that_of_the_code(monkeypatch):
    told = {"log": "1a2b3c4", "status": ""}
    monkeypatch.setattr(machine, "git", lambda word, *_: told[word])
    assert machine.commit() == "1a2b3c4"
    told["status"] = " M advreg/model.py"
    assert machine.commit() == "1a2b3c4-dirty"
    told["log"] = ""
    assert machine.commit() == "no commit"


def test_new_processes_are_measured_in_turns():
    class FreshSides(FakeSides):
        def start(self, side):
            ask = self.worker(side).ask

            def told(do, **arguments):
                if do == "hello":
                    return {"versions": {}}
                return ask(do, **arguments)

            return contextlib.nullcontext(types.SimpleNamespace(ask=told))

    fresh = work(fresh=True, count=5, measure="peak")
    result, failures = measuring.measure(FreshSides({}), fresh, fresh.sides)
    assert (failures, result["values"]["nsl"]) == ([], [1, 1, 1])
    assert result["growth"] == {"advreg": 0, "plain": 0, "nsl": 0}
    result, (failure,) = measuring.measure(
        FreshSides({"nsl": "run"}), fresh, fresh.sides
    )
    assert set(result["values"]) == {"advreg", "plain"}
    assert failure == "step: nsl: it fails"


def page_result(name, job, **changes):
    values = {"advreg": [0.002, 0.002], "plain": [0.001, 0.001]}
    ratios = {"plain": (1.9, 2.0, 2.1)}
    fields = {"measure": "seconds", "values": values, "ratios": ratios, "accuracy": {}}
    return {"name": name, "job": job, "commit": "1a2b", **fields, **changes}


def test_a_page_has_a_line_for_each_work():
    step = page_result("step/mnist/fgsm/32", {"kind": "step"})
    nsl = {"nsl": (0.9, 1.0, 1.1)}
    resnet = page_result("step/resnet/fgsm/32", {"kind": "step"}, ratios=nsl)
    growth = {"advreg": 5e6, "plain": 4e6}
    memory = page_result(
        "memory/mnist/fgsm/32", {"kind": "step"}, measure="peak", growth=growth
    )
    attack = page_result(
        "attack/mnist/pgd-20/0.1/250",
        {"kind": "attack"},
        accuracy={"advreg": 0.7, "art": 0.6},
        ratios={"art": (0.25, 0.3, 0.35)},
    )
    curve = curves.described(curves.curves()[0], list(range(1, 8)))
    found = {
        "machine": {"processor": "P", "cores": 2, "threads": 1, "system": "S"},
        "works": [step, resnet, memory, attack],
        "curves": [{**curve, "commit": "3c4d"}],
        "versions": {
            "advreg": {"advreg": "0", "keras": "3", "foolbox": "3.3"},
            "foolbox": {"keras": "3", "foolbox": "3.3"},
        },
    }
    assert pages.summary(found).splitlines() == [
        "| advreg beside | plain Keras | ART |",
        "| --- | --- | --- |",
        "| training step, FGSM, batch 32 | 2.00 |  |",
        "| PGD-20, ε 0.1, 2,000 images |  | 0.30 |",
    ]
    assert pages.page(found).startswith(f"{pages.summary(found)}\n\n")
    assert "\n\n".join(pages.parts(found)).splitlines()[:11] == [
        "| a step of training | advreg, ms | / plain Keras | / NSL |",
        "| --- | --- | --- | --- |",
        "| mnist, fgsm, 32 | 2.00 | 2.00 (1.90–2.10) |  |",
        "| resnet, fgsm, 32 | 2.00 |  | 1.00 (0.90–1.10) |",
        "",
        "| the peak of memory | advreg, MB | / plain Keras |",
        "| --- | --- | --- |",
        "| mnist, fgsm, 32 | 0, +5 MB | 2.00 (1.90–2.10), +4 MB |",
        "",
        "| an attack | advreg, s | / ART |",
        "| --- | --- | --- |",
    ]
    assert (
        "| mnist, pgd-20, 0.1, 250 | 0.00, leaves 70.0 % | 0.30 (0.25–0.35), leaves "
        "60.0 %, a stronger attack |\n" in pages.page(found)
    )
    assert "| 40 | 7.00 | 218.8 |\n\n" in pages.page(found)
    assert pages.page(found).endswith(
        "\n- advreg: keras 3\n- foolbox: keras 3, foolbox 3.3"
    )
    assert "S; advreg at 1a2b, 3c4d." in pages.page(found)


def test_without_advreg_there_is_nothing_to_compare():
    sides = FakeSides({"advreg": "logits"})
    result, (failure,) = measuring.measure(sides, work(), work().sides)
    assert result is None
    assert failure.endswith("Received: a difference of nan")


def test_the_network_of_mnist_is_that_of_the_tutorial():
    def layers(model):
        for layer in model.layers:
            config = layer.get_config()
            yield type(layer), {k: v for k, v in config.items() if k != "name"}

    _, *own = layers(keras_networks.build("mnist"))
    assert own == list(layers(mnist_network((28, 28, 1), 10)))


def test_files_carry_a_network(tmp_path):
    path = tmp_path / "file.npz"
    told = materials.make(str(path), "resnet", examples=4)
    assert told == {"data": "random", "examples": 4}
    job = Job("step", "resnet", str(path), batch=3)
    x, y = job.data()
    assert (x.shape, x.dtype, y.shape) == ((3, 32, 32, 3), "float32", (3,))
    model = keras_networks.load(job)
    np.testing.assert_allclose(model(x), job.logits()[:3], atol=1e-6)
    with pytest.raises(ValueError, match="Received: 5"):
        job.data(5)


def test_advreg_attacks_with_its_early_stop_and_without(tmp_path):
    path = tmp_path / "file.npz"
    materials.make(str(path), "mlp", examples=64)
    fields = {"epsilon": 0.1, "step_size": 0.05, "iterations": 3, "batch": 32}
    job = Job("attack", "mlp", str(path), attack="pgd", examples=64, **fields)
    stopped, went_on = (
        side.attack(job).turn()(64) for side in (advreg_side, advreg_all_steps)
    )
    x, _ = job.data(64)
    for x_adv in (stopped, went_on):
        compare_worker.check_perturbed(job, x_adv, 64)
    # Of random labels most are missed at the random start: there an early stop leaves
    # them, somewhere in the ball, and steps lead on to its surface.
    lengths = [np.abs(x_adv - x).mean(axis=1) for x_adv in (stopped, went_on)]
    assert (lengths[1] > 1.2 * lengths[0]).mean() > 0.5


def test_digits_are_enlarged():
    x = np.arange(64, dtype="float32").reshape(1, 8, 8, 1)
    large = materials.enlarged(x)
    assert large.shape == (1, 28, 28, 1)
    np.testing.assert_array_equal(large[:, 3:26:3, 3:26:3], x)
    assert large[0, :2].max() == large[0, :, -2:].max() == 0


def test_an_environment_tells_what_it_lacks(tmp_path):
    name = "no-such-package-at-all"
    lacking = environments.Environment("some", {name: "1.0"})
    assert not environments.is_complete(lacking, sys.executable)
    assert not environments.is_complete(lacking, tmp_path / "python")
    numpy = environments.Environment("some", environments.here("numpy"))
    assert environments.is_complete(numpy, sys.executable)
    other = environments.Environment("some", numpy.packages, pythons=("2.7",))
    assert not environments.is_complete(other, sys.executable)
    with pytest.raises(environments.PreparationError, match=r"needs Python 2\.7"):
        environments.prepare(other, tmp_path / "none", sys.executable)
    (tmp_path / "file").touch()
    with pytest.raises(environments.PreparationError, match="Received: "):
        environments.prepare(other, tmp_path)


def test_versions_of_the_environments_are_exact():
    for environment in environments.known().values():
        assert all("==" in text for text in environment.requirements)
    sides = {name for name in works.SIDES.values() if name is not None}
    assert sides == set(environments.known())
    folder = pathlib.Path(compare.__file__).with_name("peers")
    modules = {path.stem for path in folder.glob("*.py")}
    assert set(works.SIDES) <= modules


@pytest.mark.slow
def test_the_script_compares_what_needs_no_other_environment(tmp_path):
    file = tmp_path / "found.json"
    script = pathlib.Path(compare.__file__)
    options = ["--only", "step/tiny", "--sides", "loop", "--quick", "--json", str(file)]
    result = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    (step,) = found["works"]
    again = subprocess.run(
        [sys.executable, str(script), *options, "--markdown"],
        capture_output=True,
        text=True,
    )
    assert "advreg, plain, loop" not in again.stderr  # Nothing is measured twice.
    assert json.loads(file.read_text())["works"] == [step]
    assert f"\n{pages.page(found)}\n" in again.stdout
    assert set(step["ratios"]) == {"plain", "loop"}
    assert all(value > 0 for values in step["values"].values() for value in values)
    # The loop does what advreg does, and plain Keras something else.
    assert step["moved"]["advreg"] == pytest.approx(step["moved"]["loop"], rel=1e-3)
    assert step["moved"]["advreg"] != pytest.approx(step["moved"]["plain"], rel=1e-3)
    assert "step/tiny/fgsm/32" in result.stdout
    (line,) = [line for line in found["targets"] if line["measured"] is not None]
    assert (line["work"], line["peer"]) == ("step/tiny/fgsm/32", "plain")
    assert line["met"] == "not at full size"
