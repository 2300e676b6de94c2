import itertools
import json
import os
import random
import shutil
import socket
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.processes import start

from advreg.backend.tensorflow.replicas import (
    ReplicaSeedGenerator,
    ReplicaWeight,
    scale_mean,
    unscale_loss,
    weight_of_loss,
    zero_grads_of_empty_replicas,
)
from advreg.backend.tensorflow.strategies import check_scope
from advreg.backend.tensorflow.workers import explain_lost_worker

REPLICAS = Path(__file__).parents[1] / "helpers" / "replicas.py"
WORKERS = 2
# Plain models of older versions report other logs under replicas, too.
OLD_KERAS = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 12)
# Equal to one device by something else than `test_as_on_one_device`.
OTHERWISE = {
    "noise",
    "objectives_that_draw",
    "separate_normalisation",
    "refusals",
    "defects_of_keras",
}


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def environments(kind, **more):
    """Of the processes that train: one, or as many as there are workers."""
    if kind != "worker":
        return [{**os.environ, **more}]
    workers = [f"127.0.0.1:{port}" for port in free_ports(WORKERS)]
    return [
        {
            **os.environ,
            **more,
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            ),
        }
        for index in range(WORKERS)
    ]


class Training:
    """Processes that run `replicas.py`, and end with the test that needs them."""

    def __init__(self, folder, kind, *cases, **more):
        self.kind = kind
        self.results = []
        self.processes = []
        self.errors = []
        for index, environment in enumerate(environments(kind, **more)):
            self.results.append(folder / f"{kind}{index}.json")
            self.errors.append(folder / f"{kind}{index}.err")
            command = ["-m", "helpers.replicas", kind, self.results[-1], *cases]
            with self.errors[-1].open("w") as errors:
                self.processes.append(
                    start(*command, environment=environment, stderr=errors)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # Those that have ended are not there to be killed.
            process.wait()

    def codes(self, seconds=240):
        """Waits for the end of all, and returns their codes."""
        end = time.monotonic() + seconds
        return [
            process.wait(max(0, end - time.monotonic())) for process in self.processes
        ]

    def said(self, index):
        return self.errors[index].read_text()

    def found(self):
        """What all have found, if they succeeded."""
        codes = self.codes()
        assert codes == [0] * len(codes), self.said(codes.index(max(codes, key=abs)))
        return [json.loads(path.read_text()) for path in self.results]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What one device, two replicas and two workers find in the same cases."""
    folder = tmp_path_factory.mktemp("trained")
    with (
        Training(folder, "one") as one,
        Training(folder, "replicas") as replicas,
        Training(folder, "worker") as workers,
    ):
        return one.found()[0], replicas.found()[0], workers.found()


def assert_close(got, expected, tolerance=1e-9):
    if OLD_KERAS:
        got, expected = without_logs(got), without_logs(expected)
    keras.tree.assert_same_structure(got, expected)
    for a, b in zip(keras.tree.flatten(got), keras.tree.flatten(expected), strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def without_logs(found):
    if not isinstance(found, dict):
        return found
    return {
        name: without_logs(value)
        for name, value in found.items()
        if name not in {"logs", "evaluated", "tested"}
    }


def cases():
    lines = REPLICAS.read_text().splitlines()
    return [
        below.split("(")[0].removeprefix("def ")
        for line, below in itertools.pairwise(lines)
        if line == "@case"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in cases() if name not in OTHERWISE])
def test_as_on_one_device(case, trained):
    one, replicas, workers = trained
    rounded = {"in_float32", "an_overflow_in_one_part"}
    tolerance = 1e-5 if case in rounded else 1e-9
    for found in (replicas, *workers):
        assert_close(found[case], one[case], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted({*cases()} - {"noise", "defects_of_keras"}))
def test_workers_have_found_the_same(case, trained):
    _, _, (first, *others) = trained
    for other in others:
        assert first[case] == other[case]


@pytest.mark.slow
def test_normalisation_by_each_part_is_the_same_on_replicas_and_workers(trained):
    _, replicas, (first, _) = trained
    found = first["separate_normalisation"]
    assert np.isfinite(np.concatenate([np.ravel(w) for w in found["weights"]])).all()
    assert_close(found, replicas["separate_normalisation"])


@pytest.mark.slow
def test_replicas_and_workers_draw_different_noise(trained):
    (_, replicas, workers) = trained
    on_replicas = replicas["noise"]
    on_workers = [drawn for worker in workers for drawn in worker["noise"]]
    assert len(on_replicas) == len(on_workers) == 2
    np.testing.assert_array_equal(on_replicas, on_workers)
    assert not np.isclose(on_replicas[0], on_replicas[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicas", "worker"])
def test_what_cannot_work_says_so(kind, trained):
    _, replicas, (first, _) = trained
    found = (replicas if kind == "replicas" else first)["refusals"]
    name = "MirroredStrategy" if kind == "replicas" else "MultiWorkerMirroredStrategy"
    assert f"`jit_compile` must be False under {name}" in found["jit_compile"]
    assert (
        f"`steps_per_execution` must be 1 under {name}" in found["steps_per_execution"]
    )
    accumulation = found["gradient_accumulation_steps"]
    assert f"`gradient_accumulation_steps` must be None under {name}" in accumulation
    evaluating, watching = found["inside the scope"]
    assert "`evaluate_robustness` must be called outside of" in evaluating
    assert "`fit` with a `RobustAccuracy` must be called outside of" in watching
    assert f"Received: the scope of a {name}" in watching
    assert f"Received: {name} and variables" in found["base outside"]
    assert "Received: no strategy and variables" in found["wrapper outside"]


@pytest.mark.slow
def test_on_one_device_nothing_is_refused(trained):
    one, _, _ = trained
    assert set(keras.tree.flatten(one["refusals"])) == {"nothing"}


@pytest.mark.slow
@pytest.mark.parametrize("killed", range(WORKERS))
def test_a_killed_worker_ends_the_others_and_training_goes_on(
    killed, tmp_path, trained
):
    one, _, _ = trained
    backup = {"BACKUP": str(tmp_path)}
    with Training(tmp_path, "worker", "resumed", KILLED=str(killed), **backup) as first:
        codes = first.codes()
        assert codes[killed] == -9
        other = 1 - killed
        assert codes[other] == 1
        said = first.said(other)
        assert f"RuntimeError: Worker {other} of 2 has lost another one" in said
        assert "start all workers again" in said
    if killed == 1:  # Its backup may be older than the others', or lost.
        shutil.rmtree(tmp_path / "1")
    with Training(tmp_path, "worker", "resumed", **backup) as again:
        for found in again.found():
            found, expected = found["resumed"], one["resumed"]
            assert_close(found["weights"], expected["weights"])
            # The third epoch began anew: it and the fourth are all there was to do.
            assert len(found["logs"]["loss"]) == 2
            assert_close(found["logs"], {k: v[2:] for k, v in expected["logs"].items()})


@pytest.mark.slow
def test_what_is_mended_is_still_broken_in_keras(trained):
    """If this fails, Keras has mended it: delete what mends it here."""
    _, _, workers = trained
    for found in workers:
        defects = found["defects_of_keras"]
        # `distribution.function_over_workers`
        assert "Invalid reduction dimension" in defects["BuiltLocally"]
        # `distribution.local_example`
        assert "PerReplica" in defects["AveragedAtOnce"]


def test_a_seed_leaves_python_s_random_state_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    seeds = [ReplicaSeedGenerator(name=name) for name in ("a", "a", "b")]
    drawn_by_keras = random.randint(1, int(1e9))
    random.seed(0)
    assert random.randint(1, int(1e9)) == drawn_by_keras
    random.seed(0)
    assert random.random() == expected
    states = [int(seed.state.numpy()[0]) for seed in seeds]
    assert states[0] == states[1]
    assert len({*states, drawn_by_keras}) == 3


def test_a_single_replica_draws_as_keras_does():
    ours, keras_s = ReplicaSeedGenerator(3), keras.random.SeedGenerator(3)
    for _ in range(2):
        np.testing.assert_array_equal(ours.next(), keras_s.next())


def test_a_single_replica_scales_nothing():
    loss = tf.constant(2.0)
    assert unscale_loss(loss) is loss


def test_parameter_servers_are_refused(monkeypatch):
    servers = object.__new__(tf.distribute.experimental.ParameterServerStrategy)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: servers)
    with pytest.raises(ValueError, match="Keras 3 cannot train under a `Parameter"):
        check_scope(keras.Sequential())


def test_what_is_no_lost_worker_keeps_its_error():
    with (
        pytest.raises(tf.errors.UnavailableError, match="no worker"),
        explain_lost_worker(tf.distribute.get_strategy()),
    ):
        raise tf.errors.UnavailableError(None, None, "no worker")


def losses(*reductions):
    return [keras.losses.MeanSquaredError(reduction) for reduction in reductions]


@pytest.mark.parametrize(
    ("reductions", "expected"),
    [
        (["sum_over_batch_size"], 0.5),
        (["mean", "sum_over_batch_size"], 0.5),
        (["mean_with_sample_weight"], 0.25),
        (["sum"], None),
        (["none"], None),
    ],
)
def test_how_a_loss_averages_decides_what_a_part_counts_for(reductions, expected):
    share = ReplicaWeight(tf.constant(0.5), tf.constant(0.25), tf.constant(4.0))
    assert weight_of_loss(share, losses(*reductions)) == expected
    assert weight_of_loss(None, losses(*reductions)) is None


@pytest.mark.parametrize(
    "loss",
    ["mse", "MeanSquaredError", "crossentropy", keras.losses.mean_squared_error],
    ids=["name", "class", "whichever fits", "function"],
)
def test_losses_without_a_reduction_have_keras_s(loss):
    share = ReplicaWeight(tf.constant(0.5), tf.constant(0.25), tf.constant(4.0))
    assert weight_of_loss(share, loss) == 0.5
    assert weight_of_loss(share, {"a": loss, "b": None}) == 0.5


def test_losses_that_reduce_in_different_ways_draw_a_warning():
    share = ReplicaWeight(tf.constant(0.5), tf.constant(0.25), tf.constant(4.0))
    with pytest.warns(UserWarning, match=r"Received: reduction=\['mean', 'sum'\]"):
        assert weight_of_loss(share, losses("mean", "sum")) is None


def test_weights_of_single_outputs_draw_a_warning():
    share = ReplicaWeight(tf.constant(0.5), None, tf.constant(4.0))
    with pytest.warns(UserWarning, match="one weight for each example"):
        assert weight_of_loss(share, losses("mean_with_sample_weight")) is None


def test_no_examples_have_no_share_and_no_gradient_that_is_no_number():
    assert scale_mean(tf.constant(np.nan), tf.constant(0.0)) == 0.0
    rows = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int32), [3, 2])
    gradients = [tf.constant([np.nan, 1.0, np.inf]), None, rows]
    for examples, expected in ((0.0, [0.0, 1.0, 0.0]), (2.0, [np.nan, 1.0, np.inf])):
        share = ReplicaWeight(
            tf.constant(examples), tf.constant(examples), tf.constant(4.0)
        )
        dense, nothing, sparse = zero_grads_of_empty_replicas(gradients, share)
        np.testing.assert_array_equal(dense, expected)
        assert nothing is None
        assert sparse is rows
