import random
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers.processes import start
from helpers.resuming import STEPS

# Trains, or goes on to train, and says how far it is. A process that finds a backup has
# another seed than the undisturbed run: all that it needs is in the files.
TRAINING = f"""
import os, sys, time
import keras, numpy as np
from helpers.models import X, Y
from helpers.resuming import EPOCHS, make

how, directory = sys.argv[1:]
backup = os.path.join(directory, "backup")
file = os.path.join(directory, "model.keras")

def tell(batch, logs):
    print(batch, flush=True)
    time.sleep(0.02)

callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=tell)]
begun = os.path.exists(backup) or os.path.exists(file)
keras.utils.set_random_seed(1 if begun else 0)
model, initial_epoch = make(), 0
if how == "BackupAndRestore":
    callbacks.append(keras.callbacks.BackupAndRestore(backup))
elif how == "one file":
    if begun:
        model = keras.models.load_model(file)
        initial_epoch = int(model.optimizer.iterations) // {STEPS}
    callbacks.append(keras.callbacks.ModelCheckpoint(file))
model.fit(X, Y, batch_size=3, epochs=EPOCHS, initial_epoch=initial_epoch,
          shuffle=False, callbacks=callbacks, verbose=0)
variables = [*model.variables, *model.optimizer.variables]
np.savez(os.path.join(directory, "result.npz"), *variables)
"""


def process(how, directory):
    pipe = subprocess.PIPE
    return start("-c", TRAINING, how, directory, stdout=pipe, stderr=pipe)


def finish(how, directory):
    running = process(how, directory)
    _, errors = running.communicate()
    assert running.returncode == 0, errors.decode()
    with np.load(directory / "result.npz") as result:
        return [result[key] for key in result.files]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finish("nothing", tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "seed"), [("BackupAndRestore", 0), ("BackupAndRestore", 1), ("one file", 2)]
)
def test_killed_and_restarted_it_ends_as_if_nothing_had_happened(
    how, seed, undisturbed, tmp_path
):
    rng = random.Random(seed)
    for _ in range(3):
        running = process(how, tmp_path)
        for _ in range(rng.randint(1, 2 * STEPS)):
            assert running.stdout.readline(), running.communicate()[1].decode()
        time.sleep(rng.uniform(0, 0.03))
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        assert not (tmp_path / "result.npz").exists()
    for a, b in zip(finish(how, tmp_path), undisturbed, strict=True):
        np.testing.assert_array_equal(a, b)
