# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "tensorflow==2.21.0", "keras==3.15.1", "numpy==2.4.6",
#   "adversarial-robustness-toolbox==1.20.1", "multiprocess==0.70.19",
# ]
# ///
"""The Adversarial Robustness Toolbox 1.20, on TensorFlow.

Its trainers replace a batch by its perturbed examples: with `ratio=1.0` all of them,
which makes as many passes as advreg's step. Its classifier traces its step of training
anew in each batch; `art_compiled` hands it one that the user compiled.
"""

import keras
import keras_side
import tensorflow as tf
from art.attacks.evasion import (
    AutoAttack,
    FastGradientMethod,
    ProjectedGradientDescent,
)
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import TensorFlowV2Classifier
from side import CLASSES, CLIP, serve


def classifier(model, train_step=None):
    return TensorFlowV2Classifier(
        model,
        nb_classes=CLASSES,
        input_shape=model.input_shape[1:],
        loss_object=keras_side.cross_entropy(),
        optimizer=keras.optimizers.Adam(),
        train_step=train_step,
        clip_values=CLIP,
    )


def step(job, train_step=None):
    base, (x, y) = keras_side.load(job), job.data()
    trained = classifier(base, train_step)
    if job.iterations == 1:
        attack = FastGradientMethod(trained, eps=job.epsilon, batch_size=job.batch)
        trainer = AdversarialTrainer(trained, attack, ratio=1.0)
    else:
        trainer = AdversarialTrainerMadryPGD(
            trained, eps=job.epsilon, eps_step=job.step_size, max_iter=job.iterations
        )
        # It leaves the batch at 32, whatever it trains on, and shows bars.
        trainer.attack.set_params(batch_size=job.batch, verbose=False)

    def run(steps):
        trainer.fit(x, y, batch_size=job.batch, nb_epochs=steps)  # Of one batch each.

    return lambda: run, keras_side.logits_of(base)


def compiled_step(job):
    loss_fn, optimizer = keras_side.cross_entropy(), keras.optimizers.Adam()

    @tf.function
    def train_step(model, images, labels):
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(images, training=True))
        weights = model.trainable_variables
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))

    return step(job, train_step)


def attack(job):
    base, (x, y) = keras_side.load(job), job.data()

    def made(target):
        options = {"eps": job.epsilon, "batch_size": job.batch}
        if job.attack == "autoattack":
            return AutoAttack(target, **options)
        options |= {"eps_step": job.step_size, "max_iter": job.iterations}
        return ProjectedGradientDescent(
            target, num_random_init=1, verbose=False, **options
        )

    def turn():
        model = keras_side.fresh_copy(base)
        return lambda count: made(classifier(model)).generate(x[:count], y[:count])

    return turn, keras_side.logits_of(base)


SIDES = {"art": {"step": step, "attack": attack}}
SIDES["art_compiled"] = {"step": compiled_step}
serve(SIDES)
