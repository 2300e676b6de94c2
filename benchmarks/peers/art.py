"""The Adversarial Robustness Toolbox 1.20, on TensorFlow.

Its trainers replace a batch by its perturbed examples: with `ratio=1.0` all of them,
as Madry's trainer has it, which makes as many passes as advreg's step. Their classifier
traces its step of training anew in each batch; `art_compiled` hands it one that is
traced once.
"""

import keras
from art.attacks.evasion import (
    AutoAttack,
    FastGradientMethod,
    ProjectedGradientDescent,
)
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import TensorFlowV2Classifier

from peers import keras_networks, keras_tasks
from peers.job import CLASSES, CLIP, Task


def classifier(model, train_step=None):
    return TensorFlowV2Classifier(
        model,
        nb_classes=CLASSES,
        input_shape=model.input_shape[1:],
        loss_object=keras_tasks.cross_entropy(),
        optimizer=keras.optimizers.Adam(),
        train_step=train_step,
        clip_values=CLIP,
    )


def step(job, train_step=None):
    base, (x, y) = keras_networks.load(job), job.data()
    trained = classifier(base, train_step)
    if job.iterations == 1:
        attack = FastGradientMethod(trained, eps=job.epsilon, batch_size=job.batch)
        trainer = AdversarialTrainer(trained, attack, ratio=1.0)
    else:
        trainer = AdversarialTrainerMadryPGD(
            trained, eps=job.epsilon, eps_step=job.step_size, max_iter=job.iterations
        )
        # Which it leaves at 32, whatever the batch, and shows bars of its progress.
        trainer.attack.set_params(batch_size=job.batch, verbose=False)

    def run(steps):
        trainer.fit(x, y, batch_size=job.batch, nb_epochs=steps)  # Of one batch each.

    return Task(lambda: run, keras_tasks.logits_of(base))


def attack(job):
    base, (x, y) = keras_networks.load(job), job.data(job.examples)

    def made(target):
        if job.attack == "autoattack":
            return AutoAttack(target, eps=job.epsilon, batch_size=job.batch)
        return ProjectedGradientDescent(
            target,
            eps=job.epsilon,
            eps_step=job.step_size,
            max_iter=job.iterations,
            num_random_init=1,
            batch_size=job.batch,
            verbose=False,
        )

    def turn():
        model = keras.models.clone_model(base)
        model.set_weights(base.get_weights())
        return lambda count: made(classifier(model)).generate(x[:count], y[:count])

    return Task(turn, keras_tasks.logits_of(base))
