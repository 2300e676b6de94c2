"""What `gpu.py` needs from PyTorch: sides written by hand, and facts of the device."""

import contextlib
import platform

import keras
import torch
from torch.nn import functional as F  # noqa: N812

ON_GPU = torch.cuda.is_available()


def name():
    """Returns the name of the device."""
    return torch.cuda.get_device_name() if ON_GPU else platform.machine() + " CPU"


def wait(network):
    """Waits until the device has nothing to do."""
    if ON_GPU:
        torch.cuda.synchronize()


def begin_peak():
    """Forgets the peak, and returns the bytes in use; `None` on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(before):
    """Returns the peak of the memory beyond what was in use before."""
    if before is None:
        return None
    return {"bytes": torch.cuda.max_memory_allocated() - before}


def is_out_of_memory(error):
    """Returns whether an error says that the memory of the device is short."""
    return isinstance(error, torch.cuda.OutOfMemoryError)


def training(model, optimizer, epsilon, step_size, iterations):
    """Makes a step of training on clean and perturbed images.

    Returns:
        The step, a function of images and labels, and a function that returns the
        trainable weights.
    """
    optimizer.build(model.trainable_variables)
    weights = [variable.value for variable in model.trainable_variables]

    def loss_at(x, y):
        return F.cross_entropy(model(x, training=True), y)

    def run(x, y):
        x, y = on_device(x, y)
        x.requires_grad_()
        loss = loss_at(x, y)
        *gradients, slope = torch.autograd.grad(loss, [*weights, x])
        x = x.detach()
        x_adv = moved(x, x, slope, epsilon, step_size)
        with keras.StatelessScope():  # The moving averages are those of images.
            for _ in range(1, iterations):
                x_adv.requires_grad_()
                (slope,) = torch.autograd.grad(loss_at(x_adv, y), x_adv)
                x_adv = moved(x, x_adv.detach(), slope, epsilon, step_size)
        loss_adv = loss_at(x_adv, y)
        more = torch.autograd.grad(loss_adv, weights)
        with torch.no_grad():
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
            optimizer.apply(gradients, model.trainable_variables)
        return (loss + loss_adv).detach()

    return run, lambda: model.trainable_variables


def pgd(model, epsilon, step_size, iterations):
    """Makes PGD from random starts, a function of images and labels."""

    def run(x, y):
        x, y = on_device(x, y)
        start = x + torch.empty_like(x).uniform_(-epsilon, epsilon)
        x_adv = torch.clamp(start, 0.0, 1.0)
        for _ in range(iterations):
            x_adv.requires_grad_()
            loss = F.cross_entropy(model(x_adv, training=False), y)
            (slope,) = torch.autograd.grad(loss, x_adv)
            x_adv = moved(x, x_adv.detach(), slope, epsilon, step_size)
        return x_adv.cpu().numpy()

    return run


class ChannelsFirst(torch.nn.Module):
    """A network for images whose channels come first, as torchattacks has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.permute(0, 2, 3, 1), training=False)


def pgd_of_torchattacks(model, epsilon, step_size, iterations):
    """Makes the PGD of torchattacks, a function of images and labels."""
    steps = {"eps": epsilon, "alpha": step_size, "steps": iterations}
    attack = torchattacks.PGD(ChannelsFirst(model), **steps)

    def run(x, y):
        x, y = on_device(x, y)
        return attack(x.permute(0, 3, 1, 2), y).permute(0, 2, 3, 1).cpu().numpy()

    return run


def on_device(x, y):
    return keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y).long()


def moved(x, x_adv, gradient, epsilon, step_size):
    """Takes a step up the gradient, and back into the ball and the range."""
    there = x_adv + step_size * gradient.sign()
    return torch.clamp(x + torch.clamp(there - x, -epsilon, epsilon), 0.0, 1.0)


ATTACKS = {"by hand": pgd}
with contextlib.suppress(ImportError):
    import torchattacks

    ATTACKS["torchattacks"] = pgd_of_torchattacks
