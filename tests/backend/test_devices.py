"""Several devices of JAX. `test_distribution` has those of `tf.distribute`."""

import json
import os
import subprocess

import pytest
from helpers.processes import start

from advreg import backend

pytestmark = pytest.mark.every_backend


@pytest.mark.skipif(backend.BACKEND != "jax", reason="Keras distributes there by JAX")
def test_two_devices_train_the_model_of_one():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    process = start(
        "-m", "helpers.devices", environment=environment, stdout=subprocess.PIPE
    )
    found = json.loads(process.communicate(timeout=300)[0])
    assert process.returncode == 0
    assert found["devices"] == 2
    assert max(found["apart"]) < 2e-6
