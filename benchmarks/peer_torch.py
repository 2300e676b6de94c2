# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
# ///
"""A loop in PyTorch as its tutorials write it.

The backward pass of the clean loss gives the input's gradient as well. The perturbed
examples are clamped, and their loss goes through a second pass.
"""

import torch
from side import CLIP, MULTIPLIER, serve
from torch.nn import functional as F  # noqa: N812


class Network(torch.nn.Module):
    """The networks of `keras_side`, whose weights it takes by the names of layers."""

    def __init__(self, job):
        super().__init__()
        self.network, self.sizes, self.layers = job.network, job.sizes, {}
        for name, (first, *others) in job.weights().items():
            tensors = [as_kernel(first), *map(torch.from_numpy, others)]
            # The moving averages of a normalisation come behind what is trained.
            trained = [torch.nn.Parameter(tensor) for tensor in tensors[:2]]
            self.layers[name] = trained + tensors[2:]
            for number, parameter in enumerate(trained):
                self.register_parameter(f"{name}_{number}", parameter)

    def forward(self, x):
        return getattr(self, self.network)(x, **self.sizes)

    def dense(self, x, name):
        return F.linear(x, *self.layers[name])

    def mnist(self, x):
        for number in (1, 2, 3):
            x = F.relu(F.conv2d(x, *self.layers[f"conv{number}"]))
            x = F.max_pool2d(x, 2) if number < 3 else x
        x = x.permute(0, 2, 3, 1).flatten(1)  # Channels last, as Keras flattens them.
        return self.dense(F.relu(self.dense(x, "dense")), "logits")

    def mlp(self, x, depth=2, **_):
        for number in range(1, depth + 1):
            x = F.relu(self.dense(x, f"dense{number}"))
        return self.dense(x, "logits")

    def resnet(self, x):
        x = F.relu(self.convolution(x, "stem"))
        for number in (1, 2, 3):
            name, x = f"block{number}", F.avg_pool2d(x, 2) if number > 1 else x
            short = self.layers.get(f"{name}_short")
            shortcut = x if short is None else F.conv2d(x, *short)
            x = F.relu(self.convolution(x, f"{name}_a"))
            x = F.relu(self.convolution(x, f"{name}_b") + shortcut)
        return self.dense(x.mean((2, 3)), "logits")

    def convolution(self, x, name):
        """A convolution and its batch normalisation, with Keras's settings."""
        x = F.conv2d(x, *self.layers[name], padding=1)
        weight, bias, mean, variance = self.layers[f"{name}_norm"]
        options = {"training": self.training, "momentum": 0.01, "eps": 1e-3}
        return F.batch_norm(x, mean, variance, weight, bias, **options)


def as_kernel(array):
    """Returns a kernel of Keras, which has the outputs last, as PyTorch has it."""
    tensor = torch.from_numpy(array)
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(tensor.ndim, (0,))
    return tensor.permute(order).contiguous()


def as_tensor(x):
    """Returns examples with their channels first."""
    x = torch.from_numpy(x)
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def step(job):
    model, (x, y) = Network(job), job.data()
    images, labels = as_tensor(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(model.parameters())

    def ascend(x_adv, gradient):
        return torch.clamp(x_adv.detach() + job.step_size * gradient.sign(), *CLIP)

    def perturb(images, labels):
        x_adv = ascend(images, images.grad)
        for _ in range(job.iterations - 1):
            x_adv.requires_grad_(True)
            loss = F.cross_entropy(model(x_adv), labels)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = ascend(x_adv, gradient)
            moved = torch.clamp(x_adv - images, -job.epsilon, job.epsilon)
            x_adv = (images + moved).detach()
        return x_adv

    def run(steps):
        model.train()
        running_loss = 0.0
        for _ in range(steps):
            x = images.clone().requires_grad_(True)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            x_adv = perturb(x, labels)
            adv_loss = MULTIPLIER * F.cross_entropy(model(x_adv), labels)
            adv_loss.backward()
            optimizer.step()
            running_loss += loss.item() + adv_loss.item()

    def logits(x):
        model.eval()
        with torch.no_grad():
            return model(as_tensor(x)).numpy()

    return lambda: run, logits


serve({"torch": {"step": step}})
