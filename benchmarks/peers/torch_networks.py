"""The networks of `keras_networks` in PyTorch, under the same names of layers."""

import torch
from torch import nn
from torch.nn import functional

from peers.job import CLASSES

# The image that a dense layer sees flattened: Keras's has its channels last.
FLATTENED = {"mnist": {"dense": (3, 3, 64)}}


def load(job):
    """Makes the network of a job, with its weights."""
    model = NETWORKS[job.network](**job.sizes)
    flattened = FLATTENED.get(job.network, {})
    with torch.no_grad():
        for name, arrays in job.weights().items():
            layer = getattr(model, name)
            tensors = [torch.from_numpy(array) for array in arrays]
            for target, tensor in zip(
                own(layer), translated(tensors, flattened.get(name)), strict=True
            ):
                target.copy_(tensor)
    return model


def own(layer):
    """The variables of a layer in the order that Keras has them in."""
    if isinstance(layer, nn.BatchNorm2d):
        return [layer.weight, layer.bias, layer.running_mean, layer.running_var]
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def translated(tensors, image):
    """Keras's kernels have the outputs last."""
    kernel, *others = tensors
    if kernel.ndim == 4:
        kernel = kernel.permute(3, 2, 0, 1)
    elif kernel.ndim == 2:
        if image is not None:
            kernel = kernel.reshape(*image, -1).permute(2, 0, 1, 3).flatten(0, 2)
        kernel = kernel.T
    return [kernel, *others]


def tensor(x):
    """Examples of Keras as PyTorch has them, channels first."""
    x = torch.from_numpy(x)
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def logits(model, x):
    model.eval()
    with torch.no_grad():
        return model(tensor(x)).numpy()


class Mnist(nn.Module):
    """The network of NSL's tutorial on MNIST."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.dense = nn.Linear(576, 64)
        self.logits = nn.Linear(64, CLASSES)

    def forward(self, x):  # noqa: D102
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = torch.flatten(functional.relu(self.conv3(x)), 1)
        return self.logits(functional.relu(self.dense(x)))


class ResNet(nn.Module):
    """Three residual blocks with batch normalisation, halved between them."""

    def __init__(self):
        super().__init__()
        self._add("stem", 3, 16)
        channels = 16
        for number, filters in enumerate((16, 32, 64), 1):
            name = f"block{number}"
            self._add(f"{name}_a", channels, filters)
            self._add(f"{name}_b", filters, filters)
            if channels != filters:
                short = nn.Conv2d(channels, filters, 1, bias=False)
                self.add_module(f"{name}_short", short)
            channels = filters
        self.logits = nn.Linear(channels, CLASSES)

    def _add(self, name, channels, filters):
        convolution = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.add_module(name, convolution)
        # What Keras has by default.
        norm = nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01)
        self.add_module(f"{name}_norm", norm)

    def _convolved(self, x, name):
        return getattr(self, f"{name}_norm")(getattr(self, name)(x))

    def forward(self, x):  # noqa: D102
        x = functional.relu(self._convolved(x, "stem"))
        for number in (1, 2, 3):
            name = f"block{number}"
            if number > 1:
                x = functional.avg_pool2d(x, 2)
            shortcut = getattr(self, f"{name}_short", nn.Identity())(x)
            x = functional.relu(self._convolved(x, f"{name}_a"))
            x = functional.relu(self._convolved(x, f"{name}_b") + shortcut)
        return self.logits(x.mean((2, 3)))


class Mlp(nn.Module):
    """A multi-layer perceptron."""

    def __init__(self, width=256, depth=2):
        super().__init__()
        self.depth = depth
        for number in range(1, depth + 1):
            inputs = 100 if number == 1 else width
            self.add_module(f"dense{number}", nn.Linear(inputs, width))
        self.logits = nn.Linear(width, CLASSES)

    def forward(self, x):  # noqa: D102
        for number in range(1, self.depth + 1):
            x = functional.relu(getattr(self, f"dense{number}")(x))
        return self.logits(x)


NETWORKS = {"mnist": Mnist, "resnet": ResNet, "mlp": Mlp}
