"""A loop in PyTorch as its tutorials write it.

The backward pass of the clean loss gives the input's gradient as well; the perturbed
examples are clamped, and their loss goes through a second pass.
"""

import torch
from torch.nn import functional

from peers import torch_networks
from peers.job import CLIP, MULTIPLIER, Task


def step(job):
    model = torch_networks.load(job)
    x, y = job.data()
    images, labels = torch_networks.tensor(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(model.parameters())

    def ascend(x_adv, gradient):
        return torch.clamp(x_adv.detach() + job.step_size * gradient.sign(), *CLIP)

    def perturb(images, labels):
        x_adv = ascend(images, images.grad)
        for _ in range(job.iterations - 1):
            x_adv.requires_grad_(True)
            loss = functional.cross_entropy(model(x_adv), labels)
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
            loss = functional.cross_entropy(model(x), labels)
            loss.backward()
            x_adv = perturb(x, labels)
            adv_loss = MULTIPLIER * functional.cross_entropy(model(x_adv), labels)
            adv_loss.backward()
            optimizer.step()
            running_loss += loss.item() + adv_loss.item()
        return running_loss

    return Task(lambda: run, lambda x: torch_networks.logits(model, x))
