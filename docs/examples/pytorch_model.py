"""
PyTorch: a model and a scheduler
================================

``fastrms.torch.RMSprop`` replaces ``torch.optim.RMSprop``, with the same arguments. A small
convolutional network learns the digits with a falling learning rate::

    python -m pip install torch scikit-learn

The program prints::

    440 steps, test accuracy 0.967
"""

import numpy as np
import torch
from fastrms.torch import RMSprop
from sklearn.datasets import load_digits

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.from_numpy((x / 16).astype(np.float32)), torch.from_numpy(y.astype(np.int64))
order = torch.randperm(len(x))
train, test = order[:1400], order[1400:]

model = torch.nn.Sequential(
    torch.nn.Unflatten(1, (1, 8, 8)),
    torch.nn.Conv2d(1, 16, 3, padding=1),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(256, 10),
)

# In place of torch.optim.RMSprop, with the same arguments; the rest is as always.
optimizer = RMSprop(model.parameters(), lr=3e-3, momentum=0.5, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.85)

steps = 0
for _ in range(20):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        steps += 1
    scheduler.step()

with torch.no_grad():
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
print(f"{steps} steps, test accuracy {accuracy:.3f}")
assert accuracy > 0.95
